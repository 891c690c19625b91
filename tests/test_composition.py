"""Inside and outside of other optax transformations, beyond test_wrappers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import measure
import subspace_optax as so
from subspace_optax import projectors

SPEC = so.SubspaceSpec(2)
PARAMS = cases.tree(cases.SMALL)
STEPS = 5


def _gradients(scale=1.0):
  return [cases.tree(cases.SMALL, 50 + t, scale) for t in range(STEPS)]


def _core(stagger=True, projector=None):
  return so.subspace(
    SPEC,
    projector or projectors.svd(2, 'gram', stagger=stagger),
    optax.scale_by_adam(),
    transport='first',
  )


@functools.cache
def _jitted(tx):
  return cases.jit(tx.update)


def _run(tx, gradients, params=PARAMS, **extra_args):
  """Returns the updates of every step, and the last state."""
  state, update, history = tx.init(params), _jitted(tx), []
  for gradient in gradients:
    updates, state = update(gradient, state, params, **extra_args)
    history.append(updates)
  assert update._cache_size() == 1
  return history, state


@functools.cache
def _alone():
  """Returns the updates of `_core` without anything around it."""
  return _run(_core(), _gradients())[0]


def test_clipping_before_is_clipping_of_the_gradients():
  clip = optax.clip_by_global_norm(1.0)
  norm = lambda tree: np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(tree)))
  clipped = [
    jax.tree.map(lambda x, g=g: x / norm(g), g) for g in _gradients(3.0)
  ]
  # Random bases: factorised ones magnify the rounding of the two programs.
  core = _core(projector=projectors.stiefel(2))
  got, _ = _run(optax.chain(clip, core), _gradients(3.0))
  wanted, _ = _run(core, clipped)
  measure.assert_trees_close(got, wanted, rtol=1e-5, atol=1e-6)
  unclipped, _ = _run(core, _gradients(3.0))
  assert not np.allclose(got[-1]['up'], unclipped[-1]['up'], rtol=1e-3)


def test_clipping_after_bounds_the_updates():
  got, _ = _run(
    optax.chain(_core(), optax.clip_by_global_norm(0.5)), _gradients()
  )
  wanted = _alone()
  for one, other in zip(got, wanted, strict=True):
    np.testing.assert_allclose(optax.tree.norm(one), 0.5, rtol=1e-5)
    scale = 0.5 / optax.tree.norm(other)
    np.testing.assert_allclose(one['up'], scale * other['up'], rtol=1e-5)


def test_reduce_on_plateau():
  plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
  got, state = _run(optax.chain(_core(), plateau), _gradients(), value=1.0)
  wanted = _alone()
  scales = [
    np.asarray(one['up'] / other['up']).mean()
    for one, other in zip(got, wanted, strict=True)
  ]
  np.testing.assert_allclose(scales[0], 1.0, rtol=1e-5)
  np.testing.assert_allclose(scales[-1], state[1].scale, rtol=1e-5)
  assert scales[-1] < 0.9


def test_schedule_free_outside():
  """Its own sequence z moves by the wrapped optimizer's updates."""
  base = optax.chain(_core(), optax.scale(-0.1))
  tx = optax.contrib.schedule_free(base, learning_rate=0.1, b1=0.9)
  params, state = PARAMS, tx.init(PARAMS)
  z, base_state = PARAMS, base.init(PARAMS)
  update, base_update = cases.jit(tx.update), cases.jit(base.update)
  for gradient in _gradients():
    step, base_state = base_update(gradient, base_state, params)
    z = optax.apply_updates(z, step)
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    measure.assert_trees_close(state.z, z, rtol=1e-4, atol=1e-5)
  x = optax.contrib.schedule_free_eval_params(state, params)
  assert np.isfinite(x['up']).all()
  assert so.subspace_metrics(state)['up']['captured_energy'].shape == (3,)


def test_partition_between_two_points_of_the_grid():
  params = {'up': PARAMS['up'], 'b': PARAMS['up'] + 1.0}
  gradients = [{'up': g['up'], 'b': 2.0 * g['up']} for g in _gradients()]
  second = so.subspace(
    SPEC,
    projectors.gaussian(2, regenerate=True),
    optax.scale_by_lion(),
    per_matrix=True,
  )
  both = optax.partition({'x': _core(), 'y': second}, {'up': 'x', 'b': 'y'})
  got, state = _run(both, gradients, params)
  alone = [{'b': g['b']} for g in gradients]
  wanted, _ = _run(second, alone, {'b': params['b']})
  for one, a, b in zip(got, _alone(), wanted, strict=True):
    np.testing.assert_allclose(one['up'], a['up'], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one['b'], b['b'], rtol=1e-4, atol=1e-5)
  assert set(so.subspace_metrics(state)) == {'up', 'b'}


