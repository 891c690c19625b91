# Copyright 2026 The subspace_optax Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Numbers in one byte each: a logarithmic code in blocks.

Dettmers et al., `8-bit Optimizers via Block-wise Quantization
<https://arxiv.org/abs/2110.02861>`_, 2021, with another code. A block is a tile
of a leaf's last two axes, scaled by its largest absolute value. Its numbers
are x = scale 2^((c - top) / k), and 0 for c = 0, so that the relative error is
the same in every octave:

  int8, with a sign: k = 8, |c| to 127: 2^-15.75 to 1, within 4.5 %
  uint8: k = 10, to 255: 2^-25.4 to 1, within 3.6 %

The smallest code stands for all positive numbers below it in the unsigned code:
a second moment that is rounded to zero would make a step without bound. Rounded
at random, numbers are right in the mean; a mean that decays by 0.1 % a step is
otherwise frozen.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax import _noise
from subspace_optax import _sharding

# Numbers to a block. With 80 a scale takes a twentieth of a byte for each.
_SIZES = (range(128, 513), range(80, 128), range(513, 4097))


class _Code(NamedTuple):
  top: int  # the code of a block's largest number
  k: int  # codes to an octave


_CODES = {
  jnp.dtype(jnp.int8): _Code(127, 8),
  jnp.dtype(jnp.uint8): _Code(255, 10),
}


def tile(shape: Sequence[int]) -> tuple[int, ...]:
  """Returns the block of a leaf of two axes or more.

  Rows in multiples of 32, or columns of 128, can be taken apart where they lie
  on a TPU; of these, that which leaves both axes in a number of blocks that a
  mesh can cut. It depends on no mesh, so that a state can go from one to
  another. Sizes that allow neither get what divides them.
  """
  rows, columns = map(_divisors, shape[-2:])
  choices = (
    [*((d, 1) for d in rows if d % 32 == 0)]
    + [*((1, d) for d in columns if d % 128 == 0)],
    [(1, d) for d in columns],
    [(a, b) for a in rows for b in columns],
  )
  for pairs in choices:
    for sizes in _SIZES:
      fits = [pair for pair in pairs if math.prod(pair) in sizes]
      if fits:
        best = max(fits, key=lambda pair: _cuts(shape, pair))
        return (*(1,) * (len(shape) - 2), *best)
  return (*(1,) * (len(shape) - 2), *shape[-2:])


def _cuts(shape: Sequence[int], pair: tuple[int, int]) -> int:
  """Returns the power of two up to 8 into which both axes can be cut."""
  counts = [n // d for n, d in zip(shape[-2:], pair, strict=True)]
  return min(8, *(n & -n for n in counts))


def _divisors(n: int) -> list[int]:
  low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return sorted({*low, *(n // d for d in low)})


def encode(
  x: jax.Array,
  codes: jax.Array,
  scales: jax.Array,
  noise: tuple[Any, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns codes and scales of an array.

  Args:
    x: float32.
    codes: an array of the shape, dtype and sharding that codes shall have.
    scales: likewise.
    noise: (salt, count) to round at random, see `_noise.bits`; None rounds to
      the nearest in proportion.
  """
  top, k = _CODES[codes.dtype]
  blocks = _Blocks(codes.shape, scales.shape)
  size = jnp.abs(x)
  largest = blocks.largest(size)
  relative = size / blocks.spread(jnp.where(largest > 0, largest, 1.0))
  random = None
  if noise is not None:
    salt, count = noise
    random = _noise.uniform(salt, count, codes)
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


def decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
  """Returns float32 numbers."""
  top, k = _CODES[codes.dtype]
  c = codes.astype(jnp.float32)
  size = jnp.where(c == 0, 0.0, jnp.exp2((jnp.abs(c) - top) / k))
  spread = _Blocks(codes.shape, scales.shape).spread(scales)
  return jnp.sign(c) * size * spread


class _Blocks(NamedTuple):
  """An array's shape, and that of one value per block."""

  whole: tuple[int, ...]
  counts: tuple[int, ...]

  def largest(self, x: jax.Array) -> jax.Array:
    """Returns the largest of each block's sizes, NaN if one is not finite."""
    split, inside = self._split()
    x = lax.reshape(x, split)
    # A maximum alone may drop NaN.
    return jnp.max(x, inside) + jnp.sum(x * 0.0, inside)

  def spread(self, x: jax.Array) -> jax.Array:
    """Returns one value per block for each of its numbers."""
    split, inside = self._split()
    x = lax.broadcast_in_dim(
      x, split, [i for i in range(len(split)) if i not in inside]
    )
    return lax.reshape(x, self.whole)

  def _split(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape with blocks' axes apart, and which those are."""
    sizes: list[int] = []
    inside: list[int] = []
    for n, count in zip(self.whole, self.counts, strict=True):
      sizes.append(count)
      if count != n:
        inside.append(len(sizes))
        sizes.append(n // count)
    return tuple(sizes), tuple(inside)
