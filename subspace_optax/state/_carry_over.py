# SPDX-License-Identifier: Apache-2.0
"""Which arrays of a checkpoint an optimizer carries over, and how."""

from collections.abc import Iterable, Iterator, Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from subspace_optax._chain import _projection
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax.low_precision import _coded_state
from subspace_optax.state import _profile
from subspace_optax.state import _resize

_START_ANEW = 'or start anew with tx.init(params)'


class Plan:
  """How to carry a checkpoint over to an optimizer, and what changes.

  Attributes:
    changes: a sentence for each change.
  """

  def __init__(
    self,
    notes: Mapping[str, Any],
    saved: Mapping[str, Any],
    wanted: _profile.Wanted,
  ):
    """Raises a ValueError if the checkpoint can't be carried over.

    Args:
      notes: 'classes', 'leaves' and 'bases' of the checkpoint; see `_profile`.
      saved: types of the checkpoint's arrays by path.
      wanted: what the optimizer needs.
    """
    self._saved, self._wanted = saved, wanted
    self._old, self._new = notes['leaves'], wanted.notes['leaves']
    self._classes = notes['classes'], dict(_profile.classes(wanted.tree))
    self._coords_anew: set[str] = set()  # paths of leaves
    self._roots_anew: set[str] = set()  # paths of arrays and nodes
    self._check_params()
    self._check_bases(notes.get('bases', {}))
    self._check_matrices()
    self._compare_projectors()
    self._check_classes()
    self._check_paths()
    self.changes = [*self._changes_of_leaves(), *self._changes_of_dtypes()]

  def types(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the types of the arrays to load, by path."""
    kept = {
      path: _as_saved(self._saved[path], x)
      for path, x in _filled(self._wanted.state).items()
      if not self._is_anew(path)
    }
    return _filled(self._wanted.params) | kept

  def carry(self, params: Any, arrays: Mapping[str, jax.Array]) -> Any:
    """Returns the optimizer's state.

    Args:
      params: the restored parameters.
      arrays: the loaded arrays, by path.
    """
    state = self._wanted.state
    structure = jax.tree.structure(self._wanted.boxed)
    is_same = lambda path, x: (
      path in arrays
      and (arrays[path].shape, arrays[path].dtype) == (x.shape, x.dtype)
    )
    if all(is_same(path, x) for path, x in state.items()):
      return structure.unflatten([arrays[path] for path in state])
    with _notices.quiet():
      start = self._wanted.tx.init(params)
    first = jax.tree.leaves(start)
    old = [arrays.get(k, x) for k, x in zip(state, first, strict=True)]
    new = _resize.carry_over(
      self._wanted.tx,
      structure.unflatten(old),
      params,
      start,
      self._coords_anew,
    )
    places = zip(jax.tree.leaves(new), self._wanted.shardings, strict=True)
    return structure.unflatten([jax.device_put(x, s) for x, s in places])

  def _is_anew(self, path: str) -> bool:
    return any(_profile.is_in(root, path) for root in self._roots_anew)

  def _check_params(self) -> None:
    saved = {k: x for k, x in self._saved.items() if k.startswith('params')}
    wanted = _filled(self._wanted.params)
    _check_same(saved, wanted, 'give the tree of parameters that was saved')
    for path, x in wanted.items():
      old, new = _typed(saved[path]), _typed(x)
      if old != new:
        raise ValueError(
          f'the checkpoint has {old} at {path!r}, where params have {new}; '
          'pass params of the saved shapes and dtypes, and cast them after '
          'restoring.'
        )

  def _check_bases(self, old: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises if coordinates would meet other bases than their own.

    RSO keeps B, and draws P again at every step.
    """
    new = self._wanted.notes['bases']
    for path in sorted(old.keys() & new.keys()):
      for name, value in new[path].items():
        if old[path][name] != value:
          raise ValueError(
            f'the saved coordinates of {path!r} are those of bases with '
            f'{name}={old[path][name]!r}, and tx draws bases with '
            f'{name}={value!r}; make tx with the arguments of the saved state, '
            'save merged(params, state) of its optimizer as the parameters, '
            f'{_START_ANEW}.'
          )

  def _check_matrices(self) -> None:
    for path in sorted(set(self._old) ^ set(self._new)):
      how = ('plain', 'projected')
      raise ValueError(
        f'leaf {path!r} is {how[path in self._old]} in the checkpoint, and '
        f'{how[path in self._new]} by tx; give the spec the ranks, include and '
        f'exclude by which the same leaves are projected, {_START_ANEW}.'
      )
    for path, leaf in self._new.items():
      for name in ('rows', 'columns', 'side'):
        if leaf[name] != self._old[path][name]:
          raise ValueError(
            f'leaf {path!r} has {name}={self._old[path][name]!r} in the '
            f'checkpoint, and {name}={leaf[name]!r} by tx; give the spec the '
            'side and weight_dimension_numbers of the saved state, '
            f'{_START_ANEW}.'
          )

  def _compare_projectors(self) -> None:
    """Finds state that the new projector can't take over from the old one."""
    found = _tree.find(self._wanted.tree, _projection.ProjectState)
    for path, state in found:
      self._compare(path, _projection.paths(state))

  def _compare(self, root: str, leaves: tuple[str, ...]) -> None:
    moved = [path for path in leaves if self._has_another_rule(path)]
    own, basis = f'{root}/projector', f'{root}/subspaces/basis'
    both = (self._saved, self._wanted.state)
    if moved and (_differ(own, both) or _differ(own, self._classes)):
      self._roots_anew.add(own)
    stored = all(_within(basis, x) for x in both)
    for path in leaves:
      old, new = (x[path]['orthonormal'] for x in (self._old, self._new))
      if (new and not old) or (path in moved and not stored):
        self._coords_anew.add(path)
        self._roots_anew.add('/'.join(filter(None, (basis, path))))

  def _has_another_rule(self, path: str) -> bool:
    # Compare projectors without gaps, rates and the steps of `switch`.
    of = lambda leaves: re.sub(
      r'(?<==)[\d.e+-]+|\d+(?=: )', '', leaves[path]['projector']
    )
    return of(self._old) != of(self._new)

  def _check_classes(self) -> None:
    old, new = self._classes
    for path in [*new, *old]:
      if old.get(path) != new.get(path) and not self._is_anew(path):
        raise ValueError(
          f'the checkpoint has {_kind(old.get(path))} at {path!r}, where tx '
          f'has {_kind(new.get(path))}; make tx with the inner optimizer, '
          'residual, transport, bits and wrappers of the saved state, '
          f'{_START_ANEW}.'
        )

  def _check_paths(self) -> None:
    known = lambda tree: {
      path
      for path in tree
      if path.startswith('opt_state') and not self._is_anew(path)
    }
    _check_same(
      known(self._saved),
      known(_filled(self._wanted.state)),
      'make tx with the spec, basis_dtype, inner optimizer and wrappers of the '
      f'saved state, {_START_ANEW}',
    )

  def _changes_of_leaves(self) -> Iterator[str]:
    told: dict[str, list[str]] = {}
    for path, leaf in self._new.items():
      for name in ('rank', 'projector'):
        if leaf[name] != self._old[path][name]:
          change = f'{name} {self._old[path][name]} -> {leaf[name]}'
          told.setdefault(change, []).append(path)
      if path in self._coords_anew:
        told.setdefault('basis and moments anew', []).append(path)
    for change, paths in told.items():
      yield f'{change} of {_some(paths)}'
    for path in sorted(self._roots_anew):
      if path.endswith('/projector'):
        yield f"the projector's own state anew, {path}"

  def _changes_of_dtypes(self) -> Iterator[str]:
    name = _coded_state.CodedState.__name__
    coded = [path for path, kind in self._classes[1].items() if kind == name]
    told: dict[str, list[str]] = {}
    for path, x in self.types().items():
      like = self._wanted.state.get(path, x)
      if x.dtype == like.dtype:
        continue
      old, new = jnp.dtype(x.dtype), jnp.dtype(like.dtype)
      floats = all(jnp.issubdtype(y, jnp.floating) for y in (old, new))
      if not floats and not any(_profile.is_in(k, path) for k in coded):
        raise ValueError(
          f'the checkpoint has {old} at {path!r}, where tx has {new}; make tx '
          'with the moment_dtype and basis_dtype of the saved state, '
          f'{_START_ANEW}.'
        )
      told.setdefault(f'{old} -> {new}', []).append(path)
    for change, paths in told.items():
      yield f'{change} of {_some(paths)}'


def _filled(types: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the arrays that are not empty; Orbax keeps no empty arrays."""
  return {path: x for path, x in types.items() if x.size}


def _within(root: str, paths: Iterable[str]) -> set[str]:
  return {path for path in paths if _profile.is_in(root, path)}


def _differ(root: str, both: tuple[Any, Any]) -> bool:
  """Whether two states differ in paths or classes within a node."""
  old, new = ({k: x[k] for k in _within(root, x)} for x in both)
  values = all(isinstance(x, str) for x in [*old.values(), *new.values()])
  return old != new if values else set(old) != set(new)


def _check_same(saved: Iterable[str], wanted: Iterable[str], advice: str):
  missing = sorted(set(wanted) - set(saved))
  extra = sorted(set(saved) - set(wanted))
  told = [f'no {_some(missing)}'] if missing else []
  told += [f'{_some(extra)}, which tx and params do not'] if extra else []
  if told:
    raise ValueError(f'the checkpoint has {" and ".join(told)}; {advice}.')


def _as_saved(saved: Any, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """Returns the type of a saved array, placed like one of another rank."""
  shape, sharding = tuple(saved.shape), like.sharding
  if shape != like.shape and isinstance(sharding, NamedSharding):
    mesh = sharding.mesh
    cut = lambda entry: _sharding.parts(mesh, _sharding.names(entry))
    entries = _sharding.pad(sharding.spec, like.ndim)
    spec = [
      entry if size % cut(entry) == 0 else None
      for size, entry in zip(shape, entries, strict=False)
    ]
    sharding = sharding.update(spec=PartitionSpec(*spec))
  return jax.ShapeDtypeStruct(shape, saved.dtype, sharding=sharding)


def _typed(x: Any) -> str:
  return f'{jnp.dtype(x.dtype).name}[{",".join(map(str, x.shape))}]'


def _kind(name: str | None) -> str:
  return name or 'a plain container or none'


def _some(paths: list[str]) -> str:
  """Returns the first paths, and the number of the others."""
  more = f' and {len(paths) - 3} more' if len(paths) > 3 else ''
  return ', '.join(paths[:3]) + more
