# SPDX-License-Identifier: Apache-2.0
"""Updates of stacked layers one by one, so that one layer's moments are floats.

A block's largest value must be known before its codes are written, and XLA
keeps all of a stack's moments in float32 between the two. A loop over layers
does so for one of them. It writes directions over gradients and new codes over
old ones.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.low_precision import _coded_state
from subspace_optax.low_precision import _codes
from subspace_optax.transports import _moments

# Numbers that are worth a turn of a loop, and its most turns. A stack whose
# layers are another axis than the first has thousands of small parts, and a
# program for each of them would take longer than its arithmetic.
_LEAST_SIZE = 2**16
_MOST_TURNS = 128

_State = _coded_state.CodedState

# (updates, state, params, start) -> (directions, new state); `start` is the
# number of an array's first entry, if it is a part of a longer one.
Step = Callable[..., tuple[Any, _State]]


def update(
  step: Step, updates: Any, state: _State, params: Any
) -> tuple[Any, _State]:
  """Returns `step(updates, state, params)`, of stacks layer by layer.

  All at once if an update may depend on other numbers than its own, or if the
  layers may lie on several devices.
  """
  leaves = dict(_tree.flatten(updates)[0])
  stacks = _find_stacks(leaves, state)
  if not stacks:
    return step(updates, state, params)
  others = [path for path in leaves if path not in stacks]
  parts = [step(*_pick(others, updates, state), None)] if others else []
  parts += [
    _each_layer(step, *_pick([path], updates, state)) for path in stacks
  ]
  directions, states = zip(*parts, strict=True)
  return _joined(updates, directions), _joined_states(state, states)


def _find_stacks(leaves: dict[str, Any], state: _State) -> list[str]:
  """Returns the paths of leaves that are updated layer by layer."""
  if not _moments.are_elementwise(state.coded):
    return []
  moments = _coded_state.moments_of(state).values()
  codes = [dict(_tree.flatten(tree)[0]) for tree, _ in moments]
  return [
    path
    for path, leaf in leaves.items()
    if all(_is_stack(leaf, tree.get(path)) for tree in codes)
  ]


def _is_stack(leaf: Any, codes: Any) -> bool:
  return (
    _codes.are_codes(codes)
    and codes.ndim > 2
    and _layers_in_turn(codes.shape) < codes.shape[0]
    and jnp.issubdtype(leaf.dtype, jnp.inexact)  # as directions will be
    and all(_sharding.is_whole(x, (0,)) for x in (leaf, codes))
  )


def _layers_in_turn(shape: Sequence[int]) -> int:
  """Returns how many layers a turn takes, all if the leaf is no stack."""
  layers, size = shape[0], math.prod(shape[1:])
  fits = (
    n
    for n in range(1, layers + 1)
    if layers % n == 0 and layers <= n * _MOST_TURNS and n * size >= _LEAST_SIZE
  )
  return next(fits, layers)


def _each_layer(step: Step, updates: Any, state: _State) -> tuple[Any, _State]:
  """Returns `step` of one stack, in a loop that overwrites its arguments."""
  (stack,) = updates.values()
  n = _layers_in_turn(stack.shape)
  turns, size = len(stack) // n, np.uint32(math.prod(stack.shape[1:]))

  def one(i: jax.Array, carried: tuple[Any, _State]) -> tuple[Any, _State]:
    first = n * i
    take = lambda x: lax.dynamic_slice_in_dim(x, first, n)
    put = lambda x, layer: lax.dynamic_update_slice_in_dim(x, layer, first, 0)
    stacks = carried[0], _coded_state.moments_of(carried[1])
    gradients, moments = jax.tree.map(take, stacks)
    # With the counters before the step: `carried` has those after it.
    old = _coded_state.with_moments(state, moments)
    start = first.astype(jnp.uint32) * size
    run = lambda gradients, old: step(gradients, old, None, start)
    directions, new = _apart(run, i < turns, gradients, old)
    layer = directions, _coded_state.moments_of(new)
    directions, moments = jax.tree.map(put, stacks, layer)
    return directions, _coded_state.with_moments(new, moments)

  return _varying.fori_loop(0, turns, one, (updates, state))


def _apart(run: Callable[..., Any], always: jax.Array, *layer: Any) -> Any:
  """Returns `run(*layer)`, of arrays that are apart from their stacks.

  XLA would otherwise read stacks while it overwrites them, and make copies to
  do so. For CPUs it removes barriers, but not a branch that is always taken,
  around which it makes copies for a TPU.
  """

  def behind_barrier(*layer: Any) -> Any:
    found = run(*lax.optimization_barrier(layer))
    return jax.tree.map(_varying.vary_as, found, layer)

  def in_branch(*layer: Any) -> Any:
    return _varying.cond(always, run, lambda *layer: layer, *layer)

  return lax.platform_dependent(*layer, cpu=in_branch, default=behind_barrier)


def _pick(
  paths: Sequence[str], updates: Any, state: _State
) -> tuple[Any, _State]:
  """Returns updates and state of some leaves, in dicts by path."""

  def only(tree: Any) -> Any:
    leaves = dict(_tree.flatten(tree)[0])
    return {path: leaves[path] for path in paths}

  moments = {
    path: tuple(map(only, trees))
    for path, trees in _coded_state.moments_of(state).items()
  }
  return only(updates), _coded_state.with_moments(state, moments)


def _joined(tree: Any, parts: Sequence[Any]) -> Any:
  """Returns dicts by path of all leaves of a tree, in its form."""
  found = {path: x for part in parts for path, x in part.items()}
  pairs, treedef = _tree.flatten(tree)
  return treedef.unflatten([found[path] for path, _ in pairs])


def _joined_states(state: _State, parts: Sequence[_State]) -> _State:
  """Returns a state like `state` of the states of all its leaves."""
  moments = [_coded_state.moments_of(part) for part in parts]
  joined = {
    path: tuple(
      _joined(tree, [of[path][i] for of in moments])
      for i, tree in enumerate(trees)
    )
    for path, trees in _coded_state.moments_of(state).items()
  }
  return _coded_state.with_moments(parts[0], joined)
