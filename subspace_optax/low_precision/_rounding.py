# SPDX-License-Identifier: Apache-2.0
"""Rounding of float32 to fewer bits, by which nothing need be lost.

All of it works on bits and stays float32: of a conversion there and back again
XLA may make none at all, so that nothing were rounded.
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
  """Raises for a narrow dtype that can't be rounded like this."""
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
  """Returns one of the two bfloat16 around float32, right in the mean.

  Random bits are added below those that bfloat16 keeps, which are then cut.

  Args:
    x: float32.
    noise: random uint32 of its shape, of which the upper half is used.

  Returns:
    Values of bfloat16, in float32.
  """
  up = _float((_bits(x) + (noise >> 16)) & jnp.uint32(0xFFFF0000))
  # Neither the infinite nor NaN have neighbours.
  return jnp.where(jnp.isfinite(x), up, x)


def nearest(x: jax.Array, dtype: Any) -> jax.Array:
  """Returns the nearest value of bfloat16 or float16, in float32."""
  if dtype == jnp.bfloat16:
    # Halves go up, so that what is lost fits 16 bits.
    near = _float((_bits(x) + jnp.uint32(_HALF)) & jnp.uint32(0xFFFF0000))
    return jnp.where(jnp.isfinite(x), near, x)
  small = jnp.round(x * 2.0**24) * 2.0**-24  # float16's subnormals
  normal = lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)
  return jnp.where(jnp.abs(x) < 2.0**-14, small, normal)


def low_bits(x: jax.Array, near: jax.Array) -> jax.Array:
  """Returns int16 by which float32 differs from what is nearest to it.

  It counts float32's own spacings: all of them for bfloat16, whose other half
  it is. For float16 below 2**-17 it can be more than there is room for.
  """
  apart = lax.bitcast_convert_type(_bits(x) - _bits(near), jnp.int32)
  return jnp.clip(apart, -_HALF, _HALF - 1).astype(jnp.int16)


def joined(near: jax.Array, low: jax.Array) -> jax.Array:
  """Returns the float32 that `low_bits` was told of."""
  low = lax.bitcast_convert_type(low.astype(jnp.int32), jnp.uint32)
  whole = _float(_bits(near) + low)
  # Whoever set a weight to zero meant it; and its bits have nothing below.
  return jnp.where(jnp.isfinite(near) & (near != 0), whole, near)


def _bits(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.uint32)


def _float(bits: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(bits, jnp.float32)
