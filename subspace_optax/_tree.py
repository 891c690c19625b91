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
"""Trees of parameters: boxes, paths, and maps with several results.

A parameter tree reaches an optimizer in many dresses: bare arrays, `nnx.State`
of `nnx.Param`, linen's `Partitioned` boxes, or with `optax.MaskedNode` where a
wrapper hid a leaf. Everything here sees *entries*: one array, `Projected` or
`MaskedNode` per parameter, in tree order.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flax import nnx
from flax.core import meta
import jax
import optax

from subspace_optax import _projected


def is_masked(x: Any) -> bool:
  """Whether `x` stands where a wrapper or a spec left a leaf out."""
  return isinstance(x, optax.MaskedNode)


def is_entry(x: Any) -> bool:
  """Whether `x` stands for one parameter."""
  ours = _projected.Projected | _projected.QuantizedBasis
  return is_masked(x) or isinstance(x, ours)


def is_box(x: Any) -> bool:
  """Whether `x` is one of flax's boxes around an array."""
  return isinstance(x, nnx.Variable | meta.AxisMetadata)


def unbox(tree: Any) -> Any:
  """Returns `tree` with flax boxes replaced by the arrays inside them."""

  def content(x: Any) -> Any:
    # A box is a pytree node with one child; reading it as such needs no API of
    # the box, and adds none of its sharding constraints.
    if not is_box(x):
      return x
    return jax.tree.leaves(x, is_leaf=lambda y: y is not x)[0]

  return jax.tree.map(content, tree, is_leaf=lambda x: is_box(x) or is_entry(x))


def path_str(path: Sequence[Any]) -> str:
  """Returns a path as users write it: `blocks/mlp/up`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def flatten(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
  """Returns the (path, entry) pairs of the un-boxed tree, and its treedef."""
  pairs, treedef = jax.tree_util.tree_flatten_with_path(
    unbox(tree), is_leaf=is_entry
  )
  return [(path_str(path), entry) for path, entry in pairs], treedef


def check_arrays(pairs: Sequence[tuple[str, Any]]) -> None:
  """Raises unless all entries are arrays, or at least have their shapes."""
  for path, entry in pairs:
    if not is_entry(entry) and not hasattr(entry, 'shape'):
      raise TypeError(
        f'leaf {path!r} must be an array, got {entry!r} of type '
        f'{type(entry).__name__}; make it one with jnp.asarray, or keep what '
        'is no parameter out of the tree, as eqx.filter(model, '
        'eqx.is_inexact_array) and nnx.state(model, nnx.Param) do.'
      )


AxisNames = dict[str, tuple[str | None, ...]]


def axis_names(tree: Any) -> AxisNames:
  """Returns the names of axes that boxes hold, by the path of their array."""
  pairs, _ = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: is_entry(x) or _names_of(x) is not None
  )
  found = {}
  for path, x in pairs:
    names = _names_of(x)
    if names is not None:
      inner = () if is_box(x) else jax.tree_util.tree_leaves_with_path(x)[0][0]
      # Several mesh axes in a tuple are no name.
      found[path_str((*path, *inner))] = tuple(
        name if isinstance(name, str) else None for name in names
      )
  return found


def _names_of(x: Any) -> Any:
  """Returns the names of axes in a box of flax's, or a haliax NamedArray."""
  if isinstance(x, nnx.Variable):
    metadata = x.get_metadata()
    keys = ('out_sharding', 'sharding', 'sharding_names')
    names = next((metadata[k] for k in keys if metadata.get(k)), None)
    names = getattr(names, 'spec', names)
    return names if isinstance(names, Iterable) else None
  if isinstance(x, meta.AxisMetadata):
    return getattr(x, 'names', None)
  axes = getattr(x, 'axes', None)
  if isinstance(axes, tuple) and hasattr(x, 'array'):
    return [getattr(axis, 'name', None) for axis in axes]
  return None


def replace_entries(tree: Any, entries: Sequence[Any]) -> Any:
  """Returns `tree`, boxes and all, with its entries replaced in order."""
  return jax.tree.structure(tree, is_leaf=is_entry).unflatten(entries)


def map_unzip(f: Callable[..., tuple], n: int, tree: Any, *rest: Any) -> tuple:
  """Maps `f`, which returns `n` values, over trees; returns `n` trees."""
  leaves, treedef = jax.tree.flatten(tree)
  others = [treedef.flatten_up_to(r) for r in rest]
  results = [f(*args) for args in zip(leaves, *others, strict=True)]
  columns = zip(*results, strict=True) if results else [()] * n
  return tuple(treedef.unflatten(column) for column in columns)
