# SPDX-License-Identifier: Apache-2.0
"""Adam in a random subspace with Fira's residual: our recipe for memory.

The Haar basis of GoLore (He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_,
2024), drawn again every T steps and not stored, first moments carried along;
and the residual of Fira (Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_,
2024), at the paper's alpha = 1:

  W <- W - lr (P N + L(phi (G - P R))).

In a random basis every column has about r / m of its energy inside, so that
phi, and with it the step, is the same at every rank.
"""

import functools
from typing import Any

import optax

from subspace_optax import projectors
from subspace_optax import residuals
from subspace_optax._chain import _spec
from subspace_optax._chain import _subspace
from subspace_optax._matrix import _notices
from subspace_optax._optimizers import _common
from subspace_optax.low_precision import _quantize_moments


def subspace_adamw(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _common.default(0.25),
  update_proj_gap: Any = _common.default(200),
  scale: Any = 1.0,
  *,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  limiter: Any = 1.01,
  eight_bit: bool = False,
  weight_decay: Any = 0.0,
  mask: _common.Mask = None,
  stagger: bool = False,
  seed: int = _common.default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> _common.Transformation:
  """AdamW for whole matrices with the moments of a quarter of their rows.

  Args:
    learning_rate: a float or a schedule, about Adam's.
    rank: r, here a share of the short side; see `SubspaceSpec`.
    update_proj_gap: T, steps between new bases.
    scale: alpha, factor of what comes back from the subspace.
    b1: decay of first moments.
    b2: decay of second moments, which stay as they are when a basis moves.
    eps: added to the root of second moments.
    eps_root: added under that root; above 0 for derivatives through a step.
    limiter: gamma, the most that the residual's norm may grow in a step.
    eight_bit: whether moments take a byte each; see `scale_by_adam8bit`.
    weight_decay: decoupled, on the weights before the step, not scaled.
    mask: which leaves decay; see `optax.add_decayed_weights`.
    stagger: whether matrices take turns within each T steps.
    seed: of the bases.
    spec: takes the place of `rank` and `seed`; beside them it is an error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: 2nr numbers, and a
    few more.

  Raises:
    ValueError: see `SubspaceSpec`, `projectors.stiefel`, `residuals.fira`.
    TypeError: likewise.

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024; He et al.,
    `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> tx = so.subspace_adamw(5e-3)
  """
  adam = (
    _quantize_moments.scale_by_adam8bit if eight_bit else optax.scale_by_adam
  )
  _common.check_static(
    'subspace_adamw', rank=rank, update_proj_gap=update_proj_gap, seed=seed
  )
  make = functools.partial(
    _subspace.subspace,
    _common.spec_or(spec, {'rank': rank, 'seed': seed}),
    projectors.stiefel(
      _common.value(update_proj_gap), stagger=stagger, regenerate=True
    ),
    adam(b1, b2, eps, eps_root),
    transport='first',
    residual=residuals.fira(limiter),
    scale=scale,
  )
  tx = _common.with_decay(make, learning_rate, weight_decay, mask)
  return _notices.warning_of_ones(tx, b1=b1, b2=b2)
