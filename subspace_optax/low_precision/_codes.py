# SPDX-License-Identifier: Apache-2.0
"""Numbers in a byte or half a byte each: codes in blocks.

Dettmers et al., `8-bit Optimizers via Block-wise Quantization
<https://arxiv.org/abs/2110.02861>`_, 2021, with other codes. A block (see
`_blocks`) is scaled by its largest absolute value. Signed codes up to +-127 in
a byte and up to +-7 in half a byte represent

  int8: x = scale sign(c) (|c| / 127)^2,   int4: x = scale sign(c) (|c| / 7)^1.5

which have most codes where most momentum values lie. Rounding errors accumulate
and decay with the momentum. For the momentum of Gaussian gradients, with a
decay of 5 % per step, the error in a byte, rounded at random, is 0.03 of the
momentum's size, and 0.09 if the numbers of a block differ by a factor of e
(with an even code 0.03 and 0.48, with a logarithmic one 0.10). Half a byte is
rounded to the nearest: a step changes such momentum by a third of its size,
which is enough noise to move it between codes. The error is then 0.36 of its
size; rounded at random, 0.55.

Second moments have no sign. They use a logarithmic code of one byte,

  uint8: x = scale 2^((c - 255) / 10), and 0 for c = 0,

with errors up to 3.6 % in every octave from 2^-25.4 to 1. The smallest code
also represents all positive numbers below it, since a second moment rounded to
zero would make an unbounded step. Second moments are never in 4 bits: at a
decay of 0.1 %, the error would be as large as they are. Rounding at random is
right on average; without it, a mean that decays by 0.1 % per step is frozen.
"""

from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _noise
from subspace_optax._matrix import _sharding
from subspace_optax.low_precision import _blocks

_INT4, _INT8, _UINT8 = map(jnp.dtype, (jnp.int4, jnp.int8, jnp.uint8))
# By number of bits: with a sign and without.
_DTYPES = {4: (_INT4, _UINT8), 8: (_INT8, _UINT8)}
BITS = tuple(_DTYPES)
# The code of a block's largest number.
_TOPS = {_INT4: 7, _INT8: 127, _UINT8: 255}
_POWERS = {_INT4: 1.5, _INT8: 2.0}  # exponents of first moments' codes
_PER_OCTAVE = 10  # codes of second moments


def dtype_of(bits: int, kind: str) -> Any:
  """Returns the dtype of the codes of a kind of moment."""
  return _DTYPES[bits][kind == 'square']


def is_random(rounding: str, dtype: Any) -> bool:
  """Whether codes of a dtype are rounded at random."""
  return rounding == 'stochastic' or (rounding == 'auto' and dtype != _INT4)


def are_codes(x: Any) -> bool:
  """Whether an array, or its stand-in, holds codes."""
  return getattr(x, 'dtype', None) in (_INT4, _INT8, _UINT8)


def encode(
  x: jax.Array,
  codes: jax.Array,
  scales: jax.Array,
  noise: tuple[Any, ...] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns codes and scales of an array.

  Args:
    x: the numbers, float32.
    codes: an array with the shape, dtype and sharding of the codes. If its
      dtype is not one of codes, `x` is not encoded but made like it.
    scales: an array with the shape, dtype and sharding of the scales.
    noise: (salt, count) or (salt, count, start) to round at random, see
      `_noise.bits`; None to round to the nearest in proportion.
  """
  if not are_codes(codes):
    return _sharding.like(x, codes), scales
  if _keeps_shardings(codes, scales):
    return _encode(x, codes, scales, noise)
  return _sharding.automatic(_encode, (codes, scales), x, codes, scales, noise)


def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
  """Returns float32 numbers; returns an array that holds no codes unchanged."""
  if not are_codes(codes):
    return codes
  if _keeps_shardings(codes, scales):
    return _decode(codes, scales)
  return _sharding.automatic(_decode, codes, codes, scales)


def _keeps_shardings(codes: jax.Array, scales: jax.Array) -> bool:
  """Whether jax can infer the sharding of arrays that are cut into blocks.

  Under explicit sharding it can't for a reshape that splits two axes at once.
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
  share = 0.5 if random is None else random
  if codes.dtype == _UINT8:
    c = _squares_to_codes(relative, random)
  else:
    c = jnp.sign(x) * _sizes_to_codes(codes.dtype, relative, share)
  # Through integers of a byte, since every backend has their arithmetic.
  c = c.astype(_UINT8 if codes.dtype == _UINT8 else _INT8)
  return _sharding.like(c, codes), _sharding.like(largest, scales)


def _sizes_to_codes(dtype: Any, x: jax.Array, share: Any) -> jax.Array:
  """Returns the codes, without signs, of numbers from 0 to 1.

  Args:
    dtype: dtype of the codes.
    x: the numbers.
    share: fraction of the way to the next code from which to round up.
  """
  low = jnp.floor(_TOPS[dtype] * jnp.power(x, 1 / _POWERS[dtype]))
  below, above = (_codes_to_sizes(dtype, c) for c in (low, low + 1))
  return low + (x - below > share * (above - below)).astype(low.dtype)


def _codes_to_sizes(dtype: Any, c: jax.Array) -> jax.Array:
  return jnp.power(c / _TOPS[dtype], _POWERS[dtype])


def _squares_to_codes(x: jax.Array, random: jax.Array | None) -> jax.Array:
  """Returns the logarithmic codes of numbers from 0 to 1."""
  top, k = _TOPS[_UINT8], _PER_OCTAVE
  place = k * jnp.log2(x) + top  # -inf for 0
  c = jnp.clip(_rounded(place, k, random), 1, top)
  return jnp.where(x == 0, 0, c)


def _rounded(place: jax.Array, k: int, random: jax.Array | None) -> jax.Array:
  """Returns the nearest code, or a random neighbor that is right on average."""
  if random is None:
    return jnp.round(place)
  low = jnp.floor(place)
  # Fractions of the values that codes represent, not of codes.
  share = (jnp.exp2((place - low) / k) - 1) / (2 ** (1 / k) - 1)
  return low + (random < share).astype(low.dtype)


def _decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
  c = codes.astype(_INT8) if codes.dtype == _INT4 else codes
  c = c.astype(jnp.float32)
  if codes.dtype == _UINT8:
    x = jnp.where(c == 0, 0.0, jnp.exp2((c - _TOPS[_UINT8]) / _PER_OCTAVE))
  else:
    x = jnp.sign(c) * _codes_to_sizes(codes.dtype, jnp.abs(c))
  return x * _blocks.Blocks(codes.shape, scales.shape).spread(scales)
