# SPDX-License-Identifier: Apache-2.0
"""GaLore's bases: the leading singular vectors of the current gradient.

Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
Projection <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2; randomized
subspace iteration after Halko et al., `Finding structure with randomness
<https://arxiv.org/abs/0909.4061>`_, 2009, Algorithm 4.4.
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _sketch
from subspace_optax.projectors import _base
from subspace_optax.projectors import _periodic

METHODS = ('auto', 'exact', 'gram', 'randomized', 'warm')

# For a rank-deficient G, in units of ||G||_F: `_FILL` fills the directions that
# a sketch lacks, and `_SHIFT` raises every eigenvalue of G G^T, so that
# iteration does not lose these directions.
_FILL = 1e-3
_SHIFT = 1e-5
# Rounds of iteration on an m x m Gram matrix; each costs 2m^2 r.
_GRAM_ROUNDS = 4
# Up to this size of the Gram matrix, computing its eigenvectors is cheaper.
_EIGH_SIZE = 512


def svd(
  update_proj_gap: Any = 200,
  method: str = 'auto',
  *,
  power_iterations: int = 2,
  stagger: bool = False,
) -> _base.Projector:
  """Leading r singular vectors of the gradient at steps 0, T, 2T and so on.

  The vectors are in order, strongest first. With 'exact', their signs are those
  of the platform's SVD. The other methods approximate the space, take the
  singular vectors of P P^T G in it, and fix the signs by a weighted sum of the
  entries, so that the vectors are the same on any mesh, up to rounding.
  Directions of nearly equal strength remain arbitrary. Hence the losses of two
  methods, or of an optimizer under 'auto' on one device and on a mesh, agree to
  about 1e-3 on average, until a refresh at which moments meet directions with
  other signs.

  Args:
    update_proj_gap: T, steps between refreshes, or a `LazyGap`.
    method: 'exact' is a full SVD of every matrix. 'gram' is subspace iteration
      on the Gram matrix of the short side, or its eigenvectors if it is small;
      it loses directions weaker than 3e-4 of the strongest. 'randomized' is
      subspace iteration from a random sketch of the gradient, and 'warm' from
      the last basis; both use matrix products only. 'auto' is exact if the
      matrix surely lies on one device that is not a TPU, else (and on any mesh
      of several automatic devices) randomized. 'exact' and 'gram' gather a
      sharded gradient.
    power_iterations: rounds of 'randomized', 'warm' and hence 'auto', 4mnr
      FLOPs each. Two capture at least 99.5 % of what the exact basis captures.
    stagger: whether matrices take turns within each T steps, so that no step
      refreshes all of them. They start from random bases.

  Returns:
    A projector with orthonormal bases.

  Raises:
    TypeError: the gap or the number of iterations is not an int.
    ValueError: they are below 1; an unknown method.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> tx = so.project(so.SubspaceSpec(rank=1), so.projectors.svd(200))
    >>> params = {'w': jnp.outer(jnp.array([3.0, 4.0]), jnp.ones(8))}
    >>> gradients = params
    >>> projected, _ = jax.jit(tx.update)(gradients, tx.init(params))
    >>> print(abs(projected['w'].basis.ravel()).round(3))
    [0.6 0.8]
  """
  if method not in METHODS:
    raise ValueError(f'method must be one of {METHODS}, got {method!r}.')
  _arguments.check_static(power_iterations, 'power_iterations')
  rule = {
    'auto': functools.partial(_auto, power_iterations),
    'exact': _exact,
    'gram': _ordered(_gram),
    'randomized': _ordered(functools.partial(_randomized, power_iterations)),
    'warm': _ordered(functools.partial(_warm, power_iterations)),
  }[method]
  rounds = power_iterations if power_iterations != 2 else None
  projector = _periodic.periodic(
    'svd',
    rule,
    update_proj_gap,
    options={'method': method, 'power_iterations': rounds},
    stagger=stagger,
  )
  if method != 'auto':
    return projector
  which = ' [exact; on a mesh or TPU randomized]'
  return projector._replace(name=projector.name + which)


def _auto(
  rounds: int, matrix: _base.Matrix, basis: jax.Array, period: jax.Array
) -> jax.Array:
  """Exact unless that gathers the gradient or takes too long to compile."""
  randomized = _ordered(functools.partial(_randomized, rounds))
  if _sharding.is_sharded(matrix.like):
    return randomized(matrix, basis, period)
  # XLA takes two minutes to compile an SVD of 512 x 512 for a TPU.
  return lax.platform_dependent(
    tpu=lambda: randomized(matrix, basis, period).astype(basis.dtype),
    default=lambda: _exact(matrix, basis, period).astype(basis.dtype),
  )


def _ordered(rule: _periodic.Draw) -> _periodic.Draw:
  """Returns a rule whose bases P become the singular vectors of P P^T G."""

  def draw(matrix: _base.Matrix, basis: jax.Array, period: jax.Array):
    p = rule(matrix, basis, period)
    return _linalg.order_basis(matrix.layout, p, matrix.unit_coordinates(p))

  return draw


def _exact(
  matrix: _base.Matrix, basis: jax.Array, period: jax.Array
) -> jax.Array:
  """U_r or V_r of the thin SVD."""
  del basis, period
  layout = matrix.layout
  svd = functools.partial(jnp.linalg.svd, full_matrices=False)
  u, _, vh = _linalg.each(svd, matrix.whole().astype(jnp.float32))
  vectors = u if layout.project_rows else jnp.swapaxes(vh, -1, -2)
  return layout.from_matrix(vectors[..., : layout.rank])


def _gram(
  matrix: _base.Matrix, basis: jax.Array, period: jax.Array
) -> jax.Array:
  """Eigenvectors of G G^T, or G times those of G^T G if that is smaller."""
  del basis
  layout = matrix.layout
  g = matrix.tall() * lax.rsqrt(matrix.energy)[..., None, None]
  gt = jnp.swapaxes(g, -1, -2)
  if layout.m <= layout.n:
    vectors, _ = _leading(layout, _linalg.matmul(g, gt), matrix, period)
    return layout.from_matrix(vectors)
  vectors, values = _leading(layout, _linalg.matmul(gt, g), matrix, period)
  # Columns G v / sigma are orthonormal if sigma is above rounding. The others
  # are replaced by random columns and made orthogonal to the rest.
  weak = values < 1e-7 * jnp.max(values, axis=-1, keepdims=True)
  weak = weak[..., None, :]
  u = _linalg.matmul(g, vectors) * lax.rsqrt(
    jnp.where(weak, 1.0, values[..., None, :])
  )
  noise = _linalg.gaussian(layout, matrix.seed, period) / jnp.sqrt(layout.m)
  weak = layout.from_matrix(jnp.broadcast_to(weak, u.shape))
  u = jnp.where(weak, noise, layout.from_matrix(u))
  return _linalg.orthonormalize(layout, u)


def _leading(
  layout: _layout.Layout,
  gram: jax.Array,
  matrix: _base.Matrix,
  period: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Returns r vectors of the leading eigenspace, and their values."""
  size, r = gram.shape[-1], layout.rank
  if size <= _EIGH_SIZE or 2 * r > size:
    values, vectors = _linalg.each(jnp.linalg.eigh, gram)
    return vectors[..., ::-1][..., :r], values[..., ::-1][..., :r]
  # Gram matrices have plain axes, whatever the axes of the leaf are.
  square = _layout.square(layout.batch_shape, size, r)
  p = _fill(square, _sketch.sketch(square, gram, matrix.seed, period), gram)
  for _ in range(_GRAM_ROUNDS):
    p = _linalg.orthonormalize(square, p, _linalg.FEW_SHIFTS)
    image = _linalg.matmul(gram, p)
    kept = jnp.sum(p * image, axis=(-2, -1))
    p = image - _shift(kept, size, r)[..., None, None] * p
  p = _linalg.orthonormalize(square, p, _linalg.FEW_SHIFTS)
  return p, jnp.sum(p * _linalg.matmul(gram, p), axis=-2)


