# Copyright 2026 The subspace_optax Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""From directions back to updates of whole leaves."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from subspace_optax import _projected
from subspace_optax import _tree


class Residual(NamedTuple):
  """A rule for the part of the gradient outside the subspace.

  Attributes:
    init: from params to state.
    update: (projected, update, state) -> (update, state), where `projected` is
      a tree with `Projected` leaves that carry the gradient, and `update` the
      tree of scaled, unprojected directions.
  """

  init: Callable[[Any], Any]
  update: Callable[[Any, Any, Any], tuple[Any, Any]]


def unproject(
  *, scale: Any = 1.0, residual: Residual | None = None
) -> optax.GradientTransformationExtraArgs:
  """Takes directions in subspaces back to updates of whole leaves.

  Args:
    scale: factor of what comes back, alpha in GaLore; plain leaves are not
      scaled.
    residual: rule for the part of the gradient outside the subspace; needs
      `project(..., keep_gradient=True)`.

  Returns:
    A transformation that turns `Projected` nodes into updates of the leaf's
    shape, in the parameter's dtype, or the gradient's without params.

  Raises:
    ValueError: at `update`, if nothing is projected, `in_subspace` has not
      run, or a residual rule lacks the gradient.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Eq. (9)

  Example:
    >>> import subspace_optax as so
    >>> tx = so.unproject(scale=0.25)
  """
  return unproject_any(scale, residual, allow_empty=False)


def unproject_any(
  scale: Any, residual: Residual | None, *, allow_empty: bool
) -> optax.GradientTransformationExtraArgs:
  """As `unproject`; `allow_empty` where pieces can't be in the wrong order."""

  def init(params):
    return optax.EmptyState() if residual is None else residual.init(params)

  def update(updates, state, params=None, **extra_args):
    del extra_args
    pairs, _ = _tree.flatten(updates)
    _check_directed(pairs, residual is not None, allow_empty)
    like = pairs if params is None else _tree.flatten(params)[0]
    entries = [
      _update(entry, scale, reference.dtype)
      if isinstance(entry, _projected.Projected)
      else entry
      for (_, entry), (_, reference) in zip(pairs, like, strict=True)
    ]
    full = _tree.replace_entries(updates, entries)
    if residual is not None:
      full, state = residual.update(updates, full, state)
    return full, state

  return optax.GradientTransformationExtraArgs(init, update)


def _update(node: _projected.Projected, scale: Any, dtype: Any) -> jax.Array:
  # Scaled while it is small.
  direction = (scale * node.direction).astype(dtype)
  basis = node.basis.astype(dtype)
  return node.layout.unproject(basis, direction, node.sharding)


def _check_directed(
  pairs: list, needs_gradient: bool, allow_empty: bool
) -> None:
  """Raises where `in_subspace` or `project` should have been, and was not."""
  nodes = [(p, e) for p, e in pairs if isinstance(e, _projected.Projected)]
  if pairs and not nodes and not allow_empty:
    raise ValueError(
      f'no update is projected (the first is {pairs[0][0]!r}); chain '
      '`project` and `in_subspace` before `unproject`.'
    )
  for path, node in nodes:
    if node.direction is None:
      raise ValueError(
        f'update {path!r} has no direction yet; chain `in_subspace` before '
        '`unproject`.'
      )
    if needs_gradient and node.gradient is None:
      raise ValueError(
        f'update {path!r} came without its gradient, which the residual '
        'needs; use `project(..., keep_gradient=True)`.'
      )
