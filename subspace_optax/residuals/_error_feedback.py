# SPDX-License-Identifier: Apache-2.0
"""Error feedback: the residual is added to the next gradient.

Robert et al., `LDAdam: Adaptive Optimization from Low-Dimensional Gradient
Statistics <https://arxiv.org/abs/2410.16103>`_, 2024. With G the gradient plus
the last error, and the momentum M_o that was carried from P_o to P as M,

  E = G - P R + b1 / (1 - b1) (P_o M_o - P M),

so that gradients lost from the momentum when the basis moved return as well.
"""

from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _varying
from subspace_optax.residuals import _base


def error_feedback(b1: float = 0.9) -> _base.Residual:
  """Keeps the residual and adds it to the next step's gradient.

  The state is a buffer of the whole leaf, in the dtype of the moments. It helps
  convergence and costs memory. Gradient and buffer are added in the gradient's
  dtype; in bfloat16 about a percent is lost. The rule costs another product
  with the basis, and two more at steps in which the basis moves. If the
  gradient is not finite, the buffer does not change. A move after the
  coordinates are computed, as in `online_pca`, loses no momentum here.

  Args:
    b1: decay rate of the inner optimizer's first moment, which must be a mean,
      as in Adam or Lion. It serves to return the momentum that is lost when a
      basis moves; pass 0 if there is no momentum.

  Returns:
    A residual rule for `subspace_optax.subspace`, the only function that can
    change the gradient which `project` gets.

  Raises:
    ValueError: b1 outside [0, 1); at `update` with nonzero b1, an inner
      optimizer whose first moments are not registered or not means, such as
      `optax.trace`.

  References:
    Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = so.subspace(
    ...   so.SubspaceSpec(rank=128),
    ...   so.projectors.power_iteration(momentum=0.908),
    ...   optax.scale_by_adam(b1=0.908, b2=0.99),
    ...   transport=so.transports.both(b1=0.908, b2=0.99),
    ...   residual=so.residuals.error_feedback(b1=0.908),
    ... )
  """
  traced = isinstance(b1, jax.Array)
  _arguments.check_decay(b1, 'b1')

  def update(node: _projected.Projected, scale: Any, count: Any, last: Any):
    del count
    error = node.outside()
    if node.before is not None and (traced or b1 > 0):
      back = lambda e: e + (b1 / (1.0 - b1) * _lost(node)).astype(e.dtype)
      moved = jnp.any(node.before.moved)
      error = _varying.cond(moved, back, lambda e: e, error)
    error = error.astype(last.dtype)  # which may overflow
    finite = jnp.isfinite(node.layout.energy(error))
    error = jnp.where(node.layout.along_leaf(finite), error, last)
    return node.combine(scale * _linalg.widen(node.direction)), error

  return _base.Residual('error_feedback', update, _base.zeros_at_init, _add)


def _lost(node: _projected.Projected) -> jax.Array:
  """Returns P_o M_o - P M, the momentum that the move left behind."""
  if node.old_mean is None:
    raise ValueError(
      'error_feedback finds no mean of gradients in the inner state; name it '
      'with `subspace_optax.register_moments`, use `optax.ema` instead of '
      '`optax.trace`, or pass b1=0 if there is none.'
    )

  def lift(coords: jax.Array, basis: jax.Array) -> jax.Array:
    basis = _linalg.widen(basis)
    weights = node.weights_of(coords, basis)
    return node.layout.unproject(basis, weights, node.sharding)

  return lift(node.old_mean, node.old_basis) - lift(node.mean, node.basis)


def _add(gradient: jax.Array, error: jax.Array) -> jax.Array:
  return (_linalg.widen(gradient) + error).astype(gradient.dtype)
