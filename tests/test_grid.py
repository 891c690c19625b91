"""What every point of the grid keeps, on a cover of the pairs of choices.

`pytest tests/test_grid.py --full` takes every projector with every transport
and every inner optimizer, too (`make test-full`).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cases
import grid
import subspace_optax as so

STEPS = 6

# What a point has beside a vector. Half the matrices make half the program.
MATRICES = {
  'stack': cases.Leaf((8, 3, 12), jnp.float32, (0,), (2,)),  # along the middle
  'plain': cases.Leaf((12, 8), jnp.bfloat16, (0,), (1,)),
}


def pytest_generate_tests(metafunc):
  if 'point' in metafunc.fixturenames:
    points = grid.pairwise()
    if metafunc.config.getoption('full'):
      points = [*dict.fromkeys(points + grid.product())]
    metafunc.parametrize('point', points, ids=str)


def _leaves(point):
  bias = cases.Leaf((12,), jnp.float32)
  return {'matrix': MATRICES[point.leaf], 'bias': bias}


def _make(point):
  return grid.make(
    point,
    weight_dimension_numbers=cases.dimension_numbers(_leaves(point)),
    only_if_smaller=False,
  )


def _gradients(leaves):
  """A signal and noise at every step; one matrix of a stack rests once."""
  signal = cases.tree(leaves, 1)
  for t in range(STEPS):
    noise = cases.tree(leaves, 100 + t, 0.3)
    gradient = jax.tree.map(jnp.add, signal, noise)
    if t == 2 and gradient['matrix'].ndim == 3:
      gradient['matrix'] = gradient['matrix'].at[:, 1].set(0.0)
    yield gradient


def _avals(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def _matrices(leaf):
  """Returns a leaf as (count, rows, columns)."""
  x = np.asarray(leaf, np.float64)
  return np.moveaxis(x, 1, 0) if x.ndim == 3 else x[None]


def _check_rank(u, dtype, residual, rests):
  """Of rank 3, but for what a residual adds to it of a gradient."""
  values = np.linalg.svd(u, compute_uv=False)
  rounding = (1e-5 if dtype == jnp.float32 else 0.03) * max(values[0], 1e-30)
  if residual in (None, 'error_feedback', 'momentum_feedback'):
    assert values[3] <= rounding
  elif values[0] > 0 and not rests:  # the gradients are of full rank
    assert values[3] > rounding


def test_point(point):
  tx, leaves = _make(point), _leaves(point)
  params = cases.tree(leaves, 0)
  state = tx.init(params)
  assert all(x.size for x in jax.tree.leaves(state))
  before = _avals(state), jax.tree.structure(state)
  update = cases.jit(tx.update)
  total = jax.tree.map(jnp.zeros_like, params)
  for gradient in _gradients(leaves):
    updates, state = update(gradient, state, params)
    assert (_avals(state), jax.tree.structure(state)) == before
    assert _avals(updates) == _avals(params)
    leaf, g = updates['matrix'], gradient['matrix']
    for u, rests in zip(
      _matrices(leaf), ~_matrices(g).any((1, 2)), strict=True
    ):
      assert np.isfinite(u).all()
      _check_rank(u, leaf.dtype, point.residual, rests)
    total = jax.tree.map(jnp.add, total, updates)
  assert update._cache_size() == 1
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(_float(state)))
  if point.projector.startswith(('online_pca', 'lagged_power')):
    if point.inner == 'multi_steps' and point.transport == 'reset':
      return  # bases move, and states restart, before a window is full
  signal = cases.tree(leaves, 1)
  for path, leaf in total.items():
    assert np.vdot(np.float64(leaf), np.float64(signal[path])) < 0, path


def _float(tree):
  return [
    np.asarray(x, np.float64)
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.floating)
  ]


def test_cover_holds_every_pair():
  names = list(grid.FACTORS)
  covered = {
    (pair, values)
    for point in grid.pairwise()
    for pair, values in zip(
      itertools.combinations(names, 2),
      itertools.combinations(point, 2),
      strict=True,
    )
  }
  for a, b in itertools.combinations(names, 2):
    for x, y in itertools.product(grid.FACTORS[a], grid.FACTORS[b]):
      possible = (a, b) != ('inner', 'transport') or (
        y in grid.INNERS[x].transports
      )
      possible &= (a, b) != ('every_k', 'residual') or x == 1 or y is None
      found = ((a, b), (x, y)) in covered
      if grid.alike((a, b), (x, y)):
        assert possible or not found, (x, y)
      else:
        assert found == possible, (x, y)


@pytest.mark.parametrize('transport', ['first', 'both'])
def test_moments_that_are_not_known_are_refused(transport):
  point = grid.Point(
    'svd', 'adafactor', transport, 'short', False, jnp.float32, 1, None, 'stack'
  )
  with pytest.raises(ValueError, match='FactoredState.*register_moments'):
    _make(point).init(cases.tree(_leaves(point)))


def test_every_residual_is_in_the_grid():
  public = {name for name in vars(so.residuals) if name.islower()}
  public = {name for name in public if not name.startswith('_')}
  assert {rule.name for rule in grid.RESIDUALS.values()} == public


def test_every_projector_is_in_the_grid():
  names = {
    grid.PROJECTORS[name](False).name.split('(')[0] for name in grid.PROJECTORS
  }
  public = {
    name
    for name in vars(so.projectors)
    if name.islower() and not name.startswith('_')
  }
  # `periodic` makes a projector of a rule from outside.
  assert names == public - {'periodic'}
