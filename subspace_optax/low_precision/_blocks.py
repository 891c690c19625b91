# SPDX-License-Identifier: Apache-2.0
"""Blocks of numbers that share a scale.

A block is a tile of a leaf's last two axes. The shapes of an array and of one
value per block determine where the blocks lie. Either the number of blocks
along an axis divides its size; or the axis is cut into as many equal pieces as
the greatest common divisor of both, and the last block of each piece is
smaller. So blocks do not depend on the mesh, and a device that holds whole
pieces holds whole blocks.
"""

from collections.abc import Iterable, Sequence
import functools
import itertools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

# Numbers per block. With 80, scales add a twentieth of a byte per number.
_SIZES = (range(128, 513), range(80, 128))

# Multiples of rows and columns that a TPU can split without moving them.
_UNITS = (32, 128)

_Counts = tuple[int, int]


def counts(shape: Sequence[int]) -> tuple[int, ...]:
  """Returns the number of blocks along each axis of a leaf.

  A block holds at most 512 numbers, and a matrix of 4,096 or more numbers has
  at most one block per 80 numbers.
  """
  return (*shape[:-2], *_counts(*shape[-2:]))


@functools.lru_cache(maxsize=1024)
def _counts(m: int, n: int) -> _Counts:
  """Returns the number of blocks along both axes of a matrix.

  It prefers blocks of 32k rows, or of 128k columns, that divide an axis; among
  these, blocks whose number along both axes a mesh can divide. For other sizes
  it takes a part of a row that divides the row, or a tile that divides both
  axes, or blocks of which the last is smaller, if only these are not cut by a
  mesh. A block that two devices share costs communication.
  """
  rows, columns = _divisors(m), _divisors(n)
  aligned = [(d, 1) for d in rows if d % 32 == 0]
  aligned += [(1, d) for d in columns if d % 128 == 0]
  for tiles in (aligned, [(1, d) for d in columns]):
    if best := _even(m, n, tiles):
      return best
  of_axis = [(count, n) for count in _uneven(m, 32)]
  of_axis += [(m, count) for count in _uneven(n, 128)]
  found = [
    _even(m, n, itertools.product(rows, columns)),
    _best_uneven(m, n, of_axis),
  ]
  if not any(found):  # both axes are shorter than 128
    any_tile = itertools.product(range(1, m + 1), range(1, n + 1))
    found = [_best_uneven(m, n, any_tile)]
  return max(filter(None, found), key=lambda pair: _whole_cuts(m, n, pair))


