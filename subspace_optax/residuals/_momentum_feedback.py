# SPDX-License-Identifier: Apache-2.0
"""Error feedback in the momentum: only the part that a step used decays.

Ahn et al., `Dion: Distributed Orthonormalized Updates
<https://arxiv.org/abs/2504.05295>`_, 2025, Algorithm 1; Modoranu et al., `Trion
<https://arxiv.org/abs/2505.17967>`_, 2025, is the same with another basis. With
M the momentum of the whole matrix and P the basis of B = M + G,

  R = P^T B,   M <- B - (1 - mu) P R,
  W <- W - lr alpha sqrt(out / in) P N(R),

where N takes the rows of R to length 1 (Dion), or its singular values close to
1 (Trion): an orthogonal update of rank r.
"""

from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _coords
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _newton_schulz
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _spread
from subspace_optax.residuals import _base

FORMS = ('orthogonal', 'rows')


def momentum_feedback(
  mu: Any = 0.95, form: str = 'orthogonal', *, steps: int = 5
) -> _base.Residual:
  """Keeps the momentum of whole matrices, and normalises its coordinates.

  The projector and the inner optimizer see the momentum B instead of the
  gradient. The part of B inside the subspace decays by `mu` at every step. The
  part outside accumulates until it is large enough for the next bases. The rule
  normalises the inner optimizer's direction; the papers' inner optimizer is
  `optax.identity()`.

  The state is the momentum, with the leaf's shape and sharding, in float32 or
  wider unless the spec says otherwise. Gradient and momentum are added in the
  wider of their dtypes. If a gradient is not finite, the momentum does not
  change. A step costs two products with the basis in addition to the
  projection, and only arrays of width r cross devices.

  Args:
    mu: decay rate of the momentum inside the subspace, in [0, 1).
    form: 'orthogonal', Newton-Schulz on the r x n coordinates (Trion), or
      'rows', each row scaled to length 1 (Dion), which is as good as orthogonal
      if bases follow the singular vectors, as those of `lagged_power` do.
    steps: number of Newton-Schulz iterations.

  Returns:
    A residual rule for `subspace_optax.subspace`, the only function that can
    change the gradient which `project` gets.

  Raises:
    ValueError: mu outside [0, 1); an unknown form; fewer than one step.
    TypeError: `steps` is not an int.

  References:
    Ahn et al., `Dion <https://arxiv.org/abs/2504.05295>`_, 2025; Modoranu et
    al., `Trion <https://arxiv.org/abs/2505.17967>`_, 2025

  Example:
    >>> import optax, subspace_optax as so
    >>> trion = so.subspace(
    ...   so.SubspaceSpec(rank=0.25),
    ...   so.projectors.dct(update_proj_gap=1),
    ...   optax.identity(),
    ...   plain=optax.scale_by_adam(),
    ...   residual=so.residuals.momentum_feedback(0.95),
    ... )
  """
  _arguments.check_decay(mu, 'mu')
  if form not in FORMS:
    raise ValueError(f'form must be one of {FORMS}, got {form!r}.')
  _arguments.check_static(steps, 'steps')
  how = _newton_schulz.iteration('standard', steps, 'frobenius')
  iterate = lambda layout, x: _newton_schulz.newton_schulz(layout, x, how)

  def update(node: _projected.Projected, scale: Any, count: Any, last: Any):
    del count
    layout = node.layout
    used = node.combine((1.0 - mu) * node.inside())
    rest = (_linalg.widen(node.gradient) - used).astype(last.dtype)
    finite = jnp.isfinite(layout.energy(rest))
    momentum = jnp.where(layout.along_leaf(finite), rest, last)
    direction = _linalg.widen(node.direction)
    if form == 'rows':
      direction = _coords.unit_rows(layout, direction)
    else:
      matrices = [_coords.as_leaf(layout)]
      (direction,) = _spread.spread(iterate, matrices, [direction])
    factor = scale * (layout.outputs / layout.inputs) ** 0.5
    return node.combine(factor * direction), momentum

  return _base.Residual('momentum_feedback', update, _base.zeros_at_init, _add)


def _add(gradient: jax.Array, momentum: jax.Array) -> jax.Array:
  # Not in the gradient's dtype: in bfloat16, momentum that grows for long would
  # stop growing.
  dtype = jnp.promote_types(gradient.dtype, momentum.dtype)
  return (_linalg.widen(gradient) + _linalg.widen(momentum)).astype(dtype)
