# SPDX-License-Identifier: Apache-2.0
"""Numbers in a byte or half a byte each: codes in blocks.

Dettmers et al., `8-bit Optimizers via Block-wise Quantization
<https://arxiv.org/abs/2110.02861>`_, 2021, with another code. A block, see
`_blocks`, is scaled by its largest absolute value. Its numbers are
x = scale 2^((c - top) / k), and 0 for c = 0, so that the relative error is the
same in every octave:

  int8, with a sign: k = 8, |c| to 127: 2^-15.75 to 1, within 4.5 %
  uint8: k = 10, to 255: 2^-25.4 to 1, within 3.6 %

The smallest code stands for all positive numbers below it in the unsigned code:
a second moment that is rounded to zero would make a step without bound. Rounded
at random, numbers are right in the mean; a mean that decays by 0.1 % a step is
otherwise frozen.

Half a byte has no room for octaves. Signed codes to 7 stand for

  int4: x = scale sign(c) (|c| / 7)^1.5

and are rounded to the nearest: a step changes momentum that decays by 5 % by a
third of its size, which is noise enough to move it between codes. The error of
such a momentum of Gaussian gradients, where that of every step decays with it,
is 0.36 of its size; rounded at random, it is 0.55. With decay 0.99 it is 1.3
and 1.1: there 4 bits are too few. Second moments are never in 4 bits: at decay
0.999 the error would be of their size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_optax._matrix import _noise
from subspace_optax._matrix import _sharding
from subspace_optax.low_precision import _blocks


class _Code(NamedTuple):
  top: int  # the code of a block's largest number
  k: int  # codes to an octave


_INT4, _INT8, _UINT8 = map(jnp.dtype, (jnp.int4, jnp.int8, jnp.uint8))
# By bits, with a sign and without.
_DTYPES = {4: (_INT4, _UINT8), 8: (_INT8, _UINT8)}
BITS = tuple(_DTYPES)
_CODES = {_INT8: _Code(127, 8), _UINT8: _Code(255, 10)}
# What the codes 0 to 7 of int4 stand for.
_LEVELS = (np.arange(8) / 7) ** 1.5


def dtype_of(bits: int, kind: str) -> Any:
  """Returns the dtype of the codes of a kind of moment."""
  return _DTYPES[bits][kind == 'square']


def is_random(rounding: str, dtype: Any) -> bool:
  """Whether codes of a dtype are rounded at random."""
  return rounding == 'stochastic' or (rounding == 'auto' and dtype != _INT4)


def are_codes(x: Any) -> bool:
  """Whether an array, or what stands in its place, is one of codes."""
  return getattr(x, 'dtype', None) in (_INT4, _INT8, _UINT8)


def encode(
  x: jax.Array,
  codes: jax.Array,
  scales: jax.Array,
  noise: tuple[Any, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns codes and scales of an array.

  Args:
    x: float32.
    codes: an array of the shape, dtype and sharding that codes shall have. Of
      another dtype than codes have, it is what `x` is to be like.
    scales: likewise, of the scales.
    noise: (salt, count) to round at random, or (salt, count, start), see
      `_noise.bits`; None rounds to the nearest in proportion.
  """
  if not are_codes(codes):
    return _sharding.like(x, codes), scales
  if _keeps_shardings(codes, scales):
    return _encode(x, codes, scales, noise)
  return _sharding.automatic(_encode, (codes, scales), x, codes, scales, noise)


def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
  """Returns float32 numbers, or what is not in codes as it is."""
  if not are_codes(codes):
    return codes
  if _keeps_shardings(codes, scales):
    return _decode(codes, scales)
  return _sharding.automatic(_decode, codes, codes, scales)


def _keeps_shardings(codes: jax.Array, scales: jax.Array) -> bool:
  """Whether jax can tell how arrays are sharded that are taken into blocks.

  Under explicit sharding it can for no reshape that splits two axes at once.
  """
  blocks = _blocks.Blocks(codes.shape, scales.shape)
  return _sharding.cuts_fit(codes, blocks.cuts()) and (
    blocks.split_axes < 2 or not _sharding.explicit(codes)
  )


def _encode(
  x: jax.Array,
  codes: jax.Array,
  scales: jax.Array,
  noise: tuple[Any, ...] | None,
) -> tuple[jax.Array, jax.Array]:
  blocks = _blocks.Blocks(codes.shape, scales.shape)
  size = jnp.abs(x)
  largest = blocks.largest(size)
  relative = size / blocks.spread(jnp.where(largest > 0, largest, 1.0))
  random = None
  if noise is not None:
    salt, count, *start = noise
    random = _noise.uniform(salt, count, codes, *start)
  sizes = _sizes_in_4_bits if codes.dtype == _INT4 else _sizes_in_8_bits
  c = sizes(codes.dtype, relative, random)
  if codes.dtype != _UINT8:
    c = c * jnp.sign(x)
  # By way of integers of a byte, whose arithmetic every backend has.
  c = c.astype(_UINT8 if codes.dtype == _UINT8 else _INT8)
  return _sharding.like(c, codes), _sharding.like(largest, scales)


def _sizes_in_8_bits(
  dtype: Any, relative: jax.Array, random: jax.Array | None
) -> jax.Array:
  """Returns codes without their signs, of numbers from 0 to 1."""
  top, k = _CODES[dtype]
  place = k * jnp.log2(relative) + top  # -inf of 0
  c = jnp.clip(_rounded(place, k, random), 1, top)
  if dtype == _INT8:
    least = 2.0 ** ((1 - top) / k)
    c = jnp.where(relative < least * (0.5 if random is None else random), 0, c)
  return jnp.where(relative == 0, 0, c)


def _sizes_in_4_bits(
  dtype: Any, relative: jax.Array, random: jax.Array | None
) -> jax.Array:
  """Returns codes without their signs: how many levels are reached."""
  del dtype
  share = 0.5 if random is None else random
  steps = zip(_LEVELS[:-1], np.diff(_LEVELS), strict=True)
  c = jnp.zeros_like(relative)
  for low, step in steps:
    c += relative > low + share * step
  return c


def _rounded(place: jax.Array, k: int, random: jax.Array | None) -> jax.Array:
  """Returns the nearest code, or one of the two around, right in the mean."""
  if random is None:
    return jnp.round(place)
  low = jnp.floor(place)
  # As shares of what codes stand for, not of codes.
  return low + (random < (jnp.exp2((place - low) / k) - 1) / (2 ** (1 / k) - 1))


def _decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
  c = codes.astype(_INT8) if codes.dtype == _INT4 else codes
  c = c.astype(jnp.float32)
  if codes.dtype == _INT4:
    share = jnp.abs(c) / 7
    size = share * jnp.sqrt(share)
  else:
    top, k = _CODES[codes.dtype]
    size = jnp.where(c == 0, 0.0, jnp.exp2((jnp.abs(c) - top) / k))
  spread = _blocks.Blocks(codes.shape, scales.shape).spread(scales)
  return jnp.sign(c) * size * spread
