"""`projectors.gaussian`, bases drawn again, and bases that layers share.

Means over many matrices are compared within five standard errors of exact
variance. The seeds are fixed, so that nothing is flaky.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

P = so.projectors
GAP = 3
N, M, R = 3000, 6, 2
MANY = ref.view((N, M, 8))
TREE = {'a': jnp.ones(MANY.shape), 'b': jnp.ones(MANY.shape)}


@functools.cache
def step(gap):
  return ref.jit(so.project(so.SubspaceSpec(R), P.gaussian(gap)).update)


def states(tree, seed=0, gap=GAP):
  """Returns those after each step of two periods."""
  tx = so.project(so.SubspaceSpec(R, seed=seed), P.gaussian(gap))
  # All that depends on the seed is in the state.
  update, found = step(gap), [ref.start(tx, tree)]
  for _ in range(GAP + 1):
    found.append(update(tree, found[-1])[1])
  return found[1:]


@functools.cache
def sampled():
  """Returns (N, m, r) bases of two leaves in each of two periods."""
  found = states(TREE)
  return {
    (k, period): MANY.bases(ref.bases(found[period * GAP])[k])
    for k in TREE
    for period in (0, 1)
  }


KEYS = list(itertools.product('ab', (0, 1)))


@pytest.mark.parametrize('key', KEYS)
def test_entries_are_normal(key):
  """N(0, 1/r): moments one to four, whose variances are known."""
  x = sampled()[key] * np.sqrt(R)
  moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}
  for power, (mean, variance) in moments.items():
    # Of every place in the matrix, and of all.
    for axes, count in (0, N), (None, x.size):
      found = np.mean(x**power, axes)
      error = (found - mean) / np.sqrt(variance / count)
      np.testing.assert_allclose(error, 0 * error, rtol=0, atol=5)


@pytest.mark.parametrize('key', KEYS)
def test_mean_projection_is_the_identity(key):
  """E[P P^T] = I: entries are sums of r products of N(0, 1/r)."""
  mean = ref.projection(sampled()[key]).mean(0)
  sigma = np.sqrt(np.where(np.eye(M), 2 / R, 1 / R) / N)
  error = (mean - np.eye(M)) / sigma
  np.testing.assert_allclose(error, np.zeros((M, M)), rtol=0, atol=5)


def test_independent_of_each_other():
  """Entries of two matrices have a mean product of zero."""
  p = sampled()
  others = {
    'layers': (p['a', 0], np.roll(p['a', 0], 1, 0)),
    'leaves': (p['a', 0], p['b', 0]),
    'periods': (p['a', 0], p['a', 1]),
    'leaves and periods': (p['a', 0], p['b', 1]),
    'columns': (p['a', 0], p['a', 0][..., ::-1]),
    'rows': (p['a', 0], np.roll(p['a', 0], 1, 1)),
  }
  for name, (left, right) in others.items():
    error = np.mean(R * left * right, 0) * np.sqrt(N)
    np.testing.assert_allclose(error, np.zeros((M, R)), atol=5, err_msg=name)
    assert (left != right).any((1, 2)).all(), f'{name}: the same twice'


SMALL = {'a': {'b': jnp.ones((2, M, 8))}}


@functools.cache
def small():
  return states(SMALL)


def test_depends_on_seed_path_place_and_period_alone():
  # Other gradients and another gap, in a tree in which 'a/b' has neighbours.
  wider = {'a': {'a': ref.normal(1, (2, M, 8)), 'b': ref.normal(0, (2, M, 8))}}
  runs = {
    'tree': small(),
    'wider': states(wider, gap=1),
    'seed': states(SMALL, seed=1),
  }
  runs = {k: [ref.bases(s)['a'] for s in v] for k, v in runs.items()}
  for t in 0, GAP:
    found, wider = runs['tree'][t]['b'], runs['wider'][t // GAP]
    np.testing.assert_allclose(found, wider['b'], atol=1e-6)
    assert (abs(runs['seed'][t]['b'] - found) > 1e-4).any((1, 2)).all()
    assert (abs(wider['a'] - found) > 1e-4).any((1, 2)).all()
  for t in range(1, GAP):
    np.testing.assert_array_equal(runs['tree'][t]['b'], runs['tree'][0]['b'])


def test_resumes_from_its_state():
  """The state holds all that the next period's sample depends on."""
  found = small()
  saved = jax.tree.map(np.asarray, found[GAP - 1])
  _, after = step(GAP)(SMALL, saved)
  jax.tree.map(np.testing.assert_array_equal, after, found[GAP])


