# SPDX-License-Identifier: Apache-2.0
"""Gaussian bases, as in RSO and APOLLO: the cheapest there are.

Chen et al., `A Memory Efficient Randomized Subspace Optimization Method for
Training Large Language Models <https://arxiv.org/abs/2502.07222>`_, 2025; Zhu
et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024.
"""

from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax.projectors import _base
from subspace_optax.projectors import _periodic


def gaussian(
  update_proj_gap: Any = 200,
  *,
  stagger: bool = False,
  regenerate: bool = False,
) -> _base.Projector:
  """Matrices of independent N(0, 1/r) entries at steps 0, T, 2T and so on.

  E[P P^T] = I: coordinates have the gradient's energy, and an update in them
  is sqrt(m/r) times as long as in an orthonormal basis, which the learning
  rate or `scale` must make up for.

  Args:
    update_proj_gap: T, steps between samples, or a `LazyGap`.
    stagger: whether matrices take turns within each T steps, starting from
      random bases, so that no step refreshes them all.
    regenerate: whether to draw the bases again at every step, mr random
      numbers, instead of storing them.

  Returns:
    A projector; its bases are not orthonormal.

  Raises:
    TypeError: the gap is no int.
    ValueError: the gap is below 1.

  References:
    Chen et al., `RSO <https://arxiv.org/abs/2502.07222>`_, 2025; Zhu et al.,
    `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> bases = so.projectors.gaussian(200, regenerate=True)
    >>> tx = so.project(so.SubspaceSpec(rank=2), bases)
    >>> so.memory_report(tx, {'w': jnp.ones((64, 64))}).state < 64
    True
  """
  return _periodic.random(
    'gaussian',
    _sample,
    update_proj_gap,
    stagger,
    regenerate,
    orthonormal=False,
  )


def _sample(
  layout: _layout.Layout, seeds: jax.Array, period: jax.Array | int
) -> jax.Array:
  return _linalg.gaussian(layout, seeds, period) / jnp.sqrt(layout.rank)
