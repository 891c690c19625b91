"""Data parallelism that averages coordinates, against whole mean gradients."""

import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import errors
import grid
import measure
import subspace_optax as so
from subspace_optax import projectors

DEVICES, STEPS = 4, 5
LEAVES = {
  'up': cases.Leaf((3, 8, 12), jnp.float32, (1,), (2,)),
  'bias': cases.Leaf((12,), jnp.float32),
}
# Iterating on gradients that change magnifies rounding: those of `_gradients`
# times 1 + 1e-7 move the third step of 'lagged_power' by 3e-4, its second by
# 8e-6, and any of 'svd' by 8e-6 at the most. So it is compared for two steps,
# and its bases with those that iterate.
ITERATED = {'randomized', 'warm', 'lagged_power'}
# These divide by the mean of the squared norms, which a step on the mean
# gradient does not know; they have tests of their own.
NORMALISED = {'online_pca', 'online_pca_options', 'tracking', 'switch'}
# Like 'stiefel' here: no gradient is in their bases; or like 'gram'.
ALIKE = {'walk', 'stiefel_regenerated', 'gaussian', 'dct_random', 'svd'}


def _mesh(shape=(DEVICES,), names=('data',), kind=AxisType.Auto):
  return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def _gradients(t):
  """A strong signal, and the devices' noise on it: (devices, ...) each."""
  rng = np.random.default_rng(10 + t)
  u = rng.standard_normal((3, 8, 3)) * np.array([4.0, 2.0, 1.0])
  signal = u @ rng.standard_normal((3, 3, 12))
  noise = rng.standard_normal((DEVICES, 3, 8, 12))
  noise -= noise.mean(0)
  return {
    'up': jnp.asarray(signal + noise, jnp.float32),
    'bias': jnp.asarray(rng.standard_normal((DEVICES, 12)), jnp.float32),
  }


def _spec():
  return so.SubspaceSpec(
    3, weight_dimension_numbers=cases.dimension_numbers(LEAVES)
  )


def _make(name, **axis_name):
  return optax.chain(
    so.project(_spec(), grid.PROJECTORS[name](True), **axis_name),
    so.in_subspace(optax.trace(0.9), _spec(), transport='first'),
    so.unproject(scale=0.25),
  )


def _start(tx):
  """Returns the first state where a step leaves it: on every device.

  Elsewhere the first step would be a program of its own.
  """
  return jax.device_put(
    tx.init(cases.tree(LEAVES)), jax.NamedSharding(_mesh(), P())
  )


def _run(update, tx, steps=STEPS, state=None):
  state, found = state or _start(tx), []
  for t in range(steps):
    updates, state = update(_gradients(t), state)
    found.append(updates)
  return found, state


def _in_parallel(tx, **options):
  """Returns the update of a device each, on its own gradient."""

  def local(gradients, state):
    mine = jax.tree.map(lambda x: x[0], gradients)
    return tx.update(mine, state)

  specs = {'in_specs': (P('data'), P()), 'out_specs': P()}
  return cases.jit(jax.shard_map(local, mesh=_mesh(), **specs, **options))


def _of_mean(tx):
  mean = lambda gradients: jax.tree.map(lambda x: jnp.mean(x, 0), gradients)
  return cases.jit(lambda gradients, state: tx.update(mean(gradients), state))


@functools.cache
def _mean_run(name, steps):
  tx = _make(name)
  return _run(_of_mean(tx), tx, steps, tx.init(cases.tree(LEAVES)))


@pytest.mark.parametrize(
  'name',
  [
    # What iterates is tested below, too.
    pytest.param(name, marks=pytest.mark.full)
    if name in ALIKE | ITERATED
    else name
    for name in sorted(
      set(grid.PROJECTORS) - NORMALISED - {'randomized', 'warm'}
    )
  ],
)
def test_equals_the_step_on_the_mean_gradient(name):
  steps = 2 if name == 'lagged_power' else STEPS
  parallel = _in_parallel(_make(name, axis_name='data'))
  got, state = _run(parallel, _make(name), steps)
  wanted, wanted_state = _mean_run(name, steps)
  for one, other in zip(got, wanted, strict=True):
    measure.assert_trees_close(one, other, rtol=1e-4, atol=1e-4)
  measure.assert_trees_close(state[0].seed, wanted_state[0].seed)


