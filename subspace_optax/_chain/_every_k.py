# SPDX-License-Identifier: Apache-2.0
"""Accumulation of gradients in their subspaces.

`optax.MultiSteps` around an optimizer keeps sums of whole gradients. Inside
`in_subspace` it keeps sums of coordinates, but bases may move within a window,
and later transformations run at every micro-step. Here the basis does not move
within a window, and all later transformations run once, at its end.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _first_states
from subspace_optax._chain import _in_subspace
from subspace_optax._chain import _projection
from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying


class EveryKState(NamedTuple):
  """State for k micro-steps per step."""

  micro_step: jax.Array  # shape=(), dtype=int32, gradients so far
  mean: Any  # tree, leaf shape=the coordinates' or leaf's, dtype=float32
  project: Any
  in_subspace: Any
  rest: Any  # state of later transformations, which run once per window


def every_k(
  k: int,
  spec: _spec.SubspaceSpec,
  project: _projection.Projection,
  in_subspace: _in_subspace.InSubspace,
  rest: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """Chains the three stages, with a step for the mean of every k gradients.

  The first gradient of a window refreshes bases, and the last one tracks them.
  The other updates are zero.
  """

  def init(params):
    return _first_states.make_state(spec, first_state, params)

  def first_state(params, matches, treedef):
    return EveryKState(
      jnp.zeros((), jnp.int32),
      treedef.unflatten([_make_zeros(match) for match in matches]),
      project.init(params),
      in_subspace.init(params),
      rest.init(params),
    )

  def update(
    updates,
    state,
    params=None,
    *,
    refresh_gradients=None,
    given=None,
    **extra_args,
  ):
    given = given or _projection.Given()
    # `micro_step` exceeds k - 1 if the state had a larger k; end its window.
    first, last = state.micro_step == 0, state.micro_step >= k - 1
    seen = project.refresh_and_project(
      updates, state.project, params, refresh_gradients, given, first
    )
    nodes, project_state = project.track_bases(
      updates, state.project, seen, given, last
    )
    add = functools.partial(_add_to_mean, state.micro_step)
    mean = _tree.map_entries(add, state.mean, nodes)
    nodes = _tree.map_entries(_put_mean, nodes, mean)
    own = in_subspace.carry_before(nodes, state.in_subspace)
    run = functools.partial(in_subspace.run, nodes, params=params, **extra_args)
    directions, new = _run_if(last, run, own)
    nodes, in_state = in_subspace.carry_after(
      nodes, state.in_subspace, own, directions, new
    )
    finish = lambda rest_state: rest.update(
      nodes, rest_state, params, **extra_args
    )
    updates, rest_state = _run_if(last, finish, state.rest)
    return updates, EveryKState(
      jnp.where(last, 0, state.micro_step + 1),
      mean,
      project_state,
      in_state,
      rest_state,
    )

  return optax.GradientTransformationExtraArgs(init, _boxes.bare(update))


def _run_if(
  wanted: jax.Array, f: Callable[[Any], tuple[Any, Any]], state: Any
) -> tuple[Any, Any]:
  """Returns `f(state)` if wanted, else zeros like its result and the state."""

  def run(state):
    result, new = f(state)
    # Both branches must agree in dtypes.
    return result, jax.tree.map(_sharding.like, new, state)

  def wait(state):
    kinds, _ = _sharding.result_types(run, state)
    return jax.tree.map(_sharding.zeros, kinds), state

  return _varying.cond(wanted, run, wait, state)


def _make_zeros(match: _spec.Match | None) -> Any:
  """Returns zeros for the mean of a leaf's gradients, or coordinates."""
  if match is None:
    return optax.MaskedNode()
  wide = jnp.promote_types(match.leaf.dtype, jnp.float32)
  if match.layout is None:
    return jnp.zeros_like(match.leaf, wide)
  return _first_states.zero_coords(match.layout, match.leaf, wide)


def _add_to_mean(
  micro_step: jax.Array, path: str, mean: Any, entry: Any
) -> Any:
  """Returns the mean of the window's gradients so far."""
  del path
  if _tree.is_masked(entry):
    return mean
  x = entry.coords if isinstance(entry, _projected.Projected) else entry
  start = jnp.where(micro_step == 0, jnp.zeros_like(mean), mean)
  share = 1.0 / (micro_step + 1).astype(mean.dtype)
  new = start + share * (x.astype(mean.dtype) - start)
  return _sharding.like(new, mean)


def _put_mean(path: str, entry: Any, mean: Any) -> Any:
  """Returns an entry with its gradient replaced by the mean of its window."""
  del path
  if _tree.is_masked(entry):
    return entry
  if isinstance(entry, _projected.Projected):
    return dataclasses.replace(entry, coords=mean.astype(entry.coords.dtype))
  return mean
