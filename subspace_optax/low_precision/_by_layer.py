# SPDX-License-Identifier: Apache-2.0
"""Updates arrays part by part, so that only one part's moments are floats.

A block's largest value must be known before its codes are written, and XLA
keeps all of an array's moments in float32 in between. A loop over the layers of
a stack, or over rows of an embedding of 70 million or more numbers, keeps those
of one part. It writes directions over gradients and new codes over old codes.
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
from subspace_optax.low_precision import _blocks
from subspace_optax.low_precision import _coded_state
from subspace_optax.low_precision import _codes
from subspace_optax.transports import _moments

# The fewest numbers worth a turn of the loop, and its most turns. A stack whose
# layers are not its first axis has thousands of small parts, and a program for
# each of them would take longer than its arithmetic.
_LEAST_SIZE = 2**16
_MOST_TURNS = 128

# The fewest numbers per turn for a single matrix, and the size from which a
# matrix is worth a loop. For LLaMA-7B's embedding the loop saves 3 GB.
_LEAST_ROWS = 2**22
_LARGE = 2**26

_State = _coded_state.CodedState

# (updates, state, params, start) -> (directions, new state). For an array that
# is part of a larger one, `start` is the index of its first entry there.
Step = Callable[..., tuple[Any, _State]]


def update(
  step: Step, updates: Any, state: _State, params: Any
) -> tuple[Any, _State]:
  """Returns `step(updates, state, params)`, with large arrays part by part.

  It updates whole arrays if an update may depend on other numbers than its own,
  or if the parts may lie on several devices.
  """
  leaves = dict(_tree.flatten(updates)[0])
  turns = _find_turns(leaves, state)
  if not turns:
    return step(updates, state, params)
  others = [path for path in leaves if path not in turns]
  parts = [step(*_pick(others, updates, state), None)] if others else []
  parts += [
    _each_part(step, *_pick([path], updates, state), n)
    for path, n in turns.items()
  ]
  directions, states = zip(*parts, strict=True)
  return _joined(updates, directions), _joined_states(state, states)


def _find_turns(leaves: dict[str, Any], state: _State) -> dict[str, int]:
  """Returns the leaves to update in turns, as numbers of turns by path."""
  if not _moments.are_elementwise(state.coded):
    return {}
  moments = _coded_state.moments_of(state).values()
  pairs = [
    [dict(_tree.flatten(tree)[0]) for tree in trees] for trees in moments
  ]
  found = {
    path: _turns_of(
      leaf, [(codes.get(path), scales[path]) for codes, scales in pairs]
    )
    for path, leaf in leaves.items()
  }
  return {path: turns for path, turns in found.items() if turns > 1}


def _turns_of(leaf: Any, moments: Sequence[tuple[Any, Any]]) -> int:
  """Returns the number of turns for a leaf with these codes and scales."""
  codes = [x for x, _ in moments]
  if not (
    all(map(_codes.are_codes, codes))
    and jnp.issubdtype(leaf.dtype, jnp.inexact)  # like directions
    and all(_sharding.is_whole(x, (0,)) for x in (leaf, *codes))
  ):
    return 1
  cuts = [_blocks.Blocks(x.shape, y.shape).cuts()[0] for x, y in moments]
  return _turns(leaf.shape, math.gcd(*cuts))


def _turns(shape: Sequence[int], cuts: int) -> int:
  """Returns into how many parts, of equal numbers of rows, to cut an array.

  Args:
    shape: shape of the array; its rows are layers if it has more than two axes.
    cuts: into how many parts its rows can be cut without cutting a block.
  """
  size, is_stack = math.prod(shape), len(shape) > 2
  least = _LEAST_SIZE if is_stack else _LEAST_ROWS
  if not is_stack and size < _LARGE:
    return 1
  possible = [n for n in range(2, _MOST_TURNS + 1) if cuts % n == 0]
  worth_it = [n for n in possible if size >= n * least]
  # Short turns are better than a whole embedding in float32.
  fewest = possible[:1] if not is_stack else []
  return max(worth_it or fewest, default=1)


def _each_part(
  step: Step, updates: Any, state: _State, turns: int
) -> tuple[Any, _State]:
  """Returns `step` of one leaf, in a loop that overwrites its arguments."""
  (leaf,) = updates.values()
  row = np.uint32(math.prod(leaf.shape[1:]))
  of_leaf = lambda carried: (carried[0], _coded_state.moments_of(carried[1]))
  # Scales may have fewer rows than codes.
  rows = lambda x: x.shape[0] // turns
  counts = sorted({rows(x) for x in jax.tree.leaves(of_leaf((updates, state)))})

  def one(i: jax.Array, carried: tuple[Any, _State]) -> tuple[Any, _State]:
    first = {n: n * i for n in counts}
    take = lambda x: lax.dynamic_slice_in_dim(x, first[rows(x)], rows(x))
    put = lambda x, part: lax.dynamic_update_slice_in_dim(
      x, part, first[rows(x)], 0
    )
    whole = of_leaf(carried)
    gradients, moments = jax.tree.map(take, whole)
    # Take counters from before the step: `carried` has those after it.
    old = _coded_state.with_moments(state, moments)
    start = first[rows(leaf)].astype(jnp.uint32) * row
    run = lambda gradients, old: step(gradients, old, None, start)
    directions, new = _apart(run, i < turns, gradients, old)
    directions, moments = jax.tree.map(put, whole, of_leaf((directions, new)))
    return directions, _coded_state.with_moments(new, moments)

  return _varying.fori_loop(0, turns, one, (updates, state))


def _apart(run: Callable[..., Any], always: jax.Array, *part: Any) -> Any:
  """Returns `run(*part)`, keeping the parts separate from the arrays they cut.

  Otherwise XLA would read these arrays while overwriting them, and copy them to
  do so. On CPUs, XLA removes barriers but not a branch that is always taken; on
  a TPU it makes copies around such a branch.
  """

  def behind_barrier(*part: Any) -> Any:
    found = run(*lax.optimization_barrier(part))
    return jax.tree.map(_varying.vary_as, found, part)

  def in_branch(*part: Any) -> Any:
    return _varying.cond(always, run, lambda *part: part, *part)

  return lax.platform_dependent(*part, cpu=in_branch, default=behind_barrier)


def _pick(
  paths: Sequence[str], updates: Any, state: _State
) -> tuple[Any, _State]:
  """Returns the updates and state of some leaves, as dicts by path."""

  def only(tree: Any) -> Any:
    leaves = dict(_tree.flatten(tree)[0])
    return {path: leaves[path] for path in paths}

  moments = {
    path: tuple(map(only, trees))
    for path, trees in _coded_state.moments_of(state).items()
  }
  return only(updates), _coded_state.with_moments(state, moments)


def _joined(tree: Any, parts: Sequence[Any]) -> Any:
  """Joins dicts by path, which cover all leaves, into the form of `tree`."""
  found = {path: x for part in parts for path, x in part.items()}
  pairs, treedef = _tree.flatten(tree)
  return treedef.unflatten([found[path] for path, _ in pairs])


def _joined_states(state: _State, parts: Sequence[_State]) -> _State:
  """Joins the states of all leaves into one state like `state`."""
  moments = [_coded_state.moments_of(part) for part in parts]
  joined = {
    path: tuple(
      _joined(tree, [of[path][i] for of in moments])
      for i, tree in enumerate(trees)
    )
    for path, trees in _coded_state.moments_of(state).items()
  }
  return _coded_state.with_moments(parts[0], joined)
