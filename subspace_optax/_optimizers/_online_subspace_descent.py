# SPDX-License-Identifier: Apache-2.0
"""Online Subspace Descent: bases that one optimizer learns for another.

Liang et al., `Memory-Efficient LLM Training with Online Subspace Descent
<https://arxiv.org/abs/2408.12857>`_, 2024, Algorithm 1.
"""

import functools
from typing import Any

import jax
import optax

from subspace_optax import projectors
from subspace_optax._chain import _spec
from subspace_optax._chain import _subspace
from subspace_optax._matrix import _sign
from subspace_optax._optimizers import _common


def online_subspace_descent(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _common.default(128),
  scale: Any = 1.0,
  *,
  alpha: Any = 5.0,
  orthogonality: float = 0.1,
  basis_optimizer: optax.GradientTransformation | None = None,
  base_optimizer: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: _common.Mask = None,
  seed: int = _common.default(0),
  every_k: int | None = None,
  spec: _spec.SubspaceSpec | None = None,
) -> _common.Transformation:
  """Online Subspace Descent: bases learned along with the weights, no SVD.

  A tree without a matrix to project is left to the base optimizer, see
  `describe`.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    scale: factor of the projected leaves' updates; 0.25 in the authors'
      scripts, whose bases move at 0.005 times the schedule whatever the
      learning rate is.
    alpha: learning rate of the bases over that of the weights.
    orthogonality: lambda of Eq. (6).
    basis_optimizer: OptimizerP with its own learning rate; Adam at `alpha`
      times `learning_rate` by default. `optax.sgd` saves its 2mr of state.
    base_optimizer: OptimizerW, what runs in the subspace and on plain leaves,
      `optax.scale_by_adam()` by default. It returns directions along the
      gradient, as `optax.adam(...)` does not.
    weight_decay: of the weights, decoupled, before the step, not scaled.
    mask: which leaves decay; see `optax.add_decayed_weights`.
    seed: of the first bases.
    every_k: micro-steps to a step, whose gradients are accumulated r-sized; see
      `subspace`. None for one.
    spec: takes the place of `rank` and `seed`; beside them it is an error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: 3mr + 2nr, or
    mr + 2nr with SGD on the bases.

  Raises:
    ValueError: a negative `alpha`; see `SubspaceSpec` and
      `projectors.online_pca`; at `init`, a `base_optimizer` that steps against
      the gradient.
    TypeError: likewise.

  References:
    Liang et al., `Memory-Efficient LLM Training with Online Subspace Descent
    <https://arxiv.org/abs/2408.12857>`_, 2024, Algorithm 1

  Example:
    >>> import subspace_optax as so
    >>> tx = so.online_subspace_descent(1e-3, rank=128)
  """
  _common.check_static(
    'online_subspace_descent', rank=rank, seed=seed, every_k=every_k
  )
  if not isinstance(alpha, jax.Array) and not alpha >= 0:
    raise ValueError(f'alpha must not be negative, got {alpha}.')
  if basis_optimizer is None:
    basis_optimizer = optax.adam(_common.times(alpha, learning_rate))
  make = functools.partial(
    _subspace.subspace,
    _common.spec_or(spec, {'rank': rank, 'seed': seed}),
    projectors.online_pca(
      _sign.require_against(basis_optimizer, 'basis_optimizer'), orthogonality
    ),
    _common.adam_or(base_optimizer, 'base_optimizer'),
    scale=scale,
  )
  return _common.with_decay(
    make, learning_rate, weight_decay, mask, every_k=every_k
  )
