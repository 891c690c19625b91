# SPDX-License-Identifier: Apache-2.0
"""Orthonormal bases by matrix products: batched, sharding-safe, float32.

Only r x r matrices are factorised. A basis with rows sharded over devices then
costs all-reduces of r x r blocks, while QR or SVD would gather it.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax._matrix import _jacobi
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _sharding

_HIGHEST = lax.Precision.HIGHEST

# Shifts of the passes of Cholesky QR, relative to the trace of the Gram matrix.
# The first two passes are shifted, which keeps them finite at condition numbers
# up to about 1e6 in float32. The last two act on a nearly orthonormal matrix.
SHIFTS = (1e-6, 1e-6, 0.0, 0.0)
# `FEW_SHIFTS` is enough up to 1e5. `ROUGH` gives a well-conditioned basis of
# the same space. `_NONE` is enough for tall Gaussian matrices.
FEW_SHIFTS = (1e-6, 0.0, 0.0)
ROUGH = (1e-6,)
_NONE = (0.0, 0.0)


@functools.partial(jax.jit, static_argnums=0)
def haar(
  layout: _layout.Layout, seeds: jax.Array, period: jax.Array | int
) -> jax.Array:
  """Returns Haar-distributed orthonormal bases.

  The Q factor of a Gaussian matrix, with a positive diagonal of R, is uniform
  on the Stiefel manifold; Cholesky QR gives that factor.

  Args:
    layout: layout of the leaf.
    seeds: (*batch), uint32, one per matrix.
    period: int32, a scalar or (*batch), folded into every key.

  Returns:
    (*batch and projected axes, r), float32.
  """
  tall = layout.m >= max(64, 2 * layout.rank)
  y = gaussian(layout, seeds, period)
  return orthonormalize(layout, y, _NONE if tall else SHIFTS)


def gaussian(
  layout: _layout.Layout, seeds: jax.Array, period: jax.Array | int
) -> jax.Array:
  """Returns standard normal matrices of the basis's shape, one key for each."""

  def draw(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (layout.m, layout.rank), jnp.float32)

  flat = draw_each(draw, seeds, period)
  shape = (*layout.batch_shape, layout.m, layout.rank)
  return layout.from_matrix(flat.reshape(shape))


def gumbel(size: int, seeds: jax.Array, period: jax.Array | int) -> jax.Array:
  """Returns `size` standard Gumbel numbers per matrix, (*batch, size)."""
  draw = lambda key: jax.random.gumbel(key, (size,), jnp.float32)
  return draw_each(draw, seeds, period).reshape(*seeds.shape, size)


def draw_each(
  draw: Callable[[jax.Array], jax.Array],
  seeds: jax.Array,
  period: jax.Array | int,
) -> jax.Array:
  """Returns `draw(key)` with one key per matrix, stacked on the first axis."""
  seeds, period = map(_sharding.replicate, (seeds, jnp.asarray(period)))
  period = jnp.broadcast_to(period, seeds.shape).reshape(-1)
  seeds = seeds.reshape(-1)
  one = lambda seed, k: draw(jax.random.fold_in(_key(seed), k))
  if len(seeds) == 1:  # without a map, XLA compiles the same numbers in half
    return one(seeds[0], period[0])[None]  # the time
  return jax.vmap(one)(seeds, period)


def seeds(
  seed: int, batch_shape: tuple[int, ...], path_hash: jax.Array
) -> jax.Array:
  """Returns one seed per matrix of a leaf, (*batch), uint32."""
  key = jax.random.fold_in(_key(seed), path_hash)
  return jax.random.bits(key, batch_shape, jnp.uint32)


def _key(seed: jax.Array | int) -> jax.Array:
  # Not the generator that the program has chosen: the numbers of others may
  # depend on the backend and, for a matrix in a batch, on the batch.
  return jax.random.key(seed, impl='threefry2x32')


