# SPDX-License-Identifier: Apache-2.0
"""The protocol of what stands for a basis in the state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from subspace_optax._matrix import _layout
from subspace_optax.projectors import _base


class Storage(NamedTuple):
  """How the bases of a projector live between steps.

  Projectors see float arrays, whatever the state holds in their place.

  Attributes:
    first: (sample, seed, layout, leaf) -> what the first state holds for one
      leaf, sharded as `leaf`, if `sample` draws its basis; None if the state
      holds nothing.
    read: (matrices, stored, own) -> the tree of bases that a step begins with,
      from what the state holds and the projector's own state.
    write: (matrices, stored, old, subspaces, moves) -> (stored, subspaces,
      moves), after a refresh has moved `old` to `subspaces.basis`: what to
      store, and the bases that this stands for, which the step goes on with.
      None if bases are stored as they are, behind `track`, too.
  """

  first: Callable[..., Any] | None
  read: Callable[[Any, Any, Any], Any]
  write: Callable[..., tuple[Any, _base.Subspaces, Any]] | None = None


def draw_first(
  sample: _base.Sample, layout: _layout.Layout, dtype: Any, seed: jax.Array
) -> jax.Array:
  """Returns a leaf's first bases."""
  return sample(layout, seed, _base.AT_INIT).astype(dtype)
