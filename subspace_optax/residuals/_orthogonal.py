# SPDX-License-Identifier: Apache-2.0
"""Muon with momentum in a subspace: the whole update is orthogonalised.

Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024, with
the momentum of Nesterov's form kept for the subspace only. With N what the
inner optimizer makes of the coordinates, and E = G - P R,

  W <- W - lr alpha sqrt(max(1, out / in)) NS(P N + w E),

where NS takes all singular values close to 1 by Newton and Schulz's iteration.
Directions outside the subspace take part with this step's gradient alone.
With b2, output neurons are brought to one size, as in Li et al., `NorMuon
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

  Nothing is remembered of the residual, so that the state is the inner
  optimizer's, and one number per output with `b2`. As in Muon, a step has
  `steps` iterations on the whole matrix, which multiply with Gram matrices of
  its short side; where the long side is more than twice that, they iterate on
  Gram matrices alone, for 0.78 of the FLOPs at 8/3 and 0.67 at 4.

  Kernels that stand side by side in one leaf are orthogonalised each alone if
  `DimensionNumbers` names them: heads as a stack, others by `output_blocks`.

  Args:
    weight: w, of the residual against the inner optimizer's direction. For
      `optax.trace(b, nesterov=True)`, whose direction has 1 + b times this
      step's coordinates in it, 1 + b treats both sides alike.
    steps: Newton-Schulz iterations, unless `ns_coeffs` tells their number.
    ns_coeffs: coefficients (a, b, c) of the iteration: 'standard' (Muon's),
      'dion', three numbers, or three for each step.
    preconditioning: what brings singular values to at most 1 before the
      iteration, by optax's names: 'frobenius' and 'schatten' divide by norms of
      order 2 and 4, 'spectral' by the largest singular value, from 32 rounds
      of power iteration; 'aol' divides each row along the short side by the
      root of the sum of |X X^T| along it.
    b2: decay of the mean squares of output neurons, NorMuon's; 0.95 in the
      paper. None for Muon. Matrices keep the norm that they have without it.
    eps: added to the roots of these.

  Returns:
    A residual rule. With `b2` its state is float32 or wider, of the leaf's
    shape with 1 for the inputs' axes, and unchanged by gradients with NaN.

  Raises:
    ValueError: fewer than one step; coefficients that are no triples of finite
      numbers; an unknown preset or preconditioning; b2 outside of [0, 1).
    TypeError: steps that are no int.

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
