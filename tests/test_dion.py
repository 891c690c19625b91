"""Dion and Trion against dense float64 loops, written from the papers.

The loops keep the momentum and, for Dion, the right factor; the first of these
is that of the state. The Q factor with a positive diagonal of R leaves no sign
to choose.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import errors
import grid
import references as ref
import subspace_optax as so
from subspace_optax import projectors
from subspace_optax import residuals

# The right side of one, the left of two layers, and heads in front.
VIEWS = ref.KERNELS | {'layers/out/kernel': ref.OUT}
SPEC = so.SubspaceSpec(ref.RANK)
MU, LR, SCALE, DECAY, STEPS = 0.9, 0.1, 0.5, 0.3, 8


def gradients(t):
  """A mean that stays and noise, of decaying spectra."""
  of = lambda seed: {k: ref.decaying(seed, v, 0.8) for k, v in VIEWS.items()}
  mean, noise = of(100), of(t)
  return {k: 0.2 * mean[k] + noise[k] for k in VIEWS}


def kernels(t):
  """Fewer leaves, for programs that one test alone compiles."""
  return {k: gradients(t)[k] for k in ref.KERNELS}


def widening(view):
  """Returns the root of outputs over inputs of a kernel."""
  size = lambda axes: np.prod([view.shape[i] for i in axes])
  return np.sqrt(size(view.cols) / size(view.rows))


class Dion:
  """Ahn et al., Algorithm 1, for one m x n matrix and its n x r factor Q."""

  def __init__(self, m, n, right):
    self.momentum, self.right = np.zeros((m, n)), right

  def step(self, g):
    b = self.momentum + g
    p = ref.positive_qr(b @ self.right)
    r = b.T @ p
    self.momentum = b - (1 - MU) * p @ r.T
    self.right = r / np.linalg.norm(r, axis=0)
    return p @ self.right.T


class Trion:
  """Modoranu et al.: the same with columns of D, and Newton-Schulz."""

  def __init__(self, m, n):
    self.momentum = np.zeros((m, n))
    i, k = np.arange(m)[:, None], np.arange(m)
    d = np.cos(np.pi * (2 * i + 1) * k / (2 * m)) * np.sqrt(2 / m)
    self.transform = np.where(k == 0, np.sqrt(1 / m), d)

  def step(self, g):
    b = self.momentum + g
    s = self.transform.T @ b
    chosen = np.sort(np.argsort(-np.abs(s).sum(1))[: ref.RANK])
    p, r = self.transform[:, chosen], s[chosen]
    self.momentum = b - (1 - MU) * p @ r
    u, values, v = np.linalg.svd(r / np.linalg.norm(r), full_matrices=False)
    for _ in range(5):
      values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return p @ (u * values) @ v


def momentum(state):
  return ref.find(state, 'residual').residual


def dense(name, state):
  """Returns a loop for every matrix of every leaf."""
  loops = {}
  for k, v in VIEWS.items():
    if name == 'trion':
      loops[k] = [Trion(v.m, v.n) for _ in range(v.count)]
      continue
    right = v.coords(ref.find(state, 'right').right[k], ref.RANK)
    loops[k] = [Dion(v.m, v.n, x.T) for x in right]
  return loops


@functools.cache
def compiled(name):
  """Returns the first state and the update, which tests share."""
  tx = getattr(so, name)(LR, scale=SCALE, b=MU, weight_decay=DECAY, spec=SPEC)
  return ref.jit(tx.init)(zeros()), ref.jit(tx.update)


def zeros():
  """Parameters that do not decay."""
  return {k: jnp.zeros(v.shape) for k, v in VIEWS.items()}


@pytest.mark.parametrize('name', ['dion', 'trion'])
def test_equals_dense_loop(name):
  """In updates and momenta of all steps; params stay where they are."""
  params = gradients(99)
  state, update = compiled(name)
  loops = dense(name, state)
  for t in range(STEPS):
    g = gradients(t)
    updates, state = update(g, state, params)
    for k, v in VIEWS.items():
      pairs = zip(loops[k], v.matrices(g[k]), strict=True)
      wanted = SCALE * widening(v) * np.stack([x.step(one) for x, one in pairs])
      wanted = -LR * (wanted + DECAY * v.matrices(params[k]))
      np.testing.assert_allclose(
        v.matrices(updates[k]),
        wanted,
        rtol=0,
        atol=2e-4 * LR * SCALE,
        err_msg=f'{k} at step {t}',
      )
      np.testing.assert_allclose(
        v.matrices(momentum(state)[k]),
        np.stack([loop.momentum for loop in loops[k]]),
        rtol=0,
        atol=1e-4,
        err_msg=f'{k} at step {t}',
      )
  assert update._cache_size() == 1


def feedback(projector, form, inner=None):
  return so.subspace(
    SPEC,
    projector,
    inner or optax.identity(),
    transport='first',
    residual=residuals.momentum_feedback(MU, form),
    scale=SCALE,
  )


def normalized(form, n):
  """Returns rows of length 1, or singular values by the iteration's formula."""
  if form == 'rows':
    return n / np.linalg.norm(n, axis=1, keepdims=True)
  u, values, v = np.linalg.svd(n / np.linalg.norm(n), full_matrices=False)
  for _ in range(5):
    values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
  return (u * values) @ v


