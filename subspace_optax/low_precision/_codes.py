# SPDX-License-Identifier: Apache-2.0
"""Numbers in one byte each: a logarithmic code in blocks.

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
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _noise
from subspace_optax._matrix import _sharding
from subspace_optax.low_precision import _blocks


class _Code(NamedTuple):
  top: int  # the code of a block's largest number
  k: int  # codes to an octave


# By bits, with a sign and without. A row is all that other bits need.
_DTYPES = {8: (jnp.dtype(jnp.int8), jnp.dtype(jnp.uint8))}
_CODES = {
  jnp.dtype(jnp.int8): _Code(127, 8),
  jnp.dtype(jnp.uint8): _Code(255, 10),
}
BITS = tuple(_DTYPES)


def dtype_of(bits: int, kind: str) -> Any:
  """Returns the dtype of the codes of a kind of moment."""
  return _DTYPES[bits][kind == 'square']


def are_codes(x: Any) -> bool:
  """Whether an array, or what stands in its place, is one of codes."""
  return getattr(x, 'dtype', None) in _CODES


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
  if codes.dtype not in _CODES:
    return _sharding.like(x, codes), scales
  if _keeps_shardings(codes, scales):
    return _encode(x, codes, scales, noise)
  return _sharding.automatic(_encode, (codes, scales), x, codes, scales, noise)


def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
  """Returns float32 numbers, or what is not in codes as it is."""
  if codes.dtype not in _CODES:
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
  top, k = _CODES[codes.dtype]
  blocks = _blocks.Blocks(codes.shape, scales.shape)
  size = jnp.abs(x)
  largest = blocks.largest(size)
  relative = size / blocks.spread(jnp.where(largest > 0, largest, 1.0))
  random = None
  if noise is not None:
    salt, count, *start = noise
    random = _noise.uniform(salt, count, codes, *start)
  place = k * jnp.log2(relative) + top  # -inf of 0
  c = jnp.clip(_rounded(place, k, random), 1, top)
  if codes.dtype == jnp.int8:
    least = 2.0 ** ((1 - top) / k)
    bar = least * (0.5 if random is None else random)
    c = jnp.where(relative < bar, 0, c) * jnp.sign(x)
  c = jnp.where(x == 0, 0, c)
  return _sharding.like(c, codes), _sharding.like(largest, scales)


def _rounded(place: jax.Array, k: int, random: jax.Array | None) -> jax.Array:
  """Returns the nearest code, or one of the two around, right in the mean."""
  if random is None:
    return jnp.round(place)
  low = jnp.floor(place)
  # As shares of what codes stand for, not of codes.
  return low + (random < (jnp.exp2((place - low) / k) - 1) / (2 ** (1 / k) - 1))


def _decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
  top, k = _CODES[codes.dtype]
  c = codes.astype(jnp.float32)
  size = jnp.where(c == 0, 0.0, jnp.exp2((jnp.abs(c) - top) / k))
  spread = _blocks.Blocks(codes.shape, scales.shape).spread(scales)
  return jnp.sign(c) * size * spread
