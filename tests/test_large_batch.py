"""`refresh_gradients`: bases from other gradients than those of the step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

GAP, STEPS = 2, 4
SPEC = so.SubspaceSpec(ref.RANK)
VIEWS = ref.KERNELS


def gradients(t):
  grads = {k: ref.decaying(t, v, 0.5) for k, v in VIEWS.items()}
  return grads | {'vec': ref.normal(t, (5,))}


def large(t):
  return gradients(1000 + t)


@functools.cache
def project():
  tx = so.project(SPEC, so.projectors.svd(GAP, 'gram'))
  return tx.init, ref.jit(tx.update)


def test_bases_from_them_and_coordinates_from_the_gradients():
  """They are looked at when bases are refreshed, and may be left out."""
  init, update = project()
  state = init(gradients(0))
  for t in range(STEPS):
    grads = gradients(t)
    # Those at a step without a refresh make no difference.
    given = {'refresh_gradients': large(t)} if t < 3 else {}
    nodes, state = update(grads, state, **given)
    np.testing.assert_array_equal(nodes['vec'], grads['vec'])
    for k, v in VIEWS.items():
      source = v.matrices(large(t // GAP * GAP)[k])
      p, g = v.bases(nodes[k].basis), v.matrices(grads[k])
      best = [ref.projection(ref.svd_basis(x, ref.RANK)) for x in source]
      np.testing.assert_allclose(ref.projection(p), best, rtol=0, atol=5e-6)
      coords = v.coords(nodes[k].coords, ref.RANK)
      expected = np.swapaxes(p, 1, 2) @ g
      np.testing.assert_allclose(coords, expected, rtol=0, atol=1e-6)
      captured = so.subspace_metrics(state)[k]['captured_energy']
      energy = lambda x: np.sum(x**2, (1, 2))
      share = energy(expected) / energy(g)
      np.testing.assert_allclose(np.ravel(captured), share, atol=1e-6)


@pytest.mark.parametrize('bad', [0.0, np.nan], ids=['zero', 'nan'])
def test_a_bad_one_puts_off_the_refresh(bad):
  """And a bad gradient of the step does not."""
  init, update = project()
  view = VIEWS['stack']
  sources, grads = [large(t) for t in range(3)], gradients(0)
  sources[0]['stack'] = sources[0]['stack'].at[1].set(bad)
  grads['stack'] = grads['stack'].at[0].set(bad)
  state = init(grads)
  bases = [view.bases(ref.bases(state)['stack'])]
  for source in sources[:2]:
    _, state = update(grads, state, refresh_gradients=source)
    bases.append(view.bases(ref.bases(state)['stack']))
  np.testing.assert_array_equal(bases[1][1], bases[0][1])
  np.testing.assert_array_equal(bases[2][0], bases[1][0])
  for t, layer in (0, 0), (1, 1):
    g, p = view.matrices(sources[t]['stack'])[layer], bases[t + 1][layer]
    best = ref.projection(ref.svd_basis(g, ref.RANK))
    np.testing.assert_allclose(ref.projection(p), best, rtol=0, atol=5e-6)


def test_online_pca_starts_from_them_and_follows_the_gradients():
  rule = so.projectors.online_pca(optax.sgd(0.1), init='svd')
  tx = so.project(SPEC, rule)
  update, state = ref.jit(tx.update), tx.init(gradients(0))
  for t in range(3):
    old = ref.bases(state)
    _, state = update(gradients(t), state, refresh_gradients=large(t))
    for k, v in VIEWS.items():
      new = v.bases(ref.bases(state)[k])
      if t == 0:
        best = [ref.svd_basis(x, ref.RANK) for x in v.matrices(large(t)[k])]
        found, expected = ref.projection(new), ref.projection(np.stack(best))
      else:
        dense = ref.OnlinePCA(v, v.bases(old[k]), ref.Sgd(), 0.1)
        dense.step(gradients(t)[k], 0.1)
        found, expected = new, dense.bases
      np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def galore(scale=1.0):
  rule = so.projectors.svd(GAP, 'gram')
  return optax.chain(
    so.subspace(SPEC, rule, optax.trace(0.9)),
    optax.scale_by_learning_rate(scale),
  )


@functools.cache
def alone():
  tx = galore()
  update, state, updates = ref.jit(tx.update), tx.init(gradients(0)), []
  for t in range(STEPS):
    u, state = update(gradients(t), state, refresh_gradients=large(t))
    updates.append(u)
  return updates


WRAPPERS = {
  'masked': lambda tx: optax.masked(
    tx, {'tall': True, 'stack': True, 'vec': True}
  ),
  'chain': lambda tx: optax.chain(
    optax.inject_hyperparams(optax.scale)(step_size=1.0), tx
  ),
}


@pytest.mark.parametrize('name', WRAPPERS)
def test_passes_through(name):
  tx = WRAPPERS[name](galore())
  update, state = ref.jit(tx.update), tx.init(gradients(0))
  for t in range(STEPS):
    u, state = update(gradients(t), state, refresh_gradients=large(t))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    jax.tree.map(close, u, alone()[t])


def test_passes_through_multi_steps():
  """The last micro-step's, at which the optimizer runs."""
  tx = optax.MultiSteps(galore(), 2)
  update, state = ref.jit(tx.update), tx.init(gradients(0))
  for t in range(2 * STEPS):
    source = large(t // 2) if t % 2 else large(99)
    half = jax.tree.map(lambda x, t=t: x * (0.5 + t % 2), gradients(t // 2))
    u, state = update(half, state, refresh_gradients=source)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    expected = alone()[t // 2]
    if t % 2 == 0:
      expected = jax.tree.map(jnp.zeros_like, expected)
    jax.tree.map(close, u, expected)


def test_wrong_trees_raise():
  tx = so.project(SPEC, so.projectors.svd(GAP, 'gram'))
  grads = gradients(0)
  state = tx.init(grads)
  update = lambda source: tx.update(grads, state, refresh_gradients=source)
  wider = large(0) | {'tall': jnp.ones((12, 9))}
  with pytest.raises(ValueError, match="'tall'.*refresh_gradients"):
    update(wider)
  with pytest.raises(ValueError, match="'vec'"):
    update(large(0) | {'vec': jnp.ones(6)})
  missing = large(0)
  del missing['tall']
  with pytest.raises(ValueError, match='tall'):
    update(missing)
  renamed = large(0)
  renamed['tell'] = renamed.pop('tall')
  with pytest.raises(ValueError, match='tall'):
    update(renamed)