PROJECTORS = {
  'stiefel': projectors.stiefel(3),
  'gaussian': projectors.gaussian(3),
  'svd': projectors.svd(2),
}


# Bases that are orthonormal and not, with each of the rest.
ANY = {
  ('stiefel', 'sgd', 'orthogonal'),
  ('gaussian', 'sgd', 'rows'),
  ('gaussian', 'momentum', 'orthogonal'),
}


@pytest.mark.parametrize(
  'projector, inner, form',
  [
    pytest.param(*point, marks=() if point in ANY else pytest.mark.full)
    for point in itertools.product(
      PROJECTORS, ['sgd', 'momentum'], ['orthogonal', 'rows']
    )
  ],
)
def test_any_projector_and_inner_optimizer(projector, inner, form):
  """M <- B - (1 - mu) P (P^T P)^-1 R, and N of what the inner one returns."""
  dense_inner = ref.Sgd() if inner == 'sgd' else ref.Momentum(0.9)
  tx = feedback(
    PROJECTORS[projector], form, None if inner == 'sgd' else optax.trace(0.9)
  )
  state, update = tx.init(kernels(0)), ref.jit(tx.update)
  old = {k: v.bases(ref.bases(state)[k]) for k, v in ref.KERNELS.items()}
  loops, kept = {}, {}
  for k, v in ref.KERNELS.items():
    loops[k] = ref.InSubspace(v, dense_inner, 'first')
    loops[k].move(old[k])
    kept[k] = np.zeros((v.count, v.m, v.n))
  for t in range(5):
    g = kernels(t)
    updates, state = update(g, state)
    for k, v in ref.KERNELS.items():
      bases, loop = v.bases(ref.bases(state)[k]), loops[k]
      loop.move(bases, np.flatnonzero((bases != loop.bases).any((1, 2))))
      wanted = []
      for i, (p, one) in enumerate(zip(bases, v.matrices(g[k]), strict=True)):
        b = kept[k][i] + one
        kept[k][i] = b - (1 - MU) * p @ np.linalg.pinv(p) @ b
        n, loop.states[i] = dense_inner.update(p.T @ b, loop.states[i])
        wanted.append(p @ normalized(form, n))
      np.testing.assert_allclose(
        v.matrices(updates[k]),
        SCALE * widening(v) * np.stack(wanted),
        rtol=0,
        atol=5e-4,
        err_msg=f'{k} at step {t}',
      )
      np.testing.assert_allclose(
        v.matrices(momentum(state)[k]), kept[k], rtol=0, atol=1e-4
      )


def after_two_steps(name):
  state, update = compiled(name)
  for t in range(2):
    _, state = update(gradients(t), state, zeros())
  return state, update


