# SPDX-License-Identifier: Apache-2.0
"""Bases kept as int8 or int4 codes, and made orthonormal again when read.

A block of some 100 rows of a column has one float32 scale, its largest absolute
value over the largest code. Of a Haar basis of 4096 x 128 int8 codes are 0.65 %
off, and int4 codes 10 %, nearly all of it within rounding of orthogonality
after one or two Newton-Schulz steps towards the polar factor.

A basis that is read is a function of its codes alone: the same at every step
between two moves. It is encoded when it moves, and never again.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _varying
from subspace_optax.projectors import _base

QuantizedBasis = _projected.QuantizedBasis

# Rows of a block, at most: where int4 errs by 11 % (Haar, 4096 x 128: 64 rows
# 10.4 %, 128 rows 11.7 %, a whole column 15.7 %), and int8's scales are cheap.
_ROWS = {'int8': 128, 'int4': 64}
# The fewest steps with ||P^T P - I||_F below 1e-3 and 1e-2.
_STEPS = {'int8': 1, 'int4': 2}


def is_quantized(basis_dtype: Any) -> bool:
  """Whether bases of this dtype are codes with scales."""
  return jnp.issubdtype(jnp.dtype(basis_dtype), jnp.integer)


def check(basis_dtype: Any, projector: _base.Projector) -> None:
  """Raises if integers can't hold the bases of a projector."""
  if not is_quantized(basis_dtype):
    return
  name = jnp.dtype(basis_dtype).name
  if projector.small_steps:
    raise ValueError(
      f'basis_dtype={name!r} would round away the small steps by which '
      f"{projector.name} moves its bases; take 'float32' or 'bfloat16'."
    )
  if projector.rebuild:
    raise ValueError(
      f'basis_dtype={name!r} is of bases that are stored, but '
      f'{projector.name} draws its bases again at every step; leave out '
      "regenerate=True, or take 'float32' or 'bfloat16'."
    )


def first(
  dtype: Any,
  make: Any,
  static: tuple[Any, ...],
  args: tuple[Any, ...],
  layout: _layout.Layout,
  leaf: Any,
) -> QuantizedBasis:
  """Returns codes of the basis `make(*static, *args)`, sharded as `leaf`."""
  static = (layout, jnp.dtype(dtype), make, static)
  return QuantizedBasis(
    layout.place_basis(_first_codes, static, args, leaf),
    # Not cut along blocks that a mesh does not divide.
    layout.place_basis(_first_scales, static, args, leaf),
  )


def _first_codes(layout, dtype, make, static, *args) -> jax.Array:
  return encode(layout, make(*static, *args), dtype).codes


def _first_scales(layout, dtype, make, static, *args) -> jax.Array:
  return encode(layout, make(*static, *args), dtype).scales


def encode(
  layout: _layout.Layout, basis: jax.Array, dtype: Any
) -> QuantizedBasis:
  """Returns the nearest codes of a basis."""
  top = _top(dtype)
  # Rows that devices share, in columns that they don't, where they can.
  axis = layout.longest_axis
  x = _sharding.regroup(_linalg.widen(basis), (axis,), (basis.ndim - 1,))
  rows = _block(x.shape[axis], dtype)
  shape = (*x.shape[:axis], -1, rows, *x.shape[axis + 1 :])
  scales = jnp.max(jnp.abs(x.reshape(shape)), axis=axis + 1) / top
  scales = scales.astype(jnp.float32)
  steps = _spread(jnp.where(scales > 0, scales, 1.0), axis, rows)
  # By way of int8, whose arithmetic every backend has.
  codes = jnp.clip(jnp.round(x / steps), -top, top).astype(jnp.int8)
  return QuantizedBasis(codes.astype(dtype), scales)