def test_multi_steps_outside_with_stagger():
  """Bases take their turns by steps, not by micro-steps."""
  doubled = [g for g in _gradients() for _ in range(2)]
  got, _ = _run(optax.MultiSteps(_core(), 2), doubled)
  wanted = _alone()
  for updates in got[::2]:
    np.testing.assert_array_equal(updates['up'], 0.0)
  for one, other in zip(got[1::2], wanted, strict=True):
    np.testing.assert_allclose(one['up'], other['up'], rtol=1e-4, atol=1e-5)


def test_apply_if_finite_around_stagger_and_accumulation():
  tx = so.subspace(
    SPEC,
    projectors.stiefel(2, stagger=True),
    optax.scale_by_adam(),
    every_k=2,
    after=optax.scale(-1.0),
  )
  gradients = _gradients()
  bad = jax.tree.map(lambda x: x * jnp.nan, gradients[0])
  got, _ = _run(
    optax.apply_if_finite(tx, 3), [gradients[0], bad, *gradients[1:]]
  )
  wanted, _ = _run(tx, gradients)
  np.testing.assert_array_equal(got[1]['up'], 0.0)
  good = [got[0], *got[2:]]
  for one, other in zip(good, wanted, strict=True):
    np.testing.assert_allclose(one['up'], other['up'], rtol=1e-5, atol=1e-6)


def test_injected_hyperparameters_of_the_inner_optimizer():
  inject = optax.inject_hyperparams(optax.scale_by_adam)
  injected = so.subspace(SPEC, projectors.stiefel(2), inject(b1=0.5))
  got, _ = _run(injected, _gradients())
  fixed = so.subspace(SPEC, projectors.stiefel(2), optax.scale_by_adam(b1=0.5))
  wanted, _ = _run(fixed, _gradients())
  measure.assert_trees_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_centred_moments_must_not_part():
  tx = so.subspace(
    SPEC, projectors.stiefel(2), optax.scale_by_stddev(), transport='first'
  )
  with pytest.raises(ValueError, match='ScaleByRStdDevState'):
    tx.init(PARAMS)


def test_refresh_gradients_under_masked_and_partition():
  core = so.subspace(SPEC, projectors.svd(2), optax.scale_by_adam())
  mask = {'up': True, 'bias': False}
  big = cases.tree(cases.SMALL, 9)
  wanted, _ = _run(core, _gradients(), refresh_gradients=big)
  labels = {'up': 'x', 'bias': 'y'}
  for tx in (
    optax.masked(core, mask),
    optax.partition({'x': core, 'y': optax.scale(1.0)}, labels),
  ):
    got, _ = _run(tx, _gradients(), refresh_gradients=big)
    np.testing.assert_allclose(
      got[-1]['up'], wanted[-1]['up'], rtol=1e-4, atol=1e-6
    )


def test_a_basis_that_would_overflow_stays():
  """Online PCA diverges from bases as long as Gaussian ones may be."""
  rule = projectors.switch(
    {0: projectors.gaussian(1), 2: projectors.online_pca(optax.sgd(1e8))}
  )
  got, state = _run(so.subspace(SPEC, rule, optax.identity()), _gradients() * 4)
  assert np.isfinite(got[-1]['up']).all()
  assert np.isfinite(state[0].subspaces.basis['up']).all()


def test_accumulation_keeps_dtypes_of_what_follows():
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  tx = so.subspace(
    SPEC,
    projectors.stiefel(2),
    optax.scale_by_adam(),
    every_k=2,
    after=optax.trace(0.9),
  )
  init = jax.eval_shape(tx.init, params)
  _, state = jax.eval_shape(tx.update, _gradients()[0], init, params)
  types = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
  assert types(state) == types(init)


@pytest.mark.parametrize('init', [lambda f: f, jax.jit])
def test_copies_of_params_are_refused(init):
  inner = optax.contrib.schedule_free_adamw(0.1)
  tx = so.subspace(SPEC, projectors.stiefel(2), inner, params='coordinates')
  with pytest.raises(ValueError, match='keeps a copy of the params'):
    init(tx.init)(PARAMS)


def test_plain_leaves_are_given_their_params():
  tx = so.subspace(
    so.SubspaceSpec(2, allow_empty=True),
    projectors.stiefel(2),
    optax.scale_by_adam(),
    plain=optax.add_decayed_weights(0.5),
  )
  of_bias = lambda tree: {'bias': tree['bias']}
  got, _ = _run(tx, [of_bias(_gradients()[0])], of_bias(PARAMS))
  wanted = _gradients()[0]['bias'] + 0.5 * PARAMS['bias']
  np.testing.assert_allclose(got[0]['bias'], wanted, rtol=1e-6)
