# SPDX-License-Identifier: Apache-2.0
"""An inner optimizer with a separate state for every matrix.

`transport='reset'` restarts the state of one matrix. A tree-wide state shares
counters among leaves, which can't be restarted for one matrix. With Adam's
moments at zero but its count at T, bias correction would be off for 1/(1-b2)
steps.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_optax._matrix import _noise
from subspace_optax._matrix import _placement
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying

_AXES = 'abcdefghijklmnopqrstuvw'

# From a leaf's path to its axes that count matrices; a plain leaf has none.
BatchAxes = Mapping[str, tuple[int, ...]]


def per_matrix(
  inner: optax.GradientTransformation, batch_axes: BatchAxes
) -> optax.GradientTransformationExtraArgs:
  """Returns an optimizer that runs `inner` on each matrix separately.

  Every field of its state is a tree with the parameters' structure. The first
  axes of a leaf's arrays count its matrices.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    pairs, treedef = _tree.flatten(params)
    structure = _find_structure(inner, pairs, batch_axes)
    rows = [
      _init_leaf(inner, structure, leaf, batch_axes.get(path, ()))
      for path, leaf in pairs
    ]
    return _join_rows(structure, rows, treedef)

  def update(updates, state, params=None, **extra_args):
    pairs, treedef = _tree.flatten(updates)
    weights = [None] * len(pairs)
    if params is not None:
      weights = [leaf for _, leaf in _tree.flatten(params)[0]]
    structure = _find_structure(inner, pairs, batch_axes)

    def one(u: Any, row: Row, weight: Any, index: Any) -> tuple[Any, Row]:
      s = structure.unflatten(row)
      layer = extra_args.get('layer')
      layer = index if layer is None else _noise.seed_of_layer(layer, index)
      known = {} if layer is None else {'layer': layer}
      u, s = inner.update(u, s, weight, **{**extra_args, **known})
      return u, tuple(jax.tree.leaves(s))

    results = [
      (u, row)
      if _tree.is_masked(u)
      else _map_over_matrices(one, batch_axes.get(path, ()))(u, row, weight)
      for (path, u), row, weight in zip(
        pairs, _split_rows(structure, state, pairs), weights, strict=True
      )
    ]
    new_updates = treedef.unflatten([u for u, _ in results])
    rows = [row for _, row in results]
    return new_updates, _join_rows(structure, rows, treedef)

  return optax.GradientTransformationExtraArgs(init, update)


def restart(
  inner: optax.GradientTransformation,
  state: Any,
  coords: Any,
  moves: Mapping[str, Any],
) -> Any:
  """Resets the state of `per_matrix(inner)` for matrices that moved.

  Args:
    inner: the optimizer that `per_matrix` wraps.
    state: the state of `per_matrix(inner)`.
    coords: the tree of coordinates and plain leaves.
    moves: maps a path to the leaf's `Projected` node and its `Move`.
  """
  pairs, treedef = _tree.flatten(coords)
  batch_axes = {
    path: node.layout.coords_batch for path, (node, _) in moves.items()
  }
  structure = _find_structure(inner, pairs, batch_axes)

  def one(path: str, row: Row) -> Row:
    if path not in moves:
      return row
    node, move = moves[path]
    axes = node.layout.coords_batch
    fresh = _init_leaf(inner, structure, node.coords, axes)
    fresh = jax.tree.map(_sharding.like, fresh, row)

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
      after = tuple(range(move.moved.ndim, old.ndim))
      return jnp.where(jnp.expand_dims(move.moved, after), new, old)

    return _varying.cond(
      jnp.any(move.moved),
      lambda: jax.tree.map(choose, fresh, row),
      lambda: row,
    )

  rows = [
    one(path, row)
    for (path, _), row in zip(
      pairs, _split_rows(structure, state, pairs), strict=True
    )
  ]
  return _join_rows(structure, rows, treedef)


# The arrays of the inner state of one matrix, or of one leaf.
Row = tuple[Any, ...]


