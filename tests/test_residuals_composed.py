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
# Whose residuals keep what those of others keep.
ALIKE = ('apollo_mini', 'subspace_adamw', 'trion')


def _some(points):
  """Returns points for `parametrize`; those of what is alike with `--full`."""
  return [
    pytest.param(
      *point.values,
      marks=[*point.marks, *[pytest.mark.full] * (point.values[0] in ALIKE)],
    )
    for point in points
  ]


every_optimizer = pytest.mark.parametrize(
  'name', _some(map(pytest.param, MADE))
)


@functools.cache
def _small(name):
  return measure.compiled(MADE[name]())


def _gradients(steps=STEPS, seed=40):
  """Multiples of 2^-10, whose sums and means are exact."""
  round_off = lambda x: jnp.round(1024 * x) / 1024
  trees = [cases.tree(cases.SMALL, seed + t) for t in range(steps)]
  return jax.tree.map(round_off, trees)


@functools.cache
def _alone(name):
  return _small(name).run(_gradients())


# Numbers, and arrays like the leaf that the next gradient or momentum is added
# to. Those of the others are like one of these, or there are none.
_RULES = ('fira_adamw', 'ldadamw')
WRAPPED = grid.only(MADE, _RULES)


@pytest.mark.parametrize('name', WRAPPED)
def test_inside_multi_steps_apply_if_finite_chain_and_partition(name):
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
  small = measure.compiled(optax.MultiSteps(tx, 2))
  means, noise = _gradients(4), _gradients(4, 60)
  micro = [
    jax.tree.map(f, mean, of_one)
    for mean, of_one in zip(means, noise, strict=True)
    for f in (jnp.add, jnp.subtract)
  ]
  history = small.run(micro)
  for t, mean in enumerate(means):
    for x in jax.tree.leaves(history[2 * t][2]):
      np.testing.assert_array_equal(x, 0.0)
    got, wanted = history[2 * t + 1][2], _alone(name)[t][2]
    np.testing.assert_allclose(got['up'], wanted['up'], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got['bias'], -0.5 * mean['bias'], rtol=1e-6)
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
  # The same program goes on, with what is the same to the bit.
  assert measure.types(got) == measure.types(saved)
  host = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), got)
  resumed = _small(name).run(_gradients()[3:], (host['params'], host['state']))
  for one, other in zip(resumed, history[3:], strict=True):
    measure.assert_trees_close(one, other)
  assert _small(name).update._cache_size() == 1


@pytest.mark.parametrize(
  'name, bad_step, bad',
  _some(grid.cover(MADE, [0, 3], [np.nan, np.inf], of=2)),
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
  'name, dtypes', grid.cover(MADE, DTYPES, of=4), ids=str
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
  state = _alone(name)[0][1]
  marked = optax.tree.map_params(tx, lambda x: x + x, state)
  assert measure.types(marked) == measure.types(state)
