"""Rules from outside: written with public names, checked by `so.testing`."""

import inspect

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import grid
import measure
import subspace_optax as so

# --- Rules of an outside package ---------------------------------------------


def dct_columns(update_proj_gap):
  """The columns of the DCT in which the gradient has most energy."""

  def draw(matrix, basis, period):
    del basis, period
    i = jnp.arange(matrix.m)
    d = jnp.cos(jnp.pi * (2 * i[:, None] + 1) * i[None, :] / (2 * matrix.m))
    d = d * jnp.sqrt(jnp.where(i == 0, 1.0, 2.0) / matrix.m)[None, :]
    energy = jnp.sum(jnp.square(matrix.coordinates(d)), axis=1)
    return d[:, jax.lax.top_k(energy, matrix.rank)[1]]

  return so.projectors.periodic('dct_columns', draw, update_proj_gap)


def gradient_descent(eta):
  """Plain steps on what is outside of the subspace."""

  def update(node, scale, count, state):
    del count
    inside = node.combine(scale * node.direction)
    return inside + eta * node.outside(), state

  return so.residuals.Residual('gradient_descent', update)


def shrunk(factor):
  """First moments by C, and shorter by a factor."""

  def move(moment):
    return factor * moment.mix(moment.transition, moment.value)

  return so.transports.Transport('shrunk', move, ('mean', 'sum'))


def random_of_one_matrix(update_proj_gap, stagger=False):
  def draw(matrix, basis, period):
    y = jax.random.normal(matrix.key(period), basis.shape)
    return jnp.linalg.qr(y)[0]

  return so.projectors.periodic(
    'random', draw, update_proj_gap, stagger=stagger, uses_gradient=False
  )


def full(x):
  return pytest.param(x, marks=pytest.mark.full)


@pytest.mark.parametrize('rule', [dct_columns, gradient_descent, shrunk])
def test_thirty_lines_are_enough(rule):
  assert len(inspect.getsource(rule).splitlines()) <= 30


@pytest.mark.parametrize(
  'projector',
  [dct_columns(2), full(random_of_one_matrix(2, stagger=True))],
  ids=['dct_columns', 'random in turns'],
)
def test_projectors_from_outside(projector):
  so.testing.check_projector(projector)


# The docstring of `check_projector` has `svd`; bases that are not orthonormal,
# those of `gaussian`, are passed below.
@pytest.mark.parametrize(
  'name', [full('gaussian'), 'online_pca', full('switch')]
)
def test_projectors_of_ours(name):
  so.testing.check_projector(grid.PROJECTORS[name](False))


# One of each kind of state: none, norms, arrays like the leaf and like its
# outputs. All rules: tests/test_grid.py, test_residuals_composed.py; the one
# from outside: the docstring, in short.
@pytest.mark.parametrize(
  'name',
  [
    full('apollo_mini'),
    'error_feedback',
    full('normuon'),
    full('from outside'),
  ],
)
def test_residuals(name):
  rules = grid.RESIDUALS | {'from outside': gradient_descent(0.1)}
  so.testing.check_residual(rules[name])


# The docstring checks the first one.
@pytest.mark.parametrize(
  'transport',
  [full(shrunk(0.5)), full(so.transports.both(0.9, 0.999)), full('first')],
  ids=lambda x: getattr(x, 'name', 'by name'),
)
def test_transports(transport):
  so.testing.check_transport(transport)


SPEC = so.SubspaceSpec(3, only_if_smaller=False)


def test_columns_of_most_energy_are_taken():
  """Of a sum of three columns of the DCT, these, by hand in float64."""
  m = 8
  i = np.arange(m)
  d = np.cos(np.pi * (2 * i[:, None] + 1) * i[None, :] / (2 * m))
  d *= np.sqrt(np.where(i == 0, 1.0, 2.0) / m)[None, :]
  rows = np.random.default_rng(0).standard_normal((3, 12))
  gradient = {'w': jnp.asarray(d[:, [1, 4, 6]] @ rows, jnp.float32)}
  tx = so.project(SPEC, dct_columns(1))
  _, state = tx.update(gradient, tx.init(gradient), gradient)
  basis = np.asarray(measure.bases(state)['w'])
  np.testing.assert_allclose(
    basis @ basis.T, d[:, [1, 4, 6]] @ d[:, [1, 4, 6]].T, atol=1e-5
  )


