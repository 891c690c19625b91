# SPDX-License-Identifier: Apache-2.0
"""When bases are refreshed: every T steps, in turns, or less and less often.

The last is the lazy refresh of Zhang et al., `Q-GaLore
<https://arxiv.org/abs/2407.08296>`_, 2024.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import core
import jax.numpy as jnp

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _tree
from subspace_optax.projectors import _base

# The limit of a growing gap, so that the step after it still fits an int32.
_MOST_GAP = 2**30


@dataclasses.dataclass(frozen=True)
class LazyGap:
  """A gap that grows, matrix by matrix, where bases hardly change.

  Pass it as `update_proj_gap`. Each refresh of a matrix records one number: the
  root mean square of the cosines of the angles between its new and its old
  subspace. When the mean of the last `window` numbers reaches `threshold`, the
  matrix's gap is multiplied by `factor`. (Q-GaLore uses the cosine of the first
  singular vectors, which not every rule has.) This is of no use with rules
  whose bases are random or turn gradually.

  Attributes:
    start: T, steps between the first refreshes.
    threshold: value of the mean cosine at which the gap grows, in (0, 1].
    factor: multiplies the gap, an int of at least 2.
    window: number of cosines to average over.

  Raises:
    TypeError: `start`, `factor` or `window` is not an int.
    ValueError: they are below 1, or 2 for `factor`, or above 2**30; a
      threshold outside (0, 1].

  References:
    Zhang et al., `Q-GaLore <https://arxiv.org/abs/2407.08296>`_, 2024

  Example:
    >>> from subspace_optax import projectors
    >>> bases = projectors.svd(projectors.LazyGap(200))
  """

  start: int = 200
  threshold: float = 0.4
  factor: int = 2
  window: int = 5

  def __post_init__(self):
    _arguments.check_int(self.start, 'start', most=_MOST_GAP)
    _arguments.check_int(self.factor, 'factor', least=2, most=_MOST_GAP)
    _arguments.check_int(self.window, 'window')
    if not 0 < self.threshold <= 1:
      raise ValueError(f'threshold must lie in (0, 1], got {self.threshold}.')


def schedule(update_proj_gap: Any, stagger: bool) -> '_Fixed | _Lazy':
  """Returns the schedule that a periodic rule follows."""
  if isinstance(update_proj_gap, LazyGap):
    return _Lazy(update_proj_gap, stagger)
  if not isinstance(update_proj_gap, jax.Array):
    _arguments.check_int(update_proj_gap, 'update_proj_gap')
  return _Fixed(update_proj_gap, stagger)


def check_not_traced(gap: Any) -> None:
  """Raises if `update_proj_gap` is traced, which compressed steps can't use."""
  if isinstance(gap, core.Tracer):
    raise ValueError(
      'update_proj_gap must be static for compressed steps; under '
      "optax.inject_hyperparams, pass static_args=('update_proj_gap', ...)."
    )


def any_due(
  gap: '_Fixed | _Lazy', context: _base.Context, owed: Any, schedule: Any
) -> Any:
  """Returns whether any matrix is due or owed a refresh in this step."""
  due, _, _ = gap.due(context, owed, schedule)
  wanted = jax.tree.map(
    lambda due, owed: jnp.any(due | (owed & context.active)), due, owed
  )
  wanted = jax.tree.leaves(wanted)
  return jnp.any(jnp.stack(wanted)) if wanted else False


class FixedState(NamedTuple):
  """State of a fixed gap."""

  phase: Any  # tree, leaf shape=(*batch,), dtype=float32, in [0, 1); or ()


class LazyState(NamedTuple):
  """State of a lazy gap; trees with one leaf per projected leaf."""

  gap: Any  # leaf shape=(*batch,), dtype=int32
  due: Any  # leaf shape=(*batch,), dtype=int32, the next refresh
  # leaf shape=(*batch, window), dtype=float32; -1: none yet, -2: no basis yet
  cosines: Any


