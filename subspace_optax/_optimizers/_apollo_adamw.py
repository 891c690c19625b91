# SPDX-License-Identifier: Apache-2.0
"""APOLLO: the gradient, scaled by what Adam does in a random subspace.

Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
<https://arxiv.org/abs/2412.05270>`_, 2024, Algorithm 1.
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


def apollo_adamw(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _common.default(128),
  update_proj_gap: Any = _common.default(200),
  scale: Any = 1.0,
  *,
  granularity: str = 'channel',
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  limiter: Any = 1.01,
  weight_decay: Any = 0.0,
  mask: _common.Mask = None,
  stagger: bool = False,
  seed: int = _common.default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> _common.Transformation:
  """APOLLO: whole gradients, scaled column by column or matrix by matrix.

  The random bases are drawn anew at every step from their seeds instead of
  stored. APOLLO-Mini is `rank=1, scale=128**0.5, granularity='tensor'`.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    update_proj_gap: T, steps between new bases.
    scale: alpha, factor of the scaled gradients. The authors' and Hugging
      Face's `scale` is its square: their 128 is 128**0.5 here, and 128 here
      would be steps 11.3 times as long.
    granularity: 'channel' or 'tensor'; see `residuals.apollo`.
    b1: decay of first moments.
    b2: decay of second moments.
    eps: added to the root of second moments.
    eps_root: added under that root; above 0 for derivatives through a step.
    limiter: gamma, the most that an update's norm may grow in a step.
    weight_decay: decoupled, on the weights before the step, not scaled.
    mask: which leaves decay; see `optax.add_decayed_weights`.
    stagger: whether matrices take turns within each T steps.
    seed: of the bases.
    spec: takes the place of `rank` and `seed`; beside them it is an error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: 2nr and a few
    numbers.

  Raises:
    ValueError: see `SubspaceSpec`, `projectors.gaussian`, `residuals.apollo`.
    TypeError: likewise.

  References:
    Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> apollo = so.apollo_adamw(1e-2, rank=128)
    >>> mini = so.apollo_adamw(
    ...   1e-2, rank=1, scale=128**0.5, granularity='tensor'
    ... )
  """
  _common.check_static(
    'apollo_adamw', rank=rank, update_proj_gap=update_proj_gap, seed=seed
  )
  make = functools.partial(
    _subspace.subspace,
    _common.spec_or(spec, {'rank': rank, 'seed': seed}),
    projectors.gaussian(
      _common.value(update_proj_gap), stagger=stagger, regenerate=True
    ),
    optax.scale_by_adam(b1, b2, eps, eps_root),
    residual=residuals.apollo(granularity, limiter),
    scale=scale,
  )
  tx = _common.with_decay(make, learning_rate, weight_decay, mask)
  return _notices.warning_of_ones(tx, b1=b1, b2=b2)
