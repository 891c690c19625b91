# SPDX-License-Identifier: Apache-2.0
"""Bases that move along geodesics of the Grassmann manifold.

Rajabi et al., `SubTrack++ <https://arxiv.org/abs/2502.01586>`_, 2025, and
`GrassWalk <https://arxiv.org/abs/2510.01878>`_, 2025. For a tangent D at P (a
matrix with P^T D = 0) with the thin SVD U S V^T, the geodesic is

  P(t) = P V cos(S t) V^T + U sin(S t) V^T + P (I - V V^T)
       = P cos(K^1/2 t) + D t sinc(K^1/2 t),   K = D^T D.
"""

from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _linalg
from subspace_optax.projectors import _base
from subspace_optax.projectors import _periodic

# Squarings of T^T T, normalised. They separate its largest eigenvalue from
# others that are 1.1 times smaller.
_SQUARINGS = 7
# Terms of the series of cos and sinc, enough for float32 up to an angle of pi.
_TERMS = 11
# One pass of Cholesky QR, against rounding that would add up over moves.
_ONE_PASS = (0.0,)


def grassmann_tracking(
  update_proj_gap: Any = 200,
  step_size: Any = 1.0,
  *,
  stagger: bool = False,
) -> _base.Projector:
  """A rank-one geodesic step towards the gradient's subspace every T steps.

  With A = P^T G and T = -2 (G - P A) A^T, the gradient of ||G - P P^T G||^2,
  and its leading singular triple (u, s, v),

    P <- P (I - v v^T) + (P v cos(eta s) - u sin(eta s)) v^T,

  which turns one direction of the basis by the angle eta s.

  Args:
    update_proj_gap: T, steps between moves, or a `LazyGap`.
    step_size: eta, for a gradient normalised to unit norm: at any scale of the
      loss, s is at most 1 and eta is the largest angle, in radians. The paper
      does not normalise; its eta is this one divided by ||G||_F^2.
    stagger: whether matrices take turns within each T steps.

  Returns:
    A projector with orthonormal bases. The first ones are Haar samples, and it
    would take r moves to replace most of their directions. Start from an SVD
    instead, as the paper does and the example shows.

  Raises:
    TypeError: the gap is not an int.
    ValueError: the gap is below 1.

  References:
    Rajabi et al., `SubTrack++ <https://arxiv.org/abs/2502.01586>`_, 2025

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = so.subspace(
    ...   so.SubspaceSpec(rank=128),
    ...   so.projectors.switch(
    ...     {
    ...       0: so.projectors.svd(update_proj_gap=200),
    ...       1: so.projectors.grassmann_tracking(update_proj_gap=200),
    ...     }
    ...   ),
    ...   optax.scale_by_adam(),
    ...   transport=so.transports.both(b1=0.9, b2=0.999),
    ... )
  """

  def draw(matrix: _base.Matrix, basis: jax.Array, period: jax.Array):
    del period
    return _turn(matrix, matrix.aligned(basis), step_size)

  rule = _periodic.periodic(
    'grassmann_tracking',
    draw,
    update_proj_gap,
    options={'step_size': step_size},
    stagger=stagger,
  )
  return rule._replace(small_steps=True)


def grassmann_walk(
  update_proj_gap: Any = 200,
  step_size: Any = 0.5,
  *,
  stagger: bool = False,
) -> _base.Projector:
  """A geodesic step along a random tangent every T steps.

  The tangent is (I - P P^T) Z for a Gaussian Z, scaled to ||D||_F = sqrt(r).

  Args:
    update_proj_gap: T, steps between moves, or a `LazyGap`.
    step_size: root mean square of the angles by which the r directions turn, in
      radians. (The normalisation is ours.)
    stagger: whether matrices take turns within each T steps.

  Returns:
    A projector with orthonormal bases; the first ones are Haar samples.

  Raises:
    TypeError: the gap is not an int.
    ValueError: the gap is below 1; a step size above 1.5.

  References:
    `GrassWalk <https://arxiv.org/abs/2510.01878>`_, 2025

  Example:
    >>> from subspace_optax import projectors
    >>> bases = projectors.grassmann_walk(update_proj_gap=200, stagger=True)
  """
  if not isinstance(step_size, jax.Array) and not 0 < step_size <= 1.5:
    raise ValueError(f'step_size must lie in (0, 1.5], got {step_size}.')

  def draw(matrix: _base.Matrix, basis: jax.Array, period: jax.Array):
    return _walk(matrix, matrix.aligned(basis), period, step_size)

  return _periodic.periodic(
    'grassmann_walk',
    draw,
    update_proj_gap,
    options={'step_size': step_size},
    stagger=stagger,
    uses_gradient=False,
  )


def _turn(matrix: _base.Matrix, p: jax.Array, step_size: Any) -> jax.Array:
  """Turns one direction of P towards the gradient."""
  layout, scale = matrix.layout, matrix.scale
  mix, gram = layout.mix_basis, layout.gram
  ga = matrix.unit_image(matrix.unit_coordinates(p))
  # -T / 2 = (G - P A) A^T; the sign turns the descent into a plus.
  climb = 2.0 * (ga - mix(p, gram(p, ga)))
  v = _leading_eigenvector(gram(climb, climb))  # (*batch, r, 1)
  u = mix(climb, v)  # of length s
  s = jnp.sqrt(layout.basis_energy(u))
  u = scale(1.0 / jnp.where(s > 0, s, 1.0), u)
  angle = step_size * s
  step = scale(jnp.cos(angle) - 1.0, mix(p, v)) + scale(jnp.sin(angle), u)
  new = p + mix(step, jnp.swapaxes(v, -1, -2))
  return _linalg.orthonormalize(layout, new, _ONE_PASS)


def _leading_eigenvector(squares: jax.Array) -> jax.Array:
  """Returns the leading eigenvector, (*batch, r, 1), by repeated squaring."""
  k = squares
  for _ in range(_SQUARINGS):
    trace = jnp.trace(k, axis1=-2, axis2=-1)[..., None, None]
    k = k / jnp.where(trace > 0, trace, 1.0)
    k = _linalg.matmul(k, k)
  diagonal = jnp.diagonal(k, axis1=-2, axis2=-1)
  best = jnp.argmax(diagonal, axis=-1)[..., None, None]
  v = jnp.take_along_axis(k, best, axis=-1)
  norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=-2, keepdims=True))
  return v / jnp.where(norm > 0, norm, 1.0)


def _walk(
  matrix: _base.Matrix, p: jax.Array, period: jax.Array, step_size: Any
) -> jax.Array:
  """Moves P along a random tangent."""
  layout = matrix.layout
  mix, gram = layout.mix_basis, layout.gram
  z = matrix.aligned(_linalg.gaussian(layout, matrix.seed, period))
  d = z - mix(p, gram(p, z))
  length = jnp.sqrt(layout.basis_energy(d) / layout.rank)
  d = matrix.scale(step_size / jnp.where(length > 0, length, 1.0), d)
  cos, sinc = _cos_sinc(gram(d, d))
  return _linalg.orthonormalize(layout, mix(p, cos) + mix(d, sinc), _ONE_PASS)


def _cos_sinc(k: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns cos(K^1/2) and sin(K^1/2) K^-1/2, entire functions of K."""
  eye = _linalg.identity_like(k)
  cos, sinc = eye, eye
  for j in range(_TERMS, 0, -1):  # Horner
    cos = eye - _linalg.matmul(k, cos) / (2 * j * (2 * j - 1))
    sinc = eye - _linalg.matmul(k, sinc) / (2 * j * (2 * j + 1))
  return cos, sinc
