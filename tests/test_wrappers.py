"""Inside and around optax's own transformations."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import grid
import measure
import subspace_optax as so
from subspace_optax import projectors

READY = ('galore', 'golore', 'golore_late', 'online')


def _gradients(steps=5):
  return [cases.tree(cases.SMALL, 40 + t) for t in range(steps)]


def _alone(name, gradients):
  return measure.small(name).run(gradients)


def _assert_same(got, wanted):
  np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)


def test_chain():
  tx = optax.chain(
    optax.clip_by_global_norm(1e9),
    optax.chain(measure.small('galore').tx),
    optax.scale(2.0),
  )
  gradients = _gradients()
  got = measure.compiled(tx).run(gradients)
  wanted = _alone('galore', gradients)
  for (_, state, updates), (_, wanted_state, wanted_updates) in zip(
    got, wanted, strict=True
  ):
    for path in cases.SMALL:
      _assert_same(updates[path], 2.0 * wanted_updates[path])
    measure.assert_trees_close(
      measure.bases(state), measure.bases(wanted_state), rtol=1e-5, atol=1e-6
    )


def test_partition():
  labels = {'up': 'subspace', 'bias': 'plain'}
  tx = optax.partition(
    {'subspace': measure.small('galore').tx, 'plain': optax.sgd(0.5)},
    lambda params: jax.tree.map(lambda _, label: label, params, labels),
  )
  # The dimension numbers name leaves that the partition hides.
  gradients = _gradients(3)
  small = measure.compiled(tx)
  got = small.run(gradients)
  wanted = _alone('galore', gradients)
  for t, ((_, _, updates), (_, _, wanted_updates)) in enumerate(
    zip(got, wanted, strict=True)
  ):
    _assert_same(updates['up'], wanted_updates['up'])
    _assert_same(updates['bias'], -0.5 * gradients[t]['bias'])
  assert small.update._cache_size() == 1


@pytest.mark.parametrize('by', ['tree', 'callable'])
def test_masked(by):
  mask = {'up': True, 'bias': False}
  given = mask if by == 'tree' else lambda params: mask
  tx = optax.masked(measure.small('online').tx, given)
  gradients = _gradients(3)
  got = measure.compiled(tx).run(gradients)
  wanted = _alone('online', gradients)
  for t, ((_, _, updates), (_, _, wanted_updates)) in enumerate(
    zip(got, wanted, strict=True)
  ):
    _assert_same(updates['up'], wanted_updates['up'])
    _assert_same(updates['bias'], gradients[t]['bias'])


def test_mask_that_hides_every_matrix():
  tx = optax.masked(so.golore(0.02, rank=3), {'up': False, 'bias': True})
  params = cases.tree(cases.SMALL)
  updates, state = tx.update(params, tx.init(params), params)
  np.testing.assert_array_equal(updates['up'], params['up'])
  wanted, _ = optax.adam(0.02).update(params, optax.adam(0.02).init(params))
  _assert_same(updates['bias'], wanted['bias'])
  assert so.subspace_metrics(state) == {}


@pytest.mark.parametrize(
  'name',
  # In three steps all bases are SVDs, as 'galore' has them, or Haar samples,
  # which tests/test_composition.py has.
  grid.but(READY, ('golore', 'golore_late')),
)
def test_multi_steps_outside(name):
  multi = optax.MultiSteps(measure.small(name).tx, 2)
  means = _gradients(3)
  noise = [cases.tree(cases.SMALL, 60 + t) for t in range(3)]
  micro = []
  for mean, n in zip(means, noise, strict=True):
    micro.append(jax.tree.map(lambda g, e: g + e, mean, n))
    micro.append(jax.tree.map(lambda g, e: g - e, mean, n))
  small = measure.compiled(multi)
  params, start = small.init()
  got = small.run(micro, (params, start))
  wanted = _alone(name, means)
  before = measure.bases(start)
  for t in range(3):
    _, state, updates = got[2 * t]
    for x in jax.tree.leaves(updates):
      np.testing.assert_array_equal(x, 0.0)
    measure.assert_trees_close(measure.bases(state), before)
    after, state, _ = got[2 * t + 1]
    measure.assert_trees_close(after, wanted[t][0], rtol=1e-3, atol=1e-4)
    before = measure.bases(state)
    measure.assert_trees_close(
      before, measure.bases(wanted[t][1]), rtol=1e-3, atol=1e-4
    )
  assert small.update._cache_size() == 1


def test_multi_steps_inside_accumulates_coordinates():
  # With a basis that stays, projecting and taking the mean commute.
  def make(inner):
    return optax.chain(
      so.subspace(so.SubspaceSpec(3), projectors.stiefel(100), inner),
      optax.scale(-0.02),
    )

  inside = measure.compiled(make(optax.MultiSteps(optax.scale_by_adam(), 2)))
  outside = measure.compiled(optax.MultiSteps(make(optax.scale_by_adam()), 2))
  gradients = _gradients(4)
  got, wanted = inside.run(gradients), outside.run(gradients)
  measure.assert_trees_close(got[-1][0], wanted[-1][0], rtol=1e-4, atol=1e-5)
  accumulators = [
    x.shape
    for x in jax.tree.leaves(got[-1][1])
    if x.ndim == 3 and x.shape[-1] == 12
  ]
  assert set(accumulators) == {(3, 3, 12)}


def test_skipping_a_step_under_cond():
  tx = cases.CASES['online'].make(cases.SMALL)

  def update(skip, gradient, state, params):
    return lax.cond(
      skip,
      lambda: (jax.tree.map(jnp.zeros_like, gradient), state),
      lambda: tx.update(gradient, state, params),
    )

  params = jax.eval_shape(lambda: cases.tree(cases.SMALL))
  state = jax.eval_shape(tx.init, params)
  _, after = jax.eval_shape(update, True, params, state, params)
  assert measure.types(after) == measure.types(state)


def test_injected_learning_rate_can_change_without_recompilation():
  injected = optax.inject_hyperparams(
    so.online_subspace_descent, static_args=('rank',)
  )
  small = measure.compiled(injected(learning_rate=0.02, rank=3, scale=1.0))
  params, state = small.init()
  gradient = _gradients(1)[0]
  whole, after = small.update(gradient, state, params)
  state.hyperparams['learning_rate'] = 0.5 * state.hyperparams['learning_rate']
  half, half_after = small.update(gradient, state, params)
  _assert_same(2.0 * half['up'], whole['up'])
  _assert_same(2.0 * half['bias'], whole['bias'])
  # The bases' rate is a multiple of it.
  move = lambda s: measure.bases(s)['up'] - measure.bases(state)['up']
  np.testing.assert_allclose(2.0 * move(half_after), move(after), atol=2e-6)
  state.hyperparams['scale'] = 0.5 * state.hyperparams['scale']
  quarter, _ = small.update(gradient, state, params)
  _assert_same(4.0 * quarter['up'], whole['up'])
  _assert_same(2.0 * quarter['bias'], whole['bias'])
  assert small.update._cache_size() == 1


def test_injected_gap_is_traced():
  injected = optax.inject_hyperparams(so.galore, static_args=('rank',))
  tx = injected(learning_rate=0.02, rank=3, update_proj_gap=2)
  small = measure.compiled(tx)
  got = small.run(_gradients())
  wanted = measure.compiled(so.galore(0.02, 3, 2)).run(_gradients())
  measure.assert_trees_close(got[-1][0], wanted[-1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'wrap',
  [
    lambda tx: optax.chain(tx, optax.scale(1.0)),
    lambda tx: optax.apply_if_finite(tx, 3),
    lambda tx: optax.masked(
      tx, lambda params: jax.tree.map(lambda _: True, params)
    ),
  ],
  ids=['chain', 'if_finite', 'masked'],
)
def test_map_params_through_wrappers(wrap):
  tx = wrap(so.golore(0.02, rank=3))
  params = cases.tree(cases.SMALL)
  state = tx.init(params)
  marked = optax.tree.map_params(tx, lambda x: x + x, state)
  assert measure.types(marked) == measure.types(state)
  np.testing.assert_array_equal(
    measure.bases(marked)['up'], 2 * measure.bases(state)['up']
  )


INNER = {
  'adam_bf16': optax.scale_by_adam(mu_dtype=jnp.bfloat16),
  'nadam': optax.scale_by_adam(nesterov=True),
  'amsgrad': optax.scale_by_amsgrad(),
  'belief': optax.scale_by_belief(),
  'radam': optax.scale_by_radam(),
  'sm3': optax.scale_by_sm3(),
  'sign': optax.scale_by_sign(),
  'sgd': optax.sgd(0.1),
  'stddev': optax.scale_by_stddev(),
  'chain': optax.chain(optax.clip(0.5), optax.trace(0.9, nesterov=True)),
  'MultiSteps': optax.MultiSteps(optax.scale_by_adam(), 3),
}


@pytest.mark.parametrize(
  'name, transport', grid.cover(INNER, ['keep', 'reset'], of=2)
)
def test_any_inner_optimizer_that_needs_no_params(name, transport):
  tx = so.subspace(
    so.SubspaceSpec(3),
    projectors.stiefel(2),
    INNER[name],
    transport=transport,
  )
  leaves = {k: cases.LEAVES[k] for k in ('experts/up', 'blocks/query', 'bias')}
  params = jax.eval_shape(lambda: cases.tree(leaves))
  if (name, transport) == ('sm3', 'reset'):
    # Its state has another structure for leaves of other axes.
    with pytest.raises(ValueError, match='keep'):
      jax.eval_shape(tx.init, params)
    return
  state = jax.eval_shape(tx.init, params)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert measure.types(updates) == measure.types(params)
  assert measure.types(after) == measure.types(state)