@pytest.mark.parametrize('name', ['dion', 'trion'])
def test_zero_is_a_gradient(name):
  """Momentum goes on, and shrinks."""
  state, update = after_two_steps(name)
  updates, after = update(zeros(), state, zeros())
  assert all(np.linalg.norm(x) > 0 for x in jax.tree.leaves(updates))
  for x, y in zip(
    *(jax.tree.leaves(momentum(s)) for s in (after, state)), strict=True
  ):
    assert np.linalg.norm(x) < np.linalg.norm(y)


@pytest.mark.parametrize('name', ['dion', 'trion'])
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_bad_gradient(name, bad):
  """It leaves all but counts alone."""
  state, update = after_two_steps(name)
  spoiled = jax.tree.map(lambda x: x.at[..., 0, 0].set(bad), gradients(2))
  updates, after = update(spoiled, state, zeros())
  assert not any(np.isfinite(x).all() for x in jax.tree.leaves(updates))
  # The first layer of each stack is spoiled, and the others are not.
  for k, v in VIEWS.items():
    x, y = (v.matrices(momentum(s)[k]) for s in (state, after))
    np.testing.assert_array_equal(x[0], y[0])
    assert np.isfinite(y).all()
  if name == 'dion':
    x, y = (ref.bases(s)['tall'] for s in (state, after))
    np.testing.assert_array_equal(x, y)
    x, y = (ref.find(s, 'right').right['tall'] for s in (state, after))
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize('name', ['dion', 'trion'])
def test_nothing_of_a_first_gradient_that_is_zero(name):
  state, update = compiled(name)
  updates, state = update(zeros(), state, zeros())
  for x in jax.tree.leaves((updates, momentum(state))):
    np.testing.assert_array_equal(x, 0)


