# SPDX-License-Identifier: Apache-2.0
"""Maps over the entries of trees: arrays, `Projected` nodes, `MaskedNode`."""

from collections.abc import Callable
from typing import Any

from subspace_optax._matrix import _tree


def map_entries(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """Returns `tree`, boxes and all, with `f(path, entry, *others)` for entries.

  Args:
    f: the function.
    tree: the tree.
    *rest: trees with as many entries, in boxes or not.
  """
  pairs, _ = _tree.flatten(tree)
  columns = [[entry for _, entry in _tree.flatten(x)[0]] for x in rest]
  entries = [
    f(*pair, *others) for pair, *others in zip(pairs, *columns, strict=True)
  ]
  return _tree.replace_entries(tree, entries)
