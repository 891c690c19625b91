# SPDX-License-Identifier: Apache-2.0
"""Importance sampling of singular vectors (SARA, I3S).

Zhang et al., `Breaking the Frozen Subspace: Importance Sampling for Low-Rank
Optimization in LLM Pretraining <https://arxiv.org/abs/2502.05790>`_, 2025.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _linalg
from subspace_optax.projectors import _base
from subspace_optax.projectors import _periodic

METHODS = ('exact', 'gram')

# The square root of float32's rounding, with a margin.
_BLIND = 1e-3


def importance_svd(
  update_proj_gap: Any = 200,
  method: str = 'exact',
  *,
  stagger: bool = False,
) -> _base.Projector:
  """Singular vectors of the gradient, drawn by singular value.

  At steps 0, T, 2T and so on, it draws r vectors without replacement, one after
  the other, each with probability proportional to its singular value. The basis
  holds them in the order of their values. The draw depends on the spec's seed,
  the leaf's path and the period.

  Args:
    update_proj_gap: T, steps between refreshes, or a `LazyGap`.
    method: 'exact', an SVD of every matrix; 'gram', the eigenvectors of G G^T,
      which is faster but blind to values below 1e-3 of the largest. Both gather
      a sharded gradient, and compile slowly for a TPU.
    stagger: whether matrices take turns within each T steps, so that no step
      refreshes all of them. They start from random bases.

  Returns:
    A projector with orthonormal bases.

  Raises:
    TypeError: the gap is not an int.
    ValueError: the gap is below 1; an unknown method.

  References:
    Zhang et al., `SARA <https://arxiv.org/abs/2502.05790>`_, 2025; sampling by
    Gumbel top-k: Kool et al., `Stochastic Beams and Where to Find Them
    <https://arxiv.org/abs/1903.06059>`_, 2019

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> tx = so.project(so.SubspaceSpec(rank=1), so.projectors.importance_svd())
    >>> params = {'w': jnp.eye(3, 8).at[2, 2].set(0.0)}
    >>> projected, _ = jax.jit(tx.update)(params, tx.init(params))
    >>> print(abs(projected['w'].basis[2]).round(3))  # never the null direction
    [0.]
  """
  if method not in METHODS:
    raise ValueError(f'method must be one of {METHODS}, got {method!r}.')
  vectors_of = _by_svd if method == 'exact' else _by_eigh

  def draw(matrix: _base.Matrix, basis: jax.Array, period: jax.Array):
    del basis
    vectors, values = vectors_of(matrix)
    noise = _linalg.gumbel(values.shape[-1], matrix.seed, period)
    _, chosen = jax.lax.top_k(jnp.log(values) + noise, matrix.layout.rank)
    chosen = jnp.sort(chosen, axis=-1)[..., None, :]
    vectors = jnp.take_along_axis(vectors, chosen, axis=-1)
    return matrix.layout.from_matrix(vectors)

  return _periodic.periodic(
    'importance_svd',
    draw,
    update_proj_gap,
    options={'method': method},
    stagger=stagger,
  )


def _by_svd(matrix: _base.Matrix) -> tuple[jax.Array, jax.Array]:
  """Returns the left singular vectors and their values, the largest first."""
  svd = functools.partial(jnp.linalg.svd, full_matrices=False)
  u, s, _ = _linalg.each(svd, matrix.tall())
  return u, s


def _by_eigh(matrix: _base.Matrix) -> tuple[jax.Array, jax.Array]:
  """Returns the same as `_by_svd`, from the eigenvectors of G G^T."""
  g = matrix.tall() * jax.lax.rsqrt(matrix.energy)[..., None, None]
  gram = _linalg.matmul(g, jnp.swapaxes(g, -1, -2))
  squares, u = _linalg.each(jnp.linalg.eigh, gram)
  values = jnp.sqrt(jnp.maximum(squares, 0.0))
  # Zeros that rounding made positive are many, and would be drawn, too.
  noise = _BLIND * jnp.max(values, axis=-1, keepdims=True)
  values = jnp.where(values > noise, values, 0.0)
  return u[..., ::-1], values[..., ::-1]
