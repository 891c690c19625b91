# SPDX-License-Identifier: Apache-2.0
"""The interface of projectors, and their view of a projected leaf.

In a step, `refresh` may first move the bases to P_t (GaLore's SVD of G_t). Then
the coordinates R = P_t^T G_t are computed. Last, `track` may move the bases to
P_{t+1} (Online Subspace Descent, which moves W with P_t first). Both functions
take and return whole trees, since the optimizer of the bases is one optax
transformation.
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
  """The bases and their quality; trees with the parameters' structure.

  `MaskedNode` stands for leaves that are not projected.
  """

  # leaf shape=(*batch and projected axes, r), dtype=basis_dtype; () between
  # steps if the projector recomputes bases; for an integer dtype, a
  # `QuantizedBasis` between steps, which projectors see as float32
  basis: Any
  captured_energy: Any  # leaf shape=(*batch,), dtype=float32, of the last G
  orthogonality_error: Any  # leaf shape=(*batch,), dtype=float32
  drift: Any  # leaf shape=(*batch,), dtype=float32, of the last move


class Bases(NamedTuple):
  """The fields of one leaf that a move changes."""

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
    layout: layout of the leaf.
    moved: which matrices moved.
    basis: the new bases of matrices that moved, the old bases of the others.
    error: orthogonality error of the new bases.
    old: the bases before the move.
  """
  transition, kept = _linalg.change(layout, basis, old.basis)

  def where_moved(new: jax.Array, old: jax.Array) -> jax.Array:
    after = tuple(range(moved.ndim, old.ndim))
    which = _sharding.place_like(jnp.expand_dims(moved, after), old)
    return jnp.where(which, _sharding.like(new, old), old)

  return Bases(
    basis,
    where_moved(error, old.error),
    # Chordal distance of the two subspaces, relative to the largest possible.
    where_moved(jnp.sqrt(jnp.maximum(1.0 - kept, 0.0)), old.drift),
    where_moved(moved, old.moved),
    where_moved(transition, old.transition),
  )


@dataclasses.dataclass(frozen=True)
class Matrix:
  """One projected leaf, as projectors see it: a matrix G, or a stack of them.

  Write a rule as if for one matrix. These methods, and those of `layout` for
  bases and coordinates, handle every matrix of a stack, keep the leaf's own
  axes and shardings, and average products with G along a mapped axis. Products
  are with G / ||G||_F; they are scaled after the product, since G may be
  float16.

  Attributes:
    like: an array of the leaf's shape, dtype and sharding, whose values must
      not be read: the gradient, or the parameter if no gradient is known.
    gradient: G, with the leaf's own axes; along a mapped axis of the layout,
      one of the gradients whose mean is G. None in steps in which no rule looks
      at it.
    layout: says which of the leaf's axes are projected.
    seed: (*batch), uint32, one per matrix.
    energy: (*batch), ||G||_F^2, or 1 where not `ok`. Along a mapped axis, the
      mean of the devices' energies, since the norm of G would cost moving G.
    ok: (*batch), whether the energy is finite and nonzero. For elements between
      about 1e-19 and 1e19, this is whether G is.
    mean: mean of past coordinates divided by ||G||_F, for a rule that keeps it.
    home: an array with the leaf's sharding between steps, if `like` and
      `gradient` were handed out so that each device has matrices of its own.
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
    """Returns f P, for one number f per matrix."""
    return p * self.layout.along_basis(factor)

  def aligned(self, p: jax.Array) -> jax.Array:
    """Returns P, float32 or wider, sharded like products with G."""
    return self.layout.align_basis(_linalg.widen(p), self.like)

  def at_home(self, x: jax.Array, axes: str) -> jax.Array:
    """Returns per-matrix numbers, placed where the state of the leaf lies."""
    if self.home is None:
      return x
    return _spread.keep_along(self.layout, x, axes, self.home)

  def whole(self) -> jax.Array:
    """Returns G, (*batch, rows, columns), replicated on every device."""
    gradient = self.layout.mean(self.gradient)
    return self.layout.to_matrix(_sharding.replicate(gradient))

  def tall(self) -> jax.Array:
    """Returns G, (*batch, m, n), float32, replicated on every device."""
    g = self.whole().astype(jnp.float32)
    return g if self.layout.project_rows else jnp.swapaxes(g, -1, -2)


class Context(NamedTuple):
  """Facts about this step that all leaves share."""

  count: jax.Array  # shape=(), dtype=int32, steps before this one
  active: jax.Array  # shape=(), dtype=bool, False while `switch` rests a rule
  moves: Any = None  # for `track`: the tree of `Move` that `refresh` made


# (layout, seeds, period) -> bases. They depend on nothing else.
Sample = Callable[[_layout.Layout, jax.Array, Any], jax.Array]

# Folded into the seed of the first bases instead of a period.
AT_INIT = 2**31 - 1


class Projector(NamedTuple):
  """A rule that finds and moves the basis of every matrix.

  Attributes:
    name: the name that `describe` shows.
    init: (subspaces, matrices) -> the rule's own state, made of trees with the
      structure of the first subspaces. Their bases are () if there is a
      `rebuild`; `matrices` have no gradients.
    refresh: (context, matrices, subspaces, state) -> (subspaces, moves, state),
      called before this step's coordinates are computed. `moves` is a tree of
      `Move`, or None if the rule never moves a basis here.
    track: (context, matrices, coords, subspaces, state) -> (subspaces, moves,
      state), called after they are computed.
    sample: draws the first bases.
    rebuild: (matrices, state) -> bases, for a rule that recomputes them at
      every step; None for a rule whose bases are stored.
    orthonormal: whether all its bases have P^T P = I, up to rounding.
    needs_gradient: (context, state) -> whether the next step looks at the
      gradient itself rather than only at its coordinates: True, False or
      traced.
    small_steps: whether its bases move by steps so small that rounding to
      integers could lose them.
    most_rows: the longest side that a basis can span; None for no limit.
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
  """Returns how `describe` shows a rule, without arguments that are not set."""
  shown = [
    f'{key}={_shown(value)}'
    for key, value in arguments.items()
    if value is not None and value is not False
  ]
  return f'{name}({", ".join(shown)})'


def _shown(value: Any) -> str:
  return 'traced' if isinstance(value, jax.Array) else repr(value)


def resting(track: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `track`, skipped while the context is not active."""

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