@pytest.mark.parametrize(
  'name',
  [
    'lagged_power',
    'randomized',
    # Differs by where it starts.
    pytest.param('warm', marks=pytest.mark.full),
  ],
)
def test_subspace_iteration_finds_that_of_the_mean_gradient(name):
  tx = so.project(_spec(), grid.PROJECTORS[name](False), axis_name='data')
  update, state = _in_parallel(tx), _start(tx)
  for _ in range(STEPS):
    _, state = update(_gradients(0), state)
  p = np.asarray(measure.bases(state)['up'], np.float64)
  g = np.asarray(_gradients(0)['up'], np.float64).mean(0)
  kept = np.linalg.norm(np.swapaxes(p, 1, 2) @ g, axis=(1, 2))
  np.testing.assert_allclose(kept, np.linalg.norm(g, axis=(1, 2)), rtol=5e-3)


@pytest.mark.parametrize(
  'name',
  [
    # Whose bases see nothing that varies.
    pytest.param('stiefel', marks=pytest.mark.full),
    'gram',
  ],
)
def test_without_the_tracking_of_what_varies(name):
  tx = _make(name, axis_name='data')
  got, _ = _run(_in_parallel(tx, check_vma=False), tx)
  wanted, _ = _mean_run(name, STEPS)
  for one, other in zip(got, wanted, strict=True):
    measure.assert_trees_close(one, other, rtol=1e-4, atol=1e-4)


def test_bases_learn_from_the_mean_gradient_over_the_mean_energy():
  lr, weight = 0.5, 0.1
  rule = projectors.online_pca(optax.sgd(lr), orthogonality=weight)
  tx = so.project(_spec(), rule, axis_name='data')
  update, state = _in_parallel(tx), _start(tx)
  bases = np.asarray(measure.bases(state)['up'], np.float64)
  for t in range(STEPS):
    gradients = _gradients(t)
    g = np.asarray(gradients['up'], np.float64)
    energy = np.mean(np.sum(g**2, axis=(2, 3)), axis=0)
    nodes, state = update(gradients, state)
    np.testing.assert_allclose(nodes['bias'], gradients['bias'].mean(0), 1e-5)
    for i, p in enumerate(bases):
      x = g[:, i].mean(0) / np.sqrt(energy[i])
      a = p.T @ x
      np.testing.assert_allclose(
        nodes['up'].coords[i], a * np.sqrt(energy[i]), rtol=1e-4, atol=1e-4
      )
      # d/dP of |P P^T X - X|^2 + weight |P^T P - I|^2.
      e = p @ a - x
      down = 2 * (e @ a.T + x @ e.T @ p)
      down += 4 * weight * p @ (p.T @ p - np.eye(3))
      bases[i] = p - lr * down
    np.testing.assert_allclose(
      measure.bases(state)['up'], bases, rtol=1e-4, atol=1e-5
    )
  captured = so.subspace_metrics(state)['up']['captured_energy']
  assert np.isfinite(captured).all()


def test_a_device_without_a_finite_gradient_spoils_no_basis():
  tx = _make('gram', axis_name='data')
  update, state = _in_parallel(tx), _start(tx)
  bad = _gradients(0)
  bad['up'] = bad['up'].at[2, 1].set(jnp.nan)
  updates, after = update(bad, state)
  old, new = measure.bases(state)['up'], measure.bases(after)['up']
  np.testing.assert_array_equal(new[1], old[1])
  assert np.isfinite(np.asarray(new)).all()
  assert np.isnan(np.asarray(updates['up'][1])).all()
  assert np.isfinite(np.asarray(updates['up'][0])).all()


# --- The step of a loss -------------------------------------------------------

# Squares that no rounding hides.
SHAPES = {'w': (32, 64), 'v': (64, 16)}
BATCH = (16, 32)