def _randomized(
  rounds: int, matrix: _base.Matrix, basis: jax.Array, period: jax.Array
) -> jax.Array:
  """Rounds of subspace iteration from a sketch of the range of G."""
  del basis
  layout = matrix.layout
  y = _sketch.sketch(layout, matrix.gradient, matrix.seed, period)
  y = _fill(layout, matrix.scale(lax.rsqrt(matrix.energy), y), matrix.like)
  p = _linalg.orthonormalize(layout, y, _linalg.ROUGH)
  return _iterate(rounds, matrix, p)


def _fill(layout: _layout.Layout, y: jax.Array, leaf: jax.Array) -> jax.Array:
  """Returns a sketch that is nonzero in the directions that it may lack."""
  eye = _FILL * jnp.eye(layout.m, layout.rank, dtype=y.dtype)
  eye = jnp.broadcast_to(eye, (*layout.batch_shape, *eye.shape))
  return y + layout.align_basis(layout.from_matrix(eye), leaf)


def _warm(
  rounds: int, matrix: _base.Matrix, basis: jax.Array, period: jax.Array
) -> jax.Array:
  """Rounds of subspace iteration from the last basis."""
  del period
  return _iterate(rounds, matrix, matrix.aligned(basis))


def _iterate(rounds: int, matrix: _base.Matrix, p: jax.Array) -> jax.Array:
  """Rounds of P <- orth((G G^T / ||G||^2 - shift) P)."""
  layout = matrix.layout
  for _ in range(rounds):
    coords = matrix.unit_coordinates(p)
    kept = layout.coords_energy(coords)
    if layout.axis_name is not None:  # here `energy` is larger than that of G
      kept = jnp.ones_like(kept)
    shift = _shift(kept, layout.m, layout.rank)
    image = matrix.unit_image(coords) - matrix.scale(shift, p)
    p = _linalg.orthonormalize(layout, image, _linalg.FEW_SHIFTS)
  return p


def _shift(kept: jax.Array, m: int, r: int) -> jax.Array:
  """Returns half the mean of the eigenvalues that the basis leaves out.

  Subtracted from every eigenvalue of G G^T / ||G||^2, it about halves the
  magnitude of the unwanted ones: a Chebyshev filter of degree one.
  """
  shift = 0.5 * (1.0 - kept) / max(m - r, 1)
  return jnp.where(shift > _SHIFT, shift, -_SHIFT)
