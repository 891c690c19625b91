"""Stacked nnx layers on a mesh, trained by Online Subspace Descent."""

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import subspace_optax as so


def make_mesh() -> jax.sharding.Mesh:
  """All devices, as fsdp x tensor; JAX_NUM_CPU_DEVICES=4 makes four."""
  tensor = 2 if jax.device_count() % 2 == 0 else 1
  shape = (jax.device_count() // tensor, tensor)
  return jax.make_mesh(shape, ('fsdp', 'tensor'), (AxisType.Auto,) * 2)


def linear(d_in: int, d_out: int, names: tuple, rngs: nnx.Rngs) -> nnx.Linear:
  init = nnx.with_partitioning(nnx.initializers.lecun_normal(), names)
  return nnx.Linear(d_in, d_out, use_bias=False, kernel_init=init, rngs=rngs)


class Block(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.up = linear(32, 64, ('fsdp', 'tensor'), rngs)
    self.down = linear(64, 32, ('tensor', 'fsdp'), rngs)

  def __call__(self, x):
    return x + self.down(jnp.tanh(self.up(x)))


class Model(nnx.Module):
  def __init__(self, layers: int, rngs: nnx.Rngs):
    # Kernels of (layers, ...), whose layers are on every device.
    stack = nnx.vmap(Block, transform_metadata={nnx.PARTITION_NAME: None})
    self.blocks = stack(rngs.split(layers))

  def __call__(self, x):
    return jax.lax.scan(lambda x, b: (b(x), None), x, self.blocks)[0]


@nnx.jit
def step(model, optimizer, x, y):
  loss = lambda m: jnp.mean((m(x) - y) ** 2)
  value, gradient = nnx.value_and_grad(loss)(model)
  optimizer.update(model, gradient)
  return value


def main(steps: int = 60) -> tuple[float, float]:
  mesh = make_mesh()
  keys = jax.random.split(jax.random.key(0))
  x = jax.random.normal(keys[0], (256, 32))
  y = jnp.sin(x @ jax.random.normal(keys[1], (32, 32)))
  x, y = jax.device_put((x, y), NamedSharding(mesh, P('fsdp')))
  with jax.set_mesh(mesh):
    # No kernel is ever whole on a device.
    model = jax.jit(lambda: Model(2, nnx.Rngs(0)))()
    tx = so.online_subspace_descent(2e-2, rank=8)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [float(step(model, optimizer, x, y)) for _ in range(steps)]
  print(f'loss {losses[0]:.4f} -> {losses[-1]:.4f} on {dict(mesh.shape)}')
  return losses[0], losses[-1]


if __name__ == '__main__':
  main()