def _init_leaf(
  inner: optax.GradientTransformation,
  structure: Any,
  leaf: Any,
  axes: tuple[int, ...],
) -> Row:
  """Returns the states of a leaf's matrices, which all start equal."""
  if _tree.is_masked(leaf):
    return (leaf,) * structure.num_leaves
  one = jnp.zeros(_shape_of_one(leaf, axes), leaf.dtype) if axes else leaf
  state = inner.init(one)
  if jax.tree.structure(state) != structure:
    raise ValueError(
      'inner runs on one matrix at a time, for which its state must have one '
      f'structure, not {jax.tree.structure(state)} and {structure}; give '
      'leaves that are not projected an optimizer of their own with `plain`, '
      "or use transport='keep' or 'first' without per_matrix."
    )
  row = tuple(jax.tree.leaves(state))
  if not axes:
    return _varying.vary_as_any(row, leaf)
  return tuple(_repeat_per_matrix(x, leaf, axes) for x in row)


def _shape_of_one(leaf: Any, axes: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of one matrix of a leaf."""
  return tuple(n for i, n in enumerate(leaf.shape) if i not in axes)


def _repeat_per_matrix(
  x: jax.Array, leaf: Any, axes: tuple[int, ...]
) -> jax.Array:
  """Repeats one matrix's `x` for each matrix, sharded like the leaf."""
  names = _AXES[: len(leaf.shape)]
  first = ''.join(names[i] for i in axes)
  rest = ''.join(c for c in names if c not in first)
  if x.ndim != len(rest):
    rest = _AXES[::-1][: x.ndim]
  counts = tuple(leaf.shape[i] for i in axes)
  return _placement.place(_repeat, (counts,), (x,), leaf, names, first + rest)


def _repeat(counts: tuple[int, ...], x: jax.Array) -> jax.Array:
  return jnp.broadcast_to(x, counts + x.shape)


def _map_over_matrices(
  f: Callable[[Any, Row, Any, Any], tuple[Any, Row]], axes: tuple[int, ...]
) -> Callable[[Any, Row, Any], tuple[Any, Row]]:
  """Maps `f` over the axes of a leaf, which are the first axes in a row.

  It also gets the index of each matrix; None for a leaf that is not mapped.
  """

  def mapped(u: Any, row: Row, weight: Any) -> tuple[Any, Row]:
    run = f
    for k in reversed(range(len(axes))):
      of_leaf = axes[k] - k  # earlier axes are mapped already
      of_weight = None if weight is None else of_leaf
      run = jax.vmap(
        run, in_axes=(of_leaf, 0, of_weight, 0), out_axes=(of_leaf, 0)
      )
    return run(u, row, weight, _indices(u, axes) if axes else None)

  return mapped


def _indices(u: jax.Array, axes: tuple[int, ...]) -> Any:
  """Returns the index of each matrix, sharded like the leaf if explicit.

  A constant: optimizers that do not ask for it keep their programs.
  """
  counts = tuple(u.shape[i] for i in axes)
  index: Any = np.arange(math.prod(counts), dtype=np.uint32).reshape(counts)
  names = _AXES[: u.ndim]
  return _placement.align(index, u, names, ''.join(names[i] for i in axes))


def _find_structure(
  inner: optax.GradientTransformation,
  pairs: Sequence[tuple[str, Any]],
  batch_axes: BatchAxes,
) -> Any:
  """Returns the structure of one matrix's state."""
  one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
  known = [pair for pair in pairs if not _tree.is_masked(pair[1])]
  for path, leaf in known[:1]:
    shape = _shape_of_one(leaf, batch_axes.get(path, ()))
    one = jax.ShapeDtypeStruct(shape, leaf.dtype)
  return jax.tree.structure(jax.eval_shape(inner.init, one))


def _join_rows(structure: Any, rows: Sequence[Row], treedef: Any) -> Any:
  columns = zip(*rows, strict=True) if rows else [()] * structure.num_leaves
  return structure.unflatten([treedef.unflatten(c) for c in columns])


def _split_rows(structure: Any, state: Any, pairs: Sequence[Any]) -> list[Row]:
  fields = structure.flatten_up_to(state)
  columns = [[leaf for _, leaf in _tree.flatten(field)[0]] for field in fields]
  return list(zip(*columns, strict=True)) if columns else [()] * len(pairs)
