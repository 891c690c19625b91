# SPDX-License-Identifier: Apache-2.0
"""LDAdam: a basis that follows at every step, moments and errors carried along.

Robert et al., `LDAdam: Adaptive Optimization from Low-Dimensional Gradient
Statistics <https://arxiv.org/abs/2410.16103>`_, 2024, Algorithm 1.
"""

import functools
from typing import Any

import optax

from subspace_optax import projectors
from subspace_optax import residuals
from subspace_optax import transports
from subspace_optax._chain import _spec
from subspace_optax._chain import _subspace
from subspace_optax._matrix import _notices
from subspace_optax._optimizers import _common


def ldadamw(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _common.default(128),
  *,
  scale: Any = 1.0,
  b1: Any = 0.908,
  b2: Any = 0.99,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  momentum: float = 0.908,
  error_feedback: bool = True,
  weight_decay: Any = 0.0,
  mask: _common.Mask = None,
  seed: int = _common.default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> _common.Transformation:
  """LDAdam: power iteration, transport of both moments, error feedback.

  The first bases are Haar samples, of which the first power step is taken,
  where the authors' code takes an SVD.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    scale: factor of the projected leaves' updates.
    b1: decay of first moments.
    b2: decay of second moments.
    eps: added to the root of second moments.
    eps_root: added under that root; above 0 for derivatives through a step.
    momentum: rho, the weight of past coordinates in the power steps.
    error_feedback: whether the residual returns with the next gradient, for
      which a buffer of the whole matrix is kept.
    weight_decay: decoupled, on the weights before the step, not scaled.
    mask: which leaves decay; see `optax.add_decayed_weights`.
    seed: of the first bases.
    spec: takes the place of `rank` and `seed`; beside them it is an error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: mr + 3nr, and mn
    for error feedback; all of it in float32, of narrower parameters, too,
    unless `spec` says otherwise.

  Raises:
    ValueError: see `SubspaceSpec`, `projectors.power_iteration` and
      `residuals.error_feedback`.
    TypeError: likewise.

  References:
    Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> tx = so.ldadamw(1e-3, rank=128)
  """
  _common.check_static('ldadamw', rank=rank, seed=seed)
  make = functools.partial(
    _subspace.subspace,
    _common.spec_or(spec, {'rank': rank, 'seed': seed}),
    projectors.power_iteration(momentum=momentum),
    optax.scale_by_adam(b1, b2, eps, eps_root),
    transport=transports.both(b1, b2),
    residual=residuals.error_feedback(b1) if error_feedback else None,
    scale=scale,
  )
  tx = _common.with_decay(make, learning_rate, weight_decay, mask)
  return _notices.warning_of_ones(tx, b1=b1, b2=b2)