# Batch axes in front of, between and behind those of the matrix.
AXES = {'axes': ref.view((2, 8, 2, 12), 1, 3)}
VIEWS = AXES | {'tall': ref.TALL}
DIMS = {'axes': so.DimensionNumbers(1, 3), 'tall': so.DimensionNumbers()}


def spec(views=VIEWS, **kwargs):
  dims = {k: DIMS[k] for k in views}
  return so.SubspaceSpec(ref.RANK, weight_dimension_numbers=dims, **kwargs)


def momentum_run(rule, steps, views=VIEWS, **kwargs):
  """Returns gradients, nodes, updates and states, the first from `init`."""
  init, step = ref.pieces(
    spec(views, **kwargs), rule, optax.trace(0.9), 'first'
  )
  grads = [ref.like(views, t) for t in range(steps)]
  found, nodes, updates = [init(grads[0])], [], []
  for g in grads:
    node, update, state = step(g, found[-1])
    nodes.append(node)
    updates.append(update)
    found.append(state)
  return grads, nodes, updates, found


def moments(state):
  return ref.find(state, 'inner').inner.trace


@pytest.mark.parametrize(
  'make, kwargs, dtype',
  [
    (P.stiefel, {'update_proj_gap': GAP, 'stagger': True}, 'float32'),
    (
      P.gaussian,
      {'update_proj_gap': P.LazyGap(2, 0.6, 2, 1), 'stagger': True},
      'bfloat16',
    ),
  ],
  ids=['stiefel', 'gaussian_lazy'],
)
def test_bases_drawn_again_equal_stored_ones(make, kwargs, dtype):
  """Updates, moments that follow the bases, and metrics, step by step."""
  steps = 3 * GAP + 1
  run = functools.partial(
    momentum_run, steps=steps, views=AXES, basis_dtype=jnp.dtype(dtype)
  )
  _, _, updates, stored = run(make(**kwargs))
  _, _, again, drawn = run(make(**kwargs, regenerate=True))
  for t in range(steps):
    pairs = {
      'updates': (again[t], updates[t]),
      'moments': [moments(s[t + 1]) for s in (drawn, stored)],
      'metrics': [so.subspace_metrics(s[t + 1]) for s in (drawn, stored)],
    }
    for name, (found, expected) in pairs.items():
      jax.tree.map(
        functools.partial(
          np.testing.assert_allclose,
          rtol=1e-4,
          atol=1e-4,
          err_msg=f'{name} at step {t}',
        ),
        found,
        expected,
      )
  bases = [
    np.concatenate([v.bases(ref.bases(s)[k]) for k, v in AXES.items()])
    for s in stored
  ]
  changed = np.diff(np.stack(bases), axis=0).any((2, 3)).sum(0)
  assert changed.min() >= 2 and changed.max() >= 4, changed


def size(state):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


@pytest.mark.parametrize('make', [P.gaussian, P.stiefel])
def test_a_state_without_bases(make):
  """It holds the period of each matrix in place of its basis."""
  leaves = ref.like(VIEWS)
  stored, drawn = (
    jax.eval_shape(so.project(spec(), make(GAP, regenerate=again)).init, leaves)
    for again in (False, True)
  )
  bases = sum(4 * v.count * v.m * ref.RANK for v in VIEWS.values())
  matrices = sum(v.count for v in VIEWS.values())
  assert size(stored) - size(drawn) == bases - 4 * matrices
  assert size(drawn) < 32 * matrices
  tx = so.project(spec(), make(GAP, regenerate=True))
  _, after = jax.eval_shape(tx.update, leaves, drawn)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype), drawn)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == shapes


@pytest.mark.parametrize('make', [P.gaussian, P.stiefel])
def test_switch_refuses_bases_drawn_again(make):
  with pytest.raises(ValueError, match='regenerate'):
    P.switch({0: P.svd(2), 4: make(2, regenerate=True)})


@functools.cache
def run():
  """Returns gradients, nodes, updates and states of two periods."""
  return momentum_run(P.gaussian(GAP), 2 * GAP + 1)


def per_matrix(x):
  return np.asarray(x, np.float64).reshape(-1)


