# SPDX-License-Identifier: Apache-2.0
"""Stacks of layers, and the mappings that they stand in."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
import contextlib
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import NamedSharding
import optax

from subspace_optax._chain import _describe
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree


def layer(stack: Any, i: Any) -> Any:
  """Returns the i-th layer of a stack."""
  index = lambda x: lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
  return jax.tree.map(index, stack)


def put_layer(stack: Any, i: Any, layer: Any) -> Any:
  """Returns the stack with its i-th layer replaced."""
  put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)
  return jax.tree.map(put, stack, layer)


def layer_shapes(stack: Any) -> Any:
  """Returns the shapes of one layer."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stack
  )


def count(blocks: Any) -> int:
  """Returns the number of layers."""
  pairs = [
    (_tree.path_str(path), x)
    for path, x in jax.tree_util.tree_leaves_with_path(blocks)
  ]
  _tree.check_arrays(pairs)
  counts = {x.shape[0] if x.ndim else 0 for _, x in pairs}
  if len(counts) != 1 or 0 in counts:
    found = [f'{path} {tuple(x.shape)}' for path, x in pairs]
    raise ValueError(
      'stacked blocks need one number of layers as the first size of every '
      f'leaf, got {", ".join(found) or "no leaves"}.'
    )
  return counts.pop()


# Leaves that are trained, and the others.


def split(tree: Any) -> tuple[Any, Any]:
  """Returns the floating-point leaves and the others, None in between."""
  return partition(lambda x: jnp.issubdtype(_dtype(x), jnp.inexact), tree)


def partition(chosen: Callable[[Any], bool], tree: Any) -> tuple[Any, Any]:
  """Returns two trees, of the chosen leaves and of the others."""
  only = lambda wanted: jax.tree.map(
    lambda x: x if chosen(x) is wanted else None, tree
  )
  return only(True), only(False)


def join(one: Any, other: Any) -> Any:
  """Returns the tree that `partition` has parted."""
  return jax.tree.map(
    lambda x, y: y if x is None else x, one, other, is_leaf=lambda x: x is None
  )


def _dtype(x: Any) -> Any:
  return x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)


# Optimizer states of stacks.


def init(tx: optax.GradientTransformation, blocks: Any) -> Any:
  """Returns the state of a stack, every leaf with a first axis of layers.

  Updates see one layer at a time, so the shapes of one layer decide which
  leaves are matrices and which moments are coded. Leaves are given to `tx.init`
  in the first of three ways that makes the state that one layer has:

    1. all of them stacked, which gives each layer seeds and turns of its own
       and places states like their parameters;
    2. vectors layer by layer, since a stack of them would pass for a matrix;
    3. all of them layer by layer, unless there are bases, which would be the
       same in every layer.
  """
  layers = count(blocks)
  one = _trial(tx, layer_shapes(blocks))  # which tells what it assumes
  with _notices.quiet():
    return _as_one_layer(tx, blocks, one, layers)


def _as_one_layer(
  tx: optax.GradientTransformation, blocks: Any, one: Any, layers: int
) -> Any:
  """Returns a stack of states whose shapes are those of one layer's."""
  problem = ''
  for alone in (_nothing, _is_vector, _everything):
    if alone is _everything and _holds_project(tx, blocks):
      break
    single, stacked = partition(alone, blocks)
    found = _trial(tx, join(layer_shapes(single), stacked))
    problem = _misfit(one, found, layers)
    if problem is None:
      return _stacked_state(tx, single, stacked, one, found, layers)
  raise ValueError(_no_stack_of_states(problem or '', blocks))


def with_layers(
  tx: optax.GradientTransformation, blocks: Any, state: Any
) -> Any:
  """Returns the state of a stack with a first axis of layers everywhere.

  `optax.tree.set` leaves one number where each layer had its own.
  """
  layers = count(blocks)

  def of_all_layers(path: Any, x: Any, one: Any) -> Any:
    shape = (layers, *one.shape)
    if _shape(x) == shape:
      return x
    if _shape(x) != one.shape:
      raise ValueError(
        f'state.blocks {_tree.path_str(path)!r} of {layers} layers has shape '
        f'{_shape(x)}; give it {shape}, or {one.shape} for them all.'
      )
    return jnp.broadcast_to(jnp.asarray(x, one.dtype), shape)

  with _notices.quiet():
    one = _trial(tx, layer_shapes(blocks))
  return jax.tree.map_with_path(of_all_layers, state, one)


