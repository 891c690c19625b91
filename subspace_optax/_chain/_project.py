# SPDX-License-Identifier: Apache-2.0
"""`project`: from gradients to coordinates, with the bases as its state."""

from typing import Any

import optax

from subspace_optax._chain import _projection
from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax.projectors import _base


def project(
  spec: _spec.SubspaceSpec,
  projector: _base.Projector,
  *,
  keep_gradient: bool = False,
  axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Maps gradients to coordinates in their subspaces.

  A leaf that `spec` selects becomes a `Projected` node with R = P^T G; other
  leaves pass unchanged. The bases start as random samples and move as
  `projector` says. No basis is made from a gradient that is zero or not finite.

  `update` accepts `refresh_gradients`, a tree like the gradients, and refreshes
  bases from these instead of the gradients of the step. For large-batch GaLore,
  pass gradients of a larger batch at every T-th step.

  With `axis_name`, every device passes the gradient of its own part of the
  batch, and `project` averages coordinates over the devices instead of
  gradients: it moves at most r (m + n) numbers for an m x n matrix. It averages
  plain leaves directly, and for rules that factorise the gradient it averages
  the gradient first; the same holds for refresh gradients. The norm of the mean
  gradient is not known: the mean of the squared norms replaces its square, so
  that `captured_energy` is a lower bound. See `data_parallel_step`.

  Args:
    spec: which leaves to project, as which matrices, at which rank.
    projector: how to find and move bases, from `subspace_optax.projectors`.
    keep_gradient: whether nodes carry the gradient, for a residual rule. With
      `axis_name`, all of it is then averaged.
    axis_name: the name of a mapped axis, as in `jax.shard_map`, or a tuple.

  Returns:
    A transformation whose state holds the bases, (*batch and projected axes,
    r) in `spec.basis_dtype`, and a few numbers per matrix. If that dtype is an
    integer, the state holds a `QuantizedBasis` of codes and scales: a basis
    that moves is rounded and made orthonormal again before the step uses it.

  Raises:
    ValueError: at `init`, errors of `SubspaceSpec.match`; bases in integers for
      a projector that moves them by small steps, or recomputes them at every
      step; at `update`, gradients or refresh gradients whose tree differs from
      that at `init`, or gradients that are already projected.
    TypeError: `spec` is not a `SubspaceSpec`, or `projector` not a projector.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Eq. (9)

  Example:
    >>> import jax, jax.numpy as jnp, optax, subspace_optax as so
    >>> spec = so.SubspaceSpec(rank=2)
    >>> tx = optax.chain(
    ...   so.project(spec, so.projectors.svd(200)),
    ...   so.in_subspace(optax.scale_by_adam(), spec),
    ...   so.unproject(),
    ...   optax.scale_by_learning_rate(1e-3),
    ... )
    >>> params = {'w': jnp.ones((8, 16)), 'bias': jnp.ones(16)}
    >>> update = jax.jit(tx.update)
    >>> updates, state = update(params, tx.init(params), params)
    >>> print(updates['w'].shape, state[0].subspaces.basis['w'].shape)
    (8, 16) (8, 2)
  """
  phases = _projection.Projection(spec, projector, keep_gradient, axis_name)
  update = _boxes.bare(phases.update)
  return optax.GradientTransformationExtraArgs(phases.init, update)
