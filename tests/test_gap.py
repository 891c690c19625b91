"""When bases are refreshed: in turns (`stagger`), or ever more rarely.

Turns are read off from which bases change; `LazyGap` is compared with a plain
loop over Q-GaLore's rule, which takes its cosines from the bases it is shown.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references as ref
import subspace_optax as so

P = so.projectors
# One matrix, and batch axes around the rows of three experts in two layers.
VIEWS = {'axes': ref.view((2, 8, 3, 12), 1, 3), 'wide': ref.WIDE}
DIMS = {k: so.DimensionNumbers(v.rows[0], v.cols[0]) for k, v in VIEWS.items()}
SPEC = so.SubspaceSpec(ref.RANK, weight_dimension_numbers=DIMS)
N = sum(v.count for v in VIEWS.values())
GAP = 4


def tree(matrices):
  """Returns the tree of leaves, given all matrices in a row."""
  parts = np.split(matrices, np.cumsum([v.count for v in VIEWS.values()])[:-1])
  return {
    k: jnp.asarray(v.leaf(part), jnp.float32)
    for (k, v), part in zip(VIEWS.items(), parts, strict=True)
  }


def row(state):
  """Returns the bases of all matrices, in the same order."""
  found = ref.bases(state)
  return np.concatenate([v.bases(found[k]) for k, v in VIEWS.items()])


def random_matrices(seed):
  many = ref.view((N, 8, 12))
  return many.matrices(ref.decaying(seed, many, 0.5))


def follow(update, state, gradients):
  """Returns the bases before and after each step, (steps + 1, N, m, r)."""
  bases = [row(state)]
  for g in gradients:
    _, state = update(tree(g), state)
    bases.append(row(state))
  bases = np.stack(bases)
  assert np.isfinite(bases).all()
  return bases


def changes(bases):
  """Returns (steps, N): which matrix got another basis at which step."""
  return (bases[1:] != bases[:-1]).any((2, 3))


@functools.cache
def made(make, *args):
  tx = so.project(SPEC, make(*args))
  return ref.start(tx, tree(np.zeros((N, 8, 12)))), ref.jit(tx.update)


def staggered_svd():
  return P.svd(GAP, 'gram', stagger=True)


def plain_svd():
  return P.svd(GAP, 'gram')


@functools.cache
def traced_gap():
  rule = functools.partial(P.gaussian, stagger=True)

  def update(grads, state, gap):
    return so.project(SPEC, rule(gap)).update(grads, state)

  start = functools.partial(ref.start, so.project(SPEC, rule(GAP)))
  return start, ref.jit(update)


@functools.cache
def random(gap):
  """Returns the bases of random rules, which need no gradient, over 3 gaps."""
  init, update = traced_gap()
  zeros = np.zeros((N, 8, 12))
  step = lambda grads, state: update(grads, state, jnp.int32(gap))
  return follow(step, init(tree(zeros)), [zeros] * (3 * gap))


def turns(gap=GAP):
  return changes(random(gap))[:gap].argmax(0)


def assert_leading(gradients, bases):
  for g, p in zip(gradients, bases, strict=True):
    best = ref.projection(ref.svd_basis(g, ref.RANK))
    np.testing.assert_allclose(ref.projection(p), best, rtol=0, atol=5e-6)


@pytest.mark.parametrize('gap', [1, 2, GAP, N, 20])
def test_every_matrix_has_one_turn_a_gap(gap):
  """Across leaves and batch axes, and no more at a time than must be."""
  changed = changes(random(gap))
  np.testing.assert_array_equal(changed[:gap].sum(0), np.ones(N))
  assert changed.sum(1).max() == math.ceil(N / gap)
  for k in 1, 2:
    later = changed[k * gap : (k + 1) * gap]
    np.testing.assert_array_equal(later, changed[:gap])


def test_turns_use_the_gradient_of_their_step():
  state, update = made(staggered_svd)
  gradients = [random_matrices(t) for t in range(2 * GAP + 1)]
  bases = follow(update, state, gradients)
  expected = np.arange(len(gradients))[:, None] % GAP == turns()
  np.testing.assert_array_equal(changes(bases), expected)
  for t, g in enumerate(gradients):
    assert_leading(g[expected[t]], bases[t + 1][expected[t]])


def test_turns_under_switch():
  """From step 6 on each matrix waits for its own next turn."""
  new = lambda: P.gaussian(GAP, stagger=True)
  state, update = made(lambda: P.switch({0: staggered_svd(), 6: new()}))
  gradients = [random_matrices(t) for t in range(3 * GAP)]
  bases = follow(update, state, gradients)
  expected = np.arange(len(gradients))[:, None] % GAP == turns()
  np.testing.assert_array_equal(changes(bases), expected)
  for t, g in enumerate(gradients):
    new = bases[t + 1][expected[t]]
    if t < 6:
      assert_leading(g[expected[t]], new)
    else:
      alone = random(GAP)[t + 1][expected[t]]
      np.testing.assert_allclose(new, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize('bad', [0.0, np.nan], ids=['zero', 'nan'])
@pytest.mark.parametrize('stagger', [False, True])
def test_a_bad_gradient_at_its_turn(stagger, bad):
  """Its refresh comes with its next good gradient; no other is touched."""
  state, update = made(staggered_svd if stagger else plain_svd)
  mine = turns() if stagger else np.zeros(N, int)
  steps = np.arange(2 * GAP)
  gradients = [random_matrices(t) for t in steps]
  expected = steps[:, None] % GAP == mine
  for i, wait in (1, 1), (4, 2), (N - 1, 3):
    turn = mine[i]
    for t in range(turn, turn + wait):
      gradients[t][i] = bad
    expected[turn, i], expected[turn + wait, i] = False, True
  bases = follow(update, state, gradients)
  np.testing.assert_array_equal(changes(bases), expected)
  for t, g in enumerate(gradients):
    assert_leading(g[expected[t]], bases[t + 1][expected[t]])


def test_slices_of_a_state_keep_their_turns():
  """The state's arrays say whose turn it is, not the tree around them."""
  tx = so.project(so.SubspaceSpec(ref.RANK), P.gaussian(GAP, stagger=True))
  whole = {'w': jnp.ones((5, 8, 12))}
  state = ref.start(tx, whole)
  axes = jax.tree.map(lambda x: 0 if x.ndim else None, state)

  def step(grads, state):
    return tx.update(grads, state)[1]

  sliced = ref.jit(jax.vmap(step, (0, axes), axes))
  together = ref.jit(step)
  apart = state
  bases = [np.asarray(ref.bases(state)['w'])]
  for _ in range(2 * GAP):
    apart, state = sliced(whole, apart), together(whole, state)
    bases.append(np.asarray(ref.bases(state)['w']))
    found = ref.bases(apart)['w']
    np.testing.assert_allclose(found, bases[-1], rtol=0, atol=1e-6)
  changed = changes(np.stack(bases))
  np.testing.assert_array_equal(changed[:GAP].sum(0), np.ones(5))
  np.testing.assert_array_equal(changed[GAP:], changed[:GAP])
  assert changed.sum(1).max() == 2


