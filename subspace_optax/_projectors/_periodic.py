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
"""New bases every so many steps: the schedule shared by all such rules.

One unbatched predicate per leaf decides, outside any vmap, so that the
factorisation is skipped between refreshes. A matrix whose gradient is zero or
not finite when a refresh is due keeps its basis, and is refreshed at its next
good gradient.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax import _linalg
from subspace_optax import _projected
from subspace_optax import _sharding
from subspace_optax import _tree
from subspace_optax._projectors import _base

# (matrix, period) -> orthonormal bases, (*batch and projected axes, r), float32
Draw = Callable[[_base.Matrix, jax.Array], jax.Array]


class PeriodicState(NamedTuple):
  """State of a periodic rule."""

  owed: Any  # tree, leaf shape=(*batch,), dtype=bool: refresh at next good G


def check_gap(update_proj_gap: Any) -> None:
  """Raises unless the gap is a positive int, or traced."""
  if isinstance(update_proj_gap, jax.Array):
    return
  if isinstance(update_proj_gap, bool) or not hasattr(
    update_proj_gap, '__index__'
  ):
    raise TypeError(
      f'update_proj_gap must be a number of steps, got {update_proj_gap!r}.'
    )
  if update_proj_gap < 1:
    raise ValueError(
      f'update_proj_gap must be at least 1, got {update_proj_gap}.'
    )


def periodic(
  name: str, draw: Draw, update_proj_gap: Any, *, uses_gradient: bool
) -> _base.Projector:
  """Returns the projector that calls `draw` at steps 0, T, 2T and so on."""
  check_gap(update_proj_gap)

  def init(subspaces: _base.Subspaces) -> PeriodicState:
    owed = jax.tree.map(
      lambda x: jnp.zeros_like(x, jnp.bool_), subspaces.captured_energy
    )
    return PeriodicState(owed)

  def refresh(context, matrices, subspaces, state):
    due = context.active & (context.count % update_proj_gap == 0)
    period = context.count // update_proj_gap

    def one(basis, matrix, error, drift, owed):
      good = matrix.ok if uses_gradient else jnp.ones_like(matrix.ok)
      wants = due | (owed & context.active)
      moves = wants & good
      new, error, drift, move = lax.cond(
        jnp.any(moves),
        lambda: _move(
          matrix.layout,
          basis,
          draw(_only(moves, matrix) if uses_gradient else matrix, period),
          moves,
          error,
          drift,
        ),
        lambda: (basis, error, drift, _base.still(matrix)),
      )
      # A factorisation that failed is owed, too.
      owed = (owed | due) & ~move.moved
      return new, error, drift, owed, move

    basis, error, drift, owed, moves = _tree.map_unzip(
      one,
      5,
      subspaces.basis,
      matrices,
      subspaces.orthogonality_error,
      subspaces.drift,
      state.owed,
    )
    subspaces = subspaces._replace(
      basis=basis, orthogonality_error=error, drift=drift
    )
    return subspaces, moves, PeriodicState(owed)

  return _base.Projector(name, init, refresh, _base.no_track)


def _only(moves: jax.Array, matrix: _base.Matrix) -> _base.Matrix:
  """Returns the leaf with zeros for the gradients that don't count.

  LAPACK's SVD may never return from a matrix that holds an Inf.
  """
  gradient = jnp.where(matrix.layout.along_leaf(moves), matrix.gradient, 0)
  return dataclasses.replace(matrix, gradient=gradient)


def _move(layout, old, candidate, moves, error, drift):
  """Takes the candidates that came out orthonormal, where a move is wanted."""
  candidate = _sharding.like(candidate, old)
  wide = _linalg.widen(candidate)
  new_error = _linalg.orthogonality_error(layout.gram(wide, wide))
  usable = moves & (new_error < 0.5)  # False for NaN: a failed factorisation
  new = jnp.where(layout.along_basis(usable), candidate, old)
  step = _linalg.transition(layout, new, old)
  step = jnp.where(usable[..., None, None], step, _linalg.identity_like(step))
  # Chordal distance of the two subspaces, as a share of the largest possible.
  kept = jnp.sum(jnp.square(step), axis=(-2, -1)) / layout.rank
  moved_by = jnp.sqrt(jnp.maximum(1.0 - kept, 0.0))
  error = jnp.where(usable, new_error.astype(error.dtype), error)
  drift = jnp.where(usable, moved_by.astype(drift.dtype), drift)
  move = _projected.Move(usable, step.astype(jnp.float32))
  return new, error, drift, move
