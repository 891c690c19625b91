# SPDX-License-Identifier: Apache-2.0
"""Metrics of the bases, read from the state."""

from typing import Any

import jax

from subspace_optax._chain import _projection
from subspace_optax._matrix import _tree


def subspace_metrics(state: Any) -> dict[str, dict[str, jax.Array]]:
  """Returns metrics of every basis, as recorded by the last update.

  Args:
    state: an optimizer state that holds a state of `project` at any depth:
      through chain, partition, masked, MultiSteps, or as `opt_state` of
      `nnx.Optimizer`.

  Returns:
    A dict from path to a dict from name to a float32 array, with one value per
    matrix of the leaf. `captured_energy` is the fraction of ||G||_F^2 that
    P P^T G keeps, in [0, 1] for an orthonormal P. `orthogonality_error` is
    ||P^T P - I||_F. `drift` is how far the basis moved at its last move:
    ||P_n P_n^T - P_o P_o^T||_F / sqrt(2r), in [0, 1], for refreshes, and
    ||P_n - P_o||_F / sqrt(r) for online PCA. A step with a zero or non-finite
    gradient keeps the values of the step before.

  Raises:
    ValueError: the state holds no state of `project`.

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> tx = so.galore(1e-3, rank=2)
    >>> params = {'w': jnp.outer(jnp.arange(8.0), jnp.arange(4.0))}
    >>> _, state = jax.jit(tx.update)(params, tx.init(params), params)
    >>> print(so.subspace_metrics(state)['w']['captured_energy'].round(3))
    1.0
  """
  found = _tree.find(state, _projection.ProjectState)
  if not found:
    raise ValueError(
      f'state of type {type(state)} holds no state of `subspace_optax.project`.'
    )
  metrics: dict[str, dict[str, jax.Array]] = {}
  for _, one in found:
    for name in ('captured_energy', 'orthogonality_error', 'drift'):
      pairs, _ = _tree.flatten(getattr(one.subspaces, name))
      for path, value in pairs:
        if not _tree.is_masked(value):
          metrics.setdefault(path, {})[name] = value
  return metrics
