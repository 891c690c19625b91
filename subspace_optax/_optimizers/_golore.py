# SPDX-License-Identifier: Apache-2.0
"""GoLore: bases from gradients first, then random ones.

He et al., `Subspace Optimization for Large Language Models with Convergence
Guarantees <https://arxiv.org/abs/2410.11289>`_, 2024.
"""

import functools
import operator
from typing import Any

import optax

from subspace_optax import projectors
from subspace_optax._chain import _spec
from subspace_optax._chain import _subspace
from subspace_optax._optimizers import _common
from subspace_optax.projectors import _gap


def golore(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _common.default(128),
  update_proj_gap: Any = _common.default(200),
  scale: Any = 1.0,
  *,
  random_from: int = _common.default(0),
  base_optimizer: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: _common.Mask = None,
  stagger: bool = False,
  seed: int = _common.default(0),
  every_k: int | None = None,
  spec: _spec.SubspaceSpec | None = None,
) -> _common.Transformation:
  """GoLore: GaLore whose bases turn random, so that noise can't trap it.

  Bases come from the gradient's SVD before step `random_from` and are Haar
  samples after it; first moments move along (momentum projection). A tree
  without a matrix to project is left to the base optimizer, see `describe`.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    update_proj_gap: tau, steps between refreshes.
    scale: factor of the projected leaves' updates.
    random_from: first step with random bases; 0 for pure GoLore, 8,000 for
      GoLore@20% of 10,000 steps.
    base_optimizer: what runs in the subspace and on plain leaves, one whose
      first moments are known: see `in_subspace`. `optax.scale_by_adam()` by
      default. It returns directions along the gradient, as `optax.adam(...)`
      does not.
    weight_decay: decoupled, on the weights before the step, not scaled.
    mask: which leaves decay; see `optax.add_decayed_weights`.
    stagger: whether matrices take turns within each tau steps, so that no step
      pays for all refreshes.
    seed: of the random bases.
    every_k: micro-steps to a step, whose gradients are accumulated r-sized; see
      `subspace`. None for one.
    spec: takes the place of `rank` and `seed`; beside them it is an error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: mr + 2nr.

  Raises:
    ValueError: see `SubspaceSpec` and `projectors.switch`; at `init`, a
      `base_optimizer` that steps against the gradient.
    TypeError: likewise, or `random_from` is no int.

  References:
    He et al., `Subspace Optimization for Large Language Models with
    Convergence Guarantees <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> tx = so.golore(1e-3, rank=128, random_from=8_000)
  """
  _common.check_static(
    'golore', rank=rank, random_from=random_from, seed=seed, every_k=every_k
  )
  gap, start = map(_common.value, (update_proj_gap, random_from))
  _gap.check_int(start, 'random_from', least=0)
  random = projectors.stiefel(gap, stagger=stagger)
  rule = random
  if start != 0:
    rule = projectors.switch(
      {
        0: projectors.svd(gap, stagger=stagger),
        operator.index(start): random,
      }
    )
  make = functools.partial(
    _subspace.subspace,
    _common.spec_or(spec, {'rank': rank, 'seed': seed}),
    rule,
    _common.adam_or(base_optimizer, 'base_optimizer'),
    transport='first',
    scale=scale,
  )
  return _common.with_decay(
    make, learning_rate, weight_decay, mask, every_k=every_k
  )
