"""`subspace(..., every_k=k)`: one step with the mean of k gradients."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

P = so.projectors
SPEC = so.SubspaceSpec(ref.RANK)
VIEWS = ref.KERNELS
K, WINDOWS = 3, 4
LEFT_OUT = ('reset', 'tall')


def params():
  return ref.like(VIEWS, 1) | {'vec': ref.normal(7, (5,))}


def micro(t):
  """Returns the t-th gradient of all."""
  grads = {k: ref.decaying(t, v, 0.5) for k, v in VIEWS.items()}
  return grads | {'vec': ref.normal(t, (5,))}


def mean(window, k=K):
  many = [micro(k * window + j) for j in range(k)]
  return jax.tree.map(lambda *x: sum(x) / k, *many)


def after():
  """Decay and a schedule, both of which count steps."""
  return optax.chain(
    optax.add_decayed_weights(0.1),
    optax.scale_by_learning_rate(lambda t: 0.01 * (t + 1.0)),
  )


def train(tx, gradients, weights=None):
  """Returns updates, weights and states, the first state from `init`."""
  update, weights = ref.jit(tx.update), weights or params()
  states, all_updates, all_weights = [tx.init(weights)], [], []
  for g in gradients:
    updates, state = update(g, states[-1], weights)
    weights = optax.apply_updates(weights, updates)
    states.append(state)
    all_updates.append(updates)
    all_weights.append(weights)
  assert update._cache_size() == 1
  return all_updates, all_weights, states


def assert_close(found, expected, message='', atol=1e-6):
  close = functools.partial(
    np.testing.assert_allclose, rtol=1e-5, atol=atol, err_msg=message
  )
  jax.tree.map(close, found, expected)


def assert_zero(tree):
  jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0 * x), tree)


@functools.cache
def run(transport, every_k, gap=2):
  rule, inner = P.stiefel(gap), optax.scale_by_adam()
  parts = functools.partial(so.subspace, SPEC, rule, inner, transport=transport)
  # What a refresh does to moments takes one leaf to see.
  of = lambda tree: {k: tree[k] for k in tree if (transport, k) != LEFT_OUT}
  if every_k == 1:
    tx = optax.chain(parts(), after())
    gradients = map(mean, range(WINDOWS))
  else:
    tx = parts(every_k=every_k, after=after())
    gradients = map(micro, range(every_k * WINDOWS))
  return train(tx, [*map(of, gradients)], of(params()))


@pytest.mark.parametrize('transport', ['first', 'reset'])
def test_equals_steps_on_the_mean(transport):
  """Bases that need no gradient, moments that follow, decay and schedule."""
  updates, weights, _ = run(transport, K)
  expected_updates, expected_weights, _ = run(transport, 1)
  for t in range(K * WINDOWS):
    if t % K < K - 1:
      assert_zero(updates[t])
    else:
      name = f'at micro-step {t}'
      assert_close(updates[t], expected_updates[t // K], name)
      assert_close(weights[t], expected_weights[t // K], name)


def test_bases_stay_for_a_window_and_gaps_count_steps():
  _, _, states = run('first', K)
  _, _, expected = run('first', 1)
  for t in range(K * WINDOWS):
    old, new = ref.bases(states[t]), ref.bases(states[t + 1])
    for k in VIEWS:
      assert (old[k] != new[k]).any() == (t % (2 * K) == 0)
    assert_close(new, ref.bases(expected[t // K + 1]))
    assert ref.find(states[t + 1], 'subspaces').count == (t + 1) // K
  count = ref.find(states[-1], 'inner').inner.count
  assert count == WINDOWS


@pytest.mark.parametrize('k', [2, 5])
def test_a_window_goes_on_with_another_k(k):
  """No gradient is lost, and the step is one of their mean."""
  make = lambda k: so.subspace(SPEC, P.stiefel(9), optax.identity(), every_k=k)
  of = lambda tree: {name: tree[name] for name in ('stack', 'vec')}
  start, gradients = of(params()), [of(micro(t)) for t in range(max(k, 4))]
  _, _, states = train(make(4), gradients[:3], start)
  update, state, found = ref.jit(make(k).update), states[-1], None
  assert int(state.micro_step) == 3
  for g in gradients[3:]:
    found, state = update(g, state, start)
  assert int(state.micro_step) == 0
  wanted, _, _ = train(make(len(gradients)), gradients, start)
  assert_close(found, wanted[-1])
  direct = sum(g['vec'] for g in gradients) / len(gradients)
  np.testing.assert_allclose(found['vec'], direct, rtol=1e-5)


def test_keeps_sums_of_the_coordinates_size():
  size = lambda state: sum(x.nbytes for x in jax.tree.leaves(state))
  (_, _, one), (_, _, many) = run('first', 1), run('first', K)
  sums = sum(v.count * ref.RANK * v.n for v in VIEWS.values()) + 5
  assert size(many[0]) - size(one[0]) == 4 * sums + 4
  kinds = lambda s: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), s)
  for state in many[1:]:
    assert kinds(state) == kinds(many[0])


def leading(v, grad):
  best = [ref.svd_basis(g, ref.RANK) for g in v.matrices(grad)]
  return ref.projection(np.stack(best))


def test_refreshes_with_the_first_gradient_of_a_window():
  """Without it, with that of the next window: never in between."""
  view = VIEWS['stack']
  gradients = [micro(t)['stack'] for t in range(3 * K)]
  gradients[K] = gradients[K].at[1].set(0)
  tx = so.subspace(SPEC, P.svd(1, 'gram'), optax.identity(), every_k=K)
  weights = {'stack': jnp.zeros(view.shape)}
  grads = [{'stack': g} for g in gradients]
  updates, _, states = train(tx, grads, weights)
  bases = [view.bases(ref.bases(s)['stack']) for s in states[1:]]
  best = [leading(view, g) for g in gradients]
  best[K][1] = best[0][1]
  for t in range(3 * K):
    found = ref.projection(bases[t])
    window = t // K * K
    np.testing.assert_allclose(found, best[window], rtol=0, atol=5e-6)
    np.testing.assert_array_equal(bases[t], bases[window])
    if t % K == K - 1:
      g = sum(view.matrices(g) for g in gradients[window : t + 1]) / K
      update = view.matrices(updates[t]['stack'])
      np.testing.assert_allclose(update, best[window] @ g, rtol=0, atol=1e-5)
    else:
      assert_zero(updates[t])


def test_online_pca_follows_the_last_gradient_of_a_window():
  """W moves with P_t and the mean, then P with the last gradient."""
  k = 2
  rule = P.online_pca(optax.adam(0.05))
  tx = so.subspace(SPEC, rule, optax.trace(0.9), transport='first', every_k=k)
  gradients = [micro(t) for t in range(3 * k)]
  updates, _, states = train(tx, gradients)
  for name, v in VIEWS.items():
    first = v.bases(ref.bases(states[0])[name])
    pca = ref.OnlinePCA(v, first, ref.Adam(), 0.1)
    inner = ref.InSubspace(v, ref.Momentum(), 'first')
    for t in range(3 * k):
      old, new = (v.bases(ref.bases(s)[name]) for s in states[t : t + 2])
      if t % k < k - 1:
        np.testing.assert_array_equal(new, old)
        continue
      inner.move(old)
      step = inner.step(mean(t // k, k)[name])
      update = v.matrices(updates[t][name])
      np.testing.assert_allclose(update, step, rtol=1e-4, atol=2e-5)
      pca.step(gradients[t][name], 0.05)
      np.testing.assert_allclose(new, pca.bases, rtol=0, atol=2e-5)
      inner.move(new)


def test_masked_leaves_and_scan():
  """Leaves that a mask hides pass; a scan of micro-steps equals a loop."""
  rule, inner = P.stiefel(1), optax.scale_by_adam()
  tx = so.subspace(SPEC, rule, inner, every_k=2, after=after())
  hidden = optax.masked(tx, {'stack': True, 'tall': True, 'vec': False})
  gradients = [micro(t) for t in range(6)]
  looped, *_ = train(tx, gradients)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
  traces = []

  @ref.jit
  def scan(weights, state, gradients):
    traces.append(None)

    def step(carry, g):
      weights, state = carry
      updates, state = hidden.update(g, state, weights)
      return (optax.apply_updates(weights, updates), state), updates

    return lax.scan(step, (weights, state), gradients)

  carry = params(), hidden.init(params())
  found = []
  for half in 0, 1:
    part = jax.tree.map(lambda x, i=half: x[3 * i : 3 * i + 3], stacked)
    carry, updates = scan(*carry, part)
    found.append(updates)
  assert len(traces) == 1
  for t, expected in enumerate(looped):
    updates = jax.tree.map(lambda x, t=t: x[t % 3], found[t // 3])
    np.testing.assert_array_equal(updates.pop('vec'), gradients[t]['vec'])
    expected.pop('vec')
    assert_close(updates, expected, f'at micro-step {t}')


def test_a_bad_gradient_spoils_its_window_only():
  """Updates propagate NaN as in optax, but bases and later sums don't."""
  rule = P.online_pca(optax.sgd(0.1))
  tx = so.subspace(SPEC, rule, optax.identity(), every_k=2)
  gradients = [micro(t) for t in range(6)]
  gradients[3]['tall'] *= np.nan
  updates, _, states = train(tx, gradients)
  assert np.isnan(updates[3]['tall']).all()
  assert np.isfinite(updates[3]['stack']).all()
  before, after_it = (ref.bases(states[t])['tall'] for t in (3, 4))
  np.testing.assert_array_equal(before, after_it)
  assert np.isfinite(updates[5]['tall']).all()
  p = VIEWS['tall'].bases(before)
  expected = ref.projection(p) @ VIEWS['tall'].matrices(mean(2, 2)['tall'])
  found = VIEWS['tall'].matrices(updates[5]['tall'])
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_raises():
  tx = functools.partial(so.subspace, SPEC, P.stiefel(1), optax.identity())
  for value in 0, -1:
    with pytest.raises(ValueError, match='every_k must be at least 1'):
      tx(every_k=value)
  for value in True, 2.0, '2':
    with pytest.raises(TypeError, match='every_k must be an int'):
      tx(every_k=value)
  with pytest.raises(ValueError, match='residual.*MultiSteps'):
    tx(every_k=2, residual=so.residuals.sign())
