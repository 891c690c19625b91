# SPDX-License-Identifier: Apache-2.0
"""Control flow inside `jax.shard_map`, where types say what devices share.

There, both branches of a conditional must vary along the same mesh axes, and so
must the carry of a loop. A constant varies along none, a gradient along most.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax


def vary_as(x: jax.Array, reference: Any) -> jax.Array:
  """Returns `x`, made to vary along the mesh axes of `reference`."""
  return vary_along(x, _varying(reference))


def vary_along(x: jax.Array, names: Iterable[Any]) -> jax.Array:
  """Returns `x`, made to vary along these mesh axes."""
  missing = tuple(sorted(set(names) - _varying(x)))
  return lax.pcast(x, missing, to='varying') if missing else x


def vary_as_any(tree: Any, references: Any) -> Any:
  """Returns arrays, made to vary along the mesh axes of any reference."""
  if not _is_manual():
    return tree
  for x in jax.tree.leaves(references):
    tree = jax.tree.map(lambda y, x=x: vary_as(y, x), tree)
  return tree


def cond(
  pred: jax.Array,
  yes: Callable[..., Any],
  no: Callable[..., Any],
  *operands: Any,
) -> Any:
  """Like `lax.cond`, but its branches may vary along different axes."""
  if not _is_manual():
    return lax.cond(pred, yes, no, *operands)
  shapes = [jax.eval_shape(branch, *operands) for branch in (yes, no)]

  def alike(branch: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *operands: _vary_as_all(branch(*operands), *shapes)

  return lax.cond(pred, alike(yes), alike(no), *operands)


def fori_loop(
  lower: Any, upper: Any, body: Callable[[Any, Any], Any], start: Any
) -> Any:
  """Like `lax.fori_loop`, but `start` may vary along fewer axes."""
  if not _is_manual():
    return lax.fori_loop(lower, upper, body, start)

  def once(state: Any) -> Any:
    return _vary_as_all(state, jax.eval_shape(body, lower, state))

  # Arrays that vary after one turn may make more arrays vary in the next.
  while True:
    before, start = start, once(start)
    if _all_axes(before) == _all_axes(start):
      break
  turn = lambda i, state: _vary_as_all(body(i, state), start)
  return lax.fori_loop(lower, upper, turn, start)


def _is_manual() -> bool:
  return bool(jax.sharding.get_abstract_mesh().manual_axes)


def type_of(x: Any) -> Any:
  """Returns the type of an array; a `jax.ShapeDtypeStruct` is one itself."""
  return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)


def _varying(x: Any) -> frozenset[Any]:
  # None with check_vma=False, where nothing is tracked.
  return getattr(type_of(x).manual_axis_type, 'varying', frozenset())


def _all_axes(tree: Any) -> list[frozenset[Any]]:
  return [_varying(x) for x in jax.tree.leaves(tree)]


def _vary_as_all(tree: Any, *others: Any) -> Any:
  """Returns a tree of arrays that also vary along the axes of the others."""
  for other in others:
    tree = jax.tree.map(vary_as, tree, other)
  return tree