def test_residual_is_the_whole_gradient_with_sgd():
  """P R + (G - P R) = G, and for bases of any scale."""
  params = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)))}
  for projector in (so.projectors.stiefel(2), so.projectors.stiefel(1)):
    tx = so.subspace(
      SPEC, projector, optax.identity(), residual=gradient_descent(1.0)
    )
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates['w'], params['w'], rtol=1e-4, atol=1e-5)


def test_what_is_outside_of_any_basis():
  """G - P (P^T P)^-1 P^T G, in float64 from the basis in the state."""
  params = {'w': jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)))}
  only = so.residuals.Residual(
    'only', lambda node, scale, count, state: (node.outside(), state)
  )
  tx = so.subspace(
    SPEC, so.projectors.gaussian(2), optax.identity(), residual=only
  )
  updates, state = tx.update(params, tx.init(params), params)
  p = np.asarray(measure.bases(state)['w'], np.float64)
  g = np.asarray(params['w'], np.float64)
  wanted = g - p @ np.linalg.solve(p.T @ p, p.T @ g)
  np.testing.assert_allclose(updates['w'], wanted, rtol=1e-4, atol=1e-5)


def test_moments_are_shorter():
  tx = so.subspace(
    so.SubspaceSpec(3, only_if_smaller=False),
    so.projectors.stiefel(1),
    optax.trace(0.5),
    transport=shrunk(0.25),
  )
  whole = so.subspace(
    SPEC, so.projectors.stiefel(1), optax.trace(0.5), transport='first'
  )
  params = {'w': jnp.asarray(np.random.default_rng(1).normal(size=(8, 12)))}
  found = []
  for rule in (tx, whole):
    state = rule.init(params)
    _, state = rule.update(params, state, params)
    _, state = rule.update(jax.tree.map(jnp.zeros_like, params), state, params)
    found.append(np.asarray(state[1].inner.trace['w']))
  np.testing.assert_allclose(found[0], 0.25 * found[1], rtol=1e-5, atol=1e-6)


# One that sees the gradient, and is traced with Explicit axes. Our own are made
# in the same way: tests/test_sharding.py.
@pytest.mark.parametrize(
  'rule, kind',
  [
    pytest.param(rule, kind, marks=() if runs else pytest.mark.full)
    for rule in (dct_columns, random_of_one_matrix)
    for kind in (AxisType.Auto, AxisType.Explicit)
    for runs in [rule is dct_columns and kind == AxisType.Explicit]
  ],
)
def test_a_rule_for_one_matrix_on_a_mesh(rule, kind):
  """Steps are those on one device, and the state keeps its sharding."""
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(kind,) * 2)
  spec = so.SubspaceSpec(
    2,
    weight_dimension_numbers={
      'w': so.DimensionNumbers(),
      'stack': so.DimensionNumbers(),
    },
  )
  specs = {'w': P('x', 'y'), 'stack': P(None, 'x', 'y')}
  shapes = {'w': (8, 12), 'stack': (2, 12, 8)}

  def gradients(t):
    rng = np.random.default_rng(t)
    return {
      k: jnp.asarray(rng.standard_normal(x), jnp.float32)
      for k, x in shapes.items()
    }

  def run(put):
    tx = so.subspace(spec, rule(2), optax.scale_by_adam())
    state, update, found = tx.init(put(gradients(0))), cases.jit(tx.update), []
    for t in range(4):
      updates, state = update(put(gradients(t)), state)
      found.append(jax.device_get(updates))
    assert update._cache_size() == 1
    return found

  wanted = run(lambda x: x)
  with jax.set_mesh(mesh):
    place = {k: NamedSharding(mesh, x) for k, x in specs.items()}
    found = run(lambda x: jax.tree.map(jax.device_put, x, place))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4),
    found,
    wanted,
  )


# --- Rules that must not pass ------------------------------------------------


def _base(**changes):
  return so.projectors.gaussian(2)._replace(**changes)


def test_a_basis_that_is_not_orthonormal():
  with pytest.raises(AssertionError, match='is not I'):
    so.testing.check_projector(_base(orthonormal=True))


