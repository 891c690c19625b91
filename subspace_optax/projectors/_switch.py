# SPDX-License-Identifier: Apache-2.0
"""One projector after another: GoLore@x% and other schedules of rules.

He et al., `Subspace Optimization for Large Language Models with Convergence
Guarantees <https://arxiv.org/abs/2410.11289>`_, 2024, Section 5: SVD while the
gradient is mostly signal, random bases once it is mostly noise.
"""

from collections.abc import Mapping
import functools

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _projected
from subspace_optax.projectors import _base


def switch(projectors: Mapping[int, _base.Projector]) -> _base.Projector:
  """Uses each projector from its first step until the next projector's.

  A periodic projector takes over at the first of its own refreshes that is not
  before its first step; until then the basis stays.

  Args:
    projectors: maps first steps, ints, to projectors. One must start at step 0.

  Returns:
    A projector; its state holds the states of all of them.

  Raises:
    ValueError: no projector for step 0, or a negative step; a projector that
      recomputes its bases at every step.
    TypeError: a step that is not an int; a value that is not a projector.

  References:
    He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    GoLore@20% of 10,000 steps:

    >>> from subspace_optax import projectors
    >>> golore_20 = projectors.switch(
    ...   {0: projectors.svd(200), 8_000: projectors.stiefel(200)}
    ... )
  """
  for step in projectors:
    if isinstance(step, bool) or not isinstance(step, int):
      raise TypeError(f'projectors must be keyed by int steps, got {step!r}.')
  starts = sorted(projectors)
  if not starts or starts[0] != 0:
    raise ValueError(f'projectors must start at step 0, got steps {starts}.')
  _arguments.check_int(starts[-1], 'the last step of projectors', least=0)
  rules = [projectors[start] for start in starts]
  for start, rule in zip(starts, rules, strict=True):
    if not isinstance(rule, _base.Projector):
      raise TypeError(
        f'projectors[{start}] must come from subspace_optax.projectors, got '
        f'{rule!r}.'
      )
  for rule in rules:
    if rule.rebuild:
      raise ValueError(
        f'switch stores its bases, but {rule.name} makes them again at every '
        'step; leave out regenerate=True, or take a projector that stores them.'
      )

  def init(subspaces, matrices):
    return tuple(rule.init(subspaces, matrices) for rule in rules)

  def in_turn(context, state):
    """Yields each rule, the context it sees, and its state."""
    ends = [*starts[1:], None]
    for rule, start, end, own in zip(rules, starts, ends, state, strict=True):
      now = context.count >= start
      if end is not None:
        now &= context.count < end
      yield rule, context._replace(active=context.active & now), own

  def run(phase_of, context, seen, subspaces, state):
    moves, new_state = [], []
    for rule, own_context, own in in_turn(context, state):
      phase = phase_of(rule)
      subspaces, move, own = phase(own_context, *seen, subspaces, own)
      moves.append(move)
      new_state.append(own)
    return subspaces, _merge(subspaces.basis, moves), tuple(new_state)

  def refresh(context, matrices, subspaces, state):
    phase_of = lambda rule: rule.refresh
    return run(phase_of, context, (matrices,), subspaces, state)

  def track(context, matrices, coords, subspaces, state):
    phase_of = lambda rule: _base.resting(rule.track)
    return run(phase_of, context, (matrices, coords), subspaces, state)

  def needs_gradient(context, state):
    needs = False
    for rule, own_context, own in in_turn(context, state):
      of_rule = rule.needs_gradient(own_context, own)
      if of_rule is not False:  # else the step would be made twice
        needs |= own_context.active & of_rule
    return needs

  parts = ', '.join(
    f'{s}: {r.name}' for s, r in zip(starts, rules, strict=True)
  )
  return _base.Projector(
    f'switch({parts})',
    init,
    refresh,
    track,
    rules[0].sample,
    orthonormal=all(rule.orthonormal for rule in rules),
    needs_gradient=needs_gradient,
    small_steps=any(rule.small_steps for rule in rules),
  )


def _merge(bases, moves):
  """Returns the one move that happened; only one rule is active at a time."""
  moves = [move for move in moves if move is not None]
  if not moves:
    return None

  def pick(one: _projected.Move, other: _projected.Move) -> _projected.Move:
    of_other = other.moved[..., None, None]
    transition = jnp.where(of_other, other.transition, one.transition)
    return _projected.Move(one.moved | other.moved, transition)

  def merge(basis, *of_leaf):
    del basis
    return functools.reduce(pick, of_leaf)

  return jax.tree.map(merge, bases, *moves)
