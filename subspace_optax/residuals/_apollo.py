# SPDX-License-Identifier: Apache-2.0
"""APOLLO: the whole gradient, with scales from the subspace.

Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
<https://arxiv.org/abs/2412.05270>`_, 2024. With R = P^T G for a random P and N
Adam's direction for R, column j of the matrix has

  s_j = ||N_j|| / (||R_j|| + eps),   W <- W - lr alpha L(G diag(s)),

or the whole matrix has one s = ||N|| / (||R|| + eps) (APOLLO-Mini, rank 1). L
is the limiter of Fira.
"""

from typing import Any

from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax.residuals import _base


def apollo(
  granularity: str = 'channel',
  limiter: Any = 1.01,
) -> _base.Residual:
  """Replaces the update by the gradient, scaled as its coordinates were.

  Nothing is mapped back from the subspace, so that a step has one product with
  a basis instead of two. `scale` of `unproject` is the paper's alpha; the
  `scale` of the authors' code is its square. Their option to apply the limiter
  before or after `scale` makes no difference, since `scale` does not change
  from step to step.

  Args:
    granularity: 'channel', one factor per column along the side that is not
      projected, or 'tensor', one factor per matrix (APOLLO-Mini).
    limiter: gamma, at least 1, the largest factor by which the norm of a
      matrix's update may grow per step; None for no limit.

  Returns:
    A residual rule. It keeps one float32 per matrix.

  Raises:
    ValueError: an unknown granularity; a limiter below 1.

  References:
    Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024, Algorithm 1

  Example:
    >>> import optax, subspace_optax as so
    >>> mini = so.subspace(
    ...   so.SubspaceSpec(rank=1),
    ...   so.projectors.gaussian(update_proj_gap=200, regenerate=True),
    ...   optax.scale_by_adam(),
    ...   residual=so.residuals.apollo('tensor'),
    ...   scale=128**0.5,
    ... )
  """
  if granularity not in ('channel', 'tensor'):
    raise ValueError(
      f"granularity must be 'channel' or 'tensor', got {granularity!r}."
    )
  _base.check_limiter(limiter)

  def update(node: _projected.Projected, scale: Any, count: Any, last: Any):
    del count
    layout, r = node.layout, node.coords
    g, n = _linalg.widen(node.gradient), _linalg.widen(node.direction)
    energies = [layout.coords_columns(x * x) for x in (n, r)]
    if granularity == 'tensor':
      energies = [layout.along_columns(layout.sum_columns(x)) for x in energies]
    s = _base.ratio(*energies)
    norm = _linalg.safe_sqrt(layout.sum_columns(s * s * layout.columns(g * g)))
    factor, last = _base.limit_growth(norm, last, limiter)
    s = scale * s * layout.along_columns(factor)
    return layout.columns_to_leaf(s) * g, last

  return _base.Residual('apollo', update, _base.norms_at_init)
