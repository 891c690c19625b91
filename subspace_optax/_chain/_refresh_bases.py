# SPDX-License-Identifier: Apache-2.0
"""Refresh, the first phase of `project`: bases before the coordinates."""

import functools
from typing import Any, NamedTuple

import jax

from subspace_optax._chain import _spec
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _tree
from subspace_optax.bases import _quantized_basis
from subspace_optax.projectors import _base


class Refreshed(NamedTuple):
  """What a refresh makes of a state; trees like those in it."""

  old_basis: Any  # before the refresh
  subspaces: _base.Subspaces  # after it
  moves: Any  # from one to the other; None if the rule makes none
  own: Any  # the projector's own state
  stored: Any  # the basis as it is kept


def refresh_bases(
  spec: _spec.SubspaceSpec,
  projector: _base.Projector,
  state: Any,  # a ProjectState
  matrices: Any,
  sources: Any,
  active: jax.Array,
) -> Refreshed:
  """Moves the bases that are due, if `active`, by the gradients `sources`."""
  stored = state.subspaces.basis
  if projector.rebuild:
    drawn = projector.rebuild(matrices, state.projector)
    place = functools.partial(_place_rebuilt, spec.basis_dtype)
    basis = jax.tree.map(place, drawn, matrices)
  else:
    read = functools.partial(_quantized_basis.read, projector.orthonormal)
    basis = jax.tree.map(read, matrices, stored)
  subspaces, moves, own = projector.refresh(
    _base.Context(state.count, active),
    sources,
    state.subspaces._replace(basis=basis),
    state.projector,
  )
  new = Refreshed(basis, subspaces, moves, own, stored)
  if moves is None or not _quantized_basis.is_quantized(spec.basis_dtype):
    return new
  return _encode(projector.orthonormal, matrices, new)


def _place_rebuilt(
  dtype: Any, basis: jax.Array, matrix: _base.Matrix
) -> jax.Array:
  """Returns a basis as it would have come from the state."""
  return matrix.layout.settle_basis(basis.astype(dtype), matrix.like)


def _encode(orthonormal: bool, matrices: Any, new: Refreshed) -> Refreshed:
  """Returns what codes can hold of a refresh, and the codes."""
  codes, basis, error, drift, transition = _tree.map_unzip(
    functools.partial(_quantized_basis.store, orthonormal),
    5,
    matrices,
    new.stored,
    new.old_basis,
    new.subspaces.basis,
    new.subspaces.orthogonality_error,
    new.subspaces.drift,
    new.moves,
  )
  subspaces = new.subspaces._replace(
    basis=basis, orthogonality_error=error, drift=drift
  )
  replace = lambda _, move, c: _projected.Move(move.moved, c)
  moves = jax.tree.map(replace, matrices, new.moves, transition)
  return new._replace(subspaces=subspaces, moves=moves, stored=codes)
