"""`projectors.svd`: iterated bases are ordered, and the same on any mesh."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import references as ref
import subspace_optax as so
from subspace_optax._matrix import _jacobi
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg

RULES = {
  'gram': so.projectors.svd(1, 'gram'),
  'randomized': so.projectors.svd(1, 'randomized', power_iterations=4),
  'warm': so.projectors.svd(1, 'warm', power_iterations=4),
}


@functools.cache
def made(method):
  tx = so.project(so.SubspaceSpec(ref.RANK), RULES[method])
  return tx.init, ref.jit(tx.update)


def bases_of(method, grads):
  """Returns those of the fourth refresh, of which warm starts have need."""
  init, update = made(method)
  state = init(grads)
  for _ in range(4):
    _, state = update(grads, state)
  return ref.bases(state)


def matrices_and_bases(view, grad, rule, rank):
  """Returns them, in float64, of a leaf alone."""
  tx = so.project(so.SubspaceSpec(rank), rule)
  _, state = ref.jit(tx.update)({'w': grad}, tx.init({'w': grad}))
  [p] = ref.bases(state).values()
  return list(zip(view.matrices(grad), view.bases(p), strict=True))


def signs(p):
  """The documented sums, whose signs are to be positive."""
  bits = (np.arange(len(p)) * 2654435769) % 2**32
  return (1 + bits / 2**32) @ p


@pytest.mark.parametrize('method', RULES)
def test_columns_are_singular_vectors_in_order(method):
  grads = {k: ref.decaying(0, v, 0.3) for k, v in ref.KERNELS.items()}
  found = bases_of(method, grads)
  for k, v in ref.KERNELS.items():
    for g, p in zip(v.matrices(grads[k]), v.bases(found[k]), strict=True):
      u = ref.svd_basis(g, ref.RANK)
      np.testing.assert_allclose(np.abs(u.T @ p), np.eye(ref.RANK), atol=1e-4)
      assert (signs(p) > 0).all()


@pytest.mark.parametrize('method', RULES)
def test_signs_depend_on_nothing_but_the_vectors(method):
  """Of -G and of a small G they are those of G."""
  grads = {k: ref.decaying(1, v, 0.3) for k, v in ref.KERNELS.items()}
  wanted = bases_of(method, grads)
  for factor in -1.0, 1e-6:
    found = bases_of(method, {k: factor * g for k, g in grads.items()})
    for k in wanted:
      np.testing.assert_allclose(found[k], wanted[k], rtol=0, atol=1e-3)


@pytest.mark.parametrize('method', ['randomized', 'warm'])
def test_many_rounds_lose_no_direction(method):
  """Of a steep spectrum, whose weak directions fade from round to round."""
  view = ref.view((24, 32))
  grad = ref.decaying(0, view, spectrum=0.2 ** np.arange(24))
  rule = so.projectors.svd(1, method, power_iterations=8)
  [(g, p)] = matrices_and_bases(view, grad, rule, 12)
  np.testing.assert_allclose(p.T @ p, np.eye(12), rtol=0, atol=3e-6)
  u = ref.svd_basis(g, 4)
  np.testing.assert_allclose(p @ (p.T @ u), u, rtol=0, atol=1e-3)


def test_captures_as_much_as_the_exact_basis():
  """To 0.5 %, with as many rounds as it has by itself; spectra as of layers."""
  view = ref.view((6, 48, 64))
  grad = ref.decaying(0, view, spectrum=1 / np.arange(1, 49))
  rule = so.projectors.svd(1, 'randomized')
  for g, p in matrices_and_bases(view, grad, rule, 12):
    np.testing.assert_allclose(ref.captured(p, g), 1.0, rtol=0, atol=5e-3)


def squares(n, spectrum):
  q = np.linalg.qr(np.random.default_rng(n).normal(size=(n, n)))[0]
  return (q * spectrum) @ q.T


@pytest.mark.parametrize('n', [1, 2, 3, 24, 37])
def test_eigenvectors_without_lapack(n):
  """Jacobi's method, which TPUs run: also of equal and of zero eigenvalues."""
  jacobi = ref.jit(jax.vmap(_jacobi.eigenvectors))
  spectra = {
    'falling': 1 / np.arange(1, n + 1) ** 2,
    'equal': np.ones(n),
    'low': np.arange(n) < 1,
    'zero': np.zeros(n),
  }
  stack = np.stack([squares(n, s) for s in spectra.values()])
  found = np.asarray(jacobi(jnp.asarray(stack, jnp.float32)), np.float64)
  for v, s, values in zip(found, stack, spectra.values(), strict=True):
    np.testing.assert_allclose(v.T @ v, np.eye(n), rtol=0, atol=3e-6)
    np.testing.assert_allclose(v.T @ s @ v, np.diag(values), rtol=0, atol=3e-6)