def _loss(params, x):
  return jnp.mean(jnp.sin(x @ params['w'] + params['bias'][None]) @ params['v'])


def _params():
  rng = np.random.default_rng(3)
  make = lambda shape: jnp.asarray(0.2 * rng.standard_normal(shape), 'float32')
  return {k: make(s) for k, s in SHAPES.items()} | {'bias': make((64,))}


def _plain_step(tx):
  def step(params, state, batch):
    value, gradients = jax.value_and_grad(_loss)(params, batch)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  return step


OPTIMIZERS = {
  'golore': lambda: so.golore(0.02, 2, update_proj_gap=2),
  'online_subspace_descent': lambda: so.online_subspace_descent(0.02, 2),
  # The rest in another place, which `project` does not see.
  'partition': lambda: optax.partition(
    {'matrix': so.golore(0.02, 2, update_proj_gap=2), 'rest': optax.sgd(0.1)},
    {'w': 'matrix', 'v': 'rest', 'bias': 'rest'},
  ),
  # Of a gradient near zero Adam makes steps of rounding, but for eps.
  'residual': lambda: so.subspace_adamw(0.02, 2, update_proj_gap=2, eps=1e-3),
  'adam': lambda: optax.adam(0.02),
}


def _steps(step, tx, mesh=None):
  """Takes three steps, with params and state on a mesh from the start, or not.

  If they come from elsewhere, the first step is a program of its own.
  """
  params = _params()
  state = tx.init(params)
  if mesh:
    everywhere = jax.NamedSharding(mesh, P())
    params, state = jax.device_put((params, state), everywhere)
  step = cases.jit(step)
  rng, values = np.random.default_rng(4), []
  for _ in range(3):
    batch = jnp.asarray(rng.standard_normal(BATCH), jnp.float32)
    params, state, value = step(params, state, batch)
    values.append(value)
  assert step._cache_size() <= (1 if mesh else 2)
  return params, values


@functools.cache
def _plain_steps(name):
  tx = OPTIMIZERS[name]()
  return _steps(_plain_step(tx), tx)


@pytest.mark.parametrize(
  'name',
  # Plain leaves have Adam in the others; 'golore': several axes, below.
  grid.but(OPTIMIZERS, ('adam', 'golore')),
)
def test_step_of_a_loss(name):
  tx, mesh = OPTIMIZERS[name](), _mesh()
  step = so.data_parallel_step(_loss, tx, mesh)
  got = _steps(step, tx, None if name == 'adam' else mesh)
  wanted = _plain_steps(name)
  # Bases that learn divide by another norm, and Adam undoes it but for eps.
  loose = name == 'online_subspace_descent'
  tolerance = {'rtol': 0, 'atol': 2e-2 if loose else 2e-5}
  measure.assert_trees_close(got, wanted, **tolerance)


def _all_reduced(step, tx):
  """Returns the sizes of the arrays that all devices add up."""
  params = _params()
  put = lambda x, spec: jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=jax.NamedSharding(_mesh(), spec)
  )
  same = lambda tree: jax.tree.map(lambda x: put(x, P()), tree)
  batch = put(jnp.zeros(BATCH), P('data'))
  state = jax.eval_shape(tx.init, params)
  lowered = cases.jit(step).lower(same(params), same(state), batch)
  text = lowered.compile().as_text()
  assert 'all-gather' not in text
  lines = re.findall(r'= (.*?) all-reduce(?:-start)?\(', text)
  shapes = [s for line in lines for s in re.findall(r'\w+\[([\d,]*)\]', line)]
  return [math.prod(int(n) for n in s.split(',') if n) for s in shapes]


@pytest.mark.parametrize(
  # The other one moves energies, too.
  'name',
  grid.only(
    ('golore', 'online_subspace_descent'), ('online_subspace_descent',)
  ),
)
def test_a_step_moves_r_m_plus_n_numbers_of_a_matrix(name):
  tx = OPTIMIZERS[name]()
  moved = _all_reduced(so.data_parallel_step(_loss, tx, _mesh()), tx)
  of_matrices = sum(2 * (m + n) for m, n in SHAPES.values())
  # Of bias, loss and energies.
  assert of_matrices <= sum(moved) <= of_matrices + 64 + 8
  if name == 'golore':
    whole = _all_reduced(_plain_step(tx), tx)
    assert sum(whole) >= sum(m * n for m, n in SHAPES.values())


