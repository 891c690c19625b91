# SPDX-License-Identifier: Apache-2.0
"""Fira: the residual, scaled as the inner optimizer scaled the subspace.

Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024. For column i of the
matrix, with E = G - P R,

  phi_i = ||N_i|| / (||R_i|| + eps),   W <- W - lr (alpha P N + L(phi E)),

where L scales phi E down if its norm grows by more than a factor of gamma in a
step.

This needs only one product with P, since alpha P N + phi E = P (alpha N -
phi R) + phi G, and none for the norm: ||E_i||^2 = ||G_i||^2 - ||R_i||^2.
"""

from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax.residuals import _base


def fira(
  limiter: Any = 1.01,
  *,
  rounding: float | None = 2e-3,
  official_betas: tuple[float, float] | None = None,
) -> _base.Residual:
  """Adds the residual, with each column scaled as inside the subspace.

  It needs no product with a basis beyond GaLore's, and one float32 of state per
  matrix. `scale` does not multiply the residual.

  Args:
    limiter: gamma, at least 1, the largest factor by which the residual's norm
      may grow per step; None for no limit.
    rounding: share of a column's energy, in [0, 1), below which its residual
      counts as rounding error and is left out of the norm that the limiter
      compares and remembers; later residuals could only grow from it by
      `limiter` per step. The default
      covers products of bfloat16. None for bases that never contain a whole
      gradient, such as random ones.
    official_betas: (b1, b2) of the inner Adam, to compute what the authors'
      code does: the residual is G - scale P R, and the growth is that of norms
      before Adam's bias correction. None for the form in the paper.

  Returns:
    A residual rule.

  Raises:
    ValueError: a limiter below 1; `rounding` outside [0, 1).
    TypeError: `rounding` is no number.

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, Eq. (5)-(7)

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = so.subspace(
    ...   so.SubspaceSpec(rank=128),
    ...   so.projectors.svd(update_proj_gap=200),
    ...   optax.scale_by_adam(),
    ...   residual=so.residuals.fira(),
    ...   scale=0.25,
    ... )
  """
  _base.check_limiter(limiter)
  if rounding is not None:
    _arguments.check_decay(rounding, 'rounding, if not None,')

  def update(node: _projected.Projected, scale: Any, count: Any, last: Any):
    layout, r = node.layout, node.coords
    g, n = _linalg.widen(node.gradient), _linalg.widen(node.direction)
    inside = node.inside()
    share = 1.0 if official_betas is None else scale
    phi = _base.ratio(
      layout.coords_columns(n * n), layout.coords_columns(r * r)
    )
    total = layout.columns(g * g)
    inner = layout.coords_columns(r * inside)
    outside = total - share * (2.0 - share) * inner
    outside = jnp.maximum(outside, 0.0)  # a difference of rounded sums
    if rounding is not None:
      little = (outside <= rounding * total) & jnp.isfinite(total)
      outside = jnp.where(little, 0.0, outside)
    norm = _linalg.safe_sqrt(layout.sum_columns(phi * phi * outside))
    raw = 1.0 if official_betas is None else _bias(official_betas, count)
    factor, last = _base.limit_growth(raw * norm, last, limiter)
    phi = phi * layout.along_columns(factor)
    coords = scale * n - share * layout.columns_to_coords(phi) * inside
    return node.combine(coords) + layout.columns_to_leaf(phi) * g, last

  return _base.Residual('fira', update, _base.norms_at_init)


def _bias(betas: tuple[float, float], count: Any) -> jax.Array:
  """Returns the ratio of Adam's direction without and with bias correction."""
  b1, b2 = betas
  t = jnp.asarray(count + 1, jnp.float32)
  return (1.0 - b1**t) / jnp.sqrt(1.0 - b2**t)
