"""`online_pca` that moves, or orthonormalizes, every so many steps."""

import jax
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

VIEWS = ref.KERNELS
SPEC = so.SubspaceSpec(ref.RANK)
RATE, STEPS = 0.1, 9  # Fast enough to take P away from orthonormality.


def run(gradients, transport='first', **kwargs):
  """Returns updates and states, the first state from `init`."""
  rule = so.projectors.online_pca(optax.adam(RATE), **kwargs)
  tx = so.subspace(SPEC, rule, optax.trace(0.9), transport=transport)
  update = ref.jit(tx.update)
  updates, states = [], [tx.init(gradients[0])]
  for g in gradients:
    u, state = update(g, states[-1])
    updates.append(u)
    states.append(state)
  return updates, states


def like(t):
  return ref.like(VIEWS, t)


def of_state(state, name):
  return VIEWS[name].bases(ref.bases(state)[name])


def assert_updates_follow(gradients, updates, states):
  """Checks the weights' steps against a loop that is given the bases."""
  for k, v in VIEWS.items():
    dense = ref.InSubspace(v, ref.Momentum(), 'first')
    for t, g in enumerate(gradients):
      dense.move(of_state(states[t], k))
      np.testing.assert_allclose(
        v.matrices(updates[t][k]),
        dense.step(g[k]),
        rtol=1e-4,
        atol=1e-4,
        err_msg=f'{k} at step {t}',
      )
      dense.move(of_state(states[t + 1], k))


@pytest.mark.parametrize(
  'update_every, orthonormalize_every', [(3, None), (1, 4), (2, 4)]
)
def test_against_a_dense_loop(update_every, orthonormalize_every):
  """Steps at 0, U, 2U...; P = orth(P) at the end of every so many steps."""
  gradients = [like(t) for t in range(STEPS)]
  updates, states = run(
    gradients,
    update_every=update_every,
    orthonormalize_every=orthonormalize_every,
  )
  often = orthonormalize_every or 10**9
  for k, v in VIEWS.items():
    dense = ref.OnlinePCA(v, of_state(states[0], k), ref.Adam(), 0.1)
    for t, g in enumerate(gradients):
      if t % update_every == 0:
        dense.step(g[k], RATE)
        if (t + update_every) % often == 0:
          dense.bases = np.stack(list(map(ref.positive_qr, dense.bases)))
      found = of_state(states[t + 1], k)
      np.testing.assert_allclose(
        found, dense.bases, rtol=0, atol=1e-4, err_msg=f'{k} at step {t}'
      )
      gram = np.swapaxes(found, 1, 2) @ found
      error = np.abs(gram - np.eye(ref.RANK)).max((1, 2))
      if t % update_every == 0 and (t + update_every) % often == 0:
        np.testing.assert_allclose(error, np.zeros(v.count), atol=1e-6)
      elif t % update_every == 0:
        assert error.min() > 1e-3
  assert_updates_follow(gradients, updates, states)


def test_nothing_moves_in_between():
  """Neither bases nor their optimizer, its count included."""
  _, states = run([like(t) for t in range(STEPS)], update_every=3)
  for t in range(STEPS):
    old, new = (ref.find(s, 'subspaces') for s in states[t : t + 2])
    parts = lambda s: (s.subspaces.basis, s.projector)
    if t % 3:
      jax.tree.map(np.testing.assert_array_equal, parts(new), parts(old))
    count = optax.tree.get(new.projector, 'count')
    assert count == t // 3 + 1


def test_starts_from_the_first_gradient_and_then_waits():
  """Singular vectors at step 0, where Eq. (6) has its minimum; steps at 2."""
  gradients = [
    {k: ref.decaying(t, v, 0.5) for k, v in VIEWS.items()} for t in range(4)
  ]
  _, states = run(gradients, init='svd', update_every=2)
  for k, v in VIEWS.items():
    g, p = v.matrices(gradients[0][k]), of_state(states[1], k)
    best = [ref.projection(ref.svd_basis(x, ref.RANK)) for x in g]
    np.testing.assert_allclose(ref.projection(p), best, rtol=0, atol=5e-6)
    np.testing.assert_array_equal(of_state(states[2], k), p)
    dense = ref.OnlinePCA(v, p, ref.Adam(), 0.1)
    dense.step(gradients[2][k], RATE)
    found = of_state(states[3], k)
    np.testing.assert_allclose(found, dense.bases, rtol=0, atol=1e-4)


@pytest.mark.parametrize('bad', [0.0, np.nan], ids=['zero', 'nan'])
def test_moments_follow_a_layer_without_a_gradient(bad):
  """Whether its basis is made orthonormal or not."""
  gradients = [like(t) for t in range(5)]
  gradients[1]['stack'] = gradients[1]['stack'].at[1].set(bad)
  updates, states = run(gradients, orthonormalize_every=2)
  before, after = (of_state(states[t], 'stack') for t in (1, 2))
  assert np.isfinite(after).all()
  assert (before[0] != after[0]).any()
  if bad == 0:
    assert_updates_follow(gradients, updates, states)


@pytest.mark.parametrize('name', ['update_every', 'orthonormalize_every'])
def test_raises(name):
  rule = lambda value: so.projectors.online_pca(optax.sgd(1.0), **{name: value})
  for value in 0, -2:
    with pytest.raises(ValueError, match=f'{name} must be at least 1'):
      rule(value)
  for value in 2.0, True, '3':
    with pytest.raises(TypeError, match=f'{name} must be an int'):
      rule(value)


def test_raises_unless_a_multiple():
  with pytest.raises(ValueError, match='multiple of update_every=2, got 3'):
    so.projectors.online_pca(
      optax.sgd(1.0), update_every=2, orthonormalize_every=3
    )
