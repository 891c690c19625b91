"""The examples of nnx and linen on a mesh: placement and compilations."""

import contextlib
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import linen_mesh
import measure
import nnx_mesh
import subspace_optax as so


@contextlib.contextmanager
def _compilations():
  """Collects what XLA compiles meanwhile."""
  found = []

  def listen(event, duration, **kwargs):
    del duration, kwargs
    if event.endswith('/backend_compile_duration'):
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def _spec(x):
  return P(*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))


# Of `up` the rows are projected, of `down` the columns: both are `fsdp`. The
# rank takes what is left.
BASES = {
  'blocks/down/kernel': P(None, 'fsdp', 'tensor'),
  'blocks/up/kernel': P(None, 'fsdp', 'tensor'),
}
COORDS = {
  'blocks/down/kernel': P(None, 'tensor', 'fsdp'),
  'blocks/up/kernel': P(None, 'fsdp', 'tensor'),
}


def _check_placed(state, bases, coords):
  """Checks the shardings of bases and of the moments of coordinates."""
  project, in_subspace = state[0][0], state[0][1]
  adam = project.projector.optimizer[0]
  for basis in (project.subspaces.basis, adam.mu, adam.nu):
    assert _specs(basis) == bases
  for moment in (in_subspace.inner.mu, in_subspace.inner.nu):
    assert _specs(moment) == coords
  for x in jax.tree.leaves(state):
    device = x.addressable_shards[0].data.nbytes
    assert x.ndim < 3 or device * 4 == x.nbytes


def _specs(tree):
  pairs = jax.tree.leaves_with_path(tree)
  name = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
  return {name(path): _spec(x) for path, x in pairs}


_make = jax.jit(lambda: nnx_mesh.Model(2, nnx.Rngs(0)))


@pytest.fixture
def trained():
  """A model in `nnx.Optimizer`, a function that trains it, and its mesh."""
  mesh = nnx_mesh.make_mesh()
  assert dict(mesh.shape) == {'fsdp': 2, 'tensor': 2}
  with jax.set_mesh(mesh):
    model = _make()
    tx = so.online_subspace_descent(2e-2, rank=8)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.device_put(
      jax.random.normal(jax.random.key(1), (16, 32)),
      jax.NamedSharding(mesh, P('fsdp')),
    )
    yield model, optimizer, lambda: nnx_mesh.step(model, optimizer, x, x)


def test_nnx_optimizer_is_sharded_and_compiled_once(trained):
  model, optimizer, step = trained
  assert model.blocks.up.kernel[...].sharding.spec == P(None, 'fsdp', 'tensor')
  _check_placed(nnx.as_pure(optimizer.opt_state), BASES, COORDS)
  with _compilations() as first:
    jax.block_until_ready(step())
  with _compilations() as later:
    for _ in range(3):
      jax.block_until_ready(step())
  assert first and not later
  metrics = so.subspace_metrics(optimizer.opt_state)
  assert metrics.keys() == BASES.keys()
  for of_kernel in metrics.values():
    energy = np.asarray(of_kernel['captured_energy'])
    assert energy.shape == (2,)
    assert (energy > 0.05).all() and (energy < 1.01).all()
  _check_placed(nnx.as_pure(optimizer.opt_state), BASES, COORDS)
  assert _spec(model.blocks.up.kernel[...]) == P(None, 'fsdp', 'tensor')
  assert _spec(model.blocks.down.kernel[...]) == P(None, 'tensor', 'fsdp')


# The layers are along axis 1.
LINEN_BASES = {
  'layers/wi_0/kernel': P('fsdp', None, 'tensor'),
  'layers/wo/kernel': P(None, 'fsdp', 'tensor'),
}
LINEN_COORDS = {
  'layers/wi_0/kernel': P('fsdp', None, 'tensor'),
  'layers/wo/kernel': P('tensor', None, 'fsdp'),
}


def test_linen_train_state_is_sharded_and_compiled_once():
  mesh = nnx_mesh.make_mesh()
  with jax.set_mesh(mesh):
    x = jax.random.normal(jax.random.key(1), (16, 32))
    x = jax.device_put(x, jax.NamedSharding(mesh, P('fsdp')))
    state = linen_mesh.make_state(mesh, x)
    params = _specs(state.params)
    assert params['layers/wo/kernel'] == P('tensor', None, 'fsdp')
    _check_placed(state.opt_state, LINEN_BASES, LINEN_COORDS)
    for _ in range(3):
      state, _ = linen_mesh.step(state, x, x)
  assert linen_mesh.step._cache_size() == 1
  _check_placed(state.opt_state, LINEN_BASES, LINEN_COORDS)
  assert _specs(state.params) == params


def test_resize_rank_of_an_nnx_optimizer(trained):
  model, optimizer, step = trained
  step()
  params = nnx.state(model, nnx.Param)
  tx = so.online_subspace_descent(2e-2, rank=4)
  state = so.resize_rank(tx, optimizer.opt_state, params)
  start = tx.init(params)
  assert jax.tree.structure(state) == jax.tree.structure(start)
  for x, y in zip(*map(jax.tree.leaves, (state, start)), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
  old = nnx.as_pure(optimizer.opt_state)[0][0].subspaces.basis
  new = measure.project_state(state).subspaces.basis
  for name in ('up', 'down'):
    was, now = (np.asarray(t['blocks'][name]['kernel']) for t in (old, new))
    np.testing.assert_array_equal(now, was[..., :4])
  resumed = nnx.Optimizer(model, tx, wrt=nnx.Param)
  is_variable = lambda x: isinstance(x, nnx.Variable)
  variables = jax.tree.leaves(resumed.opt_state, is_leaf=is_variable)
  for variable, x in zip(variables, jax.tree.leaves(state), strict=True):
    variable[...] = x
  # Tracing is where a state of another structure or shape would be rejected.
  x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
  assert nnx.eval_shape(nnx_mesh.step, model, resumed, x, x).shape == ()


@pytest.mark.parametrize('example', [nnx_mesh, linen_mesh])
def test_example_lowers_the_loss(example, capsys):
  first, last = example.main()
  assert last < 0.6 * first
  assert "'fsdp': 2, 'tensor': 2" in capsys.readouterr().out
