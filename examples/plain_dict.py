"""Parameters in a plain dict, trained by Online Subspace Descent."""

import jax
import jax.numpy as jnp
import optax

import subspace_optax as so


def main(steps: int = 60) -> tuple[float, float]:
  keys = jax.random.split(jax.random.key(0), 4)
  x = jax.random.normal(keys[0], (256, 32))
  y = jnp.sin(x @ jax.random.normal(keys[1], (32, 16)))
  params = {
    'hidden': 0.2 * jax.random.normal(keys[2], (32, 64)),
    'out': 0.1 * jax.random.normal(keys[3], (64, 16)),
  }
  tx = so.online_subspace_descent(1e-2, rank=8)
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    loss = lambda p: jnp.mean((jnp.tanh(x @ p['hidden']) @ p['out'] - y) ** 2)
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  losses = []
  for _ in range(steps):
    params, state, value = step(params, state)
    losses.append(float(value))
  print(f'loss {losses[0]:.4f} -> {losses[-1]:.4f}')
  return losses[0], losses[-1]


if __name__ == '__main__':
  main()
