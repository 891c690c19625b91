# SPDX-License-Identifier: Apache-2.0
"""Optimizer states of stacks: one per layer, in the same arrays."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import optax

from subspace_optax._chain import _describe
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax.steps import _stacks


def init(tx: optax.GradientTransformation, blocks: Any) -> Any:
  """Returns the state of a stack, every leaf with a first axis of layers.

  Updates see one layer at a time, so the shapes of one layer decide which
  leaves are matrices and which moments are coded. `tx.init` gets the leaves in
  the first of these three ways that gives each layer the state of one layer:

    1. all leaves stacked, which gives each layer its own seeds and turns and
       places states like their parameters;
    2. vectors layer by layer, since a stack of vectors would pass for a matrix;
    3. all leaves layer by layer, unless there are bases, which would be the
       same in every layer.
  """
  layers = _stacks.count(blocks)
  one = _trial(tx, _stacks.layer_shapes(blocks))  # not quiet: it may warn
  with _notices.quiet():
    return _as_one_layer(tx, blocks, one, layers)


def _as_one_layer(
  tx: optax.GradientTransformation, blocks: Any, one: Any, layers: int
) -> Any:
  """Returns a stack of states with the shapes of one layer's state."""
  problem = ''
  for alone in _ways(tx, blocks):
    single, stacked = _stacks.partition(alone, blocks)
    found = _trial(tx, _stacks.join(_stacks.layer_shapes(single), stacked))
    problem = _misfit(one, found, layers)
    if problem is None:
      return _stacked_state(tx, single, stacked, one, found, layers)
  raise ValueError(_no_stack_of_states(problem or '', blocks))


def _ways(
  tx: optax.GradientTransformation, blocks: Any
) -> Iterator[Callable[[Any], bool]]:
  """Yields which leaves `tx.init` gets layer by layer; see `init`."""
  yield lambda x: False
  yield lambda x: x.ndim < 3
  if not _describe.projections_of(tx, blocks):
    yield lambda x: True


def with_layers(
  tx: optax.GradientTransformation, blocks: Any, state: Any
) -> Any:
  """Returns the state of a stack with a first axis of layers everywhere.

  `optax.tree.set` may have put one number where each layer had its own.
  """
  layers = _stacks.count(blocks)

  def of_all_layers(path: Any, x: Any, one: Any) -> Any:
    shape = (layers, *one.shape)
    if np.shape(x) == shape:
      return x
    if np.shape(x) != one.shape:
      raise ValueError(
        f'state.blocks {_tree.path_str(path)!r} of {layers} layers has shape '
        f'{np.shape(x)}; give it {shape}, or {one.shape} for them all.'
      )
    return jnp.broadcast_to(jnp.asarray(x, one.dtype), shape)

  with _notices.quiet():
    one = _trial(tx, _stacks.layer_shapes(blocks))
  return jax.tree.map_with_path(of_all_layers, state, one)


def check_rest(
  tx: optax.GradientTransformation, params: Any, state: Any
) -> None:
  """Raises if a number set in the state has a shape with one per layer."""

  def check(path: Any, x: Any, like: Any) -> None:
    if np.shape(x) != like.shape:
      raise ValueError(
        f'state.rest {_tree.path_str(path)!r} has shape {np.shape(x)}, but '
        f'must have {like.shape}; put values that differ by layer into '
        'state.blocks.'
      )

  with _notices.lenient(), _notices.quiet():  # rejects no more than `init`
    like = _trial(tx, params)
  jax.tree.map_with_path(check, state, like)


def _trial(tx: optax.GradientTransformation, params: Any) -> Any:
  """Returns the shapes of a state without making it."""
  with _describe.unheard():
    return jax.eval_shape(lambda x: tx.init(x), params)


def _misfit(one: Any, found: Any, layers: int) -> str | None:
  """Returns the path of a state that is not a stack of one layer's, or None."""
  wanted, got = (
    {
      _tree.path_str(path): (x.shape, x.dtype)
      for path, x in jax.tree.leaves_with_path(state)
    }
    for state in (one, found)
  )
  for path in [*wanted, *got]:
    shape, dtype = wanted.get(path, (None, None))
    allowed = [(shape, dtype), ((layers, *(shape or ())), dtype)]
    if shape is None or got.get(path) not in allowed:
      return path
  same = jax.tree.structure(one) == jax.tree.structure(found)
  return None if same else ''


def _stacked_state(
  tx: optax.GradientTransformation,
  single: Any,
  stacked: Any,
  one: Any,
  found: Any,
  layers: int,
) -> Any:
  """Makes the state, and adds an axis of layers to arrays without one."""
  axes = jax.tree.map(
    lambda x, y: 0 if x.shape == y.shape else None, found, one
  )
  init = lambda single: tx.init(_stacks.join(single, stacked))
  with _sharding.mesh_of(single):
    state = jax.vmap(init, out_axes=axes, axis_size=layers)(single)
  return _placed_like(single, state)


def _placed_like(params: Any, state: Any) -> Any:
  """Returns the state with the moments of these parameters placed like them."""

  def place(path: Any, x: Any) -> Any:
    _, leaf = _parameter_of(_tree.path_str(path), params)
    sharding = getattr(leaf, 'sharding', None)
    alike = leaf is not None and leaf.shape == x.shape
    if alike and isinstance(sharding, NamedSharding) and _is_concrete(leaf):
      return jax.device_put(x, sharding)
    return x

  return jax.tree.map_with_path(place, state)


def _is_concrete(x: Any) -> bool:
  return isinstance(x, jax.Array) and not isinstance(x, Tracer)


def _parameter_of(path: str, params: Any) -> tuple[str, Any]:
  """Returns the path and leaf of the parameter that a state belongs to."""
  pairs, _ = _tree.flatten(params)
  # The longest first: `attention` is the end of `encoder/attention`, too.
  for name, leaf in sorted(pairs, key=lambda pair: -len(pair[0])):
    if f'/{path}/'.endswith(f'/{name}/'):
      return name, leaf
  return '', None


def _no_stack_of_states(path: str, blocks: Any) -> str:
  name, leaf = _parameter_of(path, blocks)
  which = 'a parameter'
  if leaf is not None:
    which = f'parameter {name!r} of shape {tuple(leaf.shape[1:])} in each layer'
  return (
    f'the optimizer takes {which} for another matrix when layers are stacked: '
    f'its state {path!r} is not a stack of states. Say which axes are the '
    "matrix's, counted from the last one, in `weight_dimension_numbers` of "
    'SubspaceSpec, such as DimensionNumbers(-2, -1), or keep the parameter '
    'plain with `exclude`.'
  )
