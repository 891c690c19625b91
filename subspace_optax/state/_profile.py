# SPDX-License-Identifier: Apache-2.0
"""Checkpoint notes beside the arrays, and what an optimizer needs of them."""

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence
import re
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
import optax

from subspace_optax._chain import _describe
from subspace_optax._chain import _state_sharding
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _tree
from subspace_optax.steps import _train_step


def by_path(
  tree: Any, path_of: Callable[[Sequence[Any]], str] = _tree.path_str
) -> dict[str, Any]:
  """Returns the leaves of a tree by path."""
  return {path_of(path): x for path, x in jax.tree.leaves_with_path(tree)}


def is_in(root: str, path: str) -> bool:
  """Whether a path is that of a node or lies within it."""
  return path == root or path.startswith(root + '/')


def classes(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, str]]:
  """Yields path and class of nodes with arrays, except plain containers."""
  parts, _ = _tree.children(tree)
  if not jax.tree.leaves(tree) or not parts[0][0]:
    return
  if type(tree) not in (dict, tuple, list):
    yield _tree.path_str(path), type(tree).__name__
  for key, part in parts:
    yield from classes(part, (*path, *key))


def notes(tx: Any, params: Any) -> dict[str, dict[str, Any]]:
  """Returns, by path, how leaves are projected, in a form fit for JSON.

  'leaves' are those of `project`; 'bases' decides those of RSO, whose
  coordinates are of no use in others.
  """
  heard = _describe.heard(tx, params)
  bases = [x.settings for x in heard if isinstance(x, _describe.Drawn)]
  return {
    'leaves': _leaves(x for x in heard if isinstance(x, _describe.Record)),
    'bases': {path: x for settings in bases for path, x in settings.items()},
  }


def _leaves(records: Iterable[_describe.Record]) -> dict[str, dict[str, Any]]:
  return {
    match.path: {
      'rank': match.layout.rank,
      'side': 'rows' if match.layout.project_rows else 'columns',
      'rows': list(match.layout.rows),
      'columns': list(match.layout.cols),
      # The addresses of functions in its arguments differ between processes.
      'projector': re.sub(' at 0x[0-9a-f]+', '', record.projector.name),
      'orthonormal': record.projector.orthonormal,
    }
    for record in records
    for match in record.matches
    if match and match.layout
  }


def init_shapes(tx: Any, params: Any) -> Any:
  """Returns the shapes of `tx.init(params)`, boxed as the parameters are."""
  with _notices.quiet():
    return jax.eval_shape(lambda p: tx.init(p), params)


class Wanted:
  """What an optimizer needs from a checkpoint.

  Attributes:
    tx: the optimizer.
    boxed: shapes of the optimizer's state, boxed as the parameters are.
    tree: the same under 'opt_state', without boxes.
    params: shapes and shardings of parameters by path, under 'params'.
    state: shapes and shardings of the state by path, under 'opt_state'.
    shardings: shardings of the state's arrays, in order.
    notes: see `notes`.
  """

  def __init__(self, tx: Any, params: Any, shardings: Any = None):
    params = _place(params)
    if shardings is None and isinstance(tx, _train_step.TrainStep):
      shardings = tx.state_sharding(params)
    if shardings is None:
      shardings = _state_sharding.state_sharding(tx, params)
    self.tx, self.boxed = tx, init_shapes(tx, params)
    self.tree = {'opt_state': _tree.unbox(self.boxed)}
    bare = {'params': _tree.unbox(params)}
    self.params = by_path(bare)
    self._paths = {
      _saved_path(path): _tree.path_str(path)
      for path, _ in jax.tree.leaves_with_path(bare | self.tree)
    }
    self.shardings = jax.tree.leaves(shardings)
    self.state = {
      path: _of_type(x, sharding)
      for (path, x), sharding in zip(
        by_path(self.tree).items(), self.shardings, strict=True
      )
    }
    self.notes = notes(tx, params)

  def path_of(self, path: Sequence[Any]) -> str:
    """Returns the path of an array in a tree that Orbax returns."""
    return self._paths.get(_saved_path(path)) or '/'.join(map(_spelled, path))


def _saved_path(path: Any) -> str:
  # Orbax keeps the string of a key, also of a tuple, which spells a path here.
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _spelled(key: Any) -> str:
  """Returns a key of Orbax's tree, that of a tuple as the path it spells."""
  name = _saved_path((key,))
  try:
    value = ast.literal_eval(name) if name.startswith('(') else name
  except (SyntaxError, ValueError):
    return name
  return '/'.join(map(str, value)) if isinstance(value, tuple) else name


def _of_type(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _place(params: Any) -> Any:
  """Returns the shapes of parameters, each with a sharding on devices."""
  leaves, treedef = jax.tree.flatten(params)
  known = [getattr(x, 'sharding', None) for x in leaves]
  if not any(known) and jax.sharding.get_mesh().empty:
    known = [SingleDeviceSharding(jax.devices()[0])] * len(leaves)
  elif not all(known):
    # `state_sharding` of the parameters themselves, from boxes and the mesh.
    tx = optax.identity()._replace(init=lambda params: params)
    found = jax.tree.leaves(_state_sharding.state_sharding(tx, params))
    known = [x or y for x, y in zip(known, found, strict=True)]
  return treedef.unflatten(
    _of_type(x, sharding) for x, sharding in zip(leaves, known, strict=True)
  )
