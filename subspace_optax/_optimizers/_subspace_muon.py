# SPDX-License-Identifier: Apache-2.0
"""Muon whose momentum lives in a random subspace: our recipe for quality.

Muon (Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024)
orthogonalises momentum. Here the momentum is that of r coordinates in a Haar
basis, drawn again every T steps and carried along by GoLore's C, and what is
orthogonalised is momentum inside and this step's gradient outside, each with
the weight at which a constant gradient would come out as it is:

  M <- b M + R,   W <- W - lr alpha NS(P (R + b M) + E / (1 - b)).
"""

import functools
from typing import Any

import jax
import optax

from subspace_optax import projectors
from subspace_optax import residuals
from subspace_optax._chain import _spec
from subspace_optax._chain import _subspace
from subspace_optax._matrix import _notices
from subspace_optax._optimizers import _common


def subspace_muon(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _common.default(0.25),
  update_proj_gap: Any = _common.default(200),
  scale: Any = 8.0,
  *,
  b: Any = 0.9,
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: _common.Mask = None,
  stagger: bool = False,
  seed: int = _common.default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> _common.Transformation:
  """Muon with the momentum of a random subspace, and no basis in its state.

  Updates have singular values near `scale` times the learning rate (times
  sqrt(out / in) for kernels that widen) whatever the rank and the width, so
  that one learning rate serves all of them. A step costs Muon's products and
  3 products with a basis.

  Args:
    learning_rate: a float or a schedule, about Adam's for embeddings, heads
      and norms.
    rank: r, here a share of the short side; see `SubspaceSpec`.
    update_proj_gap: T, steps between new bases.
    scale: alpha, the step of matrices over that of the other leaves.
    b: decay of the momentum, in [0, 1).
    plain: optimizer of the leaves that are not projected,
      `optax.scale_by_adam()` by default; it returns directions along the
      gradient, as `optax.adam(...)` does not.
    weight_decay: decoupled, on the weights before the step, not scaled.
    mask: which leaves decay; see `optax.add_decayed_weights`.
    stagger: whether matrices take turns within each T steps.
    seed: of the bases.
    spec: takes the place of `rank` and `seed`; beside them it is an error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: nr, and a few
    numbers.

  Raises:
    ValueError: b outside of [0, 1); see `SubspaceSpec`, `projectors.stiefel`.
    TypeError: see `projectors.stiefel`.

  References:
    Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024;
    He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> tx = so.subspace_muon(5e-3)
  """
  if not isinstance(b, jax.Array) and not 0 <= b < 1:
    raise ValueError(f'b must lie in [0, 1), got {b}.')
  _common.check_static(
    'subspace_muon', rank=rank, update_proj_gap=update_proj_gap, seed=seed
  )
  make = functools.partial(
    _subspace.subspace,
    _common.spec_or(spec, {'rank': rank, 'seed': seed}),
    projectors.stiefel(
      _common.value(update_proj_gap), stagger=stagger, regenerate=True
    ),
    optax.trace(b, nesterov=True),
    transport='first',
    plain=_common.adam_or(plain, 'plain'),
    residual=residuals.orthogonal(1.0 / (1.0 - b)),
    scale=scale,
  )
  tx = _common.with_decay(make, learning_rate, weight_decay, mask)
  return _notices.warning_of_ones(tx, b=b)