def decode(
  layout: _layout.Layout, stored: QuantizedBasis, orthonormal: bool
) -> jax.Array:
  """Returns the bases that codes stand for, float32."""
  codes, scales = stored
  axis = layout.longest_axis
  wide = codes.astype(jnp.int8).astype(jnp.float32)
  rows = codes.shape[axis] // scales.shape[axis]
  p = wide * _sharding.like(_spread(scales, axis, rows), wide)
  for _ in range(_STEPS[codes.dtype.name] if orthonormal else 0):
    gram = layout.gram(p, p)
    p = layout.mix_basis(p, 1.5 * _linalg.identity_like(gram) - 0.5 * gram)
  return p


def read(orthonormal: bool, matrix: _base.Matrix, stored: Any) -> jax.Array:
  """Returns a leaf's bases, as they are or from their codes."""
  if not isinstance(stored, QuantizedBasis):
    return stored
  basis = decode(matrix.layout, stored, orthonormal)
  return matrix.layout.settle_basis(basis, matrix.like)


class Stored(NamedTuple):
  """What a move leaves of one leaf: all of it of the bases that are stored."""

  codes: QuantizedBasis
  basis: jax.Array  # shape=(*batch and projected axes, r), dtype=float32
  error: jax.Array  # shape=(*batch,), dtype=float32
  drift: jax.Array  # shape=(*batch,), dtype=float32
  transition: jax.Array  # shape=(*batch, r, r), dtype=float32


def store(
  orthonormal: bool,
  matrix: _base.Matrix,
  stored: QuantizedBasis,
  old: jax.Array,
  basis: jax.Array,
  error: jax.Array,
  drift: jax.Array,
  move: _projected.Move,
) -> Stored:
  """Encodes the bases that moved from `old`, and reads them again."""
  layout = matrix.layout
  moved = layout.along_basis(move.moved)

  def again() -> Stored:
    new = _where(moved, encode(layout, basis, stored.dtype), stored)
    p = jnp.where(moved, read(orthonormal, matrix, new), old)
    transition, kept = _linalg.change(layout, p, old)
    turned = jnp.sqrt(jnp.maximum(1.0 - kept, 0.0))
    square = jnp.expand_dims(move.moved, (-2, -1))
    found = Stored(
      new,
      p,
      jnp.where(
        move.moved, _linalg.orthogonality_error(layout.gram(p, p)), error
      ),
      jnp.where(move.moved, turned, drift),
      jnp.where(square, transition, move.transition),
    )
    return jax.tree.map(_sharding.like, found, still)

  still = Stored(stored, old, error, drift, move.transition)
  return _varying.cond(jnp.any(move.moved), again, lambda: still)


def _where(
  moved: jax.Array,
  new: QuantizedBasis,
  old: QuantizedBasis,
) -> QuantizedBasis:
  def one(new: jax.Array, old: jax.Array) -> jax.Array:
    # Selected in int8: not every backend has int4's.
    like = old.astype(jnp.int8) if old.dtype == jnp.int4 else old
    new = _sharding.like(new, like)
    return jnp.where(moved, new, like).astype(old.dtype)

  return QuantizedBasis(*map(one, new, old))


def _spread(scales: jax.Array, axis: int, rows: int) -> jax.Array:
  """Returns the scale of every row."""
  shape = list(scales.shape)
  shape[axis] *= rows
  wide = jnp.expand_dims(scales, axis + 1)
  wide = jnp.broadcast_to(
    wide, (*wide.shape[: axis + 1], rows, *wide.shape[axis + 2 :])
  )
  return wide.reshape(shape)


def _top(dtype: Any) -> int:
  """Returns the largest code: they are symmetric."""
  return int(jnp.iinfo(dtype).max)


@functools.cache
def _block(size: int, dtype: Any) -> int:
  """Returns how many of an axis's rows share a scale; they divide it.

  The same on every mesh, so that a checkpoint fits another: blocks of which
  devices can hold equal numbers, then the largest.
  """
  most = _ROWS[jnp.dtype(dtype).name]
  if size <= most:
    return size
  sizes = [b for b in range(most // 2, most + 1) if size % b == 0]
  return max(sizes, default=size, key=lambda b: (math.gcd(size // b, 16), b))
