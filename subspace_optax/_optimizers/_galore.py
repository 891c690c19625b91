# SPDX-License-Identifier: Apache-2.0
"""GaLore: SVD of the gradient every T steps, the optimizer's state kept.

Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
Projection <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2.
"""

import functools
from typing import Any

import optax

from subspace_optax import projectors
from subspace_optax._chain import _spec
from subspace_optax._chain import _subspace
from subspace_optax._optimizers import _common


def galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _common.default(128),
  update_proj_gap: Any = _common.default(200),
  scale: Any = 1.0,
  base_optimizer: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: _common.Mask = None,
  weight_dimension_numbers: Any = None,
  *,
  stagger: bool = False,
  every_k: int | None = None,
  spec: _spec.SubspaceSpec | None = None,
) -> _common.Transformation:
  """GaLore: an optimizer in the gradient's leading singular subspace.

  Takes the arguments of `optax.contrib.galore` and takes the same steps on
  trees of plain kernels. Beyond it: stacked and sharded kernels, any dtypes,
  zero and NaN gradients; embeddings, heads, norms and biases stay plain, see
  `describe`.

  The GaLore of its authors and of Hugging Face differs in two defaults: it
  projects the short side (`proj_type='std'`), as `spec=SubspaceSpec(128)` does
  here, where this one, like contrib, projects the long side (their
  'reverse_std'); and its `scale` is 0.25.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    update_proj_gap: T, steps between SVDs; the first is at step 0.
    scale: alpha, factor of the projected leaves' updates.
    base_optimizer: what runs in the subspace and on plain leaves,
      `optax.scale_by_adam()` by default. It returns directions along the
      gradient. `optax.adam(...)` steps against it, so that with `learning_rate`
      behind the loss would grow: an error here, contrib runs it. A b2 that
      `optax.inject_hyperparams` gives it needs `hyperparam_dtype=jnp.float32`
      beside bfloat16 parameters, in whose dtype 0.999 is 1: unseen from here,
      Adam would divide by zero.
    weight_decay: decoupled, on the weights before the step, not scaled.
    mask: which leaves decay; see `optax.add_decayed_weights`.
    weight_dimension_numbers: which axes form matrices; see `SubspaceSpec`.
    stagger: whether matrices take turns within each T steps, starting from
      random bases, so that no step pays for all SVDs.
    every_k: micro-steps to a step, whose gradients are accumulated r-sized; see
      `subspace`. None for one.
    spec: takes the place of `rank` and `weight_dimension_numbers`; beside them
      it is an error.

  Returns:
    An optimizer. State per m x n matrix, m the long side: mr + 2nr.

  Raises:
    ValueError: see `SubspaceSpec` and `projectors.svd`; at `init`, a
      `base_optimizer` that steps against the gradient.
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
  _common.check_static('galore', rank=rank, every_k=every_k)
  spec = _common.spec_or(
    spec,
    {'rank': rank, 'weight_dimension_numbers': weight_dimension_numbers},
    side='long',
    only_if_smaller=False,
  )
  make = functools.partial(
    _subspace.subspace,
    spec,
    projectors.svd(_common.value(update_proj_gap), stagger=stagger),
    _common.adam_or(base_optimizer, 'base_optimizer'),
    scale=scale,
  )
  return _common.with_decay(
    make, learning_rate, weight_decay, mask, every_k=every_k
  )