def _phases(per_matrix: Any) -> Any:
  """Returns at which part of a gap each matrix has its turn, evenly spread."""
  leaves, treedef = jax.tree.flatten(per_matrix)
  total = sum(leaf.size for leaf in leaves)
  phases, first = [], 0
  for leaf in leaves:
    # In the middle of its share, where rounding can't move it to another step.
    turns = jnp.arange(first, first + leaf.size, dtype=jnp.float32) + 0.5
    # Adding zeros like the leaf places them on the leaf's devices.
    phases.append(turns.reshape(leaf.shape) / total + jnp.zeros_like(leaf))
    first += leaf.size
  return treedef.unflatten(phases)


class _Fixed(NamedTuple):
  """Refreshes at steps 0, T, 2T..., or at each matrix's own turn in a gap."""

  gap: Any
  stagger: bool

  def init(self, per_matrix: Any) -> FixedState:
    return FixedState(_phases(per_matrix) if self.stagger else ())

  def due(self, context: _base.Context, per_matrix: Any, state: Any):
    """Returns which matrices are due, their periods, and the new state."""

    def one(like: jax.Array, phase: jax.Array | None = None):
      since = context.count + jnp.zeros_like(like, jnp.int32)
      if phase is not None:
        since -= (phase * self.gap).astype(jnp.int32)
      return context.active & (since % self.gap == 0), since // self.gap

    rest = (state.phase,) if self.stagger else ()
    return (*_tree.map_unzip(one, 2, per_matrix, *rest), state)

  def after(self, state: Any, moves: Any, drift: Any) -> FixedState:
    """Returns the state, given which matrices moved and how far."""
    del moves, drift
    return state


class _Lazy(NamedTuple):
  """Refreshes less and less often where the basis hardly changes."""

  lazy: LazyGap
  stagger: bool

  def init(self, per_matrix: Any) -> LazyState:
    start, window = self.lazy.start, self.lazy.window
    gap = jax.tree.map(lambda x: jnp.full_like(x, start, jnp.int32), per_matrix)
    due = jax.tree.map(jnp.zeros_like, gap)
    if self.stagger:
      turn = lambda phase: (phase * start).astype(jnp.int32)
      due = jax.tree.map(turn, _phases(per_matrix))
    none = lambda x: jnp.stack([jnp.full_like(x, -2.0)] * window, axis=-1)
    return LazyState(gap, due, jax.tree.map(none, per_matrix))

  def due(self, context: _base.Context, per_matrix: Any, state: Any):
    """Returns which matrices are due, their periods, and the new state."""

    def one(like: jax.Array, due: jax.Array, gap: jax.Array):
      now = context.count >= due
      # Turns continue to pass while `switch` rests the rule.
      due = jnp.where(now, context.count + gap, due)
      period = context.count + jnp.zeros_like(like, jnp.int32)
      return now & context.active, period, due

    now, period, due = _tree.map_unzip(one, 3, per_matrix, state.due, state.gap)
    return now, period, state._replace(due=due)

  def after(self, state: Any, moves: Any, drift: Any) -> LazyState:
    """Returns the state with longer gaps for bases that changed little."""

    def one(gap, due, cosines, move, drift):
      cosine = jnp.sqrt(jnp.maximum(1.0 - jnp.square(drift), 0.0))[..., None]
      latest = jnp.concatenate([cosines[..., 1:], cosine], axis=-1)
      # The basis from `init` was random: there is nothing to compare with.
      latest = jnp.where(cosines < -1.0, -1.0, latest)
      cosines = jnp.where(move.moved[..., None], latest, cosines)
      full = cosines[..., 0] >= 0
      alike = full & (jnp.mean(cosines, axis=-1) >= self.lazy.threshold)
      alike &= gap <= _MOST_GAP // self.lazy.factor
      longer = jnp.where(move.moved & alike, gap * self.lazy.factor, gap)
      return longer, due + (longer - gap), cosines

    return LazyState(
      *_tree.map_unzip(
        one, 3, state.gap, state.due, state.cosines, moves, drift
      )
    )
