"""State in the memory of the host: where it lives, and what its steps make."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp
import pytest

import cases
import errors
import grid
import measure
import subspace_optax as so
from subspace_optax._chain import _update_program
import test_layerwise

HOST, DEVICE = 'pinned_host', 'device'
OPTIMIZERS = {
  'adamw': lambda: optax.adamw(0.01),
  'galore': lambda: so.galore(0.01, 4, update_proj_gap=2),
  'subspace_adamw': lambda: so.subspace_adamw(0.01, 4, update_proj_gap=2),
  'int8 bases': lambda: so.fira_adamw(
    0.01, spec=so.SubspaceSpec(4, basis_dtype='int8')
  ),
  'subspace_muon': lambda: so.subspace_muon(0.01, 4),
  'error feedback': lambda: so.ldadamw(0.01, 4),
  '8 bits': lambda: so.subspace_adamw(0.01, 4, moment_bits=8),
  # Norms of all updates make one group of all state.
  'coupled': lambda: optax.chain(
    optax.scale_by_adam(), optax.clip_by_global_norm(0.1)
  ),
  'MultiSteps': lambda: optax.MultiSteps(optax.adam(0.01), 2),
}
every_kind = pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])


def normal(seed, *shape):
  x = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(x, jnp.float32)


def make_params():
  return {'w': normal(0, 32, 48)} | make_stack()


def make_stack():
  return {'layers': normal(1, 3, 32, 64), 'bias': normal(2, 64)}


def kinds_of(tree):
  return [x.sharding.memory_kind for x in jax.tree.leaves(tree)]


def assert_on_host(state):
  """Checks that matrices of numbers are on the host, and all else is not."""
  for path, x in jax.tree.leaves_with_path(state):
    stays = x.ndim < 2 or jnp.issubdtype(x.dtype, jax.dtypes.extended)
    assert x.sharding.memory_kind == (DEVICE if stays else HOST), path
  assert HOST in kinds_of(state)


def run(tx, params, memory_kind=None, steps=5, state=None):
  """Steps of `train_step`, params and state donated; the final ones."""
  scale = 1 + normal(3, 64) ** 2
  loss = lambda p: sum(jnp.mean(jnp.cos(x) * scale[0]) for x in p.values())
  train = so.train_step(loss, tx)
  params = jax.device_put(jax.tree.map(jnp.copy, params), jax.devices()[0])
  place = train.state_sharding(params, memory_kind=memory_kind)
  if state is None:
    state = cases.jit(train.init, out_shardings=place)(params)
  else:
    state = jax.device_put(jax.tree.map(jnp.copy, state), place)
  where = jax.tree.map(lambda x: x.sharding, params)
  step = cases.jit(
    train.step,
    donate_argnums=(0, 1),
    in_shardings=(where, place),
    out_shardings=(where, place, None),
  )
  for _ in range(steps):
    old = jax.tree.leaves((params, state))
    params, state, _ = step(params, state)
    assert all(x.is_deleted() for x in old)
    if memory_kind == HOST:
      assert_on_host(state)
  assert step._cache_size() == 1
  return params, state


@functools.cache
def start(name):
  """An optimizer, parameters and its state; a stack if none sees the others."""
  tx = OPTIMIZERS[name]()
  together = name in ('adamw', 'coupled', 'MultiSteps')
  params = make_params() if together else make_stack()
  return tx, params, cases.jit(tx.init)(params)


@functools.cache
def run_once(name, memory_kind=None):
  tx, params, state = start(name)
  return run(tx, params, memory_kind, state=state)


@pytest.mark.parametrize(
  'name',
  # Each parameter's state is a group as 'galore' and 'int8 bases' have it.
  grid.but(OPTIMIZERS, ('subspace_muon', 'error feedback', '8 bits')),
)
def test_an_ordinary_step_is_the_same(name):
  got, wanted = run_once(name, HOST), run_once(name)
  test_layerwise.assert_close(got[0], wanted[0])


def exact_momentum():
  """Momentum whose every number is a small multiple of a power of two."""
  return optax.chain(optax.trace(0.5), optax.scale(-0.25))


def whole_numbers(tree):
  return jax.tree.map(lambda x: jnp.round(8 * x), tree)


@pytest.mark.parametrize('most_bytes', [2**26, 2**10], ids=['whole', 'in rows'])
def test_is_equal_to_the_bit_where_rounding_has_no_say(most_bytes, monkeypatch):
  monkeypatch.setattr(_update_program, '_MOST_BYTES', most_bytes)
  params, tx = make_params(), exact_momentum()
  place = so.state_sharding(tx, params, memory_kind=HOST)
  state = cases.jit(tx.init, out_shardings=place)(params)
  update = cases.jit(so.offload(tx).update, out_shardings=(None, place))
  wanted = tx.init(params)
  for seed in range(4):
    gradients = whole_numbers(
      optax.tree.add(params, optax.tree.scale(seed, params))
    )
    updates, state = update(gradients, state)
    assert_on_host(state)
    wanted_updates, wanted = tx.update(gradients, wanted)
    jax.tree.map(
      np.testing.assert_array_equal, (updates, state), (wanted_updates, wanted)
    )


@pytest.mark.parametrize(
  'name, fetch',
  [
    pytest.param(
      name,
      fetch,
      # One that has codes, and no layer's bases; both ways are equal to the bit
      # below.
      marks=() if (name, fetch) == ('adam8bit', 'leaf') else pytest.mark.full,
    )
    for name in ('adam', 'subspace_adamw', 'adam8bit')
    for fetch in ('layer', 'leaf')
  ],
)
def test_layers_are_the_same_and_stay_there(name, fetch):
  # Codes multiply rounding; in float64 it is small.
  wide = name == 'adam8bit'
  with jax.enable_x64(wide):
    dtype = jnp.float64 if wide else jnp.float32
    params = optax.tree.cast(test_layerwise.make_params(), dtype)
    compare_with_far_states(test_layerwise.OPTIMIZERS[name], fetch, params)


def compare_with_far_states(tx, fetch, params):
  """Takes steps with states on the host beside those with states at hand."""
  wanted, _, rows = test_layerwise.run_layers(
    test_layerwise.layers(tx), params, 5
  )
  step = test_layerwise.layers(tx, fetch=fetch)
  params = jax.device_put(params, jax.devices()[0])
  place = step.state_sharding(params, memory_kind=HOST)
  far = cases.jit(step.init, out_shardings=place)(params)
  where = jax.tree.map(lambda x: x.sharding, params)
  update = cases.jit(
    step.step,
    donate_argnums=(0, 1),
    in_shardings=(where, place, None),
    out_shardings=(where, place, None),
  )
  params = jax.tree.map(jnp.copy, params)
  for row in rows:
    params, far, metrics = update(params, far, test_layerwise.BATCH)
    np.testing.assert_allclose(np.asarray(metrics), row, rtol=1e-5)
    assert_on_host(far)
  assert update._cache_size() == 1
  test_layerwise.assert_close(params, wanted)


def exact_layers(fetch):
  """Layers whose gradients are whole numbers, and momentum that is exact."""
  return so.layerwise(
    exact_momentum(),
    embed=lambda rest, batch: batch,
    block=lambda layer, x, batch: jnp.sum(layer['w'] * batch) + x,
    head=lambda rest, x, batch: jnp.sum(rest['head'] * batch) + jnp.sum(x),
    fetch=fetch,
  )


@pytest.mark.parametrize('fetch', ['layer', 'leaf'])
def test_layers_are_equal_to_the_bit_where_rounding_has_no_say(
  fetch, monkeypatch
):
  monkeypatch.setattr(_update_program, '_MOST_BYTES', 2**9)
  step, batch = exact_layers(fetch), jnp.round(4 * normal(5, 16, 8))
  params = {'blocks': {'w': jnp.ones((3, 16, 8))}, 'head': jnp.ones((16, 8))}
  place = step.state_sharding(params, memory_kind=HOST)
  near = (params, step.init(params))
  far = (params, cases.jit(step.init, out_shardings=place)(params))
  update = cases.jit(step.step)
  update_far = cases.jit(step.step, out_shardings=(None, place, None))
  for _ in range(3):
    near, far = update(*near, batch)[:2], update_far(*far, batch)[:2]
    assert_on_host(far[1])
    jax.tree.map(np.testing.assert_array_equal, far, near)


@every_kind
def test_cut_states_on_a_mesh(kind):
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(kind,) * 2)
  specs = {'w': P('fsdp', 'tensor'), 'layers': P(None, 'tensor'), 'bias': P()}
  with jax.set_mesh(mesh):
    params = {
      k: jax.device_put(x, NamedSharding(mesh, specs[k]))
      for k, x in make_params().items()
    }
    # `w` stays whole, and its update goes through it number by number.
    tx = so.subspace_adamw(0.01, spec=so.SubspaceSpec(4, include='layers'))
    place = so.state_sharding(tx, params, memory_kind=HOST)
    state = cases.jit(tx.init, out_shardings=place)(params)
    near = jax.device_put(state, so.state_sharding(tx, params))
    update = cases.jit(so.offload(tx).update, out_shardings=(None, place))
    ordinary = cases.jit(tx.update)
    gradients = jax.tree.map(jnp.cos, params)
    for _ in range(2):
      updates, state = update(gradients, state, params)
      wanted, near = ordinary(gradients, near, params)
      assert_on_host(state)
      measure.assert_trees_close(updates, wanted, rtol=1e-5, atol=1e-6)
    for x, y in zip(
      jax.tree.leaves(state), jax.tree.leaves(place), strict=True
    ):
      assert x.sharding.is_equivalent_to(y, x.ndim)


def test_moments_on_the_host_and_bases_on_the_device():
  tx, params, state = start('galore')
  far = lambda path: HOST if '/inner/' in path else None
  place = so.state_sharding(tx, params, memory_kind=far)
  found = {
    jax.tree_util.keystr(path, simple=True, separator='/'): x.memory_kind
    for path, x in jax.tree.leaves_with_path(place)
  }
  assert {kind for path, kind in found.items() if '/inner/' in path} == {HOST}
  assert {kind for path, kind in found.items() if 'basis' in path} == {DEVICE}
  got = run(tx, params, far, state=state)
  test_layerwise.assert_close(got[0], run_once('galore')[0])


def test_a_checkpoint_comes_back_to_the_host(tmp_path):
  tx, params, _ = start('subspace_adamw')
  place = so.state_sharding(tx, params, memory_kind=HOST)
  state = run_once('subspace_adamw', HOST)[1]
  ocp.save(tmp_path / 'state', state)
  shape = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
  like = jax.tree.map(shape, jax.eval_shape(tx.init, params), place)
  restored = ocp.load(tmp_path / 'state', like)
  assert_on_host(restored)
  assert kinds_of(restored) == kinds_of(state)
  measure.assert_trees_close(restored, state, rtol=0, atol=0)


def test_groups_are_parameters_and_elementwise_ones_come_in_rows(monkeypatch):
  monkeypatch.setattr(_update_program, '_MOST_BYTES', 2**10)
  found = {}

  def look(name, tx):
    def trace(gradients, state, params):
      program = _update_program.trace(tx.update, gradients, state, params, ())
      groups = [x for x in _update_program.groups(program) if x.far]
      found[name] = sorted(len(x.far) for x in groups)
      for group in groups:
        jaxpr, used = _update_program.only(program.jaxpr, sorted(group.outputs))
        parts, _ = _update_program.in_rows(program, group, jaxpr, used, ())
        found.setdefault(f'{name} parts', []).append(parts > 1)
      return 0

    params = make_params()
    place = so.state_sharding(tx, params, memory_kind=HOST)
    state = cases.jit(tx.init, out_shardings=place)(params)
    cases.jit(trace)(params, state, params)

  look('adamw', optax.adamw(0.01))
  look('subspace', so.subspace_adamw(0.01, 4))
  look('coupled', OPTIMIZERS['coupled']())
  assert found['adamw'] == [2, 2] and found['adamw parts'] == [True, True]
  assert found['subspace'] == [2, 2] and not any(found['subspace parts'])
  assert found['coupled'] == [4]


def test_a_parameter_without_rows():
  params = {'w': jnp.zeros((0, 4)), 'x': normal(0, 4, 4)}
  updates, state = run(optax.adam(0.1), params, 'pinned_host', 2)
  assert_on_host(state)
  assert updates['w'].shape == (0, 4)


def test_a_state_that_changes_is_told_of_by_its_path():
  def update(updates, state, params=None):
    del params
    return updates, {'a': state['a'], 'b': state['b'].astype('bfloat16')}

  init = lambda params: {'a': params, 'b': params['w']}
  tx = so.offload(optax.GradientTransformation(init, update))
  params = {'w': normal(0, 4, 4)}
  place = so.state_sharding(tx, params, memory_kind='pinned_host')
  state = jax.jit(tx.init, out_shardings=place)(params)
  message = r"changed float32\[4, 4\] to bfloat16\[4, 4\] at state\['b'\]"
  with pytest.raises(ValueError, match=message):
    tx.update(params, state, params)


def test_needs_a_memory_that_devices_have():
  tx, params = so.golore(0.01, 4), make_params()
  kinds = (HOST, DEVICE)
  for bad in ('pinned_hots', 'unpinned_host', lambda path: 'vmem'):
    with errors.raises(ValueError, 'memory_kind of state', *kinds, 'cpu'):
      so.state_sharding(tx, params, memory_kind=bad)
  same = so.state_sharding(tx, params, memory_kind=DEVICE)
  assert {x.memory_kind for x in jax.tree.leaves(same)} == {DEVICE}


def test_steps_that_take_no_state_from_the_host_say_so():
  params = {'w': normal(0, 32, 64)}
  loss = lambda params, x: jnp.mean(so.rso.dot(x, params['w']) ** 2)
  tx = so.golore(0.01, 4)
  subproblems = so.rso.subproblems(so.SubspaceSpec(4, side='in'), optax.adam(1))
  compressed = so.rso.compressed_step(loss, tx)
  for step in (subproblems, subproblems.step(loss), compressed):
    with errors.raises(ValueError, 'so.train_step', 'so.offload'):
      so.state_sharding(step, params, memory_kind=HOST)
  with errors.raises(ValueError, 'so.layerwise'):
    compressed.state_sharding(params, memory_kind=HOST)
  with errors.raises(TypeError, 'optax.GradientTransformation'):
    so.offload(subproblems)
  # Nor does it go unnoticed in an optimizer that nobody has wrapped.
  place = so.state_sharding(tx, params, memory_kind=HOST)
  state = cases.jit(tx.init, out_shardings=place)(params)
  with pytest.raises(ValueError, match='memory_space'):
    cases.jit(tx.update)(params, state, params)


def test_fetch_is_by_layer_or_leaf():
  with errors.raises(ValueError, 'fetch', "'layer', 'leaf'", "'all'"):
    exact_layers('all')


def test_factors_of_a_shape_are_those_of_the_whole(monkeypatch):
  """Rows are no matrices of their own to an optimizer that looks at shapes."""
  monkeypatch.setattr(_update_program, '_MOST_BYTES', 2**8)

  def by_width(updates, state, params=None):
    del params
    state = jax.tree.map(lambda m, g: 0.5 * m + g, state, updates)
    return jax.tree.map(lambda m: m * m.shape[0] ** -0.5, state), state

  params = make_params()
  tx = optax.GradientTransformation(optax.tree.zeros_like, by_width)
  place = so.state_sharding(tx, params, memory_kind=HOST)
  state = cases.jit(tx.init, out_shardings=place)(params)
  got, _ = cases.jit(so.offload(tx).update)(params, state)
  wanted, _ = tx.update(params, tx.init(params))
  measure.assert_trees_close(got, wanted, rtol=1e-6, atol=0)


def test_plain_parameters_beside_projected_ones_come_in_rows(monkeypatch):
  """Whose update checks gradients against parameters."""
  monkeypatch.setattr(_update_program, '_MOST_BYTES', 2**10)
  params = {'head': normal(0, 64, 32), 'w': normal(1, 32, 48)}
  tx = so.subspace_adamw(0.01, 4)
  assert tx.init(params)[0][1].inner.mu['head'].shape == (64, 32)
  far = run(tx, params, HOST)
  test_layerwise.assert_close(far[0], run(tx, params)[0])
