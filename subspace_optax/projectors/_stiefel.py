# SPDX-License-Identifier: Apache-2.0
"""GoLore's bases: uniform on the Stiefel manifold, whatever the gradient.

He et al., `Subspace Optimization for Large Language Models with Convergence
Guarantees <https://arxiv.org/abs/2410.11289>`_, 2024, Section 5.
"""

from typing import Any

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
  is left out for good (Lemma 5). The samples depend on the spec's seed, the
  leaf's path, the matrix's place in it and the period, nothing else.

  Args:
    update_proj_gap: T, steps between samples, or a `LazyGap`.
    stagger: whether matrices take turns within each T steps, starting from
      random bases, so that no step refreshes them all.
    regenerate: whether to draw the bases again at every step, about 16mr^2
      FLOPs and mr random numbers, instead of storing mr of them.

  Returns:
    A projector with orthonormal bases.

  Raises:
    TypeError: the gap is no int.
    ValueError: the gap is below 1.

  References:
    He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> tx = so.project(so.SubspaceSpec(rank=2), so.projectors.stiefel(200))
    >>> params = {'w': jnp.ones((8, 16))}
    >>> projected, _ = tx.update(params, tx.init(params))
    >>> p = projected['w'].basis
    >>> print(jnp.allclose(p.T @ p, jnp.eye(2), atol=1e-5))
    True
  """
  return _periodic.random(
    'stiefel', _linalg.haar, update_proj_gap, stagger, regenerate
  )