def test_beside_a_mesh_axis_that_shards_parameters():
  mesh = _mesh((2, 2), ('data', 'fsdp'))
  tx = so.golore(0.02, 2, update_proj_gap=2)
  specs = {'w': P('fsdp'), 'v': P(None, 'fsdp'), 'bias': P()}
  with jax.set_mesh(mesh):
    params = {
      k: jax.device_put(x, jax.NamedSharding(mesh, specs[k]))
      for k, x in _params().items()
    }
    made = so.data_parallel_step(_loss, tx, mesh)
    placed = made.state_sharding(params)
    state = cases.jit(tx.init, out_shardings=placed)(params)
    step = cases.jit(made)
    rng = np.random.default_rng(4)
    for _ in range(3):
      batch = jnp.asarray(rng.standard_normal(BATCH), jnp.float32)
      params, state, _ = step(params, state, batch)
  wanted, _ = _plain_steps('golore')
  measure.assert_trees_close(params, wanted, rtol=0, atol=2e-5)
  assert not measure.bases(state)['w'].sharding.is_fully_replicated


@pytest.mark.parametrize(
  'name',
  [
    'online_subspace_descent',
    # Whose state is a part of that.
    pytest.param('golore', marks=pytest.mark.full),
  ],
)
def test_state_stays_where_it_was_placed(name):
  mesh, tx = _mesh((2, 2), ('data', 'fsdp')), OPTIMIZERS[name]()
  specs = {'w': P(None, 'fsdp'), 'v': P('fsdp'), 'bias': P()}
  put = lambda k, x: jax.device_put(x, jax.NamedSharding(mesh, specs[k]))
  params = {k: put(k, x) for k, x in _params().items()}
  step = so.data_parallel_step(_loss, tx, mesh)
  shardings = step.state_sharding(params)
  assert shardings == so.state_sharding(tx, params, replicated=('data',))
  batch = jax.device_put(jnp.ones(BATCH), jax.NamedSharding(mesh, P('data')))
  with jax.set_mesh(mesh):
    state = cases.jit(tx.init, out_shardings=shardings)(params)
    placed = jax.tree.map(lambda x: x.sharding, params)
    step = cases.jit(step, out_shardings=(placed, shardings, None))
    # No other shardings would be taken.
    step = step.lower(params, state, batch).compile()
    for _ in range(3):
      params, state, _ = step(params, state, batch)
  for x, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
  ):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_orthogonalised_beside_a_mesh_axis_that_shards_parameters():
  """Stacks that the other axis divides, and that it does not."""
  mesh = _mesh((2, 2), ('data', 'fsdp'))
  numbers = so.DimensionNumbers(-2, -1)
  spec = so.SubspaceSpec(4, weight_dimension_numbers=numbers)
  tx = so.subspace_muon(0.05, spec=spec, update_proj_gap=2)
  rng = np.random.default_rng(5)
  draw = lambda *shape: 0.2 * rng.standard_normal(shape, np.float32)
  params = {'four': draw(4, 16, 24), 'three': draw(3, 24, 16)}
  batch = draw(8, 16)

  def loss(params, x):
    for i in range(3):
      x = jnp.tanh(x @ params['four'][i]) @ params['three'][i]
    return jnp.mean((x @ params['four'][3]) ** 2)

  def run(made, params, state):
    step = cases.jit(made.step)
    for _ in range(3):
      params, state, _ = step(params, state, batch)
    return params

  wanted = run(so.train_step(loss, tx), params, tx.init(params))
  specs = {'four': P(None, None, 'fsdp'), 'three': P(None, 'fsdp')}
  put = lambda k, x: jax.device_put(x, jax.NamedSharding(mesh, specs[k]))
  placed = {k: put(k, x) for k, x in params.items()}
  made = so.data_parallel_step(loss, tx, mesh)
  with jax.set_mesh(mesh):
    init = cases.jit(tx.init, out_shardings=made.state_sharding(placed))
    found = run(made, placed, init(placed))
  measure.assert_trees_close(found, wanted, rtol=0, atol=5e-5)


