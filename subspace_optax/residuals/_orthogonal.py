# SPDX-License-Identifier: Apache-2.0
"""Muon with momentum in a subspace: the whole update is orthogonalised.

Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024, with
the momentum of Nesterov's form kept for the subspace only. With N what the
inner optimizer makes of the coordinates, and E = G - P R,

  W <- W - lr alpha sqrt(max(1, out / in)) NS(P N + w E),

where NS takes all singular values close to 1 by Newton and Schulz's iteration.
Directions outside the subspace take part with this step's gradient alone.
"""

from typing import Any

from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _newton_schulz
from subspace_optax._matrix import _projected
from subspace_optax.projectors import _gap
from subspace_optax.residuals import _base


def orthogonal(weight: Any = 1.0, steps: int = 5) -> _base.Residual:
  """Replaces the update by the nearest matrix with orthonormal rows or columns.

  Nothing is remembered of the residual, so that the state is the inner
  optimizer's. As in Muon, a step has `steps` iterations on the whole matrix,
  which multiply with Gram matrices of its short side.

  Args:
    weight: w, of the residual against the inner optimizer's direction. For
      `optax.trace(b, nesterov=True)`, whose direction has 1 + b times this
      step's coordinates in it, 1 + b treats both sides alike.
    steps: Newton-Schulz iterations.

  Returns:
    A residual rule without state.

  Raises:
    ValueError: fewer than one step.
    TypeError: steps that are no int.

  References:
    Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = so.subspace(
    ...   so.SubspaceSpec(rank=0.25),
    ...   so.projectors.stiefel(200, regenerate=True),
    ...   optax.trace(0.9, nesterov=True),
    ...   transport='first',
    ...   plain=optax.scale_by_adam(),
    ...   residual=so.residuals.orthogonal(weight=1.9),
    ... )
  """
  _gap.check_static(steps, 'steps')

  def update(node: _projected.Projected, scale: Any, count: Any, state: Any):
    del count
    layout, g = node.layout, _linalg.widen(node.gradient)
    # P N + w (G - P R) with one product.
    coords = _linalg.widen(node.direction) - weight * _base.inside(node)
    whole = node.combine(coords) + weight * g
    factor = scale * max(1.0, layout.outputs / layout.inputs) ** 0.5
    return factor * _newton_schulz.newton_schulz(layout, whole, steps), state

  return _base.Residual('orthogonal', update)
