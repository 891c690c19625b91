"""The state in an Orbax checkpoint, and training that resumes from it."""

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
import grid
import measure
import subspace_optax as so


def _abstract(tree, mesh=None):
  """Returns shapes, dtypes and shardings, on another mesh if it is given."""

  def one(x):
    sharding = x.sharding
    if mesh is not None:
      sharding = NamedSharding(mesh, getattr(sharding, 'spec', P()))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(one, tree)


def _save_and_load(folder, tree, abstract):
  ocp.save(folder / 'state', tree)
  return ocp.load(folder / 'state', abstract)


def _assert_comes_back(folder, saved):
  got = _save_and_load(folder, saved, _abstract(saved))
  assert jax.tree.structure(got) == jax.tree.structure(saved)
  assert measure.types(got) == measure.types(saved)
  measure.assert_trees_close(got, saved)
  return got


@pytest.mark.parametrize('name', cases.CASES)
def test_state_comes_back(name, tmp_path):
  tx = cases.CASES[name].make(cases.LEAVES)
  _assert_comes_back(tmp_path, measure.filled(tx, cases.tree(cases.LEAVES)))


# One whose bases are random, one whose bases have a state.
_GOES_ON = ('golore_late', 'online')


@pytest.mark.parametrize(
  'name',
  grid.only(cases.CASES, _GOES_ON),
)
def test_training_goes_on_to_the_bit(name, tmp_path):
  small = measure.small(name)
  gradients = [cases.tree(cases.SMALL, 80 + t) for t in range(cases.STEPS)]
  history = small.run(gradients)
  # Between two refreshes, and before `switch` and `golore` change rules.
  params, state, _ = history[2]
  got = _assert_comes_back(tmp_path, {'params': params, 'state': state})
  resumed = small.run(gradients[3:], (got['params'], got['state']))
  for one, other in zip(resumed, history[3:], strict=True):
    measure.assert_trees_close(one, other)
  # A random basis is that of its period, not of the process.
  assert (
    np.asarray(measure.bases(resumed[-1][1])['up'])
    != np.asarray(measure.bases(state)['up'])
  ).any()


def test_state_moves_to_another_mesh(tmp_path):
  params = {
    'layers': jax.random.normal(jax.random.key(1), (2, 16, 32)),
    'bias': jnp.ones(32),
  }
  specs = {
    'layers': P(None, 'fsdp', 'tensor'),
    'bias': P('tensor'),
  }
  tx = so.online_subspace_descent(0.01, rank=4)

  def mesh_of(shape):
    return jax.make_mesh(
      shape, ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2
    )

  def put(mesh):
    return {
      path: jax.device_put(x, NamedSharding(mesh, specs[path]))
      for path, x in params.items()
    }

  @cases.jit
  def step(params, state):
    gradients = jax.tree.map(jnp.sin, params)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  first, second = mesh_of((2, 2)), mesh_of((4, 1))
  with jax.set_mesh(first):
    there = put(first)
    init = cases.jit(tx.init, out_shardings=so.state_sharding(tx, there))
    there, state = step(there, init(there))
    saved = {'params': there, 'state': state}
    ocp.save(tmp_path / 'state', saved)
    wanted = step(there, state)
  with jax.set_mesh(second):
    abstract = _abstract(saved, second)
    got = ocp.load(tmp_path / 'state', abstract)
    measure.assert_trees_close(got, saved)
    for x, y in zip(
      jax.tree.leaves(got), jax.tree.leaves(abstract), strict=True
    ):
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    basis = measure.bases(got['state'])['layers']
    assert basis.sharding.mesh.shape == {'fsdp': 4, 'tensor': 1}
    assert basis.addressable_shards[0].data.size * 4 == basis.size
    measure.assert_trees_close(
      step(got['params'], got['state']), wanted, rtol=1e-4, atol=1e-5
    )


def test_state_has_what_checkpoints_can_hold():
  tx = so.golore(0.01, rank=3, random_from=4)
  params = cases.tree(cases.LEAVES) | {'scalar': jnp.ones(())}

  def check(params):
    for x in jax.tree.leaves(tx.init(params)):
      assert isinstance(x, jax.Array) and x.size > 0
      assert not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

  jax.eval_shape(check, params)
