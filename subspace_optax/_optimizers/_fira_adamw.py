# SPDX-License-Identifier: Apache-2.0
"""Fira: GaLore that keeps the residual, scaled as Adam scaled the subspace.

Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024, Algorithm 1.
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


def fira_adamw(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _common.default(128),
  update_proj_gap: Any = _common.default(200),
  scale: Any = 0.25,
  *,
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
  """Fira: GaLore's Adam in the subspace, and the scaled residual beside it.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    update_proj_gap: T, steps between SVDs; the first is at step 0.
    scale: alpha, factor of what comes back from the subspace; the residual is
      not multiplied by it. The authors take 0.25, and 0.0625 from a billion
      parameters on.
    b1: decay of first moments.
    b2: decay of second moments.
    eps: added to the root of second moments.
    eps_root: added under that root; above 0 for derivatives through a step.
    limiter: gamma, the most that the residual's norm may grow in a step.
    weight_decay: decoupled, on the weights before the step, not scaled.
    mask: which leaves decay; see `optax.add_decayed_weights`.
    stagger: whether matrices take turns within each T steps, starting from
      random bases.
    seed: of the first bases if staggered.
    spec: takes the place of `rank` and `seed`; beside them it is an error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: mr + 2nr + 1.

  Raises:
    ValueError: see `SubspaceSpec`, `projectors.svd` and `residuals.fira`.
    TypeError: likewise.

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> tx = so.fira_adamw(1e-2, rank=128)
  """
  _common.check_static('fira_adamw', rank=rank, seed=seed)
  make = functools.partial(
    _subspace.subspace,
    _common.spec_or(spec, {'rank': rank, 'seed': seed}),
    projectors.svd(_common.value(update_proj_gap), stagger=stagger),
    optax.scale_by_adam(b1, b2, eps, eps_root),
    residual=residuals.fira(limiter),
    scale=scale,
  )
  tx = _common.with_decay(make, learning_rate, weight_decay, mask)
  return _notices.warning_of_ones(tx, b1=b1, b2=b2)
