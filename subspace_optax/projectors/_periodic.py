# SPDX-License-Identifier: Apache-2.0
"""New bases every T steps: the schedule shared by all periodic rules.

Only matrices that are due are processed, one after the other in a loop outside
any vmap. So nothing is factorised between refreshes, and a stack whose layers
take turns pays for one layer at a time. If a stack's batch axes may be spread
over devices, or its bases move at every step, the whole stack is processed and
layers that are not due keep their bases. A matrix whose gradient is zero or not
finite when its refresh is due keeps its basis, and is refreshed at its next
good gradient.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.projectors import _base
from subspace_optax.projectors import _gap

# (matrix, its basis, period) -> new bases, (*batch and projected axes, r).
Draw = Callable[[_base.Matrix, Any, jax.Array], jax.Array]


class PeriodicState(NamedTuple):
  """State of a periodic rule; trees with one leaf per projected leaf."""

  owed: Any  # leaf shape=(*batch,), dtype=bool: refresh at next good G
  schedule: Any  # see `_gap`
  period: Any  # leaf shape=(*batch,), dtype=int32, of the basis; or ()


def periodic(
  name: str,
  draw: Draw,
  update_proj_gap: Any,
  *,
  options: Mapping[str, Any] | None = None,
  stagger: bool,
  uses_gradient: bool = True,
  orthonormal: bool = True,
  sample: _base.Sample | None = None,
  regenerate: bool = False,
) -> _base.Projector:
  """Returns the projector that calls `draw` at steps 0, T, 2T and so on.

  Args:
    name: the name that `describe` shows, without options.
    draw: computes the next basis of a matrix.
    update_proj_gap: T, or a `LazyGap`.
    options: the rule's own arguments, which `describe` shows with those passed
      here; None to show `name` alone.
    stagger: whether matrices take turns within each T steps.
    uses_gradient: whether `draw` looks at the gradient, and needs a good one.
    orthonormal: whether to reject a basis that is not orthonormal as failed.
    sample: draws the first bases; Haar samples by default.
    regenerate: whether to draw bases again at every step instead of storing
      them; `draw` must then not look at the old basis.
  """
  gap = _gap.schedule(update_proj_gap, stagger)
  # Rules that move at every step move a whole stack at once.
  traced = isinstance(update_proj_gap, jax.Array)
  in_turn = stagger or traced or update_proj_gap != 1
  sample = sample or _linalg.haar

  def init(subspaces: _base.Subspaces, matrices: Any) -> PeriodicState:
    del matrices
    per_matrix = subspaces.captured_energy
    owed = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.bool_), per_matrix)
    period = ()
    if regenerate:
      at_init = lambda x: jnp.full_like(x, _base.AT_INIT, jnp.int32)
      period = jax.tree.map(at_init, per_matrix)
    return PeriodicState(owed, gap.init(per_matrix), period)

  def refresh(context, matrices, subspaces, state):
    due, period, schedule = gap.due(context, state.owed, state.schedule)

    def one(matrix, old, owed, due, period):
      each = matrix.layout.batch_axes
      good = matrix.ok if uses_gradient else jnp.ones_like(matrix.ok)
      wanted = (due | (owed & context.active)) & good
      if uses_gradient and matrix.gradient is None:
        new = old  # nothing is due: see `needs_gradient`
      else:
        whole = not in_turn or not _can_take_apart(matrix)
        new = _refresh(draw, orthonormal, matrix, wanted, period, old, whole)
        new = new._replace(moved=matrix.at_home(new.moved, each))
      # A failed factorisation is owed again.
      return new, matrix.at_home((owed | due) & ~new.moved, each)

    old = _base.bases_of(subspaces, jax.tree.map(_base.still, matrices))
    bases, owed = _tree.map_unzip(
      one, 2, matrices, old, state.owed, due, period
    )
    subspaces, moves = _base.with_bases(subspaces, bases)
    state = PeriodicState(
      owed,
      gap.after(schedule, moves, subspaces.drift),
      jax.tree.map(_next_period, state.period, period, moves, matrices)
      if regenerate
      else (),
    )
    return subspaces, moves, state

  def rebuild(matrices, state):
    make = lambda matrix, period: draw(matrix, None, period)
    return jax.tree.map(make, matrices, state.period)

  def needs_gradient(context, state):
    _gap.check_not_traced(update_proj_gap)
    if not uses_gradient:
      return False
    return _gap.any_due(gap, context, state.owed, state.schedule)

  if options is not None:
    name = _base.call(
      name,
      update_proj_gap=update_proj_gap,
      **options,
      stagger=stagger,
      regenerate=regenerate,
    )
  return _base.Projector(
    name,
    init,
    refresh,
    _base.no_track,
    sample,
    rebuild if regenerate else None,
    orthonormal,
    needs_gradient,
  )


def _next_period(
  old: jax.Array, new: jax.Array, move: Any, matrix: _base.Matrix
) -> jax.Array:
  period = jnp.where(move.moved, new, old)
  return matrix.at_home(period, matrix.layout.batch_axes)


def _can_take_apart(matrix: _base.Matrix) -> bool:
  batch = matrix.layout.batch
  return bool(batch) and _sharding.is_whole(matrix.like, batch)


def _refresh(
  draw: Draw,
  orthonormal: bool,
  matrix: _base.Matrix,
  wanted: jax.Array,
  period: jax.Array,
  state: _base.Bases,
  whole: bool,
) -> _base.Bases:
  """Moves the wanted bases, all at once or one after the other."""
  layout = matrix.layout

  def move(matrix, wanted, period, state):
    # A single matrix gets here only if it is wanted.
    alone = math.prod(matrix.layout.batch_shape) == 1
    source = matrix if alone else _only(wanted, matrix)
    candidate = draw(source, state.basis, period)
    return _move(matrix.layout, candidate, wanted, orthonormal, state)

  if whole:
    return _varying.cond(
      jnp.any(wanted),
      lambda: move(matrix, wanted, period, state),
      lambda: state,
    )
  each = layout.batch_axes
  axes = (layout.basis_axes(), each, each, each, each + 'yz')
  turns = jnp.argsort(~wanted.reshape(-1), stable=True)

  def turn(k: jax.Array, state: _base.Bases) -> _base.Bases:
    i = turns[k]
    # The gradient or the mean may be None.
    take: Any = lambda x, axes: x if x is None else layout.take(x, axes, i)
    one = dataclasses.replace(
      matrix,
      like=take(matrix.like, layout.leaf_axes),
      gradient=take(matrix.gradient, layout.leaf_axes),
      layout=layout.one,
      seed=take(matrix.seed, each),
      energy=take(matrix.energy, each),
      ok=take(matrix.ok, each),
      mean=take(matrix.mean, layout.coords_axes()),
    )
    old = _base.Bases(*map(take, state, axes))
    part = move(one, take(wanted, each), take(period, each), old)
    put = lambda x, axes, part: layout.put(x, axes, i, part)
    return _base.Bases(*map(put, state, axes, part))

  return _varying.fori_loop(0, jnp.sum(wanted, dtype=jnp.int32), turn, state)


def _only(wanted: jax.Array, matrix: _base.Matrix) -> _base.Matrix:
  """Returns the leaf with zeros for gradients that are not wanted.

  LAPACK's SVD may never return from a matrix that holds an Inf.
  """
  if matrix.gradient is None:
    return matrix
  gradient = jnp.where(matrix.layout.along_leaf(wanted), matrix.gradient, 0)
  return dataclasses.replace(matrix, gradient=gradient)


def _move(
  layout: _layout.Layout,
  candidate: jax.Array,
  wanted: jax.Array,
  orthonormal: bool,
  old: _base.Bases,
) -> _base.Bases:
  """Takes each wanted candidate whose factorisation succeeded."""
  candidate = _sharding.like(candidate, old.basis)
  wide = _linalg.widen(candidate)
  error = _linalg.orthogonality_error(layout.gram(wide, wide))
  # False for the NaN of a failed factorisation.
  usable = wanted & (error < (0.5 if orthonormal else jnp.inf))
  basis = jnp.where(layout.along_basis(usable), candidate, old.basis)
  return _base.moved_to(layout, usable, basis, error, old)
