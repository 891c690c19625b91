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
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _placement
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _varying


class Subspaces(NamedTuple):
  """The bases and how good they are; trees with the parameters' structure.

  `MaskedNode` stands for leaves that are not projected.
  """

  # leaf shape=(*batch and projected axes, r), dtype=basis_dtype; () between
  # steps if the projector draws them again; if that is an integer, a
  # `QuantizedBasis` between steps, which projectors see as float32
  basis: Any
  captured_energy: Any  # leaf shape=(*batch,), dtype=float32, of the last G
  orthogonality_error: Any  # leaf shape=(*batch,), dtype=float32
  drift: Any  # leaf shape=(*batch,), dtype=float32, of the last move


@dataclasses.dataclass(frozen=True)
class Matrix:
  """One projected leaf, as projectors see it.

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
    mean: of past coordinates, for a rule that keeps it.
  """

  like: jax.Array
  gradient: Any
  layout: _layout.Layout
  seed: jax.Array
  energy: jax.Array
  ok: jax.Array
  mean: jax.Array | None = None


def whole(matrix: Matrix) -> jax.Array:
  """Returns (*batch, rows, columns), G as every device must have it."""
  gradient = matrix.layout.mean(matrix.gradient)
  return matrix.layout.to_matrix(_sharding.replicate(gradient))


class Context(NamedTuple):
  """What holds for all leaves in this step."""

  count: jax.Array  # shape=(), dtype=int32, steps before this one
  active: jax.Array  # shape=(), dtype=bool, False while `switch` rests a rule
  moves: Any = None  # for `track`: the tree of `Move` that `refresh` made


# (layout, seeds, period) -> bases that depend on nothing else.
Sample = Callable[[_layout.Layout, jax.Array, Any], jax.Array]

# The period in the keys of the first bases, which no schedule reaches.
AT_INIT = 2**31 - 1


class Projector(NamedTuple):
  """A rule that finds and moves the basis of every matrix.

  Attributes:
    name: what `describe` calls it.
    init: (subspaces, zero_coords) -> the rule's own state, made of trees with
      the structure of the first subspaces; `zero_coords()` is a tree of float32
      zeros where coordinates will be.
    refresh: (context, matrices, subspaces, state) -> (subspaces, moves, state),
      before this step's coordinates are taken. `moves` is a tree of `Move`, or
      None if the rule never moves a basis here.
    track: (context, matrices, coords, subspaces, state) -> (subspaces, moves,
      state), after they are taken.
    sample: draws the first bases.
    rebuild: (matrices, state) -> bases, for a rule that draws them again at
      every step; None for one whose bases are stored.
    orthonormal: whether all its bases have P^T P = I, up to rounding.
    needs_gradient: (context, state) -> whether the coming step looks at the
      gradient and not at its coordinates alone: True, False or traced.
    small_steps: whether its bases move by steps that the rounding of integers
      could swallow.
  """

  name: str
  init: Callable[[Subspaces, Callable[[], Any]], Any]
  refresh: Callable[..., tuple[Subspaces, Any, Any]]
  track: Callable[..., tuple[Subspaces, Any, Any]]
  sample: Sample = _linalg.haar
  rebuild: Callable[[Any, Any], Any] | None = None
  orthonormal: bool = True
  needs_gradient: Callable[[Context, Any], Any] = lambda context, state: True
  small_steps: bool = False


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