def orthonormalize(
  layout: _layout.Layout, y: jax.Array, shifts: Sequence[float] = SHIFTS
) -> jax.Array:
  """Returns the Q factors of `y` by shifted Cholesky QR.

  Y = Q R with R's diagonal positive, by Q <- Q L^-T with L L^T = Q^T Q + shift,
  repeated. The result is not finite if `y` is too far from full rank.

  Args:
    layout: layout of the leaf.
    y: (*batch and projected axes, r).
    shifts: one shift per pass, relative to the trace of the Gram matrix.

  Returns:
    The same shape, float32 or wider, orthonormal to rounding.

  References:
    Fukaya et al., `Shifted Cholesky QR for computing the QR factorization of
    ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2018
  """
  q = widen(y)
  for shift in shifts:
    gram = layout.gram(q, q)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    eye = identity_like(gram)
    inverse = each(_inverse_factor, gram + shift * trace * eye, eye)
    q = layout.mix_basis(q, jnp.swapaxes(inverse, -1, -2))
  return q


def _inverse_factor(square: jax.Array, eye: jax.Array) -> jax.Array:
  """Returns L^-1 of a matrix L L^T, given the identity.

  When mapped over a sharded stack, both must have the same sharding.
  """
  chol = jnp.linalg.cholesky(square)
  return lax.linalg.triangular_solve(chol, eye, left_side=True, lower=True)


def each(f: Callable[..., Any], *stacks: jax.Array) -> Any:
  """Maps a factorisation over the matrices of (*batch, rows, columns) arrays.

  On CPUs it runs one matrix after the other. jaxlib 0.10's LAPACK calls there
  distribute a batch over the threads that run the calls, and wait for them; as
  many calls at once as there are threads would wait forever.

  Args:
    f: (matrix, ...) -> one or more arrays.
    *stacks: arrays with the same batch axes.

  Returns:
    The results of `f`, with the batch axes in front.
  """
  batch_shape = stacks[0].shape[:-2]

  def together(*stacks: jax.Array) -> Any:
    # Use vmap: jax's own batching raises errors for explicitly sharded batches.
    batched = f
    for _ in batch_shape:
      batched = jax.vmap(batched)
    return batched(*stacks)

  def in_turn(*stacks: jax.Array) -> Any:
    wanted = _sharding.result_types(together, *stacks)
    rows = [_sharding.replicate(x).reshape(-1, *x.shape[-2:]) for x in stacks]
    found = lax.map(lambda row: f(*row), tuple(rows))
    place = lambda x, kind: _sharding.like(x.reshape(kind.shape), kind)
    return jax.tree.map(place, found, wanted)

  if math.prod(batch_shape) == 1:
    return together(*stacks)
  return lax.platform_dependent(*stacks, cpu=in_turn, default=together)


def transition(
  layout: _layout.Layout, new: jax.Array, old: jax.Array
) -> jax.Array:
  """Returns C = P_n^T P_o (P_o^T P_o)^-1, (*batch, r, r), float32.

  C R are the new coordinates of P_o (P_o^T P_o)^-1 R, the smallest matrix whose
  old coordinates are R. For orthonormal bases, C is P_n^T P_o.
  """
  new, old = widen(new), widen(old)
  return _right_solve(layout.gram(new, old), layout.gram(old, old))


