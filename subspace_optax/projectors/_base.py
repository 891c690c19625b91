# SPDX-License-Identifier: Apache-2.0
"""What a projector is, and what it sees of a projected leaf.

A step runs: `refresh` may move the bases to P_t (GaLore's SVD of G_t), the
coordinates R = P_t^T G_t are taken, `track` may move the bases to P_{t+1}
(Online Subspace Descent, which moves W with P_t first). Both see and return
whole trees, since the optimizer of a basis is one optax transformation.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _placement
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _spread
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying


class Subspaces(NamedTuple):
  """The bases and how good they are; trees with the parameters' structure.

  `MaskedNode` stands for leaves that are not projected.
  """

  # leaf shape=(*batch and projected axes, r), dtype=basis_dtype; () between
  # steps if the projector makes them again; if the dtype is an integer, a
  # `QuantizedBasis` between steps, which projectors see as float32
  basis: Any
  captured_energy: Any  # leaf shape=(*batch,), dtype=float32, of the last G
  orthogonality_error: Any  # leaf shape=(*batch,), dtype=float32
  drift: Any  # leaf shape=(*batch,), dtype=float32, of the last move


class Bases(NamedTuple):
  """What a move changes of one leaf."""

  basis: jax.Array  # shape=(*batch and projected axes, r)
  error: jax.Array  # shape=(*batch,), dtype=float32, of orthogonality
  drift: jax.Array  # shape=(*batch,), dtype=float32
  moved: jax.Array  # shape=(*batch,), dtype=bool
  transition: jax.Array  # shape=(*batch, r, r), dtype=float32


def bases_of(subspaces: Subspaces, moves: Any) -> Any:
  """Returns a tree of `Bases` after their moves."""
  return jax.tree.map(
    lambda basis, error, drift, move: Bases(basis, error, drift, *move),
    subspaces.basis,
    subspaces.orthogonality_error,
    subspaces.drift,
    moves,
  )


def with_bases(subspaces: Subspaces, bases: Any) -> tuple[Subspaces, Any]:
  """Returns the subspaces with these bases, and the moves that made them."""
  basis, error, drift, moves = _tree.map_unzip(
    lambda _, x: (*x[:3], _projected.Move(*x[3:])), 4, subspaces.basis, bases
  )
  subspaces = subspaces._replace(
    basis=basis, orthogonality_error=error, drift=drift
  )
  return subspaces, moves


def moved_to(
  layout: _layout.Layout,
  moved: jax.Array,
  basis: jax.Array,
  error: jax.Array,
  old: Bases,
) -> Bases:
  """Returns the bases of a leaf after a move, measured against the old ones.

  Args:
    layout: of the leaf.
    moved: which matrices moved.
    basis: the new bases where they did, else the old ones.
    error: of the orthogonality of those that moved.
    old: the bases before.
  """
  transition, kept = _linalg.change(layout, basis, old.basis)

  def where_moved(new: jax.Array, old: jax.Array) -> jax.Array:
    after = tuple(range(moved.ndim, old.ndim))
    which = _sharding.place_like(jnp.expand_dims(moved, after), old)
    return jnp.where(which, _sharding.like(new, old), old)

  return Bases(
    basis,
    where_moved(error, old.error),
    # Chordal distance of the two subspaces, as a share of the largest possible.
    where_moved(jnp.sqrt(jnp.maximum(1.0 - kept, 0.0)), old.drift),
    where_moved(moved, old.moved),
    where_moved(transition, old.transition),
  )


@dataclasses.dataclass(frozen=True)
class Matrix:
  """One projected leaf, as projectors see it: a matrix G, or a stack of them.

  A rule reads as for one matrix. These methods, and those of `layout` for bases
  and coordinates, treat the matrices of a stack alike, keep the leaf's own axes
  and shardings, and average products with G along a mapped axis. Products are
  with G / ||G||_F, scaled behind the product, since G may be float16.

  Attributes:
    like: an array of the leaf's shape, dtype and sharding, which is not to be
      read: the gradient, or the parameter where no gradient is known.
    gradient: G, the leaf's own axes; along a mapped axis of the layout, one of
      the gradients whose mean is G. None in steps in which no rule looks at it.
    layout: which of them are projected.
    seed: (*batch), uint32, one per matrix.
    energy: (*batch), ||G||_F^2, or 1 where not `ok`; along a mapped axis, the
      mean of that, since the norm of G would cost moving it.
    ok: (*batch), whether the energy is finite and not zero, which for elements
      between about 1e-19 and 1e19 is whether G is.
    mean: of past coordinates over ||G||_F, for a rule that keeps it.
    home: an array where the leaf is between steps, if `like` and `gradient` are
      elsewhere: handed out, so that each device has matrices of its own.
  """

  like: jax.Array
  gradient: Any
  layout: _layout.Layout
  seed: jax.Array
  energy: jax.Array
  ok: jax.Array
  mean: jax.Array | None = None
  home: Any = None

  def unit_coordinates(self, p: jax.Array) -> jax.Array:
    """Returns P^T G / ||G||_F."""
    scale = self.layout.along_coords(lax.rsqrt(self.energy))
    return self.layout.project(self.gradient, p) * scale

  def unit_image(self, x: jax.Array) -> jax.Array:
    """Returns G X^T / ||G||_F."""
    return self.scale(
      lax.rsqrt(self.energy), self.layout.back(self.gradient, x)
    )

  def scale(self, factor: jax.Array, p: jax.Array) -> jax.Array:
    """Returns f P for one number f per matrix."""
    return p * self.layout.along_basis(factor)

  def aligned(self, p: jax.Array) -> jax.Array:
    """Returns P, float32 or wider, sharded as products with G make it."""
    return self.layout.align_basis(_linalg.widen(p), self.like)

  def at_home(self, x: jax.Array, axes: str) -> jax.Array:
    """Returns a few numbers of each matrix where state of the leaf is."""
    if self.home is None:
      return x
    return _spread.keep_along(self.layout, x, axes, self.home)

  def whole(self) -> jax.Array:
    """Returns G, (*batch, rows, columns), as every device must have it."""
    gradient = self.layout.mean(self.gradient)
    return self.layout.to_matrix(_sharding.replicate(gradient))

  def tall(self) -> jax.Array:
    """Returns G, (*batch, m, n), float32, as every device must have it."""
    g = self.whole().astype(jnp.float32)
    return g if self.layout.project_rows else jnp.swapaxes(g, -1, -2)


class Context(NamedTuple):
  """What holds for all leaves in this step."""

  count: jax.Array  # shape=(), dtype=int32, steps before this one
  active: jax.Array  # shape=(), dtype=bool, False while `switch` rests a rule
  moves: Any = None  # for `track`: the tree of `Move` that `refresh` made


# (layout, seeds, period) -> bases that depend on nothing else.
Sample = Callable[[_layout.Layout, jax.Array, Any], jax.Array]

# Reserved fold-in number of the first bases, in the place of a period.
AT_INIT = 2**31 - 1


class Projector(NamedTuple):
  """A rule that finds and moves the basis of every matrix.

  Attributes:
    name: what `describe` calls it.
    init: (subspaces, matrices) -> the rule's own state, made of trees with the
      structure of the first subspaces, whose bases are () if there is a
      `rebuild`; `matrices` have no gradients.
    refresh: (context, matrices, subspaces, state) -> (subspaces, moves, state),
      before this step's coordinates are taken. `moves` is a tree of `Move`, or
      None if the rule never moves a basis here.
    track: (context, matrices, coords, subspaces, state) -> (subspaces, moves,
      state), after they are taken.
    sample: draws the first bases.
    rebuild: (matrices, state) -> bases, for a rule that makes them again at
      every step; None for one whose bases are stored.
    orthonormal: whether all its bases have P^T P = I, up to rounding.
    needs_gradient: (context, state) -> whether the coming step looks at the
      gradient and not at its coordinates alone: True, False or traced.
    small_steps: whether its bases move by steps that the rounding of integers
      could swallow.
    most_rows: the longest side that a basis can span; None for any.
  """

  name: str
  init: Callable[[Subspaces, Any], Any]
  refresh: Callable[..., tuple[Subspaces, Any, Any]]
  track: Callable[..., tuple[Subspaces, Any, Any]]
  sample: Sample = _linalg.haar
  rebuild: Callable[[Any, Any], Any] | None = None
  orthonormal: bool = True
  needs_gradient: Callable[[Context, Any], Any] = lambda context, state: True
  small_steps: bool = False
  most_rows: int | None = None


def no_track(context, matrices, coords, subspaces, state):
  """A `track` that leaves the bases where they are."""
  del context, matrices, coords
  return subspaces, None, state


def still(matrix: Matrix) -> _projected.Move:
  """Returns the move of a basis that stays where it is."""
  layout = matrix.layout
  shape = (*layout.batch_shape, layout.rank, layout.rank)
  eye = jnp.eye(layout.rank, dtype=jnp.float32)
  eye = jnp.broadcast_to(eye.reshape((1,) * len(shape[:-2]) + eye.shape), shape)
  axes = layout.batch_axes + 'yz'
  eye = _placement.align(eye, matrix.like, layout.leaf_axes, axes)
  return _projected.Move(jnp.zeros_like(matrix.ok), eye)


def call(name: str, **arguments: Any) -> str:
  """Returns how `describe` shows a rule; what is not set is left out."""
  shown = [
    f'{key}={_shown(value)}'
    for key, value in arguments.items()
    if value is not None and value is not False
  ]
  return f'{name}({", ".join(shown)})'


def _shown(value: Any) -> str:
  return 'traced' if isinstance(value, jax.Array) else repr(value)


def resting(track: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `track`, skipped wherever the context is not active."""

  def rest(context, matrices, coords, subspaces, state):
    _, moves, _ = jax.eval_shape(
      lambda *args: track(context, matrices, coords, *args), subspaces, state
    )
    if moves is not None:
      moves = jax.tree.map(still, matrices)
    return subspaces, moves, state

  def maybe(context, matrices, coords, subspaces, state):
    return _varying.cond(
      context.active,
      functools.partial(track, context, matrices, coords),
      functools.partial(rest, context, matrices, coords),
      subspaces,
      state,
    )

  return maybe
