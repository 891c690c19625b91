# SPDX-License-Identifier: Apache-2.0
"""The pytree node that replaces a projected matrix in the tree."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _spread


class Selection(NamedTuple):
  """C for bases whose columns are columns of one orthonormal matrix.

  It is a partial permutation: a coordinate moves to its column's new position,
  and is 0 if its column is new.
  """

  # shape=(*batch, r), dtype=int32: position of each new column in the old
  # basis, r if it is not in it
  source: jax.Array

  @property
  def dense(self) -> jax.Array:
    """C itself, (*batch, r, r), float32."""
    places = jnp.arange(self.source.shape[-1])
    places = jnp.expand_dims(places, tuple(range(self.source.ndim)))
    return (self.source[..., None] == places).astype(jnp.float32)


def select_columns(new: jax.Array, old: jax.Array) -> Selection:
  """Returns the positions of new columns in the old bases.

  Args:
    new: (*batch, r), indices of columns, each at most once.
    old: (*batch, r), indices of columns, each at most once.
  """
  same = new[..., :, None] == old[..., None, :]
  found = jnp.any(same, axis=-1)
  place = jnp.argmax(same, axis=-1).astype(jnp.int32)
  return Selection(jnp.where(found, place, new.shape[-1]))


def carry(
  layout: _layout.Layout, transition: Any, coords: jax.Array
) -> jax.Array:
  """Returns C X for each matrix, with the transition C of a `Move`."""
  if not isinstance(transition, Selection):
    return layout.mix_coords(transition, coords)
  if _sharding.explicit(coords) is not None:
    # jax can't infer the sharding of a gather along a sharded axis.
    return layout.mix_coords(transition.dense, coords)
  source = layout.ranks_along(transition.source, layout.coords_axes())
  taken = jnp.take_along_axis(
    coords, jnp.minimum(source, layout.rank - 1), layout.rank_axis
  )
  return jnp.where(source < layout.rank, taken, 0)


class Move(NamedTuple):
  """One change of a leaf's basis, from P_o to P_n.

  Attributes:
    moved: which matrices of the leaf moved. Branch on `jnp.any(moved)` outside
      any vmap: under vmap, a `cond` runs both of its branches.
    transition: C = P_n^T P_o (P_o^T P_o)^-1, which maps coordinates in the old
      basis to coordinates in the new one; the identity if nothing moved. Rules
      for which it is a partial permutation return a `Selection`.
  """

  moved: jax.Array  # shape=(*batch,), dtype=bool
  transition: Any  # shape=(*batch, r, r), dtype=float32; or a `Selection`


class QuantizedBasis(NamedTuple):
  """A leaf's bases in int8 or int4, as `project` stores them."""

  codes: jax.Array  # shape=(*batch and projected axes, r), dtype=int8 or int4
  scales: jax.Array  # the same shape with blocks for rows, dtype=float32

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the bases."""
    return self.codes.shape

  @property
  def ndim(self) -> int:
    """Number of axes of the bases."""
    return self.codes.ndim

  @property
  def dtype(self) -> Any:
    """Dtype of the codes."""
    return self.codes.dtype


def _seal() -> jax.Array:
  """Returns an array on which arithmetic fails; see `Projected.seal`."""
  data = jnp.zeros((1, 1, 2), jnp.uint32)
  return jax.random.wrap_key_data(data, impl='threefry2x32')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Projected:
  """A matrix in the coordinates of its subspace, between stages of the chain.

  `project` makes it, `in_subspace` adds a direction, and `unproject` turns it
  into a full update. A transformation in between that maps over arrays would
  change every array here, the basis included; `seal` makes it fail.

  Attributes:
    coords: P^T G (or G Q), float32 or wider, with the leaf's axes but the rank
      instead of the projected ones.
    basis: P (or Q), (*batch and projected axes, r).
    before: the basis's move before this step's coordinates; None if its
      projector never moves it there.
    after: the basis's move after the coordinates; None if its projector never
      moves it there.
    gradient: the gradient itself, if `project(..., keep_gradient=True)`.
    home: an array placed where the leaf lies between steps, like coordinates
      and direction, if gradient and basis were handed out so that each device
      has its own matrices.
    old_basis: with the gradient, the basis before `before`.
    old_mean: with the gradient, the inner optimizer's first moment before it
      was carried to the new basis, if it is known.
    mean: that moment after it was carried.
    direction: the inner optimizer's direction; None until `in_subspace` has
      run.
    seal: a random key, (1, 1), on which arithmetic fails. For functions that
      scale or clip all arrays, jax reports that they do not accept dtype
      key<fry>; for other arithmetic, that a method of a key is abstract.
    layout: which axes are projected.
    orthonormal: whether P^T P = I, up to rounding.
    dtype: dtype of the gradient.
    update_dtype: dtype of the update that `unproject` returns.
    sharding: sharding of the gradient, under explicit sharding.
  """

  coords: jax.Array
  basis: jax.Array
  before: Move | None
  after: Move | None = None
  # Arrays, or None in steps that do not need them.
  gradient: Any = None
  home: Any = None
  old_basis: Any = None
  old_mean: Any = None
  mean: Any = None
  direction: Any = None
  seal: jax.Array = dataclasses.field(default_factory=_seal)
  layout: _layout.Layout = dataclasses.field(metadata={'static': True})
  orthonormal: bool = dataclasses.field(metadata={'static': True})
  dtype: Any = dataclasses.field(metadata={'static': True})
  update_dtype: Any = dataclasses.field(metadata={'static': True})
  sharding: Any = dataclasses.field(metadata={'static': True})

  def combine(self, weights: jax.Array) -> jax.Array:
    """Returns P C, of the leaf's shape, for weights C of P's columns.

    The dtype is float32 or wider. C has the shape and the placement of
    `coords`.
    """
    if self.home is not None:
      axes = self.layout.coords_axes()
      weights = _spread.go_along(self.layout, weights, axes, self.home)
    basis = _linalg.widen(self.basis)
    return self.layout.unproject(basis, weights, self.sharding)

  def weights_of(self, coords: jax.Array, basis: jax.Array) -> jax.Array:
    """Returns weights of a basis's columns whose sum has these coordinates."""
    coords = _linalg.widen(coords)
    if self.orthonormal:
      return coords
    return _linalg.solve_gram(self.layout, _linalg.widen(basis), coords)

  def inside(self) -> jax.Array:
    """Returns (P^T P)^-1 R; P times this is the part of G in P's span."""
    return self.weights_of(self.coords, self.basis)

  def outside(self) -> jax.Array:
    """Returns G - P (P^T P)^-1 R, the part of the gradient outside P's span."""
    return _linalg.widen(self.gradient) - self.combine(self.inside())

  def _refuse(self, *args: Any) -> Any:
    del args
    raise TypeError(
      'a leaf is still in the coordinates of its subspace; chain '
      '`subspace_optax.unproject` behind `in_subspace`, which makes updates of '
      "the parameters' shapes."
    )

  __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
  __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = _refuse
