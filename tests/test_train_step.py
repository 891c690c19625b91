"""One protocol of training steps, whichever way they take."""

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
import subspace_optax as so

RANK, ROWS = 4, 8


def loss(params, x):
  h = jnp.tanh(so.rso.dot(x, params['up']))
  return jnp.mean((h + params['bias'][None]) ** 2)


def parameters():
  rng = np.random.default_rng(0)
  make = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape))
  return jax.tree.map(jnp.float32, {'up': make(16, 24), 'bias': 1.0 + make(24)})


def batch(t):
  rng = np.random.default_rng(t)
  return jnp.asarray(rng.standard_normal((ROWS, 16)), jnp.float32)


TX = so.golore(0.01, RANK, update_proj_gap=3)


def by_layer():
  return so.layerwise(
    TX,
    embed=lambda rest, x: x,
    block=lambda layer, x, _: x + jnp.tanh(x @ layer['up']) @ layer['up'].T,
    head=lambda rest, x, _: jnp.mean((x + rest['bias'][None, :16]) ** 2),
  )


def in_parallel():
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  return so.data_parallel_step(loss, TX, mesh)


def rso():
  spec = so.SubspaceSpec(RANK, side='in')
  return so.rso.subproblems(spec, optax.adam(0.01), update_proj_gap=3)


STEPS = {
  'plain': lambda: so.train_step(loss, TX),
  'compressed': lambda: so.rso.compressed_step(loss, TX),
  'data_parallel': in_parallel,
  'layerwise': by_layer,
  'subproblems': lambda: rso().step(loss),
}


def first(name):
  params = parameters()
  if name == 'layerwise':
    up = jnp.stack([params['up']] * 2)
    return {'blocks': {'up': up}, 'bias': params['bias']}
  return params


@functools.cache
def started(name):
  """The step, its program, parameters, and the state to begin with."""
  train, params = STEPS[name](), first(name)
  return train, cases.jit(train.step), params, cases.jit(train.init)(params)


@pytest.mark.parametrize('name', STEPS)
def test_every_step_keeps_the_protocol(name):
  """init, step, params, gradients; the loss falls; nothing compiles twice."""
  train, step, params, state = started(name)
  assert isinstance(train, so.TrainStep)
  kinds = lambda: [
    (x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves((params, state))
  ]
  values, before = [], (jax.tree.structure((params, state)), kinds())
  for t in range(12):
    params, state, metrics = step(params, state, batch(t % 2))
    values.append(float(getattr(metrics, 'loss', metrics)))
  assert (jax.tree.structure((params, state)), kinds()) == before
  assert step._cache_size() <= 2  # jit spells a mesh's arrays otherwise
  assert values[-1] < values[0]
  plain = train.params(params, state)
  assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, params)
  report = so.memory_report(train, params)
  alive = jax.eval_shape(train.gradients, params, state)
  assert report.gradients == sum(x.size * 4 for x in jax.tree.leaves(alive))
  assert report.state == sum(x.nbytes for x in jax.tree.leaves(state))


def test_a_step_may_be_called():
  train, step, params, state = started('plain')
  found = cases.jit(train)(params, state, batch(0))
  wanted = step(params, state, batch(0))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_subproblems_make_their_own_step():
  """`train_step` takes what has a step, and hands on how to differentiate."""
  given = lambda f: lambda params, x: (f(params, x), gradients)
  params, made = parameters(), rso()
  state = made.init(params)
  gradients = jax.tree.map(jnp.ones_like, made.gradients(params, state))
  train = so.train_step(loss, made, value_and_grad=given)
  found = jax.jit(train)(params, state, batch(0))
  wanted = jax.jit(made.step(loss, given))(params, state, batch(0))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  drawn = train.bases(params, state)
  jax.tree.map(np.testing.assert_array_equal, drawn, made.bases(params, state))
  assert drawn['up'].shape == (16, RANK)
  assert STEPS['plain']().bases(params, state) == ()


def test_a_step_is_no_optimizer():
  with pytest.raises(TypeError, match='a training step already'):
    so.train_step(loss, STEPS['plain']())


def test_the_plain_step_is_optax():
  _, step, params, state = started('plain')

  @cases.jit
  def ordinary(params, state, x):
    value, gradients = jax.value_and_grad(loss)(params, x)
    updates, state = TX.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  found, wanted = (
    step(params, state, batch(0)),
    ordinary(params, state, batch(0)),
  )
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize('name', STEPS)
def test_where_the_state_goes(name):
  """Along the data axis it is the same, where a step says so."""
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  train = STEPS[name]()
  cut = () if train.replicated else ('data',)
  put = lambda x: jax.ShapeDtypeStruct(
    x.shape,
    x.dtype,
    sharding=NamedSharding(mesh, P(*[None] * (x.ndim - 1), *cut)),
  )
  params = jax.tree.map(put, first(name))
  places = train.state_sharding(params)
  state = jax.eval_shape(train.init, params)
  assert jax.tree.structure(state) == jax.tree.structure(places)
  used = {k for x in jax.tree.leaves(places) for k in x.spec if k}
  assert used == (set() if train.replicated else {'data'})


def test_losses_of_all_ways_to_the_same_step():
  """Compressed and data-parallel steps are the plain ones, up to rounding."""

  @functools.cache
  def values(name):
    (_, step, params, state), found = started(name), []
    for t in range(5):
      params, state, value = step(params, state, batch(t))
      found.append(value)
    return np.array(found)

  for name in ('compressed', 'data_parallel'):
    np.testing.assert_allclose(values(name), values('plain'), rtol=1e-4)


def test_a_data_parallel_step_knows_its_mesh():
  """State placed from parameters on one device, or from their shapes."""
  train, _, params, _ = started('data_parallel')
  places = train.state_sharding(params)
  assert train.state_sharding(jax.eval_shape(lambda: params)) == places
  state = jax.jit(train.init, out_shardings=places)(params)
  assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {4}
  cases.jit(train.step)(params, state, batch(0))