def test_momentum_of_rank_one_moves_along_it_alone():
  """Rows of rounding are no directions of length 1."""
  tx = feedback(projectors.lagged_power(), 'rows')
  views = ref.KERNELS
  g = {k: jnp.zeros(v.shape).at[..., 2, :].set(1) for k, v in views.items()}
  update, state = ref.jit(tx.update), tx.init(g)
  for _ in range(4):
    updates, state = update(g, state)
    for k, v in views.items():
      for p in v.bases(ref.bases(state)[k]):
        np.testing.assert_allclose(p.T @ p, np.eye(ref.RANK), atol=3e-6)
  for k, v in views.items():
    for u, one in zip(v.matrices(updates[k]), v.matrices(g[k]), strict=True):
      wanted = SCALE * widening(v) * one / np.linalg.norm(one)
      np.testing.assert_allclose(u, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize('name', ['dion', 'trion'])
def test_updates_come_to_have_singular_values_of_the_same_size(name):
  """Of a constant gradient: those of its leading subspace, or near 1."""
  state, update = compiled(name)
  g = {k: ref.decaying(5, v, 0.5) for k, v in VIEWS.items()}
  for _ in range(60):
    updates, state = update(g, state, zeros())
  for k, v in ref.KERNELS.items():
    for u in v.matrices(updates[k]):
      u = u / (LR * SCALE * widening(v))
      values = np.linalg.svd(u, compute_uv=False)
      low, high = (0.99, 1.01) if name == 'dion' else (0.6, 1.3)
      assert np.all((values[: ref.RANK] > low) & (values[: ref.RANK] < high))
      np.testing.assert_allclose(values[ref.RANK :], 0, atol=1e-5)


@functools.cache
def lagged(gap, stagger):
  tx = so.project(SPEC, projectors.lagged_power(gap, stagger=stagger))
  return tx.init(kernels(0)), ref.jit(tx.update)


def test_lagged_power_finds_the_leading_subspace_of_a_constant_gradient():
  g = {k: ref.decaying(0, v, 0.5) for k, v in ref.KERNELS.items()}
  state, update = lagged(1, False)
  for _ in range(40):
    _, state = update(g, state)
  for k, v in ref.KERNELS.items():
    found = v.bases(ref.bases(state)[k])
    for p, one in zip(found, v.matrices(g[k]), strict=True):
      best = ref.projection(ref.svd_basis(one, ref.RANK))
      np.testing.assert_allclose(ref.projection(p), best, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  'gap, stagger',
  [
    (1, False),
    (3, True),
    pytest.param(3, False, marks=pytest.mark.full),
    pytest.param(1, True, marks=pytest.mark.full),  # nothing to stagger
  ],
)
def test_lagged_power(gap, stagger):
  """P = orth(G Q^T) when it is due, Q at every step."""
  state, update = lagged(gap, stagger)
  right = {
    k: v.coords(ref.find(state, 'right').right[k], ref.RANK)
    for k, v in ref.KERNELS.items()
  }
  for t in range(6):
    g, old = kernels(t), ref.bases(state)
    _, state = update(g, state)
    for k, v in ref.KERNELS.items():
      new, moved = v.bases(ref.bases(state)[k]), []
      for i, one in enumerate(v.matrices(g[k])):
        p = ref.positive_qr(one @ right[k][i].T)
        moved.append((new[i] != v.bases(old[k])[i]).any())
        if moved[-1]:
          np.testing.assert_allclose(new[i], p, rtol=0, atol=1e-4)
        r = new[i].T @ one
        right[k][i] = r / np.linalg.norm(r, axis=1, keepdims=True)
      assert stagger or all(x == (t % gap == 0) for x in moved)
      np.testing.assert_allclose(
        v.coords(ref.find(state, 'right').right[k], ref.RANK),
        right[k],
        rtol=0,
        atol=1e-4,
      )


def test_momentum_of_bfloat16_gradients_grows_in_float32():
  """By 2^-10 of it at a step, which bfloat16 would round away."""
  tx = so.subspace(
    so.SubspaceSpec(1),
    projectors.stiefel(10**6),
    optax.identity(),
    residual=residuals.momentum_feedback(0.5),
  )
  large = {'w': ref.normal(0, (8, 12)).astype(jnp.bfloat16)}
  small = jax.tree.map(lambda x: x * 2.0**-10, large)
  update, state = ref.jit(tx.update), tx.init(large)
  updates, state = update(large, state)
  assert updates['w'].dtype == jnp.bfloat16
  p = np.asarray(ref.bases(state)['w'], np.float64)
  outside = np.eye(8) - p @ p.T
  g = np.asarray(large['w'].astype(jnp.float32), np.float64)
  for _ in range(100):
    _, state = update(small, state)
  found = outside @ np.asarray(momentum(state)['w'], np.float64)
  wanted = (1 + 100 * 2.0**-10) * outside @ g
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
  'make, argument, value',
  [
    (lambda: so.dion(1e-3, b=1.0), 'b must', '1.0'),
    (lambda: so.trion(1e-3, b=-0.1), 'b must', '-0.1'),
    (lambda: residuals.momentum_feedback(np.nan), 'mu must', 'nan'),
    (lambda: residuals.momentum_feedback(form='columns'), 'form', 'columns'),
    (lambda: residuals.momentum_feedback(steps=0), 'steps', '0'),
    (lambda: projectors.lagged_power(0), 'update_proj_gap', '0'),
  ],
)
def test_bad_arguments(make, argument, value):
  with errors.raises(ValueError, argument, value):
    make()


@pytest.mark.parametrize(
  'name, moment_dtype',
  grid.cover(['dion', 'trion'], ['parameter', None], of=2),
)
def test_momentum_has_the_dtype_of_moments(name, moment_dtype):
  params = {'w': jnp.ones((2, 24, 32), jnp.bfloat16), 'b': jnp.ones((3,))}
  spec = so.SubspaceSpec(3, moment_dtype=moment_dtype)
  tx = getattr(so, name)(0.1, spec=spec)
  state = jax.eval_shape(tx.init, params)
  updates, new = jax.eval_shape(tx.update, params, state, params)
  types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert types((new, updates)) == types((state, params))
  wanted = jnp.bfloat16 if moment_dtype else jnp.float32
  assert momentum(state)['w'].dtype == wanted
