# SPDX-License-Identifier: Apache-2.0
"""The interface for storing bases in the state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from subspace_optax._matrix import _layout
from subspace_optax.projectors import _base


class Storage(NamedTuple):
  """How the bases of a projector are stored between steps.

  Projectors always see float arrays, whatever the state holds.

  Attributes:
    first: (sample, seed, layout, leaf) -> the first stored value of one leaf,
      sharded like `leaf`, for a basis drawn by `sample`; None if the state
      stores nothing.
    read: (matrices, stored, own) -> the tree of bases at the start of a step,
      from the stored values and the projector's own state.
    write: (matrices, stored, old, subspaces, moves) -> (stored, subspaces,
      moves), called after a refresh has moved `old` to `subspaces.basis`. It
      returns what to store, and the bases that the stored values represent,
      with which the step continues. None if bases are stored unchanged, also
      after `track`.
  """

  first: Callable[..., Any] | None
  read: Callable[[Any, Any, Any], Any]
  write: Callable[..., tuple[Any, _base.Subspaces, Any]] | None = None


def draw_first(
  sample: _base.Sample, layout: _layout.Layout, dtype: Any, seed: jax.Array
) -> jax.Array:
  """Returns a leaf's first bases."""
  return sample(layout, seed, _base.AT_INIT).astype(dtype)
