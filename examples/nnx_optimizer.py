"""A Flax nnx model, trained by GaLore in nnx.Optimizer."""

from flax import nnx
import jax
import jax.numpy as jnp

import subspace_optax as so


def main(steps: int = 60) -> tuple[float, float]:
  rngs = nnx.Rngs(0)
  x = jax.random.normal(rngs(), (256, 32))
  y = jnp.sin(x @ jax.random.normal(rngs(), (32, 16)))
  model = nnx.Sequential(
    nnx.Linear(32, 64, use_bias=False, rngs=rngs),
    nnx.tanh,
    nnx.Linear(64, 16, use_bias=False, rngs=rngs),
  )
  tx = so.galore(1e-2, rank=8, update_proj_gap=20)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

  @nnx.jit
  def step(model, optimizer):
    loss = lambda m: jnp.mean((m(x) - y) ** 2)
    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value

  losses = [float(step(model, optimizer)) for _ in range(steps)]
  print(f'loss {losses[0]:.4f} -> {losses[-1]:.4f}')
  return losses[0], losses[-1]


if __name__ == '__main__':
  main()
