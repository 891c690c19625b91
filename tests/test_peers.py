"""`benchmarks/peers.py` beside what it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks import peers

STACK = jax.random.normal(jax.random.key(0), (2, 8, 12))
GRADS = [jax.random.normal(jax.random.key(i), STACK.shape) for i in (1, 2, 3)]


def steps(tx, params, grads):
  """All updates of a leaf."""
  state, found = tx.init({'w': params}), []
  for grad in grads:
    updates, state = jax.jit(tx.update)({'w': grad}, state, {'w': params})
    found.append(updates['w'])
  return np.stack(found)


def test_each_layer_of_a_stack_is_a_leaf_of_galore():
  found = steps(peers.contrib_galore(0.1, 0.01, b2=0.99), STACK, GRADS)
  alone = optax.contrib.galore(
    0.1, 2, base_optimizer=optax.scale_by_adam(b2=0.99), weight_decay=0.01
  )
  for i in range(2):
    wanted = steps(alone, STACK[i], [grad[i] for grad in GRADS])
    np.testing.assert_allclose(found[:, i], wanted, rtol=1e-5, atol=1e-6)


def test_factors_step_as_under_the_derivative_of_their_product():
  """Weights move as W0 + 2 A B does, whose A and B have gradients by jax."""
  target = jax.random.normal(jax.random.key(4), STACK.shape)
  loss = lambda w: jnp.sum((w - target) ** 2)
  inner = optax.adam(0.1)
  tx = peers.factors(inner)
  weights, state = {'w': STACK}, tx.init({'w': STACK})
  factors = {name: x['w'] for name, x in state.factors.items()}
  assert factors['a'].shape == (2, 8, 2) and factors['b'].shape == (2, 2, 12)
  of = lambda f: STACK + 2.0 * f['a'] @ f['b']
  own = inner.init(factors)

  @jax.jit
  def both(weights, state, factors, own):
    grads = {'w': jax.grad(loss)(weights['w'])}
    updates, state = tx.update(grads, state)
    grads = jax.grad(lambda f: loss(of(f)))(factors)
    moves, own = inner.update(grads, own)
    apply = optax.apply_updates
    return apply(weights, updates), state, apply(factors, moves), own

  for _ in range(4):
    weights, state, factors, own = both(weights, state, factors, own)
  np.testing.assert_allclose(weights['w'], of(factors), rtol=1e-4, atol=1e-4)
  assert np.abs(weights['w'] - STACK).mean() > 0.01
