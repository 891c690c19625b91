# SPDX-License-Identifier: Apache-2.0
"""The orthonormal cosine transform, and its columns computed from indices.

Column k of D, m x m, is c_k cos(pi (2i + 1) k / 2m) in row i, with c_0 the
square root of 1/m and all other c_k the square root of 2/m (the DCT-II). A
column costs m cosines, so a basis of D's columns need not be stored between
steps.
"""

import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _noise
from subspace_optax._matrix import _placement

# The longest side whose phases can be computed in 32 bits.
MOST_ROWS = 2**20

_LOW_BITS = 10


def make_basis(
  layout: _layout.Layout, leaf: jax.Array, columns: jax.Array, seed: Any = None
) -> jax.Array:
  """Returns columns of D, or of diag(s) D with random signs s, as bases.

  Args:
    layout: layout of the leaf.
    leaf: an array with the leaf's sharding; each device computes its own rows.
    columns: (*batch, r), indices of the columns.
    seed: (*batch), uint32, seeds of the signs; None for the columns of D.

  Returns:
    (*batch and projected axes, r), float32.
  """
  rows = _row_numbers(layout, leaf)
  of_matrix = f'{layout.batch_axes}-'
  columns = _placement.align(columns, leaf, layout.leaf_axes, of_matrix)
  columns = layout.ranks_along(columns, layout.basis_axes())
  basis = cosines(rows, columns, layout.m)
  if seed is None:
    return basis
  bits = _noise.hashed(layout.along_basis(seed), rows.astype(jnp.uint32))
  return jnp.where(bits >> 31 == 1, -basis, basis)


def _row_numbers(layout: _layout.Layout, leaf: jax.Array) -> jax.Array:
  """Returns 0 to m - 1, int32, shaped to broadcast against the basis."""
  ones = (1,) * len(layout.batch_shape)
  numbers = jnp.arange(layout.m, dtype=jnp.int32).reshape(*ones, layout.m, 1)
  # Axes of size 1 are not split.
  names = ''.join(
    '-' if c in layout.batch_axes else c for c in layout.basis_axes(r='-')
  )
  numbers = layout.one.from_matrix(numbers)
  return _placement.align(numbers, leaf, layout.leaf_axes, names)


def draw_basis(
  layout: _layout.Layout,
  leaf: jax.Array,
  seed: jax.Array,
  period: jax.Array | int,
) -> jax.Array:
  """Returns diag(s) D[:, k] with random signs s and a random subset k.

  Args:
    layout: layout of the leaf.
    leaf: see `make_basis`.
    seed: (*batch), uint32.
    period: integers, a scalar or (*batch); signs and columns depend on it.
  """
  keys = _noise.hashed(seed, jnp.asarray(period).astype(jnp.uint32))
  # Signs use other bits than the choice of columns.
  return make_basis(layout, leaf, draw_columns(layout, keys), ~keys)


def draw_columns(layout: _layout.Layout, keys: jax.Array) -> jax.Array:
  """Returns a random subset of r column indices for every key, in order.

  Args:
    layout: layout of the leaf.
    keys: (*batch), uint32.
  """
  numbers = jnp.arange(layout.m, dtype=jnp.uint32)
  numbers = jnp.expand_dims(numbers, tuple(range(keys.ndim)))
  # 31 bits, so that signed integers have the same order.
  bits = (_noise.hashed(keys[..., None], numbers) >> 1).astype(jnp.int32)
  return largest(bits, layout.rank)


def largest(values: jax.Array, rank: int) -> jax.Array:
  """Returns the indices of the r largest along the last axis, in order."""
  return jnp.sort(lax.top_k(values, rank)[1], axis=-1)


def cosines(rows: jax.Array, numbers: jax.Array, m: int) -> jax.Array:
  """Returns entries of D, float32, with errors of one part in 10^7.

  It is elementwise in arrays that broadcast, so that each shard computes its
  own rows.

  Args:
    rows: i, integers from 0 to m - 1.
    numbers: k, integers from 0 to m - 1.
    m: the transform's size, at most `MOST_ROWS`.
  """
  phase = _phase(2 * rows.astype(jnp.uint32) + 1, numbers.astype(jnp.uint32), m)
  # cos is even and changes its sign half way, so fold 4m phases into 0 to m,
  # where float32 represents the angle best.
  phase = jnp.minimum(phase, 4 * m - phase)
  is_negative = phase > m
  phase = jnp.where(is_negative, 2 * m - phase, phase)
  x = jnp.cos(phase.astype(jnp.float32) * (math.pi / 2 / m))
  x = jnp.where(is_negative, -x, x)
  return x * jnp.where(numbers == 0, (1 / m) ** 0.5, (2 / m) ** 0.5)


def _phase(odd: jax.Array, number: jax.Array, m: int) -> jax.Array:
  """Returns (odd * number) mod 4m, exactly, for uint32 factors below 2m."""
  if 2 * m * m < 2**32:
    return (odd * number % (4 * m)).astype(jnp.int32)
  high = odd * (number >> _LOW_BITS) % (4 * m) << _LOW_BITS
  low = odd * (number & ((1 << _LOW_BITS) - 1))
  # Each product is below 2^32, but their sum is not.
  return ((high % (4 * m) + low % (4 * m)) % (4 * m)).astype(jnp.int32)
