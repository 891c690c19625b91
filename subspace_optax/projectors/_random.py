# SPDX-License-Identifier: Apache-2.0
"""Bases that do not depend on gradients: Haar samples and Gaussian matrices.

He et al., `Subspace Optimization for Large Language Models with Convergence
Guarantees <https://arxiv.org/abs/2410.11289>`_, 2024, Section 5; Chen et al.,
`A Memory Efficient Randomized Subspace Optimization Method for Training Large
Language Models <https://arxiv.org/abs/2502.07222>`_, 2025; Zhu et al., `APOLLO
<https://arxiv.org/abs/2412.05270>`_, 2024.
"""

from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax.projectors import _base
from subspace_optax.projectors import _periodic


def stiefel(
  update_proj_gap: Any = 200,
  *,
  stagger: bool = False,
  regenerate: bool = False,
) -> _base.Projector:
  """Haar samples of the Stiefel manifold at steps 0, T, 2T and so on.

  With P ~ U(St(m, r)), E[P P^T] = (r/m) I, so that no direction of the gradient
  is left out forever (Lemma 5). The samples depend only on the spec's seed, the
  leaf's path, the matrix's place in the leaf and the period.

  Args:
    update_proj_gap: T, steps between samples, or a `LazyGap`.
    stagger: whether matrices take turns within each T steps, so that no step
      refreshes all of them. They start from random bases.
    regenerate: whether to draw the bases again at every step, which takes mr
      random numbers and about 8mr^2 FLOPs (16mr^2 for r above m / 2), instead
      of storing mr numbers.

  Returns:
    A projector with orthonormal bases.

  Raises:
    TypeError: the gap is not an int.
    ValueError: the gap is below 1.

  References:
    He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> tx = so.project(so.SubspaceSpec(rank=2), so.projectors.stiefel(200))
    >>> params = {'w': jnp.ones((8, 16))}
    >>> projected, _ = jax.jit(tx.update)(params, tx.init(params))
    >>> p = projected['w'].basis
    >>> print(jnp.allclose(p.T @ p, jnp.eye(2), atol=1e-5))
    True
  """
  return _random('stiefel', _linalg.haar, update_proj_gap, stagger, regenerate)


def gaussian(
  update_proj_gap: Any = 200,
  *,
  stagger: bool = False,
  regenerate: bool = False,
) -> _base.Projector:
  """Matrices of independent N(0, 1/r) entries at steps 0, T, 2T and so on.

  E[P P^T] = I: coordinates have the gradient's energy, and an update in them is
  sqrt(m/r) times as long as in an orthonormal basis. Make up for that with the
  learning rate or `scale`.

  Args:
    update_proj_gap: T, steps between samples, or a `LazyGap`.
    stagger: whether matrices take turns within each T steps, so that no step
      refreshes all of them. They start from random bases.
    regenerate: whether to draw the bases again at every step, which takes mr
      random numbers, instead of storing them.

  Returns:
    A projector; its bases are not orthonormal.

  Raises:
    TypeError: the gap is not an int.
    ValueError: the gap is below 1.

  References:
    Chen et al., `RSO <https://arxiv.org/abs/2502.07222>`_, 2025; Zhu et al.,
    `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> bases = so.projectors.gaussian(200, regenerate=True)
    >>> tx = so.project(so.SubspaceSpec(rank=2), bases)
    >>> so.memory_report(tx, {'w': jnp.ones((64, 64))}).state < 64
    True
  """
  return _random(
    'gaussian', _scaled, update_proj_gap, stagger, regenerate, orthonormal=False
  )


def _scaled(
  layout: _layout.Layout, seeds: jax.Array, period: jax.Array | int
) -> jax.Array:
  return _linalg.gaussian(layout, seeds, period) / jnp.sqrt(layout.rank)


def _random(
  name: str,
  sample: _base.Sample,
  update_proj_gap: Any,
  stagger: bool,
  regenerate: bool,
  orthonormal: bool = True,
) -> _base.Projector:
  """Returns the periodic rule for bases that do not depend on gradients."""

  def draw(matrix: _base.Matrix, basis: jax.Array, period: jax.Array):
    del basis
    return sample(matrix.layout, matrix.seed, period)

  return _periodic.periodic(
    name,
    draw,
    update_proj_gap,
    options={},
    stagger=stagger,
    uses_gradient=False,
    orthonormal=orthonormal,
    sample=sample,
    regenerate=regenerate,
  )