def test_placed_states_stay_beside_a_mesh_axis_that_shards_parameters():
  mesh, numbers = _mesh((2, 2), ('data', 'fsdp')), so.DimensionNumbers(-2, -1)
  spec = so.SubspaceSpec(4, weight_dimension_numbers=numbers)
  loss = lambda params, x: jnp.mean((x @ params['w'].sum(0)) ** 2)
  made = so.data_parallel_step(loss, so.subspace_muon(0.05, spec=spec), mesh)
  place = jax.NamedSharding(mesh, P(None, 'fsdp'))
  params = {'w': jax.device_put(jnp.ones((4, 8, 12)), place)}
  state = jax.device_put(made.init(params), made.state_sharding(params))
  step = jax.jit(made.step)
  with jax.set_mesh(mesh):
    for _ in range(2):
      params, state, _ = step(params, state, jnp.ones((8, 8)))
  assert step._cache_size() == 1


def test_a_random_key_in_the_batch_is_the_same_everywhere():
  def loss(params, batch):
    key = jax.random.fold_in(batch['key'], jax.lax.axis_index('data'))
    x = batch['x'] * jax.random.bernoulli(key, 0.5, batch['x'].shape)
    return jnp.mean((x @ params['w']) ** 2)

  params, key = {'w': jnp.ones((8, 12))}, jax.random.key(0)
  step = so.data_parallel_step(loss, optax.sgd(0.0), _mesh())
  batch = {'x': jnp.ones((8, 8)), 'key': key}
  *_, value = jax.jit(step)(params, step.init(params), batch)
  masks = [
    jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, (8 // DEVICES, 8))
    for i in range(DEVICES)
  ]
  x = np.concatenate(masks).astype(np.float64)
  np.testing.assert_allclose(value, np.mean(x.sum(-1) ** 2), rtol=1e-6)


def test_losses_that_need_the_check_off():
  def loss(params, x):  # the carry starts as a constant
    h = jnp.sin(x @ params['w'] + params['bias'][None]) @ params['v']
    total, _ = jax.lax.scan(lambda c, row: (c + row, None), jnp.zeros(16), h)
    return jnp.mean(total) / len(x)

  tx, mesh = OPTIMIZERS['golore'](), _mesh()
  step = so.data_parallel_step(loss, tx, mesh, check_vma=False)
  got, wanted = _steps(step, tx, mesh), _plain_steps('golore')
  measure.assert_trees_close(got, wanted, rtol=0, atol=2e-5)


def test_several_axes_have_parts_of_the_batch():
  mesh = _mesh((2, 2), ('slices', 'data'))
  tx = OPTIMIZERS['golore']()
  step = so.data_parallel_step(_loss, tx, mesh, ('slices', 'data'))
  got, wanted = _steps(step, tx, mesh), _plain_steps('golore')
  measure.assert_trees_close(got, wanted, rtol=0, atol=2e-5)


def test_mesh_must_fit():
  tx = so.golore(0.02, 2)
  with errors.raises(ValueError, "axis_name='batch'", "'data'"):
    so.data_parallel_step(_loss, tx, _mesh(), 'batch')
  with errors.raises(ValueError, 'data', 'explicit', 'AxisType.Auto'):
    so.data_parallel_step(_loss, tx, _mesh(kind=AxisType.Explicit))


def test_also_under_a_named_vmap():
  tx = _make('stiefel', axis_name='data')
  state = tx.init(cases.tree(LEAVES))

  def local(gradients):
    return tx.update(gradients, state)[0]

  got = jax.jit(jax.vmap(local, axis_name='data'))(_gradients(0))
  wanted = _mean_run('stiefel', STEPS)[0][0]
  for i in range(DEVICES):
    one = jax.tree.map(lambda x, i=i: x[i], got)
    measure.assert_trees_close(one, wanted, rtol=1e-4, atol=1e-4)
