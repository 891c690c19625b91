# SPDX-License-Identifier: Apache-2.0
"""FRUGAL: Adam inside the subspace, sign descent outside.

Zmushko et al., `FRUGAL: Memory-Efficient Optimization by Reducing State
Overhead <https://arxiv.org/abs/2411.07837>`_, 2024. With E = G - P R,

  W <- W - lr (alpha P N + c sign(E)).
"""

from typing import Any

import jax.numpy as jnp

from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax.residuals import _base

# Bound on rounding, in units of the gradient's precision times a column's norm.
_EPS = 4.0


def sign(strength: Any = 1.0) -> _base.Residual:
  """Adds the signs of the residual; keeps no state.

  It costs one more product with the basis, 2mnr FLOPs. Elements no larger than
  the rounding error of their column get no sign.

  Args:
    strength: c, the step of the residual's elements divided by the learning
      rate; `scale` does not multiply it. FRUGAL uses 1 for pre-training and 0.1
      for fine-tuning.

  Returns:
    A residual rule without state.

  References:
    Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, 2024

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = so.subspace(
    ...   so.SubspaceSpec(rank=0.25),
    ...   so.projectors.svd(update_proj_gap=200),
    ...   optax.scale_by_adam(),
    ...   transport='reset',
    ...   residual=so.residuals.sign(),
    ... )
  """

  def update(node: _projected.Projected, scale: Any, count: Any, state: Any):
    del count
    g, outside = _linalg.widen(node.gradient), node.outside()
    # Of the part inside the subspace, only rounding errors are left.
    eps = _EPS * jnp.finfo(node.gradient.dtype).eps
    size = node.layout.columns_to_leaf(jnp.sqrt(node.layout.columns(g * g)))
    outside = jnp.where(jnp.abs(outside) > eps * size, outside, 0.0)
    kept = node.combine(scale * _linalg.widen(node.direction))
    return kept + strength * jnp.sign(outside), state

  return _base.Residual('sign', update)