def _even(m: int, n: int, tiles: Iterable[_Counts]) -> _Counts | None:
  """Returns the best counts for these tiles, None if none has a good size."""
  found = [(a * b, (m // a, n // b)) for a, b in tiles]
  for sizes in _SIZES:
    fits = [pair for size, pair in found if size in sizes]
    if fits:
      return max(fits, key=lambda pair: min(8, *map(_power_of_two, pair)))
  return None


def _best_uneven(m: int, n: int, pairs: Iterable[_Counts]) -> _Counts | None:
  """Returns the best of these counts, None if none fits."""
  return max(
    (pair for pair in pairs if _fits(m, n, pair)),
    key=lambda pair: (_whole_cuts(m, n, pair), -math.prod(pair)),
    default=None,
  )


def _uneven(n: int, unit: int) -> list[int]:
  """Returns counts of blocks of 128 to 256 numbers in equal pieces."""
  pieces = [k for k in (1, 2, 4, 8) if n % k == 0]
  return [k * -(-n // (k * x)) for k in pieces for x in range(128, 257, unit)]


def _fits(m: int, n: int, pair: _Counts) -> bool:
  """Whether blocks hold at most 512 numbers, and at least 128 on average."""
  axes = map(_axis, (m, n), pair, _UNITS)
  largest = math.prod(axis.size for axis in axes)
  return largest <= 512 and m * n >= 128 * math.prod(pair)


def _whole_cuts(m: int, n: int, pair: _Counts) -> float:
  """Returns the share of a mesh's cuts, up to 8 per axis, that cut no block."""
  cuts = lambda n: min(8, _power_of_two(n))
  axes = zip((m, n), pair, strict=True)
  return math.prod(cuts(math.gcd(*axis)) / cuts(axis[0]) for axis in axes)


def _power_of_two(n: int) -> int:
  """Returns the largest power of two that divides `n`."""
  return n & -n


def _divisors(n: int) -> list[int]:
  low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
  return sorted({*low, *(n // d for d in low)})


class _Axis(NamedTuple):
  """How blocks lie along an axis of equal pieces, each of whole blocks.

  The last block of a piece holds the rest of it.
  """

  pieces: int
  piece: int  # numbers per piece
  blocks: int  # blocks per piece
  size: int  # numbers per block

  def shape(self, *sizes: int) -> tuple[int, ...]:
    """Returns the axis as pieces, if there is more than one, of `sizes`."""
    return sizes if self.pieces == 1 else (self.pieces, *sizes)


def _axis(n: int, count: int, unit: int) -> _Axis:
  """Returns how `count` blocks lie along an axis of `n` numbers."""
  if n % count == 0:
    return _Axis(1, n, count, n // count)
  pieces = math.gcd(n, count)
  piece, blocks = n // pieces, count // pieces
  size = -(-piece // blocks)
  aligned = -(-size // unit) * unit
  if -(-piece // aligned) == blocks:
    size = aligned
  return _Axis(pieces, piece, blocks, size)


class Blocks:
  """How blocks lie in an array, given its shape and the numbers of blocks.

  If the last block is smaller, arrays are padded with zeros. A TPU writes out
  the padded arrays, four or five temporary arrays of a leaf's size.
  """

  def __init__(self, whole: Sequence[int], counts: Sequence[int]):
    units = (*(1,) * (len(whole) - 2), *_UNITS)
    self._whole, self._counts = tuple(whole), tuple(counts)
    self._axes = [*map(_axis, self._whole, self._counts, units)]

  @property
  def split_axes(self) -> int:
    """How many axes have blocks of more than one number."""
    return len(self._split()[1])

  def cuts(self) -> tuple[int, ...]:
    """Returns into how many parts each axis can be cut between blocks."""
    return tuple(map(math.gcd, self._whole, self._counts))

  def largest(self, x: jax.Array) -> jax.Array:
    """Returns each block's largest magnitude, NaN if one is not finite."""
    split, inside = self._split()
    pieces, padded = self._padded()
    x = lax.reshape(x, pieces)
    if padded != pieces:
      x = jnp.pad(x, [(0, b - a) for a, b in zip(pieces, padded, strict=True)])
    x = lax.reshape(x, split)
    # A maximum alone may drop NaN. With masks instead of the sum, XLA takes
    # 0.65 GB more for a layer-wise step of LLaMA-7B on a TPU.
    largest = jnp.max(x, inside) + jnp.sum(x * 0.0, inside)
    return lax.reshape(largest, self._counts)

  def spread(self, x: jax.Array) -> jax.Array:
    """Repeats one value per block for each number in the block."""
    split, inside = self._split()
    pieces, padded = self._padded()
    kept = [i for i in range(len(split)) if i not in inside]
    x = lax.reshape(x, [split[i] for i in kept])
    x = lax.reshape(lax.broadcast_in_dim(x, split, kept), padded)
    if padded != pieces:
      x = lax.slice(x, [0] * x.ndim, pieces)
    return lax.reshape(x, self._whole)

  def _padded(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape with pieces apart, and the same padded to blocks."""
    pieces = [axis.shape(axis.piece) for axis in self._axes]
    padded = [axis.shape(axis.blocks * axis.size) for axis in self._axes]
    chain = itertools.chain.from_iterable
    return tuple(chain(pieces)), tuple(chain(padded))

  def _split(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shape with separate axes inside blocks, and these axes."""
    sizes: list[int] = []
    inside: list[int] = []
    for axis in self._axes:
      sizes += axis.shape(axis.blocks)
      if axis.size > 1:
        inside.append(len(sizes))
        sizes.append(axis.size)
    return tuple(sizes), tuple(inside)
