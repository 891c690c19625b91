# SPDX-License-Identifier: Apache-2.0
"""Rounding of float32 to fewer bits, where the lost bits can be kept.

Everything works on bits and stays float32. XLA may remove a conversion to a
narrow dtype and back, and then nothing would be rounded.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

_DTYPES = {
  'stochastic': (jnp.bfloat16,),
  'compensated': (jnp.bfloat16, jnp.float16),
}
_HALF = 2**15


def is_narrow(dtype: Any) -> bool:
  """Whether a dtype has fewer bits than float32 has."""
  return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32


def check(rounding: str, path: str, dtype: Any) -> None:
  """Raises for a narrow dtype that can't be rounded this way."""
  known = _DTYPES.get(rounding)
  if known is None or not is_narrow(dtype) or dtype in known:
    return
  names = ' and '.join(jnp.dtype(x).name for x in known)
  other = "take 'compensated'" if dtype == jnp.float16 else 'leave it out'
  raise ValueError(
    f'rounding={rounding!r} is for {names}, but {path!r} is '
    f'{jnp.dtype(dtype).name}; {other}.'
  )


def at_random(x: jax.Array, noise: jax.Array) -> jax.Array:
  """Rounds float32 at random to a neighboring bfloat16, right on average.

  Random bits are added below the bits that bfloat16 keeps, and cut off.

  Args:
    x: float32.
    noise: random uint32 of the same shape; the upper half is used.

  Returns:
    Values of bfloat16, in float32.
  """
  up = _float((_bits(x) + (noise >> 16)) & jnp.uint32(0xFFFF0000))
  # Infinities and NaN have no neighbors.
  return jnp.where(jnp.isfinite(x), up, x)


def nearest(x: jax.Array, dtype: Any) -> jax.Array:
  """Returns the nearest value of bfloat16 or float16, in float32."""
  if dtype == jnp.bfloat16:
    # Halves go up, so that the rounding error fits 16 bits.
    near = _float((_bits(x) + jnp.uint32(_HALF)) & jnp.uint32(0xFFFF0000))
    return jnp.where(jnp.isfinite(x), near, x)
  small = jnp.round(x * 2.0**24) * 2.0**-24  # float16's subnormals
  normal = lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
  return jnp.where(jnp.abs(x) < 2.0**-14, small, normal)


def converted(x: jax.Array, dtype: Any) -> jax.Array:
  """Returns what a conversion to bfloat16 or float16 makes, in float32.

  Unlike with `nearest`, halves go to the even one of two bfloat16.
  """
  if dtype == jnp.bfloat16:
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  return nearest(x, dtype)


def low_bits(x: jax.Array, near: jax.Array) -> jax.Array:
  """Returns, as int16, the difference of float32 and its nearest value.

  It counts spacings of float32. For bfloat16 it holds the other half of the
  float32 and loses nothing. For float16 below 2**-17 it may not fit an int16.
  """
  apart = lax.bitcast_convert_type(_bits(x) - _bits(near), jnp.int32)
  return jnp.clip(apart, -_HALF, _HALF - 1).astype(jnp.int16)


def joined(near: jax.Array, low: jax.Array) -> jax.Array:
  """Returns the float32 from its nearest value and `low_bits`."""
  low = lax.bitcast_convert_type(low.astype(jnp.int32), jnp.uint32)
  whole = _float(_bits(near) + low)
  # A weight that was set to zero was meant to be; and it has no bits below.
  return jnp.where(jnp.isfinite(near) & (near != 0), whole, near)


def _bits(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(bits, jnp.float32)
