"""`projectors.stiefel`: Lemma 5 of GoLore, by Monte Carlo, and its keys.

Means over N matrices are compared within five standard errors, of exact
variance where one is known. The seeds are fixed, so that nothing is flaky.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references as ref
import subspace_optax as so

N, M, R = 4000, 6, 2
GAP = 3
# Of the rows, and of the columns.
VIEWS = {'a': ref.view((N, M, 8)), 'b': ref.view((N, 8, M))}


@functools.cache
def update(gap):
  return ref.jit(so.project(spec(), so.projectors.stiefel(gap)).update)


def spec(seed=0):
  return so.SubspaceSpec(R, seed=seed)


def refreshed(grads, seed=0, gap=GAP):
  """Returns nodes and states of two periods."""
  state = ref.start(so.project(spec(seed), so.projectors.stiefel(gap)), grads)
  nodes, states = [], []
  for _ in range(GAP + 1):
    # All that depends on the seed is in the state.
    node, state = update(gap)(grads, state)
    nodes.append(node)
    states.append(state)
  return nodes, states


@functools.cache
def drawn():
  """Returns one gradient of each leaf, and nodes and states of two periods."""
  one = {'a': ref.normal(0, (M, 8)), 'b': ref.normal(1, (8, M))}
  grads = {k: jnp.broadcast_to(g, VIEWS[k].shape) for k, g in one.items()}
  return one, *refreshed(grads)


@functools.cache
def sampled():
  """Returns (N, m, r) bases of two leaves in each of two periods."""
  _, _, states = drawn()
  return {
    (k, period): view.bases(ref.bases(states[period * GAP])[k])
    for k, view in VIEWS.items()
    for period in (0, 1)
  }


KEYS = [('a', 0), ('a', 1), ('b', 0), ('b', 1)]


@pytest.mark.parametrize('key', KEYS)
def test_orthonormal(key):
  p = sampled()[key]
  gram = np.swapaxes(p, 1, 2) @ p
  eye = np.broadcast_to(np.eye(R), gram.shape)
  np.testing.assert_allclose(gram, eye, rtol=0, atol=2e-6)


@pytest.mark.parametrize('key', KEYS)
def test_lemma_5_mean(key):
  """E[P P^T] = (r/m) I."""
  mean = ref.projection(sampled()[key]).mean(0)
  # A diagonal entry is Beta(r/2, (m-r)/2); all squares add up to r.
  on = 2 * R * (M - R) / (M**2 * (M + 2))
  off = (R - M * on - R**2 / M) / (M * (M - 1))
  sigma = np.sqrt(np.where(np.eye(M), on, off) / N)
  error = (mean - R / M * np.eye(M)) / sigma
  np.testing.assert_allclose(error, np.zeros((M, M)), rtol=0, atol=5)


@pytest.mark.parametrize('key', KEYS)
def test_uniform(key):
  """The share of a vector in the subspace is Beta(r/2, (m-r)/2); E[P] = 0."""
  p = sampled()[key]
  u = np.random.default_rng(0).normal(size=M)
  share = np.sort(np.sum((u / np.linalg.norm(u) @ p) ** 2, 1))
  law = 1 - (1 - share) ** ((M - R) / 2)  # Exact for r = 2.
  steps = np.arange(N) / N
  distance = max(np.abs(law - steps).max(), np.abs(law - steps - 1 / N).max())
  # Kolmogorov-Smirnov: exceeded by chance once in 30,000.
  assert distance < 2.34 / np.sqrt(N)
  error = p.mean(0) / np.sqrt(1 / M / N)
  np.testing.assert_allclose(error, np.zeros((M, R)), rtol=0, atol=5)


def test_lemma_5_error():
  """E||P P^T G - G||^2 = (1 - r/m) ||G||^2, on either side."""
  one, nodes, _ = drawn()
  for k, view in VIEWS.items():
    coords = view.coords(nodes[0][k].coords, R)
    [g] = view._replace(shape=one[k].shape, rows=(0,), cols=(1,)).matrices(
      one[k]
    )
    error = sampled()[k, 0] @ coords - g
    share = np.sum(error**2, (1, 2)) / np.linalg.norm(g) ** 2
    sigma = share.std() / np.sqrt(N)
    np.testing.assert_allclose(share.mean(), 1 - R / M, rtol=0, atol=5 * sigma)
    assert sigma < 0.01


def test_independent_of_each_other():
  """tr(P P^T Q Q^T) averages r^2/m over layers, leaves and periods."""
  p = sampled()
  others = {
    'layers': (p['a', 0], np.roll(p['a', 0], 1, 0)),
    'leaves': (p['a', 0], p['b', 0]),
    'periods': (p['a', 0], p['a', 1]),
    'later leaves': (p['a', 1], p['b', 1]),
    'leaves and periods': (p['a', 0], p['b', 1]),
  }
  for name, (left, right) in others.items():
    overlap = np.sum((np.swapaxes(left, 1, 2) @ right) ** 2, (1, 2))
    sigma = overlap.std() / np.sqrt(N)
    error = (overlap.mean() - R**2 / M) / sigma
    np.testing.assert_allclose(error, 0, atol=5, err_msg=name)
    assert overlap.max() < R - 1e-4, f'{name}: one subspace came twice'


SHAPE = (2, M, 8)
TREE = {'a': {'b': jnp.ones(SHAPE)}}


@functools.cache
def small():
  _, states = refreshed(TREE)
  return states


def test_moves_every_gap_steps_only():
  bases = [np.asarray(ref.bases(s)['a']['b']) for s in small()]
  for t in range(1, GAP):
    np.testing.assert_array_equal(bases[t], bases[0])
  assert (bases[GAP] != bases[0]).any((1, 2)).all()


def test_depends_on_seed_path_place_and_period_alone():
  # Other gradients and another gap, in a tree in which 'a/b' has neighbours.
  wider = {'a': {'a': ref.normal(1, SHAPE), 'b': ref.normal(0, SHAPE)}}
  runs = {
    'tree': small(),
    'wider': refreshed(wider, gap=1)[1],
    'seed': refreshed(TREE, seed=1)[1],
  }
  runs = {k: [ref.bases(s)['a'] for s in v] for k, v in runs.items()}
  for t in 0, GAP:
    found, wider = runs['tree'][t]['b'], runs['wider'][t // GAP]
    np.testing.assert_allclose(found, wider['b'], atol=1e-6)
    assert (abs(runs['seed'][t]['b'] - found) > 1e-4).any((1, 2)).all()
    assert (abs(wider['a'] - found) > 1e-4).any((1, 2)).all()


def test_resumes_from_its_state():
  """The state holds all that the next period's sample depends on."""
  states = small()
  saved = jax.tree.map(np.asarray, states[GAP - 1])
  _, state = update(GAP)(TREE, saved)
  np.testing.assert_allclose(
    ref.bases(state)['a']['b'],
    ref.bases(states[GAP])['a']['b'],
    rtol=0,
    atol=1e-6,
  )
