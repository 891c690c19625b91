# SPDX-License-Identifier: Apache-2.0
"""Bases stored as int8 or int4 codes, and made orthonormal again when read.

Each block of about 100 rows of a column has one float32 scale: its largest
absolute value divided by the largest code. For a 4096 x 128 Haar basis, the
error is 0.65 % with int8 codes and 10 % with int4 codes. One or two
Newton-Schulz steps towards the polar factor make the basis nearly orthonormal
again; see `_STEPS`.

A basis that is read depends on its codes alone, so it is the same at every step
between two moves. It is encoded only when it moves.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.bases import _base as _bases
from subspace_optax.low_precision import _blocks
from subspace_optax.projectors import _base

QuantizedBasis = _projected.QuantizedBasis

# The largest number of rows in a block. For int4 it keeps the error at 11 %
# (Haar, 4096 x 128: 10.4 % with 64 rows, 11.7 % with 128, 15.7 % with a whole
# column); for int8 it makes scales cheap.
_ROWS = {'int8': 128, 'int4': 64}
# The fewest Newton-Schulz steps with ||P^T P - I||_F below 1e-3 and 1e-2.
_STEPS = {'int8': 1, 'int4': 2}


def is_quantized(basis_dtype: Any) -> bool:
  """Whether bases of this dtype are stored as codes with scales."""
  return jnp.issubdtype(jnp.dtype(basis_dtype), jnp.integer)


def codes(dtype: Any, projector: _base.Projector) -> _bases.Storage:
  """Returns the storage that keeps a projector's bases in int8 or int4."""
  _check(dtype, projector)

  def first(sample, seed, layout, leaf):
    def place(field: str) -> jax.Array:
      static = (field, sample, layout, dtype)
      return layout.place_basis(_draw_first, static, (seed,), leaf)

    # Placed separately, since scales can't be sharded where the mesh does not
    # divide the number of blocks.
    return QuantizedBasis(place('codes'), place('scales'))

  def read(matrices, stored, own):
    del own
    one = functools.partial(_read, projector.orthonormal)
    return jax.tree.map(one, matrices, stored)

  def write(matrices, stored, old, subspaces, moves):
    one = functools.partial(_write, projector.orthonormal)
    moved = _base.bases_of(subspaces, moves)
    new, moved = _tree.map_unzip(one, 2, matrices, stored, old, moved)
    return new, *_base.with_bases(subspaces, moved)

  return _bases.Storage(first, read, write)


def _check(dtype: Any, projector: _base.Projector) -> None:
  """Raises if integers can't hold the bases of a projector."""
  if projector.small_steps:
    raise ValueError(
      f'basis_dtype={dtype.name!r} would round away the small steps by which '
      f"{projector.name} moves its bases; take 'float32' or 'bfloat16'."
    )
  if projector.rebuild:
    raise ValueError(
      f'basis_dtype={dtype.name!r} is for stored bases, but '
      f'{projector.name} makes its bases again at every step; take '
      "'float32' or 'bfloat16', or leave out regenerate=True."
    )


def _draw_first(field, sample, layout, dtype, seed) -> jax.Array:
  """Returns the codes or the scales of a leaf's first bases."""
  basis = _bases.draw_first(sample, layout, jnp.float32, seed)
  return getattr(encode(layout, basis, dtype), field)


def encode(
  layout: _layout.Layout, basis: jax.Array, dtype: Any
) -> QuantizedBasis:
  """Returns the nearest codes of a basis."""
  top = int(jnp.iinfo(dtype).max)  # codes are symmetric
  # Shard columns instead of rows, if possible, so that blocks stay whole.
  axis = layout.longest_axis
  x = _sharding.regroup(_linalg.widen(basis), (axis,), (basis.ndim - 1,))
  rows = _block(x.shape[axis], dtype)
  shape = (*x.shape[:axis], -1, rows, *x.shape[axis + 1 :])
  # Not `Blocks.largest`, whose handling of NaN would cost an all-reduce.
  scales = jnp.max(jnp.abs(x.reshape(shape)), axis=axis + 1) / top
  scales = scales.astype(jnp.float32)
  blocks = _blocks.Blocks(x.shape, scales.shape)
  steps = blocks.spread(jnp.where(scales > 0, scales, 1.0))
  # Through int8, since every backend has int8 arithmetic.
  codes = jnp.clip(jnp.round(x / steps), -top, top).astype(jnp.int8)
  return QuantizedBasis(codes.astype(dtype), scales)


def decode(
  layout: _layout.Layout, stored: QuantizedBasis, orthonormal: bool
) -> jax.Array:
  """Returns the bases that codes represent, float32."""
  codes, scales = stored
  wide = codes.astype(jnp.int8).astype(jnp.float32)
  steps = _blocks.Blocks(codes.shape, scales.shape).spread(scales)
  p = wide * _sharding.like(steps, wide)
  for _ in range(_STEPS[codes.dtype.name] if orthonormal else 0):
    gram = layout.gram(p, p)
    p = layout.mix_basis(p, 1.5 * _linalg.identity_like(gram) - 0.5 * gram)
  return p


def _read(
  orthonormal: bool, matrix: _base.Matrix, stored: QuantizedBasis
) -> jax.Array:
  """Returns the bases of a leaf, read from its codes."""
  basis = decode(matrix.layout, stored, orthonormal)
  return matrix.layout.settle_basis(basis, matrix.like)


def _write(
  orthonormal: bool,
  matrix: _base.Matrix,
  stored: QuantizedBasis,
  old: jax.Array,
  bases: _base.Bases,
) -> tuple[QuantizedBasis, _base.Bases]:
  """Encodes the bases of a leaf that moved from `old`, and reads them back."""
  layout = matrix.layout
  still = bases._replace(basis=old)
  # `moved` is known already, so no branch needs to return it.
  kept = stored, still._replace(moved=None)

  def again() -> tuple[QuantizedBasis, _base.Bases]:
    moved = layout.along_basis(bases.moved)
    new = _where(moved, encode(layout, bases.basis, stored.dtype), stored)
    p = jnp.where(moved, _read(orthonormal, matrix, new), old)
    error = _linalg.orthogonality_error(layout.gram(p, p))
    found = _base.moved_to(layout, bases.moved, p, error, still)
    found = new, found._replace(moved=None)
    return jax.tree.map(_sharding.like, found, kept)

  new, found = _varying.cond(jnp.any(bases.moved), again, lambda: kept)
  return new, found._replace(moved=bases.moved)


def _where(
  moved: jax.Array, new: QuantizedBasis, old: QuantizedBasis
) -> QuantizedBasis:
  def one(new: jax.Array, old: jax.Array) -> jax.Array:
    # Selected in int8, since not every backend can select int4.
    like = old.astype(jnp.int8) if old.dtype == jnp.int4 else old
    return jnp.where(moved, _sharding.like(new, like), like).astype(old.dtype)

  return QuantizedBasis(*map(one, new, old))


@functools.cache
def _block(size: int, dtype: Any) -> int:
  """Returns how many rows of an axis share a scale; it divides the axis.

  It does not depend on the mesh, so that a checkpoint fits other meshes. It
  favors blocks that divide equally among devices, then large blocks.
  """
  most = _ROWS[jnp.dtype(dtype).name]
  if size <= most:
    return size
  sizes = [b for b in range(most // 2, most + 1) if size % b == 0]
  return max(sizes, default=size, key=lambda b: (math.gcd(size // b, 16), b))