def test_nothing_to_order():
  """A basis stays orthonormal where coordinates are zero or NaN."""
  layout = _layout.Layout((2, 8, 12), (1,), (2,), True, 3)
  q = np.linalg.qr(np.random.default_rng(0).normal(size=(2, 8, 3)))[0]
  coords = jnp.zeros((2, 3, 12)).at[1].set(np.nan)
  order = ref.jit(functools.partial(_linalg.order_basis, layout))
  p = np.asarray(order(jnp.asarray(q, jnp.float32), coords))
  eye = np.broadcast_to(np.eye(3), (2, 3, 3))
  np.testing.assert_allclose(p.swapaxes(1, 2) @ p, eye, rtol=0, atol=2e-6)


# A small network.

STEPS = 100
PLACES = {
  'rows': ((4,), ('x', None)),
  'both': ((2, 2), ('x', 'y')),
}


def weights():
  rng = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape), 'float32')
  return {'layers': make(2, 16, 40), 'bias': make(16)}


def loss(params, x, whole):
  """How far the network is from one of other weights."""
  if whole is not None:
    params = jax.tree.map(lambda x: jax.reshard(x, whole), params)

  def run(params):
    y = x
    for w in params['layers']:
      y = y + jnp.tanh(y @ w) @ w.T
    return y + params['bias'][None]

  target = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), weights())
  return jnp.mean((run(params) - run(target)) ** 2)


def losses(tx, params, whole=None):
  def step(carry, key):
    params, state = carry
    x = jax.random.normal(key, (32, 16))
    value, grads = jax.value_and_grad(loss)(params, x, whole)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  @cases.jit
  def run(params, keys):
    return jax.lax.scan(step, (params, tx.init(params)), keys)[1]

  return np.asarray(run(params, jax.vmap(jax.random.key)(jnp.arange(STEPS))))


def optimizer(method):
  spec = so.SubspaceSpec(4, side='long', only_if_smaller=False)
  return so.subspace(
    spec,
    so.projectors.svd(30, method),
    optax.scale_by_adam(),
    scale=0.25,
    after=optax.scale_by_learning_rate(4e-3),
  )


@functools.cache
def losses_alone():
  return losses(optimizer('randomized'), weights())


@pytest.mark.parametrize(
  ('place', 'kind'),
  [
    ('both', 'Auto'),
    # Explicit axes with rules for sharded gradients: tests/test_sharding.py.
    pytest.param('rows', 'Explicit', marks=pytest.mark.full),
  ],
)
def test_the_same_losses_on_any_mesh(place, kind):
  """Over three refreshes, with `auto` where `randomized` runs on one device."""
  shape, axes = PLACES[place]
  types = (getattr(AxisType, kind),) * len(shape)
  mesh = jax.make_mesh(shape, ('x', 'y')[: len(shape)], axis_types=types)

  def put(x):
    entries = axes if x.ndim > 1 else ()
    spec = P(*[None] * (x.ndim - len(entries)), *entries)
    return jax.device_put(x, NamedSharding(mesh, spec))

  with jax.set_mesh(mesh):
    params = jax.tree.map(put, weights())
    whole = NamedSharding(mesh, P()) if kind == 'Explicit' else None
    found = losses(optimizer('auto'), params, whole)
  np.testing.assert_allclose(found, losses_alone(), rtol=1e-3)
  assert found[-10:].mean() < 0.99 * found[:10].mean()
