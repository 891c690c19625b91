# SPDX-License-Identifier: Apache-2.0
"""Online Subspace Descent's bases: a step of online PCA at every step.

Liang et al., `Memory-Efficient LLM Training with Online Subspace Descent
<https://arxiv.org/abs/2408.12857>`_, 2024, Algorithm 1. W moves with P_t, then
any optimizer moves P_t along the gradient of Eq. (6),

  L(P) = ||P P^T G~ - G~||_F^2 + lambda ||P^T P - I||_F^2,   G~ = G / ||G||_F.

With A = P^T G~, S = P^T P and H = G~ A^T,

  dL/dP = P (2 P^T H + 4 lambda (S - I)) + 2 H (S - 2 I),

which costs one product with G (A is known already) and four products of size r,
that is 2mnr + 8mr^2.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _sign
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.projectors import _base
from subspace_optax.projectors import _svd


class OnlinePcaState(NamedTuple):
  """State of `online_pca`."""

  optimizer: Any  # OptimizerP's state, moments in the bases' shape
  start: Any  # state of the rule that makes the first bases; or ()


def online_pca(
  optimizer: optax.GradientTransformation,
  orthogonality: float = 0.1,
  init: str = 'random',
  *,
  update_every: int = 1,
  orthonormalize_every: int | None = None,
) -> _base.Projector:
  """Bases that an optimizer moves at every step on the PCA loss of Eq. (6).

  Bases stay close to orthonormal without any factorisation. The optimizer's
  learning rate must stay small, such as 5 times that of the weights.

  Args:
    optimizer: OptimizerP of Algorithm 1, including its learning rate and, for
      lambda_P, weight decay. It runs on the bases and gets them as its params.
      Adam adds 2mr of state to the mr of the basis, SGD none.
    orthogonality: lambda of Eq. (6).
    init: 'random' starts from a Haar sample, 'svd' from the singular vectors
      of the first gradient.
    update_every: training steps per step of the optimizer, whose schedules
      count only its own steps. The steps between cost no product with the
      gradient beyond the coordinates.
    orthonormalize_every: training steps between exact orthonormalisations by
      Cholesky QR, a multiple of `update_every`; None for never.

  Returns:
    A projector.

  Raises:
    ValueError: an unknown `init`; a negative `orthogonality`; a number of steps
      below 1; an `orthonormalize_every` that is not a multiple of
      `update_every`; at `init`, an optimizer that steps along the gradient.
    TypeError: `optimizer` is not a gradient transformation; a number of steps
      is not an int.

  References:
    Liang et al., `Online Subspace Descent
    <https://arxiv.org/abs/2408.12857>`_, 2024, Algorithm 1 and Eq. (6)

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = so.subspace(
    ...   so.SubspaceSpec(rank=128),
    ...   so.projectors.online_pca(optax.adam(5e-3)),
    ...   optax.scale_by_adam(),
    ... )
  """
  optimizer = _sign.require_against(optimizer, 'optimizer')
  if init not in ('random', 'svd'):
    raise ValueError(f"init must be 'random' or 'svd', got {init!r}.")
  if not isinstance(orthogonality, jax.Array) and orthogonality < 0:
    raise ValueError(
      f'orthogonality must not be negative, got {orthogonality}.'
    )
  _arguments.check_static(update_every, 'update_every')
  if orthonormalize_every is not None:
    _arguments.check_static(orthonormalize_every, 'orthonormalize_every')
    if orthonormalize_every % update_every:
      raise ValueError(
        'orthonormalize_every must be a multiple of update_every='
        f'{update_every}, got {orthonormalize_every}.'
      )
  first = _svd.svd(_arguments.MOST_STEPS) if init == 'svd' else None

  def init_fn(subspaces, matrices):
    start = ()
    if first:
      start = first.init(subspaces, matrices)
      start = start._replace(owed=jax.tree.map(jnp.ones_like, start.owed))
    return OnlinePcaState(optimizer.init(subspaces.basis), start)

  def refresh(context, matrices, subspaces, state):
    if not first:
      return subspaces, None, state
    subspaces, moves, start = first.refresh(
      context, matrices, subspaces, state.start
    )
    return subspaces, moves, state._replace(start=start)

  def track(context, matrices, coords, subspaces, state):
    old = subspaces.basis
    learns = jax.tree.map(lambda x: x.ok & context.active, matrices)
    if context.moves is not None:
      # Singular vectors minimise Eq. (6), so their gradient is rounding noise,
      # from which Adam would make a step of full length.
      learns = jax.tree.map(
        lambda ok, move: ok & ~move.moved, learns, context.moves
      )
    grads, captured, error = _tree.map_unzip(
      lambda p, x, r, ok: _pca_gradient(p, x, r, ok, orthogonality),
      3,
      old,
      matrices,
      coords,
      learns,
    )
    updates, own = optimizer.update(grads, state.optimizer, old)
    new, learns = _tree.map_unzip(_step, 2, old, updates, matrices, learns)
    if orthonormalize_every is not None:
      # At the last step of each period, after the steps have been taken.
      due = (context.count + update_every) % orthonormalize_every == 0
      new = _varying.cond(
        due & context.active,
        lambda new: jax.tree.map(_orthonormal, new, matrices, learns),
        lambda new: new,
        new,
      )
    own = _skip(optimizer, state.optimizer, own, matrices, learns)
    drift, moves = _tree.map_unzip(_moved_by, 2, new, old, matrices, learns)
    keep = lambda ok, new, old: jnp.where(ok, new.astype(old.dtype), old)
    subspaces = _base.Subspaces(
      new,
      jax.tree.map(keep, learns, captured, subspaces.captured_energy),
      jax.tree.map(keep, learns, error, subspaces.orthogonality_error),
      jax.tree.map(keep, learns, drift, subspaces.drift),
    )
    return subspaces, moves, state._replace(optimizer=own)

  def track_sometimes(context, matrices, coords, subspaces, state):
    due = context.active & (context.count % update_every == 0)
    context = context._replace(active=due)
    return _base.resting(track)(context, matrices, coords, subspaces, state)

  name = _base.call(
    'online_pca',
    orthogonality=orthogonality,
    init=init,
    update_every=update_every if update_every != 1 else None,
    orthonormalize_every=orthonormalize_every,
  )
  return _base.Projector(
    name,
    init_fn,
    refresh,
    track if update_every == 1 else track_sometimes,
    orthonormal=False,
    small_steps=True,
  )


def _pca_gradient(basis, matrix, coords, ok, orthogonality):
  """Returns dL/dP of Eq. (6), the captured energy and the error of P."""
  layout = matrix.layout
  p = _linalg.widen(basis)
  a = coords * layout.along_coords(lax.rsqrt(matrix.energy))
  h = matrix.unit_image(a)
  s = layout.gram(p, p)
  aa = layout.gram(p, h)  # P^T (G~ A^T) = A A^T
  eye = _linalg.identity_like(s)
  on_p = 2.0 * aa + 4.0 * orthogonality * (s - eye)
  on_h = 2.0 * s - 4.0 * eye
  grad = layout.mix_basis(p, on_p) + layout.mix_basis(h, on_h)
  # 1 - ||P P^T G~ - G~||^2, which is ||A||^2 if P is orthonormal.
  captured = jnp.sum(aa * (2.0 * eye - s), axis=(-2, -1))
  error = _linalg.orthogonality_error(s)
  grad = jnp.where(layout.along_basis(ok), grad, jnp.zeros_like(grad))
  return _sharding.like(grad, basis), captured, error


def _step(old, update, matrix, ok):
  """Returns the bases after the step, and which of them moved.

  A basis with nothing to learn from stays at P_t. So does one whose step
  overflows, since nothing would bring it back.
  """
  layout = matrix.layout
  ok &= jnp.isfinite(layout.basis_energy(_linalg.widen(update)))
  new = _sharding.like(old + update.astype(old.dtype), old)
  return jnp.where(layout.along_basis(ok), new, old), ok


def _orthonormal(basis, matrix, ok):
  """Orthonormalises the bases that move, unless the result is not finite."""
  layout = matrix.layout
  q = _linalg.orthonormalize(layout, matrix.aligned(basis))
  good = ok & jnp.isfinite(layout.basis_energy(q))
  return jnp.where(layout.along_basis(good), _sharding.like(q, basis), basis)


def _moved_by(new, old, matrix, ok):
  """Returns ||P_{t+1} - P_t||_F / sqrt(r) and the move."""
  layout = matrix.layout
  difference = _linalg.widen(new) - _linalg.widen(old)
  drift = jnp.sqrt(layout.basis_energy(difference) / layout.rank)
  step = _linalg.transition(layout, new, old).astype(jnp.float32)
  return drift, _projected.Move(ok, step)


class _Pair:
  """Two values that pass through a tree map as one leaf."""

  def __init__(self, new, old):
    self.new, self.old = new, old


def _skip(optimizer, old_state, new_state, matrices, ok):
  """Returns the optimizer's new state, or the old one for skipped matrices."""
  pairs = jax.tree.map(_Pair, new_state, old_state)
  any_ok = jax.tree.reduce(lambda a, b: a | jnp.any(b), ok, jnp.array(False))

  def per_matrix(pair, matrix, ok):
    whole = pair.new.shape == matrix.layout.basis_shape
    keep = matrix.layout.along_basis(ok) if whole else jnp.any(ok)
    return jnp.where(keep, pair.new, pair.old)

  def shared(pair):
    return jnp.where(any_ok, pair.new, pair.old)

  return optax.tree.map_params(
    optimizer, per_matrix, pairs, matrices, ok, transform_non_params=shared
  )