def test_a_state_that_changes_its_type():
  rule = so.projectors.stiefel(2)

  def track(context, matrices, coords, subspaces, state):
    subspaces, moves, state = rule.track(
      context, matrices, coords, subspaces, state
    )
    drift = jax.tree.map(lambda x: x.astype(jnp.bfloat16), subspaces.drift)
    return subspaces._replace(drift=drift), moves, state

  with pytest.raises(AssertionError, match='changes structure, shape or dtype'):
    so.testing.check_projector(rule._replace(track=track))


def test_a_basis_that_is_refused_at_every_refresh():
  draw = lambda matrix, basis, period: jax.random.normal(
    matrix.key(period), basis.shape
  )
  make = lambda **options: so.projectors.periodic('noise', draw, 2, **options)
  with pytest.raises(AssertionError, match='for matrix was refused'):
    so.testing.check_projector(make())
  so.testing.check_projector(make(orthonormal=False))


def test_a_gradient_that_a_rule_said_it_does_not_look_at():
  draw = lambda matrix, basis, period: jnp.linalg.qr(
    matrix.gradient[:, : matrix.rank]
  )[0]
  rule = so.projectors.periodic('first', draw, 2, uses_gradient=False)
  with pytest.raises(ValueError, match='uses_gradient=False says'):
    so.testing.check_projector(rule)


def test_a_draw_that_returns_nothing():
  rule = so.projectors.periodic('none', lambda matrix, basis, period: None, 2)
  message = r'draw\(matrix, basis, period\) returned NoneType'
  with pytest.raises(ValueError, match=message):
    so.testing.check_projector(rule)


def test_a_draw_of_another_shape():
  rule = so.projectors.periodic('wrong', lambda m, p, t: p.T, 2)
  with pytest.raises(
    ValueError, match=r'array of \(3, 8\).*has shape \(8, 3\)'
  ):
    so.testing.check_projector(rule)


def test_a_residual_that_is_not_finite():
  def update(node, scale, count, state):
    return node.combine(node.direction) / jnp.sum(jnp.abs(node.coords)), state

  rule = so.residuals.Residual('wrong', update)
  with pytest.raises(AssertionError, match='is not finite'):
    so.testing.check_residual(rule)


def test_a_transport_that_is_not_finite():
  rule = so.transports.Transport('wrong', lambda moment: jnp.nan * moment.value)
  with pytest.raises(AssertionError, match='is not finite'):
    so.testing.check_transport(rule)


def exact_svd(update_proj_gap):
  def draw(matrix, basis, period):
    return jnp.linalg.svd(matrix.gradient, full_matrices=False)[0][:, :2]

  return so.projectors.periodic('exact', draw, update_proj_gap)


@pytest.mark.parametrize(
  'rule', [exact_svd, full(dct_columns), full(random_of_one_matrix)]
)
def test_a_rule_for_one_matrix_sees_the_mean_gradient(rule):
  """In data-parallel steps, which are those of the whole batch."""
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  loss = lambda p, x: jnp.mean((jnp.tanh(x @ p['w']) - 1.0) ** 2)
  tx = so.subspace(
    so.SubspaceSpec(2), rule(2), optax.trace(0.9), after=optax.scale(-0.1)
  )
  rng = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  start, batches = {'w': make(8, 12)}, [make(16, 8) for _ in range(4)]
  found = []
  for train in (
    so.train_step(loss, tx),
    so.data_parallel_step(loss, tx, mesh, check_vma=False),
  ):
    params, state, step = start, train.init(start), cases.jit(train.step)
    for x in batches:
      params, state, _ = step(params, state, x)
    found.append(params['w'])
  np.testing.assert_allclose(*found, rtol=1e-3, atol=1e-4)


def test_a_rule_for_one_matrix_in_a_compressed_step():
  loss = lambda p, x: jnp.mean(so.rso.dot(x, p['w']) ** 2)
  tx = so.subspace(
    so.SubspaceSpec(2),
    random_of_one_matrix(2),
    optax.scale_by_adam(),
    after=optax.scale(-0.1),
  )
  found = []
  for train in (so.train_step(loss, tx), so.rso.compressed_step(loss, tx)):
    params = {'w': jnp.ones((8, 12))}
    state = train.init(params)
    for t in range(3):
      x = jax.random.normal(jax.random.key(t), (4, 8))
      params, state, _ = cases.jit(train.step)(params, state, x)
    found.append(params['w'])
  np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
