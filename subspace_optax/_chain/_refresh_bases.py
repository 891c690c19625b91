# SPDX-License-Identifier: Apache-2.0
"""Refresh, the first phase of `project`, before the coordinates."""

from typing import Any, NamedTuple

import jax

from subspace_optax import bases
from subspace_optax.projectors import _base


class Refreshed(NamedTuple):
  """The result of a refresh; trees like those in the state."""

  old_basis: Any  # before the refresh
  subspaces: _base.Subspaces  # after it
  moves: Any  # from the old to the new basis; None if the rule makes none
  own: Any  # the projector's own state
  stored: Any  # the basis as the state stores it


def refresh_bases(
  storage: bases.Storage,
  projector: _base.Projector,
  state: Any,  # a ProjectState
  matrices: Any,
  sources: Any,
  active: jax.Array,
) -> Refreshed:
  """Moves bases that are due, if `active`, by the gradients in `sources`."""
  stored = state.subspaces.basis
  basis = storage.read(matrices, stored, state.projector)
  subspaces, moves, own = projector.refresh(
    _base.Context(state.count, active),
    sources,
    state.subspaces._replace(basis=basis),
    state.projector,
  )
  if storage.write is not None and moves is not None:
    stored, subspaces, moves = storage.write(
      matrices, stored, basis, subspaces, moves
    )
  return Refreshed(basis, subspaces, moves, own, stored)
