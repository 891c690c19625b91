"""`projectors.online_pca` against Eq. (6) and Algorithm 1, in float64.

The gradient is compared with automatic differentiation of Eq. (6); whole runs
with a dense loop that starts from the first basis in the state.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

VIEWS = {**ref.KERNELS, **ref.ATTENTION}
SPEC = so.SubspaceSpec(ref.RANK)


@ref.jit
@jax.grad
def eq_6(p, g, lam):
  g = g / jnp.linalg.norm(g)
  eye = jnp.eye(p.shape[1])
  outside = jnp.sum(jnp.square(p @ p.T @ g - g))
  return outside + lam * jnp.sum(jnp.square(p.T @ p - eye))


def differentiate(p, g, lam):
  """Returns jax.grad of Eq. (6), in float64."""
  with jax.enable_x64(True):
    grad = eq_6(jnp.asarray(p), jnp.asarray(g), lam)
    assert grad.dtype == jnp.float64
    return np.asarray(grad)


def test_reference_gradient():
  p, g = ref.normal(0, (8, 3)), ref.normal(1, (8, 12))
  p, g = np.asarray(p, np.float64), np.asarray(g, np.float64)
  grad = ref.pca_gradient(p, g, 0.3)
  np.testing.assert_allclose(grad, differentiate(p, g, 0.3), rtol=1e-11)


@pytest.mark.parametrize('lam', [0.0, 1.0])
def test_moves_along_the_gradient_of_eq_6(lam):
  """SGD at rate 1 moves P by minus the gradient, orthonormal P or not."""
  tx = so.project(SPEC, so.projectors.online_pca(optax.sgd(1.0), lam))
  update = ref.jit(tx.update)
  # Eq. (6) does not depend on the gradient's size.
  for t, size in enumerate([1.0, 1e-6, 1e6]):
    grads = {k: size * ref.normal(t, v.shape) for k, v in VIEWS.items()}
    state = tx.init(grads)
    skew = {
      k: p + 0.1 * t * ref.normal(t, p.shape)
      for k, p in ref.bases(state).items()
    }
    _, after = update(grads, ref.with_bases(state, skew))
    for k, v in VIEWS.items():
      old, new = v.bases(skew[k]), v.bases(ref.bases(after)[k])
      for p, q, g in zip(old, new, v.matrices(grads[k]), strict=True):
        np.testing.assert_allclose(
          p - q, differentiate(p, g, lam), rtol=3e-6, atol=3e-6, err_msg=k
        )


def test_gradient_in_float64():
  """Float64 gradients and bases lose nothing on their way."""
  with jax.enable_x64(True):
    spec = so.SubspaceSpec(ref.RANK, basis_dtype=jnp.float64)
    tx = so.project(spec, so.projectors.online_pca(optax.sgd(1.0), 0.3))
    x = np.random.default_rng(0).normal(size=(12, 8 + ref.RANK))
    g, p = x[:, :8], x[:8, 8:]
    state = tx.init({'tall': jnp.asarray(g)})
    state = ref.with_bases(state, {'tall': jnp.asarray(p)})
    _, after = ref.jit(tx.update)({'tall': jnp.asarray(g)}, state)
    found = p - np.asarray(ref.bases(after)['tall'])
    assert found.dtype == np.float64
  np.testing.assert_allclose(found, differentiate(p, g.T, 0.3), rtol=1e-11)


OPTIMIZERS = {
  'adam': (optax.adam(0.02), ref.Adam(), 0.0),
  'adamw': (optax.adamw(0.02, weight_decay=0.5), ref.Adam(), 0.5),
  'sgd': (optax.sgd(0.02), ref.Sgd(), 0.0),
}


@pytest.mark.parametrize(
  'name, lam, init',
  [
    ('adam', 0.1, 'random'),
    ('adam', 0.1, 'svd'),
    ('adam', 0.0, 'random'),
    ('adamw', 0.1, 'random'),
    ('sgd', 0.1, 'random'),
    ('sgd', 0.0, 'svd'),
  ],
)
def test_algorithm_1(name, lam, init):
  """W moves with P_t, then P_t moves with the same gradient.

  From an SVD, P first moves at the second step, as in the paper's code: at the
  first one it is where Eq. (6) has its minimum.
  """
  optimizer, on_p, decay = OPTIMIZERS[name]
  projector = so.projectors.online_pca(optimizer, lam, init)
  tx = so.subspace(SPEC, projector, optax.scale_by_adam())
  update = ref.jit(tx.update)
  views = ref.KERNELS
  params = ref.like(views)
  states = [tx.init(params)]
  dense = {k: ref.InSubspace(v, ref.Adam()) for k, v in views.items()}
  pca = {}
  for t in range(10):
    grads = ref.like(views, t + 1)
    updates, state = update(grads, states[-1], params)
    states.append(state)
    for k, v in views.items():
      if t == 0:
        first = v.bases(ref.bases(states[init == 'svd'])[k])
        pca[k] = ref.OnlinePCA(v, first, on_p, lam, decay)
        if init == 'svd':
          assert_leading(v, grads[k], first)
      dense[k].move(pca[k].bases)
      np.testing.assert_allclose(
        v.matrices(updates[k]),
        dense[k].step(grads[k]),
        rtol=0,
        atol=2e-4,
        err_msg=f'update of {k} at step {t}',
      )
      if t > 0 or init == 'random':
        pca[k].step(grads[k], 0.02)
      np.testing.assert_allclose(
        v.bases(ref.bases(state)[k]),
        pca[k].bases,
        rtol=0,
        atol=3e-6 * (t + 1),
        err_msg=f'basis of {k} after step {t}',
      )


def assert_leading(view, grad, bases):
  for p, g in zip(bases, view.matrices(grad), strict=True):
    best = ref.projection(ref.svd_basis(g, ref.RANK))
    np.testing.assert_allclose(ref.projection(p), best, rtol=0, atol=3e-6)


@pytest.mark.parametrize('bad', [0.0, np.nan], ids=['zero', 'nan'])
def test_a_bad_gradient_leaves_its_matrix_and_its_moments(bad):
  """The other layers move as they would have."""
  projector = so.projectors.online_pca(optax.adam(0.02))
  tx = so.project(SPEC, projector)
  update = ref.jit(tx.update)
  grads = {'stack': ref.normal(0, ref.STACK.shape)}
  spoilt = {'stack': grads['stack'].at[1].set(bad)}
  _, state = update(grads, tx.init(grads))
  _, good = update(grads, state)
  _, after = update(spoilt, state)

  def layers(i, state):
    own = ref.find(state.projector, 'mu')
    trees = (ref.bases(state), own.mu, own.nu)
    return np.stack([tree['stack'][i] for tree in trees])

  np.testing.assert_array_equal(layers(1, after), layers(1, state))
  np.testing.assert_array_equal(layers(0, after), layers(0, good))
  assert (layers(1, good) != layers(1, state)).any()


def test_metrics():
  """What Eq. (6) says of the basis that the step used, and how far it went."""
  tx = so.project(SPEC, so.projectors.online_pca(optax.sgd(0.1)))
  update = ref.jit(tx.update)
  grads = ref.like(ref.KERNELS)
  state = tx.init(grads)
  bases = {
    k: p + 0.1 * ref.normal(1, p.shape) for k, p in ref.bases(state).items()
  }
  _, after = update(grads, ref.with_bases(state, bases))
  metrics = so.subspace_metrics(after)
  for k, v in ref.KERNELS.items():
    old, new = v.bases(bases[k]), v.bases(ref.bases(after)[k])
    pairs = list(zip(old, v.matrices(grads[k]), strict=True))
    error = np.swapaxes(old, 1, 2) @ old - np.eye(ref.RANK)
    expected = {
      'captured_energy': [1 - ref.pca_loss(p, g, 0) for p, g in pairs],
      'orthogonality_error': np.linalg.norm(error, axis=(1, 2)),
      'drift': np.linalg.norm(new - old, axis=(1, 2)) / np.sqrt(ref.RANK),
    }
    for name, values in expected.items():
      found = np.ravel(metrics[k][name])
      np.testing.assert_allclose(found, values, rtol=1e-5, err_msg=name)


def test_finds_the_leading_subspace():
  """On one gradient P P^T G becomes the best approximation, P orthonormal."""
  tx = so.project(SPEC, so.projectors.online_pca(optax.adam(0.01)))
  grad = ref.decaying(0, ref.WIDE)
  step = lambda state, _: (tx.update({'wide': grad}, state)[1], None)
  scan = ref.jit(lambda state: jax.lax.scan(step, state, None, 600)[0])
  state = tx.init({'wide': grad})
  (g,) = ref.WIDE.matrices(grad)
  (before,) = ref.WIDE.bases(ref.bases(state)['wide'])
  (p,) = ref.WIDE.bases(ref.bases(scan(state))['wide'])
  assert ref.captured(before, g) < 0.8
  assert abs(ref.captured(p, g) - 1) < 0.01
  np.testing.assert_allclose(p.T @ p, np.eye(ref.RANK), rtol=0, atol=0.01)