def change(
  layout: _layout.Layout, new: jax.Array, old: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns `transition` and the mean squared cosine of principal angles.

  The mean, (*batch), is tr(P_n^T P_o (P_o^T P_o)^-1 P_o^T P_n (P_n^T
  P_n)^-1) / r: 1 for equal subspaces, 0 for orthogonal ones.
  """
  new, old = widen(new), widen(old)
  cross = layout.gram(new, old)
  there = _right_solve(cross, layout.gram(old, old))
  back = _right_solve(jnp.swapaxes(cross, -1, -2), layout.gram(new, new))
  kept = jnp.sum(there * jnp.swapaxes(back, -1, -2), axis=(-2, -1))
  return there, kept / layout.rank


def coordinates(
  layout: _layout.Layout, leaf: jax.Array, basis: jax.Array
) -> jax.Array:
  """Returns (P^T P)^-1 P^T W; P times this is the part of W in P's span."""
  return solve_gram(layout, widen(basis), layout.project(leaf, basis))


def solve_gram(
  layout: _layout.Layout, basis: jax.Array, coords: jax.Array
) -> jax.Array:
  """Returns (P^T P)^-1 R."""
  gram = layout.gram(basis, basis)
  inverse = _right_solve(identity_like(gram), gram)
  return layout.mix_coords(inverse, coords)


def _right_solve(x: jax.Array, squares: jax.Array) -> jax.Array:
  """Returns X S^-1 for positive definite S, both (*batch, r, r)."""

  def one(x: jax.Array, square: jax.Array) -> jax.Array:
    solve = functools.partial(
      lax.linalg.triangular_solve,
      jnp.linalg.cholesky(square),
      left_side=True,
      lower=True,
    )
    return solve(solve(x.T), transpose_a=True).T

  return each(one, x, squares)


def order_basis(
  layout: _layout.Layout, basis: jax.Array, coords: jax.Array
) -> jax.Array:
  """Returns P V, where V holds the eigenvectors of R R^T.

  For orthonormal P and R = P^T G, these are the singular vectors of P P^T G,
  the leading one first. A weighted sum of its entries fixes the sign of each
  vector; the weights follow no pattern, so rounding does not decide it.

  Args:
    layout: layout of the leaf.
    basis: P.
    coords: R, scaled so that its squares can't overflow.

  Returns:
    A basis of the same shape and the same space.
  """
  gram = layout.gram_coords(coords, coords)
  # LAPACK may never return if the input is not finite.
  turn = each(_eigenvectors, jnp.where(jnp.isfinite(gram), gram, 0.0))
  weights = _weights(layout, basis)
  sums = matmul(layout.gram(weights, basis), turn)
  return layout.mix_basis(basis, jnp.where(sums < 0, -turn, turn))


def _weights(layout: _layout.Layout, basis: jax.Array) -> jax.Array:
  """Returns numbers in [1, 2] that follow no pattern, as bases of rank 1."""
  # The fractional parts of multiples of the golden ratio, exactly.
  bits = jnp.arange(layout.m, dtype=jnp.uint32) * jnp.uint32(2654435769)
  column = 1.0 + bits.astype(basis.dtype) * 2.0**-32
  shape = (*layout.batch_shape, layout.m, 1)
  return layout.from_matrix(jnp.broadcast_to(column[:, None], shape))


def _eigenvectors(square: jax.Array) -> jax.Array:
  """Returns the eigenvectors of a symmetric matrix, the leading one first."""
  return lax.platform_dependent(
    square,
    # XLA takes minutes to compile jax's own method for 512 x 512 on a TPU.
    tpu=_jacobi.eigenvectors,
    default=lambda square: jnp.linalg.eigh(square)[1][:, ::-1],
  )


def safe_sqrt(squares: jax.Array) -> jax.Array:
  """Returns square roots with derivative 0 at 0, where it would be infinite."""
  zero = squares == 0
  return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))


def orthogonality_error(gram: jax.Array) -> jax.Array:
  """Returns ||P^T P - I||_F of every matrix, given P^T P of (*batch, r, r)."""
  return jnp.sqrt(
    jnp.sum(jnp.square(gram - identity_like(gram)), axis=(-2, -1))
  )


def identity_like(squares: jax.Array) -> jax.Array:
  """Returns identity matrices of the shape of (*batch, r, r) `squares`."""
  eye = jnp.eye(squares.shape[-1], dtype=squares.dtype)
  eye = eye.reshape((1,) * (squares.ndim - 2) + eye.shape)
  return _sharding.like(jnp.broadcast_to(eye, squares.shape), squares)


def widen(x: jax.Array) -> jax.Array:
  """Returns `x` in float32, or unchanged if it is wider."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """Returns the product of two batches of matrices in full float32."""
  return jnp.matmul(a, b, precision=_HIGHEST)
