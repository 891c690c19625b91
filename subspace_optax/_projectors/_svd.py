# Copyright 2026 The subspace_optax Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""GaLore's bases: the leading singular vectors of the current gradient.

Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
Projection <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2; randomized
subspace iteration after Halko et al., `Finding structure with randomness
<https://arxiv.org/abs/0909.4061>`_, 2009, Algorithm 4.4.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax import _linalg
from subspace_optax import _sharding
from subspace_optax._projectors import _base
from subspace_optax._projectors import _periodic

METHODS = ('auto', 'exact', 'gram', 'randomized')

# Subspace iteration adds this share of ||G||_F^2 to every eigenvalue of G G^T:
# the subspaces stay the same and a rank-deficient G no longer loses directions.
_SHIFT = 1e-5
_ITERATIONS = 3


def svd(update_proj_gap: Any = 200, method: str = 'auto') -> _base.Projector:
  """Leading r singular vectors of the gradient at steps 0, T, 2T and so on.

  Args:
    update_proj_gap: T, steps between refreshes.
    method: 'exact', a full SVD of every matrix; 'gram', eigenvectors of the
      Gram matrix of the short side, which loses directions weaker than 3e-4 of
      the strongest; 'randomized', three rounds of subspace iteration from a
      Gaussian start, matrix products only; 'auto', exact where the matrix
      surely lies on one device that is not a TPU, else (and on any mesh of
      several automatic devices) randomized. Only 'randomized' never gathers a
      sharded gradient.

  Returns:
    A projector with orthonormal bases.

  Raises:
    TypeError: the gap is no int.
    ValueError: the gap is below 1; an unknown method.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> tx = so.project(so.SubspaceSpec(rank=1), so.projectors.svd(200))
    >>> params = {'w': jnp.outer(jnp.array([3.0, 4.0]), jnp.ones(8))}
    >>> projected, _ = tx.update(
    ...   params, tx.init(params)
    ... )  # the gradient: params
    >>> print(abs(projected['w'].basis.ravel()).round(3))
    [0.6 0.8]
  """
  if method not in METHODS:
    raise ValueError(f'method must be one of {METHODS}, got {method!r}.')

  def draw(matrix: _base.Matrix, period: jax.Array) -> jax.Array:
    return _DRAWS[method](matrix, period)

  name = (
    f'svd(update_proj_gap={_base.shown(update_proj_gap)}, method={method!r})'
  )
  return _periodic.periodic(name, draw, update_proj_gap, uses_gradient=True)


def _auto(matrix: _base.Matrix, period: jax.Array) -> jax.Array:
  """Exact where that gathers nothing, and compiles within the day."""
  if _sharding.is_sharded(matrix.gradient):
    return _randomized(matrix, period)
  # XLA takes two minutes to compile an SVD of 512 x 512 for a TPU.
  return lax.platform_dependent(
    tpu=lambda: _randomized(matrix, period),
    default=lambda: _exact(matrix, period),
  )


def _exact(matrix: _base.Matrix, period: jax.Array) -> jax.Array:
  """U_r or V_r of the thin SVD."""
  del period
  layout = matrix.layout
  g = layout.to_matrix(_sharding.replicate(matrix.gradient))
  u, _, vh = jnp.linalg.svd(g.astype(jnp.float32), full_matrices=False)
  vectors = u if layout.project_rows else jnp.swapaxes(vh, -1, -2)
  return layout.from_matrix(vectors[..., : layout.rank])


def _gram(matrix: _base.Matrix, period: jax.Array) -> jax.Array:
  """Eigenvectors of G G^T, or G times those of G^T G if that is smaller."""
  layout = matrix.layout
  g = layout.to_matrix(_sharding.replicate(matrix.gradient))
  g = g.astype(jnp.float32) * lax.rsqrt(matrix.energy)[..., None, None]
  g = g if layout.project_rows else jnp.swapaxes(g, -1, -2)  # m x n
  gt = jnp.swapaxes(g, -1, -2)
  if layout.m <= layout.n:
    _, vectors = jnp.linalg.eigh(_linalg.matmul(g, gt))
    return layout.from_matrix(vectors[..., ::-1][..., : layout.rank])
  values, vectors = jnp.linalg.eigh(_linalg.matmul(gt, g))
  values, vectors = values[..., ::-1], vectors[..., ::-1]
  values, vectors = values[..., : layout.rank], vectors[..., : layout.rank]
  # Columns G v / sigma are orthonormal where sigma is above rounding; the
  # others are replaced by random ones and made orthogonal to the rest.
  weak = (values < 1e-7 * values[..., :1])[..., None, :]
  u = _linalg.matmul(g, vectors) * lax.rsqrt(
    jnp.where(weak, 1.0, values[..., None, :])
  )
  noise = _linalg.gaussian(layout, matrix.seed, period) / jnp.sqrt(layout.m)
  weak = layout.from_matrix(jnp.broadcast_to(weak, u.shape))
  u = jnp.where(weak, noise, layout.from_matrix(u))
  return _linalg.orthonormalize(layout, u)


def _randomized(matrix: _base.Matrix, period: jax.Array) -> jax.Array:
  """Rounds of P <- orth((G G^T / ||G||^2 + shift) P) from a Gaussian P."""
  layout, g = matrix.layout, matrix.gradient
  p = _linalg.gaussian(layout, matrix.seed, period)
  p = layout.align_basis(p, g)
  scale = lax.rsqrt(matrix.energy).astype(p.dtype)
  for _ in range(_ITERATIONS):
    # Scaled after each product, since G may be float16.
    image = layout.project(g, p).astype(p.dtype) * layout.along_coords(scale)
    image = layout.back(g, image).astype(p.dtype) * layout.along_basis(scale)
    p = _linalg.orthonormalize(layout, image + _SHIFT * p)
  return p


_DRAWS = {
  'auto': _auto,
  'exact': _exact,
  'gram': _gram,
  'randomized': _randomized,
}
