"""`online_subspace_descent` against Algorithm 1 in dense float64.

The whole recipe: P's learning rate of alpha times the schedule, Eq. (6)'s
lambda, scale, weight decay, mask and a plain leaf. The loop starts from the
first basis in the state and from nothing else.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

STEPS = 8
SCHEDULE = optax.linear_schedule(0.02, 0.004, 8)


def lr(t):
  return 0.02 - 0.002 * t


RECIPES = {
  # alpha 5, lambda 0.1, Adam twice.
  'defaults': ({}, ref.Adam(), ref.Adam(), 5.0, 0.1, 1.0, 0.0),
  'all': (
    {
      'scale': 0.25,
      'alpha': 2.0,
      'orthogonality': 1.0,
      'inner': optax.scale_by_lion(),
      'weight_decay': 0.3,
      'mask': {'tall': False, 'stack': True, 'vec': True},
    },
    ref.Lion(),
    ref.Adam(),
    2.0,
    1.0,
    0.25,
    0.3,
  ),
  'sgd': (
    {'basis_optimizer': optax.sgd(lambda t: 3 * SCHEDULE(t))},
    ref.Adam(),
    ref.Sgd(),
    3.0,
    0.1,
    1.0,
    0.0,
  ),
}


def gradient(params, t):
  noise = ref.like(ref.KERNELS, t + 1) | {'vec': ref.normal(t, (5,))}
  return {k: jnp.tanh(p) + noise[k] for k, p in params.items()}


@pytest.mark.parametrize('recipe', RECIPES)
def test_algorithm_1(recipe):
  kwargs, inner, on_p, alpha, lam, scale, decay = RECIPES[recipe]
  tx = so.online_subspace_descent(SCHEDULE, ref.RANK, **kwargs)
  params = ref.like(ref.KERNELS) | {'vec': ref.normal(9, (5,))}
  state, update = tx.init(params), ref.jit(tx.update)
  first = ref.bases(state)
  weights, dense, pca = {}, {}, {}
  for k, v in ref.KERNELS.items():
    weights[k] = v.matrices(params[k])
    dense[k] = ref.InSubspace(v, inner)
    pca[k] = ref.OnlinePCA(v, v.bases(first[k]), on_p, lam)
  vec, vec_state = np.float64(params['vec']), inner.start((5,))
  for t in range(STEPS):
    grads = gradient(params, t)
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    for k, v in ref.KERNELS.items():
      dense[k].move(pca[k].bases)
      n = scale * dense[k].step(grads[k])
      n += decay * weights[k] * (k == 'stack')
      weights[k] = weights[k] - lr(t) * n
      pca[k].step(grads[k], alpha * lr(t))
      np.testing.assert_allclose(
        v.matrices(params[k]),
        weights[k],
        rtol=0,
        atol=5e-5,
        err_msg=f'{k} after step {t}',
      )
      np.testing.assert_allclose(
        v.bases(ref.bases(state)[k]),
        pca[k].bases,
        rtol=0,
        atol=5e-5,
        err_msg=f'basis of {k} after step {t}',
      )
    n, vec_state = inner.update(np.float64(grads['vec']), vec_state)
    vec = vec - lr(t) * (n + decay * vec)
    np.testing.assert_allclose(params['vec'], vec, rtol=0, atol=5e-5)


def test_bases_move_at_every_step_and_stay_orthonormal():
  """At the default alpha, over 300 steps of noise."""
  tx = so.online_subspace_descent(1e-3, ref.RANK)
  params = {'stack': ref.normal(0, ref.STACK.shape)}

  def step(state, t):
    grads = {'stack': jnp.sin(params['stack'] * t)}
    _, after = tx.update(grads, state, params)
    move = ref.bases(after)['stack'] - ref.bases(state)['stack']
    return after, jnp.linalg.norm(move, axis=(1, 2))

  state, moves = ref.jit(
    lambda s: jax.lax.scan(step, s, jnp.arange(1.0, 301.0))
  )(tx.init(params))
  assert np.asarray(moves).min() > 1e-4
  p = ref.STACK.bases(ref.bases(state)['stack'])
  gram = np.swapaxes(p, 1, 2) @ p
  eye = np.broadcast_to(np.eye(ref.RANK), gram.shape)
  np.testing.assert_allclose(gram, eye, rtol=0, atol=0.05)


def test_state_dtypes_stay():
  """bfloat16 params and gradients; bases and their moments in float32."""
  tx = so.online_subspace_descent(0.01, ref.RANK, weight_decay=0.1)
  to_bf16 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  params = to_bf16(ref.like(ref.KERNELS))
  state, update = tx.init(params), ref.jit(tx.update)
  dtypes = jax.tree.map(lambda x: x.dtype, state)
  for t in range(3):
    updates, state = update(to_bf16(ref.like(ref.KERNELS, t)), state, params)
    assert jax.tree.map(lambda x: x.dtype, state) == dtypes
    assert {u.dtype for u in updates.values()} == {jnp.dtype(jnp.bfloat16)}
  on_p = ref.find(ref.find(state, 'subspaces').projector, 'mu').mu
  for tree in (ref.bases(state), on_p):
    assert {p.dtype for p in tree.values()} == {jnp.dtype(jnp.float32)}
