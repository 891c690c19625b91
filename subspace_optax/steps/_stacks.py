# SPDX-License-Identifier: Apache-2.0
"""Stacks of layers, and the mappings that contain them."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.layout import Layout
from jax.experimental.layout import with_layout_constraint
import jax.numpy as jnp

from subspace_optax._matrix import _tree


def layer(stack: Any, i: Any) -> Any:
  """Returns the i-th layer of a stack."""
  index = lambda x: lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
  return jax.tree.map(index, stack)


def put_layer(stack: Any, i: Any, layer: Any) -> Any:
  """Returns the stack with its i-th layer replaced."""
  put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)
  return jax.tree.map(put, stack, layer)


def row_major(stack: Any) -> Any:
  """Returns the stack, kept in row-major order so that XLA does not copy it.

  Arguments of a program are row-major unless a caller says otherwise. On a TPU,
  a loop whose products prefer column-major arrays would otherwise begin by
  copying whole stacks. Other backends don't need this constraint; XLA does not
  partition it there, and would gather sharded stacks.
  """

  def one(x: jax.Array) -> jax.Array:
    rows = Layout(tuple(range(x.ndim)))
    constrain = lambda x: with_layout_constraint(x, rows)
    return lax.platform_dependent(x, tpu=constrain, default=lambda x: x)

  return jax.tree.map(one, stack)


def layer_shapes(stack: Any) -> Any:
  """Returns the shapes of one layer."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stack
  )


def count(blocks: Any) -> int:
  """Returns the number of layers."""
  pairs = [
    (_tree.path_str(path), x) for path, x in jax.tree.leaves_with_path(blocks)
  ]
  _tree.check_arrays(pairs)
  counts = {x.shape[0] if x.ndim else 0 for _, x in pairs}
  if len(counts) != 1 or 0 in counts:
    found = [f'{path} {tuple(x.shape)}' for path, x in pairs[:3]]
    found += ['...'] if len(pairs) > 3 else []
    raise ValueError(
      'stacked blocks need one number of layers as the first size of every '
      f'leaf, got {", ".join(found) or "no leaves"}. Stack a list of blocks by '
      'jax.tree.map(lambda *x: jnp.stack(x), *blocks).'
    )
  return counts.pop()


# Leaves that are trained, and the others.


def split(tree: Any) -> tuple[Any, Any]:
  """Returns the floating-point leaves and the others; None elsewhere."""
  return partition(lambda x: jnp.issubdtype(_dtype(x), jnp.inexact), tree)


def partition(chosen: Callable[[Any], bool], tree: Any) -> tuple[Any, Any]:
  """Returns two trees, of the chosen leaves and of the others."""
  only = lambda wanted: jax.tree.map(
    lambda x: x if chosen(x) is wanted else None, tree
  )
  return only(True), only(False)


def join(one: Any, other: Any) -> Any:
  """Returns the tree that `partition` split."""
  return jax.tree.map(
    lambda x, y: y if x is None else x, one, other, is_leaf=lambda x: x is None
  )


def _dtype(x: Any) -> Any:
  return x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)


# Parameters in mappings.


def take(tree: Any, keys: Sequence[str]) -> tuple[Any, Any]:
  """Returns the entry at a path, and the tree without it."""
  key, *more = keys
  if not isinstance(tree, Mapping) or key not in tree:
    found = sorted(map(str, tree)) if isinstance(tree, Mapping) else type(tree)
    raise ValueError(
      f'stack: no {key!r} among the parameters, only {found}; put them into a '
      'mapping in which that key holds the stacked blocks.'
    )
  rest = _copy(tree)
  if not more:
    del rest[key]
    return tree[key], rest
  found, rest[key] = take(tree[key], more)
  return found, rest


def put(tree: Any, keys: Sequence[str], blocks: Any, rest: Any) -> Any:
  """Returns a tree like `tree`, from the parts that `take` returned."""
  treedef = jax.tree.structure(tree)
  numbers = treedef.unflatten(range(treedef.num_leaves))
  order = jax.tree.leaves(take(numbers, keys))
  leaves = dict(zip(order, jax.tree.leaves((blocks, rest)), strict=True))
  return treedef.unflatten([leaves[i] for i in range(treedef.num_leaves)])


def _copy(tree: Any) -> Any:
  """Returns a mapping of the same type or, if that is immutable, a dict."""
  new = jax.tree.map(lambda x: x, tree)
  mutable = isinstance(new, MutableMapping) and new is not tree
  return new if mutable else dict(tree.items())


def nest(value: Any, keys: Sequence[str]) -> Any:
  """Returns a tree that holds only this value, at a path."""
  for key in reversed(keys):
    value = {key: value}
  return value