def check_rest(
  tx: optax.GradientTransformation, params: Any, state: Any
) -> None:
  """Raises if a number that was set has the shape of one for each layer."""

  def check(path: Any, x: Any, like: Any) -> None:
    if _shape(x) != like.shape:
      raise ValueError(
        f'state.rest {_tree.path_str(path)!r} has shape {_shape(x)}, but must '
        f'have {like.shape}; what differs by layer belongs into state.blocks.'
      )

  with _notices.lenient(), _notices.quiet():  # refuses no more than `init`
    like = _trial(tx, params)
  jax.tree.map_with_path(check, state, like)


def _shape(x: Any) -> tuple[int, ...]:
  return tuple(x.shape) if hasattr(x, 'shape') else ()


def _nothing(x: Any) -> bool:
  del x
  return False


def _is_vector(x: Any) -> bool:
  """Whether a leaf has fewer than two axes in each layer."""
  return x.ndim < 3


def _everything(x: Any) -> bool:
  del x
  return True


def _trial(tx: optax.GradientTransformation, params: Any) -> Any:
  """Returns the shapes of a state that is not made."""
  with _describe.unheard():
    return jax.eval_shape(lambda x: tx.init(x), params)


def _holds_project(tx: optax.GradientTransformation, params: Any) -> bool:
  try:
    return bool(_describe.records_of(tx, params))
  except ValueError:
    return False


def _misfit(one: Any, found: Any, layers: int) -> str | None:
  """Returns the path of what is no stack of one layer's arrays, if any is."""
  wanted, got = (
    {
      _tree.path_str(path): (x.shape, x.dtype)
      for path, x in jax.tree_util.tree_leaves_with_path(state)
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
  """Makes the state; what has no axis of layers gets one."""
  axes = jax.tree.map(
    lambda x, y: 0 if x.shape == y.shape else None, found, one
  )
  init = lambda single: tx.init(join(single, stacked))
  with _mesh_of(single):
    state = jax.vmap(init, out_axes=axes, axis_size=layers)(single)
  return _placed_like(single, state)


def _mesh_of(params: Any) -> contextlib.AbstractContextManager:
  """Sets the mesh of arrays on explicit axes, which tracers of them need."""
  for x in jax.tree.leaves(params):
    if _is_concrete(x) and _sharding.explicit(x):
      return jax.set_mesh(x.sharding.mesh)
  return contextlib.nullcontext()


def _placed_like(params: Any, state: Any) -> Any:
  """Returns the state with the moments of these parameters on their devices."""

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
  pairs = [(name, x) for name, x in _tree.flatten(params)[0]]
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


# Parameters in mappings.


def take(tree: Any, keys: Sequence[str]) -> tuple[Any, Any]:
  """Returns what is at a path, and the tree without it."""
  key, *more = keys
  if not isinstance(tree, Mapping) or key not in tree:
    found = sorted(map(str, tree)) if isinstance(tree, Mapping) else type(tree)
    raise ValueError(
      f'stack: no {key!r} among the parameters, only {found}; put them into a '
      'mapping in which that key holds the stacked blocks.'
    )
  if not more:
    return tree[key], _without(tree, key)
  found, below = take(tree[key], more)
  rest = _copy(tree)
  rest[key] = below
  return found, rest


def put(tree: Any, keys: Sequence[str], blocks: Any, rest: Any) -> Any:
  """Returns a tree like `tree`, of what `take` has parted."""
  treedef = jax.tree.structure(tree)
  numbers = treedef.unflatten(range(treedef.num_leaves))
  order = jax.tree.leaves(take(numbers, keys))
  leaves = dict(zip(order, jax.tree.leaves((blocks, rest)), strict=True))
  return treedef.unflatten([leaves[i] for i in range(treedef.num_leaves)])


def _without(tree: Any, key: str) -> Any:
  rest = _copy(tree)
  del rest[key]
  return rest


def _copy(tree: Any) -> Any:
  """Returns a mapping of the same type or, if that is immutable, a dict."""
  new = jax.tree.map(lambda x: x, tree)
  mutable = isinstance(new, MutableMapping) and new is not tree
  return new if mutable else dict(tree.items())


def nest(value: Any, keys: Sequence[str]) -> Any:
  """Returns the tree that holds a value alone, at a path."""
  for key in reversed(keys):
    value = {key: value}
  return value
