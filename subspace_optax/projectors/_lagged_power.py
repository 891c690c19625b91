# SPDX-License-Identifier: Apache-2.0
"""Dion's bases: half a power step from the coordinates of the last step.

Ahn et al., `Dion: Distributed Orthonormalized Updates
<https://arxiv.org/abs/2504.05295>`_, 2025, Algorithm 1. With Q_o the last
coordinates, R_o = P_o^T G_o, with rows of length 1,

  P = orth(G Q_o^T),   Q = unit rows of P^T G.

`power_iteration` uses P_o^T G instead of Q_o: it takes one more product with
the gradient, and has no state but the basis. If gradients change slowly, as
momentum does, both find the same subspace.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _coords
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _sharding
from subspace_optax.projectors import _base
from subspace_optax.projectors import _periodic

# Weight of the last basis, which completes a rank-deficient image.
_SHIFT = 1e-6


class LaggedPowerState(NamedTuple):
  """State of `lagged_power`."""

  periodic: _periodic.PeriodicState
  # tree, leaf shape=the coordinates', dtype=float32: Q, rows of length 1
  right: Any


def lagged_power(
  update_proj_gap: Any = 1, *, stagger: bool = False
) -> _base.Projector:
  """Half a power step with the last step's coordinates, at every T-th step.

  Made for momentum; see `residuals.momentum_feedback`. A step costs one product
  with the gradient (2mnr), half as much as `power_iteration` takes, and about
  24mr^2 of Cholesky QR. Q starts at random. A matrix whose gradient is zero or
  not finite keeps its Q.

  Args:
    update_proj_gap: T, steps between power steps, or a `LazyGap`. Q is updated
      at every step.
    stagger: whether matrices take turns within each T steps.

  Returns:
    A projector with orthonormal bases. Its state is nr, in addition to mr for
    the basis. The paper keeps no basis; here, moments can follow it.

  Raises:
    TypeError: the gap is not an int.
    ValueError: the gap is below 1.

  References:
    Ahn et al., `Dion <https://arxiv.org/abs/2504.05295>`_, 2025, Algorithm 1

  Example:
    >>> import optax, subspace_optax as so
    >>> dion = so.subspace(
    ...   so.SubspaceSpec(rank=0.25),
    ...   so.projectors.lagged_power(),
    ...   optax.identity(),
    ...   plain=optax.scale_by_adam(),
    ...   residual=so.residuals.momentum_feedback(0.95, 'rows'),
    ... )
  """
  rule = _periodic.periodic(
    'lagged_power', _draw, update_proj_gap, options={}, stagger=stagger
  )

  def init(subspaces, matrices):
    right = jax.tree.map(_first_right, matrices)
    return LaggedPowerState(rule.init(subspaces, matrices), right)

  def refresh(context, matrices, subspaces, state):
    # `mean` carries Q here; other rules use it for a mean of coordinates.
    with_right = lambda x, right: dataclasses.replace(x, mean=right)
    subspaces, moves, periodic = rule.refresh(
      context,
      jax.tree.map(with_right, matrices, state.right),
      subspaces,
      state.periodic,
    )
    return subspaces, moves, state._replace(periodic=periodic)

  def track(context, matrices, coords, subspaces, state):
    def one(x: _base.Matrix, right: jax.Array, r: jax.Array) -> jax.Array:
      new = _sharding.like(_coords.unit_rows(x.layout, r), right)
      good = x.layout.along_coords(x.ok & context.active)
      return jnp.where(good, new, right)

    right = jax.tree.map(one, matrices, state.right, coords)
    return subspaces, None, state._replace(right=right)

  return _base.Projector(rule.name, init, refresh, track)


def _draw(matrix: _base.Matrix, basis: jax.Array, period: jax.Array):
  """Returns orth(G Q^T), with the gradient normalised."""
  del period
  layout, p = matrix.layout, matrix.aligned(basis)
  assert matrix.mean is not None  # see `refresh`
  image = matrix.unit_image(matrix.mean)
  size = _linalg.safe_sqrt(layout.basis_energy(image))
  return _linalg.orthonormalize(
    layout, image + matrix.scale(_SHIFT * jnp.maximum(size, 1e-9), p)
  )


def _first_right(matrix: _base.Matrix) -> jax.Array:
  """Returns random rows of length 1, placed like coordinates."""
  static, args = (matrix.layout,), (matrix.seed,)
  return matrix.layout.place_coords(_draw_rows, static, args, matrix.like)


def _draw_rows(layout: _layout.Layout, seeds: jax.Array) -> jax.Array:
  """Draws the rows as a basis of the other side, with coordinates' axes."""
  other = dataclasses.replace(layout, project_rows=not layout.project_rows)
  # Not the random numbers of the first basis.
  x = _linalg.gaussian(other, seeds, _base.AT_INIT - 1)
  return _coords.unit_rows(layout, jnp.moveaxis(x, -1, layout.rank_axis))
