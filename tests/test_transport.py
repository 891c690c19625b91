"""Moments across a change of basis, against a dense float64 loop.

Every policy with every inner optimizer whose moments it knows, for bases that
move before the step (Stiefel, which hardly overlap) and after it (online PCA,
which are not orthonormal). The loop is given the bases; the rest is its own.
"""

import functools

import jax
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

SPEC = so.SubspaceSpec(ref.RANK)
GAP, STEPS = 3, 8
STIEFEL = so.projectors.stiefel(GAP)
PLAIN = (5,)


@functools.cache
def run(projector, inner, transport):
  """Returns gradients, updates and states, the first state from `init`."""
  tx = so.subspace(SPEC, projector, inner, transport=transport)
  update = ref.jit(tx.update)
  all_grads, all_updates = [], []
  states = [tx.init(_grads(0))]
  for t in range(STEPS):
    grads = _grads(t)
    updates, state = update(grads, states[-1])
    all_grads.append(grads)
    all_updates.append(updates)
    states.append(state)
  return all_grads, all_updates, states


def _grads(t):
  """A mean that stays, so that first moments matter, and noise."""
  mean, noise = ref.like(ref.KERNELS, 100), ref.like(ref.KERNELS, t)
  grads = {k: mean[k] + noise[k] for k in mean}
  return grads | {'vec': ref.normal(t, PLAIN)}


def assert_moments(view, fields, inner_state, dense, message):
  """Compares the moments of the projected leaf `name`."""
  for mine, field in fields.items():
    found = view.coords(getattr(inner_state, field), ref.RANK)
    expected = np.stack([s[mine] for s in dense.states])
    np.testing.assert_allclose(
      found, expected, rtol=1e-5, atol=1e-5, err_msg=f'{field} {message}'
    )


def moments(state, fields, name):
  """Returns the inner state with the fields of one leaf only."""
  inner = ref.find(state, 'inner').inner
  return inner._replace(
    **{field: getattr(inner, field)[name] for field in fields.values()}
  )


@pytest.mark.parametrize(
  'name, transport',
  [
    ('adam', 'keep'),
    ('adam', 'reset'),
    ('adam', 'first'),
    ('lion', 'first'),
    # Of bases that move after the step, below; and what has no first moment.
    *[
      pytest.param(name, 'first', marks=pytest.mark.full)
      for name in ref.INNER
      if name not in ('adam', 'lion')
    ],
    # `keep` and `reset` ask nothing of an inner optimizer's moments.
    pytest.param('lion', 'keep', marks=pytest.mark.full),
    *[
      pytest.param(name, 'reset', marks=pytest.mark.full)
      for name in ref.INNER
      if name != 'adam'
    ],
  ],
)
def test_bases_that_move_before_the_step(name, transport):
  """m <- C m comes before that step's moment update; v and t are carried."""
  inner, dense_inner, fields = ref.INNER[name]
  grads, updates, states = run(STIEFEL, inner, transport)
  for k, v in ref.KERNELS.items():
    dense = ref.InSubspace(v, dense_inner, transport)
    for t in range(STEPS):
      if t % GAP == 0:
        dense.move(v.bases(ref.bases(states[t + 1])[k]))
      expected = dense.step(grads[t][k])
      np.testing.assert_allclose(
        v.matrices(updates[t][k]),
        expected,
        rtol=1e-4,
        atol=1e-4,
        err_msg=f'{k} at step {t}',
      )
      own = moments(states[t + 1], fields, k)
      assert_moments(v, fields, own, dense, f'of {k} after step {t}')
  _assert_plain(dense_inner, grads, updates)
  if name == 'adam' and transport != 'reset':
    assert ref.find(states[-1], 'inner').inner.count == STEPS


def test_reset_restarts_the_count_of_every_matrix():
  """Each has its own, and plain leaves, too."""
  *_, states = run(STIEFEL, ref.INNER['adam'][0], 'reset')
  for t, state in enumerate(states[1:]):
    counts = ref.find(state, 'inner').inner.count
    since = t % GAP + 1
    expected = {'tall': since, 'stack': [since, since], 'vec': t + 1}
    assert jax.tree.map(np.ndarray.tolist, jax.device_get(counts)) == expected


@pytest.mark.parametrize(
  'name, transport',
  [
    ('adam', 'keep'),
    ('momentum', 'first'),
    pytest.param('adam', 'first', marks=pytest.mark.full),
    pytest.param('momentum', 'keep', marks=pytest.mark.full),
  ],
)
def test_bases_that_move_after_the_step(name, transport):
  """m <- P_{t+1}^T P_t (P_t^T P_t)^-1 m at the step's end."""
  inner, dense_inner, fields = ref.INNER[name]
  # Fast enough to take P away from orthonormality.
  projector = so.projectors.online_pca(optax.adam(0.1))
  grads, updates, states = run(projector, inner, transport)
  for k, v in ref.KERNELS.items():
    dense = ref.InSubspace(v, dense_inner, transport)
    for t in range(STEPS):
      if t == 0:
        dense.move(v.bases(ref.bases(states[0])[k]))
      expected = dense.step(grads[t][k])
      np.testing.assert_allclose(
        v.matrices(updates[t][k]),
        expected,
        rtol=1e-4,
        atol=1e-4,
        err_msg=f'{k} at step {t}',
      )
      dense.move(v.bases(ref.bases(states[t + 1])[k]))
      own = moments(states[t + 1], fields, k)
      assert_moments(v, fields, own, dense, f'of {k} after step {t}')
    last = v.bases(ref.bases(states[-1])[k])
    error = np.swapaxes(last, 1, 2) @ last - np.eye(ref.RANK)
    assert np.linalg.norm(error, axis=(1, 2)).min() > 0.03
  _assert_plain(dense_inner, grads, updates)


def _assert_plain(inner, grads, updates):
  """Plain leaves never notice."""
  state = inner.start(PLAIN)
  for g, u in zip(grads, updates, strict=True):
    expected, state = inner.update(np.asarray(g['vec'], np.float64), state)
    np.testing.assert_allclose(u['vec'], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('transport', ['first', 'reset'])
def test_only_the_matrix_that_moves_is_touched(transport):
  """Layer 1 has no gradient at the refresh, and so moves a step later."""
  inner, dense_inner, fields = ref.INNER['adam']
  view = ref.STACK
  tx = so.subspace(SPEC, so.projectors.svd(GAP), inner, transport=transport)
  update = ref.jit(tx.update)
  state = tx.init({'stack': ref.normal(0, view.shape)})
  moves = {0: (0, 1), GAP: (0,), GAP + 1: (1,)}
  dense = ref.InSubspace(view, dense_inner, transport)
  for t in range(GAP + 3):
    grad = ref.normal(t, view.shape)
    grad = grad.at[1].set(0) if t == GAP else grad
    updates, state = update({'stack': grad}, state)
    dense.move(view.bases(ref.bases(state)['stack']), moves.get(t, ()))
    found, expected = view.matrices(updates['stack']), dense.step(grad)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    own = moments(state, fields, 'stack')
    assert_moments(view, fields, own, dense, f'after step {t}')