class Lazy:
  """Q-GaLore's rule for one matrix, by the angles of subspaces."""

  def __init__(self, rule, first):
    self.rule, self.gap, self.turn = rule, rule.start, first
    self.owed, self.queue, self.old = False, [], None

  def is_due(self, t, good):
    """Returns whether to refresh now."""
    if t == self.turn:
      self.owed, self.turn = True, t + self.gap
    due, self.owed = self.owed and good, self.owed and not good
    return due

  def saw(self, basis):
    """Takes note of a new basis."""
    new = basis
    if self.old is not None:
      cosine = np.linalg.norm(new.T @ self.old) / np.sqrt(new.shape[1])
      self.queue = [*self.queue, cosine][-self.rule.window :]
      if len(self.queue) == self.rule.window:
        if np.mean(self.queue) >= self.rule.threshold:
          self.turn += self.gap * (self.rule.factor - 1)
          self.gap *= self.rule.factor
    self.old = new


@pytest.mark.parametrize(
  'rule, stagger',
  [
    (P.LazyGap(2, 0.8, 2, 5), False),
    (P.LazyGap(4, 0.9, 3, 1), True),
  ],
)
def test_lazy_gap(rule, stagger):
  """Of matrices that change at different rates, two with bad gradients."""
  state, update = made(lambda: P.svd(rule, 'gram', stagger=stagger))
  first = turns(rule.start) if stagger else np.zeros(N, int)
  lazy = [Lazy(rule, turn) for turn in first]
  mean, noise = random_matrices(100), np.geomspace(0.01, 30, N)[:, None, None]
  bases = row(state)
  for t in range(40):
    gradient = mean + noise * random_matrices(t)
    good = np.ones(N, bool)
    good[[2, N - 1]] = t not in (4, 5, 8)
    gradient[~good] = 0 if t == 4 else np.nan
    _, state = update(tree(gradient), state)
    old, bases = bases, row(state)
    due = np.array([x.is_due(t, ok) for x, ok in zip(lazy, good, strict=True)])
    changed = (bases != old).any((1, 2))
    np.testing.assert_array_equal(changed, due, f'at step {t}')
    assert_leading(gradient[due], bases[due])
    for i in np.flatnonzero(due):
      lazy[i].saw(bases[i])
  gaps = {x.gap for x in lazy}
  assert rule.start in gaps and len(gaps) > 1, gaps


def test_lazy_gap_stops_where_its_next_refresh_would_be_no_int32():
  rule = P.LazyGap(2, threshold=1e-3, factor=2**30, window=1)
  state, update = made(lambda: P.svd(rule, 'gram'))
  bases = follow(update, state, [random_matrices(t) for t in range(8)])
  np.testing.assert_array_equal(changes(bases).all(1), [1, 0] * 4)


@pytest.mark.parametrize('name, least', [('start', 1), ('factor', 2)])
def test_lazy_gap_raises(name, least):
  for value in True, 2.5, '3':
    with pytest.raises(TypeError, match=f'{name} must be an int'):
      P.LazyGap(**{name: value})
  with pytest.raises(ValueError, match=f'{name} must be at least {least}'):
    P.LazyGap(**{name: least - 1})


@pytest.mark.parametrize('threshold', [0.0, -0.1, 1.1, np.nan])
def test_lazy_gap_threshold_raises(threshold):
  with pytest.raises(ValueError, match='threshold must lie in'):
    P.LazyGap(threshold=threshold)


def test_lazy_gap_window_raises():
  with pytest.raises(ValueError, match='window must be at least 1'):
    P.LazyGap(window=0)
