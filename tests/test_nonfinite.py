"""Zero, NaN, infinite and rank-deficient gradients never spoil a basis.

The stack of three matrices gets a bad gradient in the middle one, at a
refresh (steps 0 and 2), before one (1) and after one (3).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import grid
import measure
import subspace_optax as so

every_case = pytest.mark.parametrize('name', cases.CASES)
BAD = {
  'zero': lambda g: jnp.zeros_like(g),
  'nan': lambda g: jnp.full_like(g, jnp.nan),
  'one_nan': lambda g: g.at[2, 3].set(jnp.nan),
  'inf': lambda g: g.at[0, 0].set(jnp.inf),
  # Squares that overflow, and that underflow.
  'huge': lambda g: 1e25 * g,
  'tiny': lambda g: 1e-25 * g,
}
# Rules whose new basis does not depend on the gradient, from step to step.
RANDOM = {'golore': range(6), 'stiefel_sgd': range(6), 'golore_late': (4, 5)}


def _gradients():
  return [cases.tree(cases.SMALL, 70 + t) for t in range(cases.STEPS)]


@functools.cache
def _clean(name):
  return measure.small(name).run(_gradients())


def _spoiled(name, kind, steps):
  gradients = _gradients()
  for t in steps:
    up = gradients[t]['up']
    gradients[t]['up'] = up.at[1].set(BAD[kind](up[1]))
  return measure.small(name).run(gradients)


def _basis(state):
  return np.asarray(measure.bases(state)['up'], np.float32)


def _assert_orthonormal(name, basis):
  assert np.isfinite(basis).all()
  gram = np.swapaxes(basis, -1, -2) @ basis
  eye = np.broadcast_to(np.eye(gram.shape[-1]), gram.shape)
  case = cases.CASES[name]
  learned = case.bases == 3 or 'online' in name
  tolerance = 0.5 if learned else 2e-5
  np.testing.assert_allclose(gram, eye, atol=tolerance)


STEPS = [(0,), (1,), (2,), (3,), (2, 3), (4, 5)]


@pytest.mark.parametrize(
  'name, kind, steps', grid.cover(cases.CASES, BAD, STEPS, of=6), ids=str
)
def test_one_bad_matrix_of_a_stack(name, kind, steps):
  case, clean = cases.CASES[name], _clean(name)
  history = _spoiled(name, kind, steps)
  before = _basis(measure.small(name).init()[1])
  owed = False
  for t, (_, state, updates) in enumerate(history):
    basis = _basis(state)
    _assert_orthonormal(name, basis)
    # The others are refreshed as if nothing had happened.
    np.testing.assert_allclose(
      basis[[0, 2]],
      _basis(clean[t][1])[[0, 2]],
      rtol=1e-4,
      atol=1e-5,
      err_msg=f'step {t}',
    )
    moved = (basis[1] != before[1]).any()
    if t in steps and t not in RANDOM.get(name, ()):
      assert not moved, f'moved at step {t}'
      owed = owed or case.moves[t] == 'x'
    else:
      # A rule that `switch` has put to rest does not retry.
      rests = name == 'golore_late' and t == 3
      wanted = (owed and not rests) or case.moves[t] == 'x'
      assert moved == wanted, f'step {t}'
      owed = False
    if t == steps[0]:
      update = np.asarray(updates['up'])
      assert np.isfinite(update[[0, 2]]).all()
      np.testing.assert_allclose(
        update[[0, 2]],
        np.asarray(clean[t][2]['up'])[[0, 2]],
        rtol=2e-3,
        atol=2e-5,
      )
      if kind in ('nan', 'one_nan'):
        assert not np.isfinite(update[1]).all()
      elif kind != 'inf':  # of which Lion takes the sign
        assert np.isfinite(update[1]).all()
    before = basis


@every_case
def test_metrics_skip_a_bad_gradient(name):
  history = _spoiled(name, 'nan', (2, 3))
  last = so.subspace_metrics(history[1][1])['up']
  for t in (2, 3):
    metrics = so.subspace_metrics(history[t][1])['up']
    for key, value in metrics.items():
      assert np.isfinite(np.asarray(value)).all(), key
      if key == 'captured_energy' or t not in RANDOM.get(name, ()):
        np.testing.assert_array_equal(value[1], last[key][1], err_msg=key)
  after = so.subspace_metrics(history[4][1])['up']
  assert after['captured_energy'][1] != last['captured_energy'][1]


@pytest.mark.parametrize('name', ['galore', 'gram_adam_reset', 'golore_late'])
def test_retry_takes_the_next_gradient_s_singular_vectors(name):
  gradients = _gradients()
  history = _spoiled(name, 'nan', (0,))
  e = cases.projected(name, cases.SMALL)['up']
  g = e.view.matrices(gradients[1]['up'])
  best = np.linalg.svd(g[1])[0][:, :3]
  first, second = _basis(history[0][1]), _basis(history[1][1])
  p = second[1]
  np.testing.assert_allclose(p @ p.T, best @ best.T, atol=1e-3)
  # The others keep those of step 0.
  np.testing.assert_array_equal(second[[0, 2]], first[[0, 2]])


@pytest.mark.parametrize('name', ['online', 'online_lion_first'])
def test_optimizer_of_the_basis_skips_the_step(name):
  small = measure.small(name)
  gradients = _gradients()
  _, state, _ = small.run(gradients[:2])[-1]
  own = measure.project_state(state).projector
  params, _ = small.init()
  nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), gradients[2])
  _, after = small.update(nothing, state, params)
  measure.assert_trees_close(measure.project_state(after).projector, own)
  # Of one bad matrix only its own moments stay.
  up = gradients[2]['up']
  bad = gradients[2] | {'up': up.at[1].set(jnp.nan)}
  _, after = small.update(bad, state, params)
  _, clean = small.update(gradients[2], state, params)
  for old, new, wanted in zip(
    jax.tree.leaves(own),
    jax.tree.leaves(measure.project_state(after).projector),
    jax.tree.leaves(measure.project_state(clean).projector),
    strict=True,
  ):
    if old.shape == (3, 8, 3):
      np.testing.assert_array_equal(new[1], old[1])
      np.testing.assert_allclose(
        new[jnp.array([0, 2])], wanted[jnp.array([0, 2])], rtol=1e-5
      )
      assert (new[0] != old[0]).any()
    else:
      np.testing.assert_array_equal(new, wanted)


@every_case
def test_bad_plain_leaf_touches_no_basis(name):
  gradients = _gradients()[:4]
  for gradient in gradients[1:3]:
    gradient['bias'] = gradient['bias'].at[0].set(jnp.nan)
  history = measure.small(name).run(gradients)
  for (_, state, updates), (_, wanted, _) in zip(
    history, _clean(name)[:4], strict=True
  ):
    np.testing.assert_array_equal(_basis(state), _basis(wanted))
    assert np.isfinite(np.asarray(updates['up'])).all()
  assert np.isnan(np.asarray(history[1][2]['bias'][0]))


@every_case
def test_all_zero_gradients_from_the_start(name):
  zeros = jax.tree.map(jnp.zeros_like, _gradients()[0])
  history = measure.small(name).run([zeros] * 3)
  for _, state, updates in history:
    _assert_orthonormal(name, _basis(state))
    for x in jax.tree.leaves((state, updates)):
      assert np.isfinite(np.asarray(x, np.float32)).all()
    measure.assert_trees_close(
      updates, jax.tree.map(jnp.zeros_like, updates), atol=1e-7
    )


@every_case
@pytest.mark.parametrize('deficient', ['rank_1', 'one_row', 'weak'])
def test_rank_deficient_gradients(name, deficient):
  rng = np.random.default_rng(5)
  left, right = rng.standard_normal((3, 8, 1)), rng.standard_normal((3, 1, 12))
  up = left @ right
  if deficient == 'one_row':
    up = np.zeros((3, 8, 12))
    up[:, 4] = right[:, 0]
  elif deficient == 'weak':  # the second direction is below float32's rounding
    up = up + 1e-9 * rng.standard_normal((3, 8, 12))
  gradient = {'up': jnp.asarray(up, jnp.float32), 'bias': jnp.ones(12)}
  history = measure.small(name).run([gradient] * 4)
  for _, state, updates in history:
    _assert_orthonormal(name, _basis(state))
    assert np.isfinite(np.asarray(updates['up'])).all()
  if name in ('galore', 'gram_adam_reset', 'randomized_rms_first'):
    energy = so.subspace_metrics(history[0][1])['up']['captured_energy']
    np.testing.assert_allclose(energy, 1.0, atol=1e-4)


def test_apply_if_finite_leaves_no_trace_of_a_bad_step():
  tx = optax.apply_if_finite(measure.small('online').tx, 5)
  small = measure.compiled(tx)
  gradients = _gradients()
  bad = jax.tree.map(lambda x: x.at[0].set(jnp.nan), gradients[3])
  spoiled = small.run(gradients[:3] + [bad] + gradients[3:])
  wanted = measure.small('online').run(gradients)
  np.testing.assert_array_equal(spoiled[3][2]['up'], 0.0)
  measure.assert_trees_close(
    spoiled[-1][0], wanted[-1][0], rtol=1e-5, atol=1e-6
  )
  measure.assert_trees_close(
    spoiled[-1][1].inner_state, wanted[-1][1], rtol=1e-5, atol=1e-6
  )
