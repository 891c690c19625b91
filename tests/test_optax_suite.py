"""What optax asks of every contributed optimizer, of the ready-made ones.

On a stack of matrices at a rank below both of their sides, so that it is the
subspace whose properties are tested.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grid
import references as ref
import subspace_optax as so

# Learning rates that come close to the target in 200 steps, Trion's in 500: its
# steps are of one length, and few columns of a fixed transform a step.
RATES = {
  'galore': 0.1,
  'golore': 0.3,
  'online_subspace_descent': 0.1,
  'fira_adamw': 0.3,
  'apollo_adamw': 0.3,
  'ldadamw': 0.1,
  'subspace_adamw': 0.2,
  'subspace_muon': 0.01,
  'dion': 0.01,
  'trion': 0.005,
  'scale': 0.02,
  'normuon': 0.01,
}
every_optimizer = pytest.mark.parametrize('name', RATES)
# Whose arguments others take, too, and hand on in the same way.
ALIKE = ('golore', 'subspace_adamw', 'trion')
DTYPES = ['float16', 'bfloat16', 'float32']


def factory(name):
  """Returns the factory, at rank 2 and with a new basis in every other step."""
  make = so.optimizers.READY_MADE[name]
  options = {'rank': 2, 'update_proj_gap': 2}
  return functools.partial(
    make, **{k: x for k, x in options.items() if so.optimizers.takes(make, k)}
  )


def tree(seed, dtype=jnp.float32):
  shapes = {'stack': (2, 6, 8), 'bias': (3,)}
  return {k: ref.normal(seed, s).astype(dtype) for k, s in shapes.items()}


def types(x):
  return jax.tree.map(jax.typeof, x)


@functools.cache
def compiled(name):
  """Returns the optimizer with a schedule, and its update."""
  tx = factory(name)(optax.constant_schedule(RATES[name]), weight_decay=1e-3)
  return tx, ref.jit(tx.update)


def run(tx, update, **extra_args):
  """Returns the updates of three steps, twice from the start."""
  params, all_updates = tree(0), []
  for state in (tx.init(params), tx.init(params)):
    for t in range(3):
      updates, state = update(tree(t + 1), state, params, **extra_args)
      all_updates.append(updates)
  return all_updates, state


@pytest.mark.parametrize(
  'name',
  grid.but(RATES, ALIKE),
)
def test_traced_floats_equal_constants(name):
  """Every float argument, beside a schedule and an argument nobody knows."""
  make = factory(name)
  arguments = inspect.signature(make).parameters.values()
  floats = {p.name: p.default for p in arguments if type(p.default) is float}
  floats |= {'learning_rate': RATES[name], 'weight_decay': 1e-3}
  assert 'scale' in floats
  static = [k for k in ('rank', 'update_proj_gap') if k in make.keywords]
  tx = optax.inject_hyperparams(make, static_args=static)(**floats)
  got, state = run(tx, ref.jit(tx.update))
  assert state.hyperparams.keys() == floats.keys()
  wanted, _ = run(*compiled(name), unknown=jnp.ones(2))
  assert compiled(name)[1]._cache_size() == 1
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@every_optimizer
def test_reaches_a_target_of_its_rank(name):
  tx, update = compiled(name)
  left, right = ref.normal(5, (2, 6, 2)), ref.normal(6, (2, 2, 8))
  target = {'stack': left @ right, 'bias': ref.normal(7, (3,))}
  params = jax.tree.map(jnp.zeros_like, target)
  state = tx.init(params)
  for _ in range(500 if name == 'trion' else 200):
    gradient = jax.tree.map(lambda p, t: p - t, params, target)
    updates, state = update(gradient, state, params, unknown=jnp.ones(2))
    params = optax.apply_updates(params, updates)
  for k in target:
    gap = np.linalg.norm(params[k] - target[k])
    assert gap < 0.05 * np.linalg.norm(target[k]), (k, gap)


@pytest.mark.parametrize('name, dtype', grid.cover(RATES, DTYPES, of=3))
def test_updates_and_state_keep_their_types(name, dtype):
  """`MultiSteps` has a condition, one of whose branches does nothing."""
  tx, params = optax.MultiSteps(factory(name)(0.01), 4), tree(0, dtype)
  state = jax.eval_shape(tx.init, params)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert types(updates) == types(params)
  assert types(after) == types(state)


@every_optimizer
def test_map_params(name):
  tx = factory(name)(0.01)
  state = jax.eval_shape(tx.init, tree(0))
  mapped = optax.tree.map_params(
    tx, lambda x: 'of a leaf', state, transform_non_params=lambda x: 'other'
  )
  assert jax.tree.structure(mapped) == jax.tree.structure(state)
  leaves = jax.tree.leaves(mapped)
  assert {'of a leaf', 'other'} == set(leaves)
