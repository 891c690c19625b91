"""`projectors.importance_svd` against sequential sampling of singular vectors.

One matrix, as often as a stack has layers, is a Monte Carlo sample of the law:
r indices without replacement, each draw in proportion to the singular values
that are left. The seeds are fixed, so that nothing is flaky.
"""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import references as ref
import subspace_optax as so

N, M = 2500, 5
SPECTRUM = np.array([5.0, 3.0, 2.0, 1.0, 0.5])
# The left side of one, the right side of the other.
ONE = {'left': ref.view((M, 6)), 'right': ref.view((6, M))}
VIEWS = {
  'left': ref.view((N, M, 6)),
  'right': ref.view((N, 6, M)),
}


@functools.cache
def made(rank, method):
  tx = so.project(
    so.SubspaceSpec(rank), so.projectors.importance_svd(1, method)
  )
  return tx, ref.jit(tx.update)


def refreshed(rank, method, grads, steps=1):
  """Returns the bases after each step on the same gradients."""
  tx, update = made(rank, method)
  state, found = ref.start(tx, grads), []
  for _ in range(steps):
    _, state = update(grads, state)
    found.append(ref.bases(state))
  return found


@functools.cache
def drawn(rank, method):
  """Returns (N, r) indices of singular vectors, by leaf and period."""
  one = {k: ref.decaying(0, v, spectrum=SPECTRUM) for k, v in ONE.items()}
  grads = {k: jnp.broadcast_to(g, VIEWS[k].shape) for k, g in one.items()}
  found = {}
  for period, bases in enumerate(refreshed(rank, method, grads, 2)):
    for k, view in VIEWS.items():
      vectors = np.linalg.svd(ONE[k].matrices(one[k])[0])[0]
      found[k, period] = indices(vectors, view.bases(bases[k]))
  return found


def indices(vectors, bases):
  """Returns which singular vectors the columns are, after checking it."""
  chosen = abs(vectors.T @ bases)
  np.testing.assert_allclose(chosen, np.round(chosen), rtol=0, atol=2e-4)
  np.testing.assert_array_equal(np.round(chosen).sum(1), 1)
  return chosen.argmax(1)


def law(rank, weights=SPECTRUM):
  """Returns the probability of every set of indices, in order."""
  size = len(weights)
  found = dict.fromkeys(itertools.combinations(range(size), rank), 0.0)
  for order in itertools.permutations(range(size), rank):
    left, probability = weights.sum(), 1.0
    for i in order:
      probability *= weights[i] / left
      left -= weights[i]
    found[tuple(sorted(order))] += probability
  return found


# Gram matrices draw the same as the SVD: the law holds for both.
CASES = [
  (2, 'exact'),
  (3, 'gram'),
  pytest.param(2, 'gram', marks=pytest.mark.full),
  pytest.param(3, 'exact', marks=pytest.mark.full),
]
KEYS = list(itertools.product(VIEWS, [0, 1]))


@pytest.mark.parametrize('rank, method', CASES)
def test_law(rank, method):
  """Pearson's chi-square of all ten sets, in the order of the values."""
  expected = law(rank)
  np.testing.assert_allclose(sum(expected.values()), 1, rtol=1e-12)
  for key in KEYS:
    found = drawn(rank, method)[key]
    assert (np.diff(found, axis=1) > 0).all()
    counts = dict.fromkeys(expected, 0)
    for row in found.tolist():
      counts[tuple(row)] += 1
    mean = N * np.array(list(expected.values()))
    assert mean.min() > 5
    statistic = np.sum((np.array(list(counts.values())) - mean) ** 2 / mean)
    # Of nine degrees of freedom: exceeded by chance once in 10,000.
    assert statistic < 33.7, (key, counts)


def test_draws_are_independent():
  """Of each other, over layers, leaves and periods."""
  found = drawn(2, 'exact')
  others = {
    'layers': (found['left', 0], np.roll(found['left', 0], 1, 0)),
    'leaves': (found['left', 0], found['right', 0]),
    'periods': (found['left', 0], found['left', 1]),
  }
  p = np.sum(np.array(list(law(2).values())) ** 2)
  for name, (a, b) in others.items():
    same = (a == b).all(1).mean()
    error = (same - p) / np.sqrt(p * (1 - p) / N)
    np.testing.assert_allclose(error, 0, atol=5, err_msg=name)


@pytest.mark.parametrize('method', ['exact', 'gram'])
def test_vectors_of_zero_singular_values_are_never_drawn(method):
  """So that all of a gradient of rank r stays, of 1,200 of them."""
  view = ref.view((200, 32, 48))
  spectrum = np.array([5.0, 2.0, 1.0, *np.zeros(29)])
  grads = {'w': ref.decaying(0, view, spectrum=spectrum)}
  g = view.matrices(grads['w'])
  for bases in refreshed(3, method, grads, 6):
    p = view.bases(bases['w'])
    kept = p @ (np.swapaxes(p, 1, 2) @ g)
    np.testing.assert_allclose(kept, g, rtol=0, atol=1e-3)


@pytest.mark.parametrize('rank', [2, pytest.param(3, marks=pytest.mark.full)])
def test_gram_draws_the_same_as_exact(rank):
  exact, gram = drawn(rank, 'exact'), drawn(rank, 'gram')
  for key in KEYS:
    np.testing.assert_array_equal(gram[key], exact[key], str(key))


@pytest.mark.parametrize('method', ['exact', 'gram'])
def test_orthonormal(method):
  """Of gradients of any scale and of low rank, too."""
  views = ref.KERNELS
  one_row = {
    k: jnp.zeros(v.shape).at[..., 1, :].set(1) for k, v in views.items()
  }
  tiny = {k: 1e-12 * ref.decaying(0, v) for k, v in views.items()}
  for grads in one_row, tiny:
    (bases,) = refreshed(ref.RANK, method, grads)
    for k, v in views.items():
      for g, p in zip(v.matrices(grads[k]), v.bases(bases[k]), strict=True):
        np.testing.assert_allclose(p.T @ p, np.eye(ref.RANK), atol=2e-6)
        if grads is one_row:
          np.testing.assert_allclose(p @ p.T @ g, g, rtol=0, atol=1e-5)


def test_the_long_side():
  """Columns are singular vectors of that side, none of its null space."""
  views = {k: v._replace(left=not v.left) for k, v in ref.KERNELS.items()}
  grads = {k: ref.decaying(3, v) for k, v in views.items()}
  spec = so.SubspaceSpec(ref.RANK, side='long', only_if_smaller=False)
  tx = so.project(spec, so.projectors.importance_svd(1, 'gram'))
  update, state = ref.jit(tx.update), ref.start(tx, grads)
  for _ in range(20):
    _, state = update(grads, state)
    for k, v in views.items():
      pairs = zip(
        v.matrices(grads[k]), v.bases(ref.bases(state)[k]), strict=True
      )
      for g, p in pairs:
        vectors = np.linalg.svd(g, full_matrices=False)[0]
        found = indices(vectors, p[None])
        assert (np.diff(found) > 0).all()


def test_unknown_method_raises():
  with pytest.raises(ValueError, match='method must be one of'):
    so.projectors.importance_svd(2, 'randomized')
