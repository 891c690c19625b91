# SPDX-License-Identifier: Apache-2.0
"""Refresh, the first phase of `project`: bases before the coordinates."""

from typing import Any, NamedTuple

import jax

from subspace_optax import bases
from subspace_optax.projectors import _base


class Refreshed(NamedTuple):
  """What a refresh makes of a state; trees like those in it."""

  old_basis: Any  # before the refresh
  subspaces: _base.Subspaces  # after it
  moves: Any  # from one to the other; None if the rule makes none
  own: Any  # the projector's own state
  stored: Any  # the basis as it is kept


def refresh_bases(
  storage: bases.Storage,
  projector: _base.Projector,
  state: Any,  # a ProjectState
  matrices: Any,
  sources: Any,
  active: jax.Array,
) -> Refreshed:
  """Moves the bases that are due, if `active`, by the gradients `sources`."""
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
