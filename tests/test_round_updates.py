"""Narrow weights of which steps smaller than their spacing are not lost."""

import math

from flax import nnx
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import errors
import grid
import measure
import subspace_optax as so
from subspace_optax.low_precision import _round_updates
from subspace_optax.low_precision import _rounding

BF16 = jnp.bfloat16
LAST = {
  'nearest': optax.identity,
  'stochastic': so.round_updates,
  'compensated': lambda: so.round_updates('compensated'),
}
each = pytest.mark.parametrize('rounding', ['stochastic', 'compensated'])


def _run(rounding, params, steps):
  """Returns params and state after all steps of a sequence of updates."""
  tx = LAST[rounding]()

  def body(carry, u):
    params, state = carry
    updates, state = tx.update(u, state, params)
    return (optax.apply_updates(params, updates), state), None

  start = params, tx.init(params)
  return cases.jit(lambda start, us: lax.scan(body, start, us)[0])(start, steps)


def _wide(x):
  return np.asarray(x, np.float64)


def _around(x):
  """Returns the bfloat16 below and above float64, each by its spacing."""
  spacing = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
  return np.floor(x / spacing) * spacing, np.ceil(x / spacing) * spacing


def test_stochastic_takes_a_neighbour_and_is_right_in_the_mean():
  rng = np.random.default_rng(0)
  p = jnp.asarray(
    rng.standard_normal((8, 32)) * 10.0 ** rng.integers(-3, 2), BF16
  )
  u = jnp.asarray(0.01 * _wide(p) * rng.standard_normal((8, 32)), jnp.float32)
  tx, counts = so.round_updates(), jnp.arange(1000)

  def new(count):
    state = _round_updates.StochasticState(count)
    updates, state = tx.update({'w': u}, state, {'w': p})
    return optax.apply_updates({'w': p}, updates)['w'], state.count

  got, after = cases.jit(jax.vmap(new))(counts)
  np.testing.assert_array_equal(after, counts + 1)
  got, exact = _wide(got), _wide(np.float32(p) + np.float32(u))
  low, high = _around(exact)
  assert np.all((got == low) | (got == high))
  share = (exact - low) / np.where(high > low, high - low, 1)
  error = (got - exact) / np.where(high > low, high - low, 1)
  deviation = np.sqrt(share * (1 - share) / len(counts)) + 1e-4
  # Over steps for each weight, and over weights for each step.
  np.testing.assert_array_less(np.abs(error.mean(0)), 5 * deviation)
  deviation = np.sqrt(np.sum(share * (1 - share))) / share.size
  z = error.mean((1, 2)) / deviation
  np.testing.assert_array_less(np.abs(z), 5)
  np.testing.assert_allclose(z.std(), 1, atol=0.1)
  np.testing.assert_allclose(np.square(z[1:] + z[:-1]).mean(), 2, atol=0.3)


def test_small_steps_of_a_weight_of_one():
  params = {'w': jnp.ones((16, 64), BF16)}
  steps = {'w': jnp.full((1000, 16, 64), 1e-4)}
  wanted, spacing = 1.1, 2**-7
  got = {k: _wide(_run(k, params, steps)[0]['w']) for k in LAST}
  np.testing.assert_array_equal(got['nearest'], 1.0)
  # Each has taken about 13 of 1000 chances to move by a spacing.
  deviation = spacing * math.sqrt(0.1 / spacing)
  error = got['stochastic'] - wanted
  assert abs(error.mean()) < 4 * deviation / math.sqrt(error.size)
  np.testing.assert_allclose(error.std(), deviation, rtol=0.1)
  np.testing.assert_allclose(got['compensated'], wanted, atol=spacing / 2)


