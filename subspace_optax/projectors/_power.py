# SPDX-License-Identifier: Apache-2.0
"""LDAdam's bases: one block power step from the last basis.

Robert et al., `LDAdam: Adaptive Optimization from Low-Dimensional Gradient
Statistics <https://arxiv.org/abs/2410.16103>`_, 2024. With M the mean of past
coordinates, debiased, and B = rho P_o M + (1 - rho) G,

  P = orth(B B^T P_o),

which needs no B: X = P_o^T B = rho S M + (1 - rho) P_o^T G with S = P_o^T P_o,
and B X^T = rho P_o (M X^T) + (1 - rho) G X^T.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _varying
from subspace_optax.projectors import _base
from subspace_optax.projectors import _periodic

# Weight of the last basis, which completes a rank-deficient image; relative to
# the energy that the last basis captures.
_SHIFT = 1e-6


class PowerState(NamedTuple):
  """State of `power_iteration` with momentum."""

  periodic: _periodic.PeriodicState
  count: Any  # tree, leaf shape=(*batch,), dtype=int32, steps in the mean
  mean: Any  # tree, leaf shape=the coordinates', dtype=float32


def power_iteration(
  update_proj_gap: Any = 1,
  momentum: float = 0.0,
  *,
  stagger: bool = False,
) -> _base.Projector:
  """One block power step from the last basis, at every T-th step.

  Tracks the leading subspace of successive gradients from a random start. Each
  step costs two products with the gradient (4mnr) and about 24mr^2 of Cholesky
  QR. With `momentum`, the power step uses a weighted mean of the gradient and
  the mean of past coordinates, which follow the basis (C = P_n^T P_o).

  The columns are those of the Q factor. Step by step they turn towards the
  singular vectors, in order, without solving an eigenproblem. From the same
  start they are the same on any mesh, up to rounding.

  Args:
    update_proj_gap: T, steps between power steps, or a `LazyGap`.
    momentum: rho, the weight of past coordinates and the decay rate of their
      mean, in [0, 1). LDAdam uses its beta_1, 0.908. Adds nr of float32 state.
    stagger: whether matrices take turns within each T steps.

  Returns:
    A projector with orthonormal bases.

  Raises:
    TypeError: the gap is not an int.
    ValueError: the gap is below 1; a momentum outside [0, 1).

  References:
    Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = so.subspace(
    ...   so.SubspaceSpec(rank=128),
    ...   so.projectors.power_iteration(momentum=0.908),
    ...   optax.scale_by_adam(b1=0.908, b2=0.99),
    ...   transport=so.transports.both(b1=0.908, b2=0.99),
    ... )
  """
  _arguments.check_decay(momentum, 'momentum')
  keeps_mean = isinstance(momentum, jax.Array) or momentum > 0

  def draw(matrix: _base.Matrix, basis: jax.Array, period: jax.Array):
    del period
    return _power_step(matrix, matrix.aligned(basis), momentum)

  rule = _periodic.periodic(
    'power_iteration',
    draw,
    update_proj_gap,
    options={'momentum': momentum if keeps_mean else None},
    stagger=stagger,
  )
  if not keeps_mean:
    return rule

  def init(subspaces, matrices):
    count = lambda x: jnp.zeros_like(x, jnp.int32)
    return PowerState(
      rule.init(subspaces, matrices),
      jax.tree.map(count, subspaces.captured_energy),
      jax.tree.map(_zero_coords, matrices),
    )

  def refresh(context, matrices, subspaces, state):
    def with_mean(x: _base.Matrix, mean: jax.Array, count: jax.Array):
      weight = 1.0 - momentum ** count.astype(jnp.float32)
      weight = x.layout.along_coords(jnp.where(count > 0, weight, 1.0))
      scale = x.layout.along_coords(lax.rsqrt(x.energy))
      return dataclasses.replace(x, mean=mean / weight * scale)

    subspaces, moves, periodic = rule.refresh(
      context,
      jax.tree.map(with_mean, matrices, state.mean, state.count),
      subspaces,
      state.periodic,
    )
    mean = jax.tree.map(_carry, matrices, state.mean, moves)
    return subspaces, moves, PowerState(periodic, state.count, mean)

  def track(context, matrices, coords, subspaces, state):
    def one(x: _base.Matrix, mean: jax.Array, r: jax.Array) -> jax.Array:
      new = _sharding.like(momentum * mean + (1.0 - momentum) * r, mean)
      return jnp.where(x.layout.along_coords(x.ok & context.active), new, mean)

    add = lambda x, count: count + (x.ok & context.active).astype(jnp.int32)
    count = jax.tree.map(add, matrices, state.count)
    mean = jax.tree.map(one, matrices, state.mean, coords)
    return subspaces, None, PowerState(state.periodic, count, mean)

  return _base.Projector(rule.name, init, refresh, track)


def _zero_coords(matrix: _base.Matrix) -> jax.Array:
  """Returns float32 zeros, placed like coordinates."""
  return matrix.layout.zeros(matrix.layout.coords_axes(), matrix.like)


def _power_step(
  matrix: _base.Matrix, p: jax.Array, momentum: float
) -> jax.Array:
  """Returns orth(B B^T P), with the gradient normalised."""
  layout = matrix.layout
  x = (1.0 - momentum) * matrix.unit_coordinates(p)
  if matrix.mean is not None:
    mean = momentum * matrix.mean
    x += layout.mix_coords(layout.gram(p, p), mean)
  image = (1.0 - momentum) * matrix.unit_image(x)
  if matrix.mean is not None:
    image += layout.mix_basis(p, layout.gram_coords(mean, x))
  captured = jnp.maximum(layout.coords_energy(x), 1e-9)
  return _linalg.orthonormalize(
    layout, image + matrix.scale(_SHIFT * captured, p)
  )


def _carry(
  matrix: _base.Matrix, mean: jax.Array, move: _projected.Move
) -> jax.Array:
  """Returns the mean in the new basis."""
  return _varying.cond(
    jnp.any(move.moved),
    lambda: _sharding.like(
      matrix.layout.mix_coords(move.transition, mean), mean
    ),
    lambda: mean,
  )
