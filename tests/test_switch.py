"""`projectors.switch`: each rule in its time, and the state of all of them."""

import functools

import jax
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

SPEC = so.SubspaceSpec(ref.RANK)
P = so.projectors
VIEWS = {'stack': ref.STACK}


@functools.cache
def compiled(make, *args):
  tx = so.project(SPEC, make(*args))
  return tx.init, ref.jit(tx.update)


def run(projector, steps, bad=()):
  """Returns gradients and states, those before the first step included."""
  init, update = compiled(*projector)
  grads = [
    {k: ref.decaying(t, v, 0.5) * (t not in bad) for k, v in VIEWS.items()}
    for t in range(steps)
  ]
  states = [init(grads[0])]
  for g in grads:
    states.append(update(g, states[-1])[1])
  return grads, states


@functools.cache
def haar(gap):
  return run((P.stiefel, gap), 13)[1]


def assert_svd(grads, state):
  for k, v in VIEWS.items():
    pairs = zip(v.matrices(grads[k]), v.bases(ref.bases(state)[k]), strict=True)
    for g, p in pairs:
      best = ref.projection(ref.svd_basis(g, ref.RANK))
      np.testing.assert_allclose(ref.projection(p), best, rtol=0, atol=3e-6)


def momentum():
  inner = ref.Momentum()
  return {k: ref.InSubspace(v, inner, 'first') for k, v in VIEWS.items()}


def assert_same(state, other):
  for k in VIEWS:
    a, b = ref.bases(state)[k], ref.bases(other)[k]
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def svd_until(start, gap=3):
  return P.switch({start: P.stiefel(gap), 0: P.svd(3, 'exact')})


@pytest.mark.parametrize('start', [3, 4])
def test_svd_then_stiefel(start):
  """The new rule acts at its first refresh in its time, here 3 or 6."""
  grads, states = run((svd_until, start), 8)
  for t in range(8):
    last_refresh = t // 3 * 3
    if last_refresh < start:
      assert_svd(grads[last_refresh], states[t + 1])
    else:
      assert_same(states[t + 1], haar(3)[t + 1])


def test_rules_of_other_gaps():
  """Stiefel every 4 from step 5 on: SVDs at 0, 3 and samples at 8, 12."""
  grads, states = run((svd_until, 5, 4), 13)
  for t in range(13):
    if t < 8:
      assert_svd(grads[0 if t < 3 else 3], states[t + 1])
    else:
      assert_same(states[t + 1], haar(4)[t + 1])


def test_online_pca_then_stiefel_then_online_pca():
  """Each optimizer on P rests, state and all, while another rule is active."""
  pca = lambda: P.online_pca(optax.adam(0.02))
  rule = lambda: P.switch({0: pca(), 3: P.stiefel(2), 6: pca()})
  _, alone = run((pca,), 3)
  grads, states = run((rule,), 8)
  for t in range(3):
    assert_same(states[t + 1], alone[t + 1])
  assert_same(states[4], states[3])  # No refresh is due at step 3.
  for t in 4, 5:
    assert_same(states[t + 1], haar(2)[t + 1])
  own = [ref.find(s, 'subspaces').projector for s in states]
  assert len(own[0]) == 3
  for t in range(3, 8):
    jax.tree.map(np.testing.assert_array_equal, own[t + 1][0], own[3][0])
  for t in range(6):
    jax.tree.map(np.testing.assert_array_equal, own[t + 1][2], own[0][2])
  # The third rule starts from the bases that it finds.
  for k, v in VIEWS.items():
    bases = v.bases(ref.bases(states[6])[k])
    dense = ref.OnlinePCA(v, bases, ref.Adam(), 0.1)
    for t in 6, 7:
      dense.step(grads[t][k], 0.02)
      found = v.bases(ref.bases(states[t + 1])[k])
      np.testing.assert_allclose(found, dense.bases, rtol=0, atol=1e-5)


def test_a_refresh_owed_before_the_switch_is_not_made_up_after_it():
  """Nor does the resting rule's debt ever move a basis."""
  grads, states = run((svd_until, 4), 7, bad=(3,))
  for t in range(6):
    assert_svd(grads[0], states[t + 1])
  assert_same(states[7], haar(3)[7])


def test_moments_move_along():
  """transport='first' through SVD, switch and Haar, as in a dense loop."""
  rule = P.switch({0: P.svd(2, 'exact'), 3: P.stiefel(2)})
  tx = so.subspace(SPEC, rule, optax.trace(0.9), transport='first')
  update = ref.jit(tx.update)
  state = tx.init(ref.like(VIEWS))
  dense = {
    k: ref.InSubspace(v, ref.Momentum(), 'first') for k, v in VIEWS.items()
  }
  for t in range(7):
    grads = {k: ref.decaying(t, v, 0.5) for k, v in VIEWS.items()}
    updates, state = update(grads, state)
    for k, v in VIEWS.items():
      dense[k].move(v.bases(ref.bases(state)[k]))
      found = v.matrices(updates[k])
      np.testing.assert_allclose(found, dense[k].step(grads[k]), atol=1e-5)


def test_moments_move_along_from_online_pca_to_stiefel():
  """Moves after the step, then before it: each is applied in its own place."""
  rule = P.switch({0: P.online_pca(optax.sgd(0.3)), 3: P.stiefel(2)})
  tx = so.subspace(SPEC, rule, optax.trace(0.9), transport='first')
  update = ref.jit(tx.update)
  state = tx.init(ref.like(VIEWS))
  dense = {
    k: ref.InSubspace(v, ref.Momentum(), 'first') for k, v in VIEWS.items()
  }
  for t in range(7):
    grads = ref.like(VIEWS, t)
    before = ref.bases(state)
    updates, state = update(grads, state)
    after = ref.bases(state)
    for k, v in VIEWS.items():
      dense[k].move(v.bases((before if t < 3 else after)[k]))
      found = v.matrices(updates[k])
      np.testing.assert_allclose(found, dense[k].step(grads[k]), atol=2e-5)
      if t < 3:
        dense[k].move(v.bases(after[k]))