def test_compensated_is_float32_to_the_bit():
  rng = np.random.default_rng(0)
  start = np.float32(rng.standard_normal((8, 32)))
  params = {'w': jnp.asarray(start, BF16)}
  # Over six decades: the least are lost by float32, too.
  size = 10.0 ** rng.uniform(-8, -2, (300, 8, 32))
  steps = np.float32(size * rng.standard_normal(size.shape))
  params, state = _run('compensated', params, {'w': jnp.asarray(steps)})
  exact = np.asarray(jnp.asarray(start, BF16), np.float32)
  for step in steps:
    exact = exact + step
  assert state.lost['w'].dtype == jnp.int16
  wide = jnp.asarray(params['w'], jnp.float32)
  joined = _rounding.joined(wide, state.lost['w'])
  np.testing.assert_array_equal(np.asarray(joined), exact)
  low, high = _around(_wide(exact))
  np.testing.assert_array_less(np.abs(exact - wide), (high - low) * 0.5001)


def test_updates_of_bfloat16_are_exact_up_to_half_of_a_weight():
  """Then at most what the update itself is rounded by is lost."""
  rng = np.random.default_rng(0)
  draw = lambda size: jnp.asarray(rng.standard_normal(4000) * size, BF16)
  p, u = draw(1.0), draw(10.0 ** rng.uniform(-4, 1, 4000))
  tx = so.round_updates('compensated')
  v, state = cases.jit(tx.update)(u, tx.init(p), p)
  weights = jnp.asarray(optax.apply_updates(p, v), jnp.float32)
  found = _wide(_rounding.joined(weights, state.lost))
  p, u, v = (np.asarray(x, np.float32) for x in (p, u, v))
  exact, moved = p + u, np.abs(v - u)
  is_small = np.abs(u) <= np.abs(p) / 2
  np.testing.assert_array_equal(found[is_small], exact[is_small])
  error = np.abs(found - exact)[~is_small]
  least = 2 * np.spacing(np.abs(exact))
  np.testing.assert_array_less(error, (moved + least)[~is_small])
  np.testing.assert_array_less(error, np.abs(u)[~is_small] / 128)


def test_compensated_float16():
  rng = np.random.default_rng(0)
  start = np.float16(10.0 ** rng.uniform(-5, 2, (8, 32)))
  steps = np.float32(start * 10.0 ** rng.uniform(-5, -3, (300, 8, 32)) + 3e-8)
  params, state = _run('compensated', {'w': jnp.asarray(start)}, {'w': steps})
  exact = _wide(start) + _wide(steps).sum(0)
  spacing = np.maximum(2.0 ** (np.floor(np.log2(exact)) - 10), 2.0**-24)
  error = np.abs(_wide(params['w']) - exact) / spacing
  np.testing.assert_array_less(error, 0.51)
  assert params['w'].dtype == jnp.float16


@pytest.mark.parametrize('dtype', [BF16, jnp.float16])
def test_nearest_against_numpy(dtype):
  rng = np.random.default_rng(0)
  x = rng.standard_normal(4000) * 10.0 ** rng.uniform(-9, 4, 4000)
  x = np.float32(np.concatenate([x, [0.0, -0.0, 65519, 65521, 3e38, np.inf]]))
  wanted = jnp.asarray(x).astype(dtype)
  got = cases.jit(lambda x: _rounding.nearest(x, dtype))(x)
  np.testing.assert_array_equal(np.asarray(got), np.float32(wanted))
  assert np.isnan(_rounding.nearest(jnp.float32(jnp.nan), dtype))


def test_bytes():
  params = {
    'narrow': jnp.ones((64, 32), BF16),
    'wide': jnp.ones((64, 32)),
    'count': jnp.ones((3,), jnp.int32),
  }
  of = lambda k: so.memory_report(LAST[k](), params).state
  assert of('stochastic') == 4
  assert of('compensated') == 2 * 64 * 32


