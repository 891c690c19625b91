"""A Flax linen model, trained by GaLore in a TrainState."""

from flax import linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp

import subspace_optax as so


def main(steps: int = 60) -> tuple[float, float]:
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (256, 32))
  y = jnp.sin(x @ jax.random.normal(keys[1], (32, 16)))
  model = nn.Sequential([nn.Dense(64), nn.tanh, nn.Dense(16)])
  state = train_state.TrainState.create(
    apply_fn=model.apply,
    params=model.init(keys[2], x)['params'],
    tx=so.galore(1e-2, rank=8, update_proj_gap=20),
  )

  @jax.jit
  def step(state):
    loss = lambda p: jnp.mean((state.apply_fn({'params': p}, x) - y) ** 2)
    value, gradient = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradient), value

  losses = []
  for _ in range(steps):
    state, value = step(state)
    losses.append(float(value))
  print(f'loss {losses[0]:.4f} -> {losses[-1]:.4f}')
  return losses[0], losses[-1]


if __name__ == '__main__':
  main()
