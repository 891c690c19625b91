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
"""Ready-made optimizers in optax's own form."""

from collections.abc import Callable
from typing import Any

import optax

from subspace_optax import _spec
from subspace_optax import _subspace
from subspace_optax import projectors

Mask = Any | Callable[[Any], Any] | None
Transformation = optax.GradientTransformationExtraArgs


def galore(
  learning_rate: Any,
  rank: Any = 128,
  update_proj_gap: Any = 200,
  scale: Any = 1.0,
  base_optimizer: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  weight_dimension_numbers: Any = None,
  *,
  stagger: bool = False,
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """GaLore: an optimizer in the gradient's leading singular subspace.

  Takes the arguments of `optax.contrib.galore` and takes the same steps on
  trees of plain kernels. Beyond it: stacked and sharded kernels, any dtypes,
  zero and NaN gradients; embeddings, heads, norms and biases stay plain, see
  `describe`.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    update_proj_gap: T, steps between SVDs; the first is at step 0.
    scale: alpha, factor of the projected leaves' updates.
    base_optimizer: what runs in the subspace and on plain leaves,
      `optax.scale_by_adam()` by default.
    weight_decay: decoupled, on the weights before the step, not scaled.
    mask: which leaves decay; see `optax.add_decayed_weights`.
    weight_dimension_numbers: which axes form matrices; see `SubspaceSpec`.
    stagger: whether matrices take turns within each T steps, starting from
      random bases, so that no step pays for all SVDs.
    spec: takes the place of `rank` and `weight_dimension_numbers`.

  Returns:
    An optimizer. State per m x n matrix, m the long side: mr + 2nr.

  Raises:
    ValueError: see `SubspaceSpec` and `projectors.svd`.
    TypeError: likewise.

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
    Projection <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2

  Example:
    >>> import jax.numpy as jnp, optax, subspace_optax as so
    >>> tx = so.galore(learning_rate=0.01, rank=16)
    >>> params = {'w': jnp.ones((100, 100)), 'b': jnp.ones((100,))}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> so.memory_report(tx, params).state < so.memory_report(tx, params).adam
    True
  """
  spec = spec or _spec.SubspaceSpec(
    rank,
    side='long',
    weight_dimension_numbers=weight_dimension_numbers,
    only_if_smaller=False,
    allow_empty=True,
  )
  tx = _subspace.subspace(
    spec,
    projectors.svd(update_proj_gap, stagger=stagger),
    _adam_or(base_optimizer),
    scale=scale,
  )
  return _with_decay(tx, learning_rate, weight_decay, mask)


def golore(
  learning_rate: Any,
  rank: Any = 128,
  update_proj_gap: Any = 200,
  scale: Any = 1.0,
  *,
  random_from: int = 0,
  base_optimizer: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  stagger: bool = False,
  seed: int = 0,
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
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
      default.
    weight_decay: decoupled, on the weights before the step, not scaled.
    mask: which leaves decay; see `optax.add_decayed_weights`.
    stagger: whether matrices take turns within each tau steps, so that no step
      pays for all refreshes.
    seed: of the random bases.
    spec: takes the place of `rank` and `seed`.

  Returns:
    An optimizer. State per m x n matrix, m the short side: mr + 2nr.

  Raises:
    ValueError: see `SubspaceSpec` and `projectors.switch`.
    TypeError: likewise, or `random_from` is no int.

  References:
    He et al., `Subspace Optimization for Large Language Models with
    Convergence Guarantees <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> tx = so.golore(1e-3, rank=128, random_from=8_000)
  """
  if isinstance(random_from, bool) or not isinstance(random_from, int):
    raise TypeError(
      f'random_from must be a static int, got {random_from!r}; under '
      "optax.inject_hyperparams, pass static_args=('rank', 'random_from')."
    )
  random = projectors.stiefel(update_proj_gap, stagger=stagger)
  rule = random
  if random_from != 0:
    rule = projectors.switch(
      {
        0: projectors.svd(update_proj_gap, stagger=stagger),
        random_from: random,
      }
    )
  tx = _subspace.subspace(
    spec or _default_spec(rank, seed),
    rule,
    _adam_or(base_optimizer),
    transport='first',
    scale=scale,
  )
  return _with_decay(tx, learning_rate, weight_decay, mask)


def online_subspace_descent(
  learning_rate: Any,
  rank: Any = 128,
  scale: Any = 1.0,
  *,
  alpha: Any = 5.0,
  orthogonality: float = 0.1,
  basis_optimizer: optax.GradientTransformation | None = None,
  base_optimizer: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  seed: int = 0,
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """Online Subspace Descent: bases learned along with the weights, no SVD.

  A tree without a matrix to project is left to the base optimizer, see
  `describe`.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    scale: factor of the projected leaves' updates.
    alpha: learning rate of the bases over that of the weights.
    orthogonality: lambda of Eq. (6).
    basis_optimizer: OptimizerP with its own learning rate; Adam at `alpha`
      times `learning_rate` by default. `optax.sgd` saves its 2mr of state.
    base_optimizer: OptimizerW, what runs in the subspace and on plain leaves,
      `optax.scale_by_adam()` by default.
    weight_decay: of the weights, decoupled, before the step, not scaled.
    mask: which leaves decay; see `optax.add_decayed_weights`.
    seed: of the first bases.
    spec: takes the place of `rank` and `seed`.

  Returns:
    An optimizer. State per m x n matrix, m the short side: 3mr + 2nr, or
    mr + 2nr with SGD on the bases.

  Raises:
    ValueError: see `SubspaceSpec` and `projectors.online_pca`.
    TypeError: likewise.

  References:
    Liang et al., `Memory-Efficient LLM Training with Online Subspace Descent
    <https://arxiv.org/abs/2408.12857>`_, 2024, Algorithm 1

  Example:
    >>> import subspace_optax as so
    >>> tx = so.online_subspace_descent(1e-3, rank=128)
  """
  if basis_optimizer is None:
    basis_optimizer = optax.adam(_times(alpha, learning_rate))
  tx = _subspace.subspace(
    spec or _default_spec(rank, seed),
    projectors.online_pca(basis_optimizer, orthogonality),
    _adam_or(base_optimizer),
    scale=scale,
  )
  return _with_decay(tx, learning_rate, weight_decay, mask)


def _default_spec(rank: Any, seed: int) -> _spec.SubspaceSpec:
  return _spec.SubspaceSpec(rank, allow_empty=True, seed=seed)


def _adam_or(
  optimizer: optax.GradientTransformation | None,
) -> optax.GradientTransformation:
  return optax.scale_by_adam() if optimizer is None else optimizer


def _times(alpha: Any, learning_rate: Any) -> Any:
  if callable(learning_rate):
    return lambda count: alpha * learning_rate(count)
  return alpha * learning_rate


def _with_decay(
  tx: Transformation, learning_rate: Any, weight_decay: Any, mask: Mask
) -> Transformation:
  return optax.chain(
    tx,
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