@each
def test_wide_leaves_pass_and_zero_moves_nothing(rounding):
  rng = np.random.default_rng(0)
  w = rng.standard_normal((16, 32))
  params = {'wide': jnp.asarray(w), 'narrow': jnp.asarray(w, BF16)}
  u = jnp.asarray(rng.standard_normal((16, 32)), jnp.float32)
  tx = LAST[rounding]()
  state = tx.init(params)
  assert all(x.size for x in jax.tree.leaves(state))
  updates, state = cases.jit(tx.update)(
    {'wide': u, 'narrow': jnp.zeros_like(u)}, state, params
  )
  measure.assert_trees_close(updates['wide'], u)
  np.testing.assert_array_equal(updates['narrow'], 0)
  if rounding == 'compensated':
    assert isinstance(state.lost['wide'], optax.MaskedNode)


@each
def test_what_is_not_finite_propagates(rounding):
  p = jnp.asarray([1, 1, jnp.inf, jnp.nan, 3.38e38, 0.0], BF16)
  u = jnp.asarray([jnp.nan, jnp.inf, 1, 1, 3e38, 0.0])
  tx = LAST[rounding]()
  state = tx.init({'w': p})
  update = cases.jit(tx.update)
  updates, state = update({'w': u}, state, {'w': p})
  got = optax.apply_updates({'w': p}, updates)
  wanted = [jnp.nan, jnp.inf, jnp.inf, jnp.nan, jnp.inf, 0]
  np.testing.assert_array_equal(_wide(got['w']), wanted)
  # Whoever puts such weights right goes on with them.
  right = {'w': jnp.ones_like(p)}
  updates, state = update({'w': 0 * jnp.ones_like(u)}, state, right)
  np.testing.assert_array_equal(_wide(updates['w']), 0)


def test_weights_that_others_have_set():
  params = {'w': jnp.ones((4, 8), BF16)}
  steps = {'w': jnp.full((1, 4, 8), -1e-3)}
  _, state = _run('compensated', params, steps)
  assert np.all(np.asarray(state.lost['w']) < 0)
  tx = LAST['compensated']()
  zero = {'w': jnp.zeros((4, 8), BF16)}
  updates, _ = tx.update({'w': jnp.full((4, 8), 0.5)}, state, zero)
  np.testing.assert_array_equal(updates['w'], 0.5)


def _sgd(rounding, rate=1e-3):
  return optax.chain(optax.sgd(rate), LAST[rounding]())


@each
def test_stable_donated_and_compiled_once(rounding):
  params = {'a': {'w': jnp.ones((8, 16), BF16)}, 'b': jnp.ones(4)}
  tx = optax.chain(optax.adam(1e-3), LAST[rounding]())
  state = tx.init(params)
  before = measure.types((params, state))

  def step(params, state):
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  step = cases.jit(step, donate_argnums=(0, 1))
  for _ in range(3):
    params, state = step(params, state)
  assert measure.types((params, state)) == before
  assert step._cache_size() == 1
  doubled = optax.tree.map_params(tx, lambda x: x + x, state)
  assert measure.types(doubled) == measure.types(state)
  if rounding == 'compensated':
    lost = state[-1].lost['a']['w']
    assert np.any(np.asarray(lost))
    measure.assert_trees_close(doubled[-1].lost['a']['w'], lost + lost)


@each
def test_masked_and_empty(rounding):
  params = {'a': jnp.ones((2, 8), BF16), 'b': jnp.ones((2, 8), BF16)}
  mask = {'a': True, 'b': False}
  tx = optax.masked(LAST[rounding](), mask)
  u = jax.tree.map(lambda x: jnp.full(x.shape, 0.3), params)
  updates, _ = tx.update(u, tx.init(params), params)
  assert np.all(np.asarray(updates['a']) != u['a'])
  measure.assert_trees_close(updates['b'], u['b'])
  tx = LAST[rounding]()
  assert tx.update({}, tx.init({}), {})[0] == {}


