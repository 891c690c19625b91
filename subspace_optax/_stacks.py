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
"""Stacks of layers, and the nested mappings that they stand in."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from subspace_optax import _describe
from subspace_optax import _notices
from subspace_optax import _tree


def layer(stack: Any, i: Any) -> Any:
  """Returns the i-th layer of a stack."""
  index = lambda x: lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
  return jax.tree.map(index, stack)


def put_layer(stack: Any, i: Any, layer: Any) -> Any:
  """Returns the stack with its i-th layer replaced."""
  put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)
  return jax.tree.map(put, stack, layer)


def count(blocks: Any) -> int:
  """Returns the number of layers."""
  counts = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(blocks)}
  if len(counts) != 1 or 0 in counts:
    shapes = sorted({str(tuple(x.shape)) for x in jax.tree.leaves(blocks)})
    raise ValueError(
      'stacked blocks need one number of layers as the first size of every '
      f'leaf, got shapes {", ".join(shapes)}.'
    )
  return counts.pop()


def init(tx: optax.GradientTransformation, blocks: Any) -> Any:
  """Returns the state of a stack, every leaf with a first axis of layers."""
  layers = count(blocks)
  one = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), blocks
  )
  with _describe.unheard():
    one = jax.eval_shape(lambda x: tx.init(x), one)
  with _notices.quiet():  # the tree of one layer has told
    stack = tx.init(blocks)
  if jax.tree.structure(one) != jax.tree.structure(stack):
    raise ValueError(
      'the optimizer makes a state of another structure for one layer than for '
      f'the stack:\n{jax.tree.structure(one)}\n{jax.tree.structure(stack)}'
    )

  def stacked(path, of_one, x):
    if x.shape == (layers, *of_one.shape):
      return x
    if x.shape == of_one.shape:  # a counter: each layer has its own
      return jnp.broadcast_to(x, (layers, *x.shape))
    raise ValueError(
      f'state {_tree.path_str(path)!r} of a stack of {layers} layers has shape '
      f'{x.shape}, that of one layer {of_one.shape}: not a stack of states. '
      "Projected kernels need the layers' axis apart from their matrix: see "
      '`weight_dimension_numbers` of SubspaceSpec.'
    )

  return jax.tree.map_with_path(stacked, one, stack)


# Parameters as nested mappings.


def take(tree: Any, keys: Sequence[str]) -> tuple[Any, Any]:
  """Returns what is at a path, and the tree without it."""
  if not isinstance(tree, Mapping) or keys[0] not in tree:
    found = sorted(tree) if isinstance(tree, Mapping) else type(tree)
    raise ValueError(
      f'stack: no {keys[0]!r} among the parameters, only {found}.'
    )
  key, *more = keys
  rest = {k: v for k, v in tree.items() if k != key}
  if not more:
    return tree[key], _like(tree, rest)
  found, below = take(tree[key], more)
  return found, _like(tree, rest | {key: below})


def put(tree: Any, keys: Sequence[str], value: Any) -> Any:
  """Returns the tree with a value at a path."""
  key, *more = keys
  new = put(tree[key], more, value) if more else value
  return _like(tree, {**tree, key: new})


def _like(tree: Any, items: dict[str, Any]) -> Any:
  """Returns a mapping of the same type."""
  return type(tree)(items)


def nest(value: Any, keys: Sequence[str]) -> Any:
  """Returns the tree that holds a value alone, at a path."""
  for key in reversed(keys):
    value = {key: value}
  return value
