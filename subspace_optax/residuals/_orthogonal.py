# SPDX-License-Identifier: Apache-2.0
"""Muon with momentum in a subspace: the whole update is orthogonalised.

Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024, with
Nesterov momentum kept for the subspace only. With N the inner optimizer's
direction, and E = G - P R,

  W <- W - lr alpha sqrt(max(1, out / in)) NS(P N + w E),

where NS brings all singular values close to 1 by Newton-Schulz iterations.
Directions outside the subspace enter with this step's gradient alone. With b2,
output neurons are brought to one size, as in Li et al., `NorMuon
<https://arxiv.org/abs/2510.05491>`_, 2025.
"""

from typing import Any

import jax

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _orthogonalize
from subspace_optax._matrix import _projected
from subspace_optax.residuals import _base


def orthogonal(
  weight: Any = 1.0,
  steps: int = 5,
  *,
  ns_coeffs: Any = 'standard',
  preconditioning: str = 'frobenius',
  b2: Any = None,
  eps: Any = 1e-8,
) -> _base.Residual:
  """Replaces the update by the nearest matrix with orthonormal rows or columns.

  It keeps no state for the residual. The state is that of the inner optimizer
  and, with `b2`, one number per output. As in Muon, a step has `steps`
  iterations on the whole matrix, which multiply with Gram matrices of its short
  side. If the long side is more than twice as long, they iterate on Gram
  matrices alone, which takes 0.78 of the FLOPs at a ratio of 8/3 and 0.67 at 4.

  Kernels side by side in one leaf are orthogonalised separately if
  `DimensionNumbers` names them: heads as a stack, others by `output_blocks`.

  Args:
    weight: w, the weight of the residual relative to the inner optimizer's
      direction. The direction of `optax.trace(b, nesterov=True)` contains 1 + b
      times this step's coordinates, so 1 + b treats both sides alike.
    steps: number of Newton-Schulz iterations, unless `ns_coeffs` sets it.
    ns_coeffs: coefficients (a, b, c) of the iteration: 'standard' (Muon's),
      'dion', three numbers, or three for each step.
    preconditioning: how to bring singular values to at most 1 before the
      iteration, by optax's names. 'frobenius' and 'schatten' divide by norms of
      order 2 and 4; 'spectral' divides by the largest singular value, from 32
      rounds of power iteration; 'aol' divides each row along the short side by
      the square root of the sum of |X X^T| along it.
    b2: decay rate of NorMuon's mean squares of output neurons, 0.95 in the
      paper; None for Muon. Matrices keep the norm that they have without it.
    eps: added to the square roots of the mean squares.

  Returns:
    A residual rule. With `b2` its state is float32 or wider, has the leaf's
    shape with 1 for the inputs' axes, and ignores gradients with NaN.

  Raises:
    ValueError: fewer than one step; coefficients that are not triples of finite
      numbers; an unknown preset or preconditioning; b2 outside [0, 1).
    TypeError: `steps` is not an int.

  References:
    Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024;
    Li et al., `NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025,
    Algorithm 1; Boissin et al., `Turbo-Muon
    <https://arxiv.org/abs/2512.04632>`_, 2025, for 'aol'

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = so.subspace(
    ...   so.SubspaceSpec(rank=0.25),
    ...   so.projectors.stiefel(200, regenerate=True),
    ...   optax.trace(0.9, nesterov=True),
    ...   transport='first',
    ...   plain=optax.scale_by_adam(),
    ...   residual=so.residuals.orthogonal(weight=1.9, b2=0.95),
    ... )
  """
  _arguments.check_static(steps, 'steps')
  if b2 is not None:
    _arguments.check_decay(b2, 'b2')
  rule = _orthogonalize.make_rule(ns_coeffs, steps, preconditioning, b2, eps)

  def update(node: _projected.Projected, scale: Any, count: Any, state: Any):
    del scale, count
    # P N + w (G - P R) with one product.
    coords = _linalg.widen(node.direction) - weight * node.inside()
    return node.combine(coords) + weight * _linalg.widen(node.gradient), state

  def together(nodes: Any, scale: Any, updates: Any, states: Any):
    layouts = [node.layout for node in nodes]
    homes = [node.home for node in nodes]
    updates, states = _orthogonalize.orthogonalize(
      rule, layouts, updates, states, homes
    )
    return [scale * x for x in updates], states

  first = None if b2 is None else _squares
  return _base.Residual('orthogonal', update, first, together=together)


def _squares(layout: _layout.Layout, leaf: Any, dtype: Any) -> jax.Array:
  del dtype
  return _orthogonalize.first_squares(layout, leaf)
