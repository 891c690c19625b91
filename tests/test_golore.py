"""`golore` against dense float64 loops of momentum projection.

GoLore's MSGD and Adam with m <- P_t^T P_{t-1} m before the step's own moment
update, P uniform on the Stiefel manifold, or from an SVD at first.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

GAP = 2
SCHEDULE = optax.linear_schedule(0.1, 0.02, 10)


def run(tx, steps, offset=0.0):
  """Returns params before every step and after the last, and all states."""
  params = ref.like(ref.KERNELS) | {'vec': ref.normal(9, (5,))}
  state, update = tx.init(params), ref.jit(tx.update)
  all_params, states = [params], [state]
  for t in range(steps):
    updates, state = update(gradient(params, t, offset), state, params)
    params = optax.apply_updates(params, updates)
    all_params.append(params)
    states.append(state)
  return all_params, states


def gradient(params, t, offset):
  """Depends on the params; `offset` keeps the spectrum from being flat."""
  noise = ref.like(ref.KERNELS, t + 1) | {'vec': ref.normal(t, (5,))}
  lead = {k: ref.decaying(t, v, 0.3) for k, v in ref.KERNELS.items()}
  grads = {k: jnp.tanh(p) + noise[k] for k, p in params.items()}
  return {k: g + 30 * offset * lead.get(k, 0) for k, g in grads.items()}


@pytest.mark.parametrize('inner', ['momentum', 'adam'])
def test_momentum_projection(inner):
  """With scale, schedule, weight decay, mask and a plain leaf."""
  optimizer, dense_inner, _ = ref.INNER[inner]
  tx = so.golore(
    SCHEDULE,
    ref.RANK,
    update_proj_gap=GAP,
    scale=0.5,
    inner=optimizer if inner == 'momentum' else None,
    weight_decay=0.2,
    mask={'tall': False, 'stack': True, 'vec': True},
  )
  params, states = run(tx, 7)
  for k, v in ref.KERNELS.items():
    dense = ref.InSubspace(v, dense_inner, 'first')
    w = v.matrices(params[0][k])
    for t in range(7):
      if t % GAP == 0:
        dense.move(v.bases(ref.bases(states[t + 1])[k]))
      n = dense.step(gradient(params[t], t, 0.0)[k])
      lr = 0.1 - 0.008 * t
      w = w - lr * (0.5 * n + (0.2 * w if k == 'stack' else 0))
      np.testing.assert_allclose(
        v.matrices(params[t + 1][k]), w, rtol=0, atol=1e-4, err_msg=f'{k}, {t}'
      )
  w, state = np.float64(params[0]['vec']), dense_inner.start((5,))
  for t in range(7):
    g = np.float64(gradient(params[t], t, 0.0)['vec'])
    n, state = dense_inner.update(g, state)
    w = w - (0.1 - 0.008 * t) * (n + 0.2 * w)
    np.testing.assert_allclose(params[t + 1]['vec'], w, rtol=0, atol=1e-4)


def test_bases():
  """Stiefel's, by spec and seed; SVD's before `random_from` if there is one."""
  params, states = run(
    so.golore(0.01, ref.RANK, update_proj_gap=GAP, seed=3), 8, offset=1.0
  )
  late = so.golore(0.01, ref.RANK, update_proj_gap=GAP, random_from=4, seed=3)
  late_params, late_states = run(late, 8, offset=1.0)
  spec = so.SubspaceSpec(ref.RANK, seed=3)
  haar = so.project(spec, so.projectors.stiefel(GAP))
  state, update = haar.init(params[0]), ref.jit(haar.update)
  for t in range(8):
    _, state = update(params[0], state)
    grads = gradient(late_params[t], t, 1.0)
    for k, v in ref.KERNELS.items():
      random, found, late_found = (
        ref.bases(s)[k] for s in (state, states[t + 1], late_states[t + 1])
      )
      np.testing.assert_allclose(found, random, rtol=0, atol=1e-6)
      if t >= 4:
        np.testing.assert_allclose(late_found, random, rtol=0, atol=1e-6)
      elif t % GAP == 0:
        for g, p in zip(v.matrices(grads[k]), v.bases(late_found), strict=True):
          best = ref.projection(ref.svd_basis(g, ref.RANK))
          np.testing.assert_allclose(ref.projection(p), best, atol=1e-5)


def test_regenerated_bases_are_those_of_the_cosine_transform():
  """By the same keys as `projectors.dct`; none of them is in the state."""
  tx = so.golore(0.01, ref.RANK, update_proj_gap=GAP, regenerate=True, seed=3)
  spec = so.SubspaceSpec(ref.RANK, seed=3)
  rule = so.projectors.dct(GAP, 'random')
  same = so.subspace(spec, rule, optax.scale_by_adam(), transport='first')
  same = optax.chain(same, optax.scale(-0.01))
  params, states = run(tx, 3)
  expected, _ = run(same, 3)
  for k in ref.KERNELS:
    np.testing.assert_allclose(params[-1][k], expected[-1][k], atol=1e-6)
  assert all(x.size <= 1 for x in jax.tree.leaves(ref.bases(states[-1])))
  with pytest.raises(ValueError, match='regenerate=True .* random_from=4'):
    so.golore(0.01, random_from=4, regenerate=True)


def test_state_dtypes_stay():
  """bfloat16 params and gradients, float32 bases and moments."""
  tx = so.golore(0.1, ref.RANK, update_proj_gap=GAP, weight_decay=0.1)
  to_bf16 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  params = to_bf16(ref.like(ref.KERNELS))
  state, update = tx.init(params), ref.jit(tx.update)
  dtypes = jax.tree.map(lambda x: x.dtype, state)
  for t in range(3):
    updates, state = update(to_bf16(ref.like(ref.KERNELS, t)), state, params)
    assert jax.tree.map(lambda x: x.dtype, state) == dtypes
    assert {u.dtype for u in updates.values()} == {jnp.dtype(jnp.bfloat16)}
  assert {p.dtype.name for p in ref.bases(state).values()} == {'float32'}
  assert ref.find(state, 'mu').mu['tall'].dtype == jnp.float32