@each
def test_inside_optax_wrappers(rounding):
  params = {'w': jnp.ones((8, 16), BF16)}
  plain = optax.chain(
    optax.apply_if_finite(optax.sgd(1e-2), 5), LAST[rounding]()
  )
  bad = {'w': jnp.full((8, 16), jnp.nan, BF16)}
  updates, _ = plain.update(bad, plain.init(params), params)
  np.testing.assert_array_equal(updates['w'], 0)

  around = optax.apply_if_finite(_sgd(rounding, 1e-2), 5)
  bad = {'w': jnp.full((8, 16), jnp.nan)}
  start = around.init(params)
  updates, state = around.update(bad, start, params)
  np.testing.assert_array_equal(updates['w'], 0)
  measure.assert_trees_close(state.inner_state, start.inner_state)

  steps = optax.MultiSteps(_sgd(rounding, 1e-2), 2)
  state, g = steps.init(params), {'w': jnp.ones((8, 16))}
  update = cases.jit(steps.update)
  updates, state = update(g, state, params)
  np.testing.assert_array_equal(updates['w'], 0)
  updates, state = update(g, state, params)
  alone = _sgd(rounding, 1e-2)
  wanted, _ = alone.update(g, alone.init(params), params)
  measure.assert_trees_close(updates, wanted)
  assert np.any(np.asarray(wanted['w']))


@each
def test_boxed_params(rounding):
  model = nnx.Linear(8, 16, param_dtype=BF16, rngs=nnx.Rngs(0))
  before = _wide(model.kernel[...])
  optimizer = nnx.Optimizer(model, _sgd(rounding, 1e-2), wrt=nnx.Param)
  gradients = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
  for _ in range(20):
    optimizer.update(model, gradients)
  moved = _wide(model.kernel[...]) - before
  assert model.kernel[...].dtype == BF16
  np.testing.assert_allclose(moved.mean(), -0.2, atol=2e-3)

  boxed = {'w': nn.Partitioned(jnp.ones((8, 16), BF16), ('a', 'b'))}
  tx = _sgd(rounding)
  updates, _ = tx.update(boxed, tx.init(boxed), boxed)
  assert jax.tree.structure(updates) == jax.tree.structure(boxed)


@pytest.mark.parametrize(
  'kind, rounding',
  grid.cover(
    [AxisType.Auto, AxisType.Explicit], ['stochastic', 'compensated'], of=2
  ),
)
def test_on_a_mesh_it_is_the_same(kind, rounding):
  rng = np.random.default_rng(0)
  start = {'w': jnp.asarray(rng.standard_normal((16, 24)), BF16)}
  g = {'w': jnp.asarray(rng.standard_normal((16, 24)), jnp.float32)}
  tx = _sgd(rounding)

  def step(params, state, g):
    updates, state = tx.update(g, state, params)
    return optax.apply_updates(params, updates), state

  def run(params, g):
    state, compiled = tx.init(params), cases.jit(step)
    before = compiled._cache_size()
    for _ in range(5):
      params, state = compiled(params, state, g)
    assert compiled._cache_size() == before + 1
    return params, state

  alone = run(start, g)
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(kind,) * 2)
  cut = NamedSharding(mesh, P('fsdp', 'tensor'))
  with jax.set_mesh(mesh):
    params = jax.device_put(start, cut)
    placed = so.state_sharding(tx, params)
    # Gradients may lie otherwise.
    other = NamedSharding(
      mesh, P('fsdp') if kind == AxisType.Auto else cut.spec
    )
    many = run(params, jax.device_put(g, other))
  measure.assert_trees_close(many, alone)
  assert many[0]['w'].sharding == cut
  for x, sharding in zip(
    jax.tree.leaves(many[1]), jax.tree.leaves(placed), strict=True
  ):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)
  if rounding == 'compensated':
    assert many[1][-1].lost['w'].sharding == cut


