# SPDX-License-Identifier: Apache-2.0
"""How good the bases are, read from the state."""

from typing import Any

import jax

from subspace_optax._chain import _projection
from subspace_optax._matrix import _tree


def subspace_metrics(state: Any) -> dict[str, dict[str, jax.Array]]:
  """Returns what the last update noted about every basis.

  Args:
    state: an optimizer state that holds one of `project`, however deep:
      through chain, partition, masked, MultiSteps, or as `opt_state` of
      `nnx.Optimizer`.

  Returns:
    From path to from name to float32 array, one value per matrix of the leaf:
    `captured_energy`, the share of ||G||_F^2 that P P^T G keeps, in [0, 1] for
    an orthonormal P; `orthogonality_error`, ||P^T P - I||_F; `drift`, how far
    the basis went at its last move, ||P_n P_n^T - P_o P_o^T||_F / sqrt(2r) in
    [0, 1] for refreshes and ||P_n - P_o||_F / sqrt(r) for online PCA. Values
    of a step with a zero or non-finite gradient are those of the step before.

  Raises:
    ValueError: the state holds none of `project`.

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
