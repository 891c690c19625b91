# SPDX-License-Identifier: Apache-2.0
"""Trees of parameters: boxes, paths, and maps with several results.

A parameter tree reaches an optimizer in many forms: bare arrays, `nnx.State` of
`nnx.Param`, linen's `Partitioned` boxes, or with `optax.MaskedNode` where a
wrapper hid a leaf. All functions here work on *entries*: one array, `Projected`
or `MaskedNode` per parameter, in tree order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _projected


def is_masked(x: Any) -> bool:
  """Whether `x` replaces a leaf that a wrapper or a spec left out."""
  return isinstance(x, optax.MaskedNode)


def is_entry(x: Any) -> bool:
  """Whether `x` is the entry of one parameter."""
  ours = _projected.Projected | _projected.QuantizedBasis
  return is_masked(x) or isinstance(x, ours)


def unbox(tree: Any) -> Any:
  """Returns `tree` with boxes replaced by the arrays inside them.

  Also inside of entries: each part of a `QuantizedBasis` has a box of its own.
  """
  return _boxes.unbox(tree)


def path_str(path: Sequence[Any]) -> str:
  """Returns a path as users write it: `blocks/mlp/up`.

  A key that is a tuple, as `flax.traverse_util.flatten_dict` makes them, is the
  path that it spells.
  """
  return '/'.join(map(_key_str, path))


def _key_str(key: Any) -> str:
  name = getattr(key, 'key', None)
  if isinstance(name, tuple):
    return '/'.join(map(str, name))
  return jax.tree_util.keystr((key,), simple=True)


def flatten(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
  """Returns the (path, entry) pairs of the un-boxed tree, and its treedef."""
  pairs, treedef = jax.tree.flatten_with_path(unbox(tree), is_leaf=is_entry)
  return [(path_str(path), entry) for path, entry in pairs], treedef


def flatten_params(params: Any) -> tuple[list[tuple[str, Any]], Any]:
  """Like `flatten`, for parameters, which must be arrays.

  Raises:
    TypeError: a leaf is not an array, or is in an unregistered wrapper.
  """
  _check_known(params)
  pairs, treedef = flatten(params)
  check_arrays(pairs)
  return pairs, treedef


def check_arrays(pairs: Sequence[tuple[str, Any]]) -> None:
  """Raises unless all entries are arrays, or have shapes like arrays."""
  for path, entry in pairs:
    if not is_entry(entry) and not hasattr(entry, 'shape'):
      raise TypeError(
        f'leaf {path!r} must be an array, got {entry!r} of type '
        f'{type(entry).__name__}; make it one with jnp.asarray, or keep what '
        'is no parameter out of the tree, as eqx.filter(model, '
        'eqx.is_inexact_array) and nnx.state(model, nnx.Param) do.'
      )


def _check_known(params: Any) -> None:
  """Raises if an array is in an unregistered wrapper."""
  pairs = jax.tree.leaves_with_path(params, is_leaf=_boxes.is_unknown)
  for path, x in pairs:
    if _boxes.is_unknown(x):
      raise TypeError(
        f'leaf {path_str(path)!r} is an array in a {type(x).__name__}, which '
        'is none of the known boxes; tell how to read and to make one with '
        'subspace_optax.register_box, or give arrays.'
      )


AxisNames = dict[str, _boxes.Names]


def axis_names(tree: Any) -> AxisNames:
  """Returns the names of axes that boxes hold, by the path of their array."""
  pairs = jax.tree.leaves_with_path(
    tree, is_leaf=lambda x: is_entry(x) or _boxes.is_box(x)
  )
  boxes = {path_str(path): x for path, x in pairs if _boxes.is_box(x)}
  found = {path: _boxes.axes_of(box) for path, box in boxes.items()}
  return {path: names for path, names in found.items() if names is not None}


def replace_entries(tree: Any, entries: Sequence[Any]) -> Any:
  """Returns `tree` with its boxes, but its entries replaced in order."""
  return jax.tree.structure(tree, is_leaf=is_entry).unflatten(entries)


def map_unzip(f: Callable[..., tuple], n: int, tree: Any, *rest: Any) -> tuple:
  """Maps `f`, which returns `n` values, over trees; returns `n` trees."""
  leaves, treedef = jax.tree.flatten(tree)
  others = [treedef.flatten_up_to(r) for r in rest]
  results = [f(*args) for args in zip(leaves, *others, strict=True)]
  columns = zip(*results, strict=True) if results else [()] * n
  return tuple(treedef.unflatten(column) for column in columns)


def map_entries(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """Returns `tree` with its boxes, but `f(path, entry, *others)` for entries.

  Args:
    f: the function.
    tree: the tree.
    *rest: trees with as many entries, boxed or not.
  """
  pairs, _ = flatten(tree)
  columns = [[entry for _, entry in flatten(x)[0]] for x in rest]
  entries = [
    f(*pair, *others) for pair, *others in zip(pairs, *columns, strict=True)
  ]
  return replace_entries(tree, entries)


def children(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
  """Returns the children of a tree's node, with key paths, and its treedef."""
  return jax.tree.flatten_with_path(node, is_leaf=lambda x: x is not node)


def find(tree: Any, *kinds: type) -> list[tuple[str, Any]]:
  """Returns the nodes of some classes in a tree, with their paths."""
  pairs = jax.tree.leaves_with_path(
    tree, is_leaf=lambda x: isinstance(x, kinds)
  )
  return [(path_str(path), x) for path, x in pairs if isinstance(x, kinds)]


def owners(state: Any, params: Any) -> dict[str, str]:
  """Returns the leaf to which each array of a state belongs, by path.

  An array belongs to the leaf whose keys are the end of its own keys. A
  parameter named `count` is a key of a mapping, while a counter's `count` is a
  field. (If parameters are a NamedTuple, their fields can't be told apart from
  a counter's.) If the parameters are one array, all arrays belong to it.
  """
  every = {path for path, _ in jax.tree.leaves_with_path(unbox(params))}
  lengths = sorted({len(path) for path in every}, reverse=True)
  found = {}
  for path, _ in jax.tree.leaves_with_path(state):
    ends = (path[len(path) - n :] for n in lengths if n <= len(path))
    leaf = next((end for end in ends if end in every), None)
    if leaf is not None:
      found[path_str(path)] = path_str(leaf)
  return found
