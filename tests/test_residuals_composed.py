"""Residuals inside optax's wrappers, in checkpoints, after bad gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp
import pytest

import cases
import grid
import measure
import subspace_optax as so
from subspace_optax import projectors
from subspace_optax import residuals

LR, STEPS = 0.02, 6
SPEC = so.SubspaceSpec(
  3, weight_dimension_numbers=cases.dimension_numbers(cases.SMALL)
)


def _of_rule(rule):
  return so.subspace(
    SPEC,
    projectors.stiefel(2),
    optax.scale_by_adam(),
    transport='first',
    residual=rule,
    after=optax.scale(-LR),
  )


MADE = {
  'fira_adamw': lambda: so.fira_adamw(LR, update_proj_gap=2, spec=SPEC),
  'apollo_adamw': lambda: so.apollo_adamw(LR, update_proj_gap=2, spec=SPEC),
  'apollo_mini': lambda: so.apollo_adamw(
    LR, update_proj_gap=2, spec=SPEC, granularity='tensor'
  ),
  'ldadamw': lambda: so.ldadamw(LR, spec=SPEC),
  'subspace_adamw': lambda: so.subspace_adamw(LR, update_proj_gap=2, spec=SPEC),
  'subspace_muon': lambda: so.subspace_muon(LR, update_proj_gap=2, spec=SPEC),
  'dion': lambda: so.dion(LR, spec=SPEC),
  'trion': lambda: so.trion(LR, spec=SPEC),
  'sign': lambda: _of_rule(residuals.sign(0.3)),
  'error_feedback': lambda: _of_rule(residuals.error_feedback(b1=0.9)),
}
every_optimizer = pytest.mark.parametrize('name', MADE)


@functools.cache
def _small(name):
  return measure.compiled(MADE[name]())


def _gradients(steps=STEPS):
  return [cases.tree(cases.SMALL, 40 + t) for t in range(steps)]


@functools.cache
def _alone(name):
  return _small(name).run(_gradients())


@every_optimizer
def test_inside_chain_partition_and_apply_if_finite(name):
  labels = {'up': 'subspace', 'bias': 'plain'}
  parts = {'subspace': MADE[name](), 'plain': optax.sgd(0.5)}
  tx = optax.apply_if_finite(
    optax.chain(
      optax.clip_by_global_norm(1e9),
      optax.partition(
        parts, lambda params: jax.tree.map(lambda _, k: k, params, labels)
      ),
    ),
    3,
  )
  small = measure.compiled(tx)
  gradients = _gradients(4)
  for t, (got, wanted) in enumerate(
    zip(small.run(gradients), _alone(name), strict=False)
  ):
    np.testing.assert_allclose(
      got[2]['up'], wanted[2]['up'], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(got[2]['bias'], -0.5 * gradients[t]['bias'])
  assert small.update._cache_size() == 1


@every_optimizer
def test_multi_steps_outside(name):
  micro, means = [], _gradients(3)
  for t, mean in enumerate(means):
    noise = cases.tree(cases.SMALL, 60 + t)
    micro += [
      jax.tree.map(jnp.add, mean, noise),
      jax.tree.map(jnp.subtract, mean, noise),
    ]
  small = measure.compiled(optax.MultiSteps(MADE[name](), 2))
  got = small.run(micro)
  for t in range(3):
    for x in jax.tree.leaves(got[2 * t][2]):
      np.testing.assert_array_equal(x, 0.0)
    wanted = _alone(name)[t][2]
    measure.assert_trees_close(got[2 * t + 1][2], wanted, rtol=2e-3, atol=1e-5)
  assert small.update._cache_size() == 1


@every_optimizer
def test_training_goes_on_to_the_bit_from_a_checkpoint(name, tmp_path):
  history = _alone(name)
  params, state, _ = history[2]
  saved = {'params': params, 'state': state}
  ocp.save(tmp_path / 'state', saved)
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), saved
  )
  got = ocp.load(tmp_path / 'state', abstract)
  measure.assert_trees_close(got, saved)
  resumed = _small(name).run(_gradients()[3:], (got['params'], got['state']))
  for one, other in zip(resumed, history[3:], strict=True):
    measure.assert_trees_close(one, other)


@pytest.mark.parametrize(
  'name, bad_step, bad', grid.cover(MADE, [0, 3], [np.nan, np.inf], of=2)
)
def test_one_bad_matrix_touches_no_other_and_no_residual_state(
  name, bad_step, bad
):
  gradients = _gradients()
  up = gradients[bad_step]['up']
  gradients[bad_step]['up'] = up.at[1, 2, 3].set(bad)
  others = jnp.array([0, 2])
  history = _small(name).run(gradients)
  for (_, state, updates), (_, _, wanted) in zip(
    history, _alone(name), strict=True
  ):
    np.testing.assert_allclose(
      updates['up'][others], wanted['up'][others], rtol=1e-4, atol=1e-6
    )
    # The inner optimizer's moments are NaN's to keep, as in optax.
    state = jax.tree.map(np.asarray, measure.residual_state(state))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


# Of parameters and of gradients.
DTYPES = [
  ('float32', 'bfloat16'),
  ('bfloat16', 'float32'),
  ('float16', 'float16'),
  ('float64', 'float32'),
]


@pytest.mark.parametrize(
  'name, dtypes', grid.cover(MADE, DTYPES, of=2), ids=str
)
def test_any_dtypes_of_parameters_and_gradients(name, dtypes):
  of_params, of_gradients = dtypes
  cast = lambda dtype: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype), cases.tree(cases.SMALL)
  )
  with jax.enable_x64('float64' in (of_params, of_gradients)):
    tx, params = MADE[name](), cast(of_params)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(
      tx.update, cast(of_gradients), state, params
    )
    found = {x.dtype.name for x in jax.tree.leaves(updates)}
    assert found == {of_gradients}
    assert measure.types(after) == measure.types(state)


@every_optimizer
def test_map_params(name):
  tx = MADE[name]()
  state = tx.init(cases.tree(cases.SMALL))
  marked = optax.tree.map_params(tx, lambda x: x + x, state)
  assert measure.types(marked) == measure.types(state)
