# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: parameters, optimizer state and step, by Orbax.

Orbax keeps the trees of arrays by path, with shapes and dtypes. Notes beside
them record what arrays can't: the class of every node of the state and, for
each projected leaf, its rank, its matrix and its projector, or for RSO how its
bases are drawn. So `restore` needs
only the new optimizer, and can tell how it differs from the one that saved.
"""

from collections.abc import Callable, Mapping
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from subspace_optax._matrix import _notices
from subspace_optax._matrix import _tree
from subspace_optax.state import _carry_over
from subspace_optax.state import _profile

Where = str | os.PathLike | ocp.training.Checkpointer


class Restored(NamedTuple):
  """What `restore` returns.

  Attributes:
    params: the parameters, with the tree and the boxes that were passed.
    state: the optimizer's state, with the structure of `tx.init(params)`.
    step: the saved step.
    changes: sentences on what differs from the checkpoint, such as ranks.
  """

  params: Any
  state: Any
  step: int
  changes: tuple[str, ...]


def save(where: Where, tx: Any, params: Any, state: Any, step: int = 0) -> None:
  """Saves a run, so that `restore` can load it for another optimizer or mesh.

  The checkpoint is complete or absent. Plain Orbax can read it, too, as
  {'params', 'opt_state'}, without empty arrays. All processes must call this.

  Args:
    where: a folder, which must not exist yet; it is written when this returns.
      Or Orbax's `training.Checkpointer`, which writes in the background, under
      the number of the step. Arrays are copied first, so that you may donate
      them to the next step.
    tx: the optimizer or `TrainStep`.
    params: the parameters.
    state: a state made by `tx.init(params)` and updates.
    step: number of steps taken.

  Raises:
    ValueError: `state` has another structure than `tx.init(params)`; it or
      `params` hold random keys of a key dtype, or numbers that are not arrays;
      the folder exists.

  Example:
    >>> import pathlib, tempfile
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> params = {'w': jnp.ones((8, 16))}
    >>> tx = so.golore(1e-3, rank=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   where = pathlib.Path(folder, '300')
    ...   so.checkpoint.save(where, tx, params, tx.init(params), step=300)
    ...   run = so.checkpoint.restore(where, tx, params)
    >>> print(run.step, run.state[0][0].subspaces.basis['w'].shape)
    300 (8, 4)
  """
  tree = {'params': _tree.unbox(params), 'opt_state': _tree.unbox(state)}
  _check_structure(tx, params, tree['opt_state'])
  _check_arrays(tree)
  notes = {
    'step': int(step),
    'classes': dict(_profile.classes({'opt_state': tree['opt_state']})),
    **_profile.notes(tx, params),
  }
  tree = jax.tree.map(lambda x: x if jnp.size(x) else None, tree)
  if isinstance(where, ocp.training.Checkpointer):
    where.wait()  # while a save is in progress, Orbax would skip this one
    where.save_async(int(step), tree, custom_metadata=notes)
  else:
    ocp.save(_absolute(where), tree, custom_metadata=notes)


def restore(
  where: Where, tx: Any, params: Any, *, shardings: Any = None
) -> Restored:
  """Restores a run for `tx`, on the mesh of `params`, at the ranks of `tx`.

  An optimizer equal to the one that saved gets every bit back, whatever the
  mesh and the number of processes at the time. Where `tx` differs, the state is
  carried over as far as possible; `changes` and a warning say how:

  - Ranks, but for RSO's: see `resize_rank`.
  - Projectors, such as 'golore' after 'galore': the new rule starts from the
    saved basis. The rule's own state is reset if it has another form than the
    old rule's. If one of the two stores no bases (`regenerate=True`, `dct`), or
    only the new one's are orthonormal, bases and moments in the subspace are
    reset. Moments of other leaves stay, and so does Adam's counter, unless each
    matrix has its own (`per_matrix`, 'reset').
  - Dtypes of moments and bases between floats, and of moments between int8 and
    int4: values are rounded.

  Learning rates, gaps (but for RSO's), transports and decay rates are those of
  `tx`. Counters, seeds and injected hyperparameters are those of the
  checkpoint. Optimizers are told apart only by their states: one whose state
  has the form of the saved one, such as Yogi after Adam, continues from it, and
  `changes` does not mention it.

  Args:
    where: the saved folder; or a `training.Checkpointer`, whose newest
      checkpoint is restored.
    tx: the optimizer or `TrainStep` to continue with.
    params: the parameters, or their shapes, with shardings or in flax's boxes
      as `state_sharding` takes them. Without a mesh, the run is restored to the
      first device.
    shardings: shardings of the state, by default `state_sharding(tx, params)`.

  Returns:
    (params, state, step, changes); see `Restored`.

  Raises:
    ValueError: parameters with other paths, shapes or dtypes; a state that
      can't be carried over, such as one with another inner optimizer, other
      projected leaves or another side, or of RSO with another rank, gap,
      sample, `basis_dtype` or `key_group`; a checkpoint that `save` did not
      write.
    FileNotFoundError: there is no complete checkpoint.

  Example:
    >>> import pathlib, tempfile, warnings
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> params = {'w': jnp.ones((8, 16))}
    >>> tx = so.golore(1e-3, rank=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   where = pathlib.Path(folder, '300')
    ...   so.checkpoint.save(where, tx, params, tx.init(params), step=300)
    ...   with warnings.catch_warnings(action='ignore'):
    ...     run = so.checkpoint.restore(where, so.golore(1e-3, rank=4), params)
    >>> print(run.changes)
    ('rank 2 -> 4 of w',)
  """
  saved = _open(where)
  wanted = _profile.Wanted(tx, params, shardings)
  kinds = _profile.by_path(saved.tree, wanted.path_of)
  plan = _carry_over.Plan(saved.notes, kinds, wanted)
  arrays = saved.load(plan.types(), wanted.path_of)
  own = [arrays[k] if x.size else _empty(x) for k, x in wanted.params.items()]
  params = jax.tree.structure(params).unflatten(own)
  state = plan.carry(params, arrays)
  if plan.changes:
    told = '; '.join(plan.changes)
    _notices.warn(f'the checkpoint was saved by another optimizer: {told}.')
  return Restored(params, state, saved.notes['step'], tuple(plan.changes))


class _Saved(NamedTuple):
  """A checkpoint before its arrays are read."""

  notes: Mapping[str, Any]
  tree: Any  # tree of shapes and dtypes
  read: Callable[[Any], Any]  # such a tree with shardings -> arrays

  def load(
    self, types: Mapping[str, Any], path_of: Callable[[Any], str]
  ) -> dict[str, jax.Array]:
    """Returns the arrays of `types`, by path."""
    one = lambda path, _: types.get(path_of(path), ocp.PLACEHOLDER)
    loaded = self.read(jax.tree.map_with_path(one, self.tree))
    found = _profile.by_path(loaded, path_of)
    return {path: x for path, x in found.items() if path in types}


def _open(where: Where) -> _Saved:
  is_checkpointer = isinstance(where, ocp.training.Checkpointer)
  if is_checkpointer:
    newest = where.latest
    if newest is None:
      raise FileNotFoundError('where has no complete checkpoint.')
    found: Any = where.metadata(newest.step)
    read = lambda tree: where.load(newest.step, tree)
  else:
    path = _absolute(where)
    if not ocp.is_orbax_checkpoint(path):
      raise FileNotFoundError(f'where={path!r} is not a complete checkpoint.')
    found = ocp.metadata(path)
    read = lambda tree: ocp.load(path, tree)
  notes = found.custom_metadata or {}
  if not {'step', 'classes', 'leaves'} <= set(notes):
    folder = where.directory if is_checkpointer else where
    raise ValueError(
      f'where={str(folder)!r} was not written by `checkpoint.save`; load it '
      'with Orbax, using the state shapes of the optimizer that saved it, and '
      'save it again with `checkpoint.save`.'
    )
  return _Saved(notes, found.metadata, read)


def _absolute(where: Any) -> str:
  # Orbax takes only absolute paths; paths of buckets are URLs.
  path = os.fspath(where)
  return path if '://' in path else os.path.abspath(path)


def _check_arrays(tree: Any) -> None:
  for path, x in _profile.by_path(tree).items():
    what = '' if hasattr(x, 'shape') else repr(x)
    if not what and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      what = f'random keys of dtype {x.dtype}'
    if what:
      raise ValueError(
        f'{path!r} is {what}, but only arrays of numbers can be saved here; '
        'save trees with other leaves by Orbax itself.'
      )


def _check_structure(tx: Any, params: Any, state: Any) -> None:
  got = jax.tree.structure(state)
  wanted = jax.tree.structure(_tree.unbox(_profile.init_shapes(tx, params)))
  if got != wanted:
    raise ValueError(
      f'state has the structure {got}, where tx.init(params) has {wanted}; '
      'pass the optimizer that made this state.'
    )


def _empty(x: jax.ShapeDtypeStruct) -> jax.Array:
  return jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