@each
def test_layer_by_layer(rounding):
  rng = np.random.default_rng(0)
  blocks = {'w': jnp.asarray(rng.standard_normal((3, 8, 8)), BF16)}
  params = {'blocks': blocks, 'head': jnp.ones((8, 1), BF16)}
  step = so.layerwise(
    optax.chain(optax.sgd(1.0), optax.scale(0.0), LAST[rounding]()),
    embed=lambda rest, batch: batch,
    block=lambda layer, x, batch: x + jnp.tanh(x @ layer['w']),
    head=lambda rest, x, batch: jnp.mean((x @ rest['head']) ** 2),
  )
  state = step.init(params)
  shapes = {x.shape for x in jax.tree.leaves(state.blocks)}
  assert shapes == ({(3,)} if rounding == 'stochastic' else {(3, 8, 8)})
  update = cases.jit(step.step)
  after, new, _ = update(params, state, jnp.ones((4, 8), BF16))
  measure.assert_trees_close(after, params)  # the learning rate is none
  assert measure.types(new) == measure.types(state)


@each
def test_in_a_subspace(rounding):
  params = {'up': jnp.ones((16, 32), BF16), 'bias': jnp.ones(8, BF16)}
  tx = optax.chain(so.golore(1e-5, rank=4), LAST[rounding]())
  state, update = tx.init(params), cases.jit(tx.update)
  gradients = jax.tree.map(jnp.ones_like, params)
  updates, state = update(gradients, state, params)
  after = optax.apply_updates(params, updates)
  for path, p in params.items():
    assert after[path].dtype == BF16
    np.testing.assert_array_equal(
      _wide(after[path]) - _wide(p), _wide(updates[path])
    )


def _loss_after_training(rounding, dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((64, 16)), jnp.float32)
  true = jnp.asarray(1 + 0.1 * rng.standard_normal((16, 8)), jnp.float32)
  loss = lambda p: jnp.mean((x @ (p['w'].astype(jnp.float32) - true)) ** 2)
  tx = optax.chain(optax.adam(5e-4), LAST[rounding]())

  def body(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), loss(params)

  params = {'w': jnp.ones((16, 8), dtype)}
  run = cases.jit(lambda start: lax.scan(body, start, length=1000)[1])
  return float(run((params, tx.init(params)))[-1])


def test_training_of_bfloat16_weights():
  wide = _loss_after_training('nearest', jnp.float32)
  plain = _loss_after_training('nearest', BF16)
  # The loss of weights that lie evenly within a spacing around the best ones.
  spread = 16 * (2**-7) ** 2 / 3
  for rounding in ('stochastic', 'compensated'):
    assert _loss_after_training(rounding, BF16) < wide + spread < plain / 100


@pytest.mark.parametrize('rounding', ['stochastic', 'compensated'])
def test_every_parameter_needs_an_update(rounding):
  params = {'w': jnp.ones(4, BF16), 'b': jnp.ones(4, BF16)}
  tx = so.round_updates(rounding)
  with errors.raises(ValueError, "'b'", 'no update', 'masked'):
    tx.update({'w': params['w'], 'b': None}, tx.init(params), params)


def test_what_it_refuses():
  with errors.raises(TypeError, "'w'", 'array', '2.0'):
    so.round_updates('compensated').init({'w': 2.0})
  half = {'a': {'w': jnp.ones(4, jnp.float16)}}
  with errors.raises(ValueError, "'stochastic'", "'a/w'", 'float16', 'compens'):
    so.round_updates().init(half)
  tiny = {'w': jnp.ones(4, jnp.float8_e4m3fn)}
  with errors.raises(ValueError, "'compensated'", "'w'", 'float8_e4m3fn'):
    so.round_updates('compensated').init(tiny)
  with errors.raises(ValueError, 'rounding', "'nearest'", 'apply_updates'):
    so.round_updates('nearest')
  params = {'up': jnp.ones((8, 16), BF16)}
  tx = so.round_updates()
  with errors.raises(ValueError, 'update(updates, state, params)'):
    tx.update(params, tx.init(params))
  spec = so.SubspaceSpec(2)
  early = optax.chain(so.project(spec, so.projectors.stiefel(2)), tx)
  with errors.raises(ValueError, "'up'", 'unproject'):
    jax.eval_shape(lambda p: early.update(p, early.init(p), p), params)