@pytest.mark.parametrize('name', VIEWS)
def test_transition(name):
  """C = P_n^T P_o (P_o^T P_o)^-1, the identity between refreshes."""
  view = VIEWS[name]
  _, nodes, _, states = run()
  for t, node in enumerate(nodes):
    move = node[name].before
    eye = np.eye(ref.RANK)
    found = np.reshape(move.transition, (-1, *eye.shape))
    assert per_matrix(move.moved).all() == (t % GAP == 0)
    expected = np.broadcast_to(eye, found.shape)
    if t % GAP == 0:
      old, new = (view.bases(ref.bases(s)[name]) for s in states[t : t + 2])
      expected = np.stack(list(map(ref.transition, new, old)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', VIEWS)
def test_metrics(name):
  """Of bases of any length and angles: see `subspace_metrics`."""
  view = VIEWS[name]
  grads, _, _, states = run()
  for t, g in enumerate(grads):
    metrics = so.subspace_metrics(states[t + 1])[name]
    g = view.matrices(g[name])
    old, new = (view.bases(ref.bases(s)[name]) for s in states[t : t + 2])
    square = lambda x: np.sum(x**2, (1, 2))
    lengths = square(new) / ref.RANK
    captured = square(np.swapaxes(new, 1, 2) @ g) / square(g) / lengths
    error = np.swapaxes(new, 1, 2) @ new - np.eye(ref.RANK)
    expected = {
      'captured_energy': captured,
      'orthogonality_error': np.sqrt(square(error)),
    }
    if t % GAP == 0:
      # Chordal distance: sines of the principal angles.
      q, p = np.linalg.qr(new)[0], np.linalg.qr(old)[0]
      cos = np.linalg.svd(np.swapaxes(q, 1, 2) @ p, compute_uv=False)
      expected['drift'] = np.sqrt(np.mean(1 - cos**2, 1))
    for key, value in expected.items():
      found = per_matrix(metrics[key])
      np.testing.assert_allclose(found, value, rtol=2e-5, err_msg=key)


def test_moments_follow():
  """Through two periods, as in a dense loop that knows only the bases."""
  grads, _, updates, found = run()
  for k, v in VIEWS.items():
    dense = ref.InSubspace(v, ref.Momentum(), 'first')
    for t, g in enumerate(grads):
      dense.move(v.bases(ref.bases(found[t + 1])[k]))
      close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
      close(v.matrices(updates[t][k]), dense.step(g[k]), atol=2e-4)
      trace = v.coords(moments(found[t + 1])[k], ref.RANK)
      close(trace, np.stack([s['m'] for s in dense.states]), atol=1e-4)


def test_moments_follow_through_a_switch_of_rules():
  """From Gaussian bases to orthonormal ones to those of online PCA."""
  pca = P.online_pca(optax.sgd(0.3))
  rule = P.switch({0: P.gaussian(2), 3: P.svd(2, 'gram'), 6: pca})
  grads, _, updates, found = momentum_run(rule, 8, AXES)
  for k, v in AXES.items():
    dense = ref.InSubspace(v, ref.Momentum(), 'first')
    of = lambda t, k=k, v=v: v.bases(ref.bases(found[t])[k])
    for t, g in enumerate(grads):
      dense.move(of(t if t >= 6 else t + 1))
      np.testing.assert_allclose(
        v.matrices(updates[t][k]),
        dense.step(g[k]),
        rtol=1e-4,
        atol=2e-4,
        err_msg=f'{k} at step {t}',
      )
      if t >= 6:
        dense.move(of(t + 1))
    grams = [np.swapaxes(of(t), 1, 2) @ of(t) for t in range(9)]
    error = [np.abs(x - np.eye(ref.RANK)).max() for x in grams]
    assert max(error[5:7]) < 1e-5 < min(error[1:5]), error


def test_key_group_shares_bases():
  """Query and value draw alike at every period; others don't."""
  group = lambda path: 'attention/qkv' if path[-1] in 'qv' else path
  shapes = {'q': (2, 8, 12), 'v': (2, 8, 9), 'o': (2, 8, 12)}
  grads = {'attention': {k: ref.normal(1, s) for k, s in shapes.items()}}
  dims = so.DimensionNumbers()
  spec = so.SubspaceSpec(
    ref.RANK, weight_dimension_numbers=dims, key_group=group
  )
  tx = so.project(spec, P.gaussian(2))
  update, found = ref.jit(tx.update), [ref.jit(tx.init)(grads)]
  for _ in range(3):
    found.append(update(grads, found[-1])[1])
  found.append(ref.jit(so.project(spec, P.stiefel(2)).init)(grads))
  for state in found:
    p = {k: np.asarray(p) for k, p in ref.bases(state)['attention'].items()}
    np.testing.assert_allclose(p['v'], p['q'], rtol=0, atol=1e-6)
    assert (abs(p['o'] - p['q']) > 1e-3).any((1, 2)).all()
    assert (abs(p['q'][0] - p['q'][1]) > 1e-3).any()
