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
"""The inner optimizer on coordinates: the piece that owns its state."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax import _per_matrix
from subspace_optax import _projected
from subspace_optax import _sharding
from subspace_optax import _spec
from subspace_optax import _transport
from subspace_optax import _tree


class InSubspaceState(NamedTuple):
  """State of `in_subspace`."""

  inner: Any  # the inner optimizer's state, moments in coords' shape


def in_subspace(
  inner: optax.GradientTransformation,
  spec: _spec.SubspaceSpec,
  *,
  transport: str = 'keep',
) -> optax.GradientTransformationExtraArgs:
  """Runs an optimizer on coordinates, as if they were the gradients.

  The inner optimizer sees one tree: coordinates in place of projected leaves,
  everything else as it is. Its state keeps the dtypes it was made with, and
  its arithmetic on coordinates is float32 or wider.

  Args:
    inner: any optax transformation that needs no params.
    spec: the one given to `project`.
    transport: what happens to the inner state when a basis moves: 'keep'
      nothing (GaLore); 'first' maps first moments by C = P_n^T P_o (GoLore's
      momentum projection), known for Adam, momentum (trace), Lion and RMSProp;
      'reset' starts the state of a matrix anew (RSO), for which each matrix,
      and each plain leaf, gets a state of its own, counters included: an inner
      optimizer that looks at the whole tree then sees one matrix at a time.
      With `online_pca`, which moves at every step, nothing accumulates.

  Returns:
    A transformation whose state is the inner optimizer's.

  Raises:
    ValueError: an unknown transport; at `init`, an inner optimizer that needs
      params, or one whose moments `transport` does not know; at `update`,
      gradients that `project` has not seen.

  References:
    He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import optax, subspace_optax as so
    >>> spec = so.SubspaceSpec(rank=128)
    >>> tx = so.in_subspace(optax.scale_by_lion(), spec, transport='first')
  """
  _spec.check_spec(spec)
  _transport.check_policy(transport)
  inner = optax.with_extra_args_support(inner)

  def runner(batch_axes: _per_matrix.BatchAxes) -> Any:
    if transport == 'reset':
      return _per_matrix.per_matrix(inner, batch_axes)
    return inner

  def init(params):
    matches = spec.match(params)
    _, treedef = _tree.flatten(params)
    templates = treedef.unflatten([_template(spec, match) for match in matches])
    _check_params_free(inner, templates)
    layouts = {m.path: m.layout for m in matches if m and m.layout}
    batch_axes = {path: x.coords_batch for path, x in layouts.items()}
    state = runner(batch_axes).init(templates)
    if transport == 'first':
      _transport.check_known(state)
    state = _sharding.on_mesh_of([m.leaf for m in matches if m], state)
    return InSubspaceState(state)

  def update(updates, state, params=None, **extra_args):
    del params
    pairs, treedef = _tree.flatten(updates)
    _check_projected(spec, updates, pairs)
    nodes = {path: node for path, node in pairs if _is_projected(node)}
    batch_axes = {path: x.layout.coords_batch for path, x in nodes.items()}
    coords = treedef.unflatten([_coords(entry) for _, entry in pairs])
    before = {path: (x, x.before) for path, x in nodes.items() if x.before}
    after = {path: (x, x.after) for path, x in nodes.items() if x.after}

    own = _carry(state.inner, coords, before)
    try:
      directions, new = runner(batch_axes).update(
        coords, own, None, **extra_args
      )
    except (TypeError, ValueError):
      _check_moments(inner, own, coords)
      raise
    # Whatever dtype the inner optimizer computes in, its state keeps its own.
    new = jax.tree.map(_sharding.like, new, own)
    new = _carry(new, coords, after)
    entries = [
      _with_direction(entry, direction)
      for (_, entry), (_, direction) in zip(
        pairs, _tree.flatten(directions)[0], strict=True
      )
    ]
    return _tree.replace_entries(updates, entries), InSubspaceState(new)

  def _carry(state, coords, moves):
    if transport == 'first':
      return _transport.first(state, moves)
    if transport == 'reset':
      return _per_matrix.restart(inner, state, coords, moves)
    return state

  return optax.GradientTransformationExtraArgs(init, update)


def _template(spec: _spec.SubspaceSpec, match: _spec.Match | None) -> Any:
  """Returns what stands for a parameter when the inner state is made."""
  if match is None:
    return optax.MaskedNode()
  if match.layout is None:
    return match.leaf
  layout, dtype = match.layout, spec.moment_dtype or match.leaf.dtype
  static = (layout.coords_shape, jnp.dtype(dtype))
  return layout.place_coords(jnp.zeros, static, (), match.leaf)


def _check_params_free(inner: Any, templates: Any) -> None:
  """Raises if the inner optimizer works with params and not without."""

  def works(params: Any) -> bool:
    try:
      jax.eval_shape(
        lambda u, p: inner.update(u, inner.init(u), p), templates, params
      )
      return True
    except Exception:  # for any reason: an extra argument may be missing, too
      return False

  if jax.tree.leaves(templates) and not works(None) and works(templates):
    raise ValueError(
      'inner needs params, which have no coordinates to give it; for weight '
      'decay use `weight_decay` of the ready-made optimizers or chain '
      '`optax.add_decayed_weights` after `unproject`, with '
      '`optax.scale_by_adam` in place of `optax.adamw` here.'
    )


def _check_projected(spec: Any, updates: Any, pairs: list) -> None:
  """Raises where `project` should have been, and was not."""
  if any(_is_projected(entry) for _, entry in pairs):
    for path, entry in pairs:
      if _is_projected(entry) and entry.direction is not None:
        raise ValueError(
          f'gradient {path!r} went through `in_subspace` already; chain '
          '`project`, `in_subspace` and `unproject` in this order, once.'
        )
    return
  bare = [m.path for m in spec.match(updates) if m and m.layout]
  if bare:
    raise ValueError(
      f'gradient {bare[0]!r} is not projected; chain `project` before '
      '`in_subspace`.'
    )


def _check_moments(runner: Any, state: Any, coords: Any) -> None:
  """Raises for the leaf whose moments don't fit its coordinates, if any."""
  pairs, treedef = _tree.flatten(coords)
  paths = treedef.unflatten([path for path, _ in pairs])

  def check(moment: Any, coord: Any, path: str) -> None:
    if _tree.is_masked(moment) or moment.ndim != coord.ndim:
      return
    if moment.shape != coord.shape:
      raise ValueError(
        f'gradient {path!r} has coordinates of shape {coord.shape}, but init '
        f'made moments of shape {moment.shape}; give update the tree that init '
        'was given.'
      )

  optax.tree.map_params(
    runner, check, state, coords, paths, is_leaf=_tree.is_masked
  )


def _is_projected(entry: Any) -> bool:
  return isinstance(entry, _projected.Projected)


def _coords(entry: Any) -> Any:
  return entry.coords if _is_projected(entry) else entry


def _with_direction(entry: Any, direction: Any) -> Any:
  if not _is_projected(entry):
    return direction
  return dataclasses.replace(entry, direction=direction)
