"""A linen model on a mesh, its layers stacked along axis 1 as in MaxText."""

from flax import linen as nn
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nnx_mesh
import subspace_optax as so


def dense(features: int, names: tuple, name: str) -> nn.Dense:
  init = nn.with_partitioning(nn.initializers.lecun_normal(), names)
  return nn.Dense(features, use_bias=False, kernel_init=init, name=name)


class Block(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = jnp.tanh(dense(64, ('fsdp', 'tensor'), 'wi_0')(x))
    return x + dense(32, ('tensor', 'fsdp'), 'wo')(h), None


class Model(nn.Module):
  layers: int

  @nn.compact
  def __call__(self, x):
    stack = nn.scan(
      Block,
      variable_axes={'params': 1},
      split_rngs={'params': True},
      length=self.layers,
      metadata_params={nn.PARTITION_NAME: None},
    )
    return stack(name='layers')(x)[0]


def make_state(mesh: jax.sharding.Mesh, x: jax.Array) -> TrainState:
  """Parameters and optimizer state, made where they belong."""
  model, key = Model(layers=2), jax.random.key(0)
  spec = so.SubspaceSpec(
    8, weight_dimension_numbers=so.dimension_numbers_from_paths
  )
  tx = so.online_subspace_descent(2e-2, spec=spec)
  init = lambda key: model.init(key, x)['params']
  places = nn.get_sharding(jax.eval_shape(init, key), mesh)
  params = jax.jit(lambda k: nn.unbox(init(k)), out_shardings=places)(key)
  init_tx = jax.jit(tx.init, out_shardings=so.state_sharding(tx, params))
  count = jax.device_put(0, NamedSharding(mesh, P()))
  return TrainState(count, model.apply, params, tx, init_tx(params))


@jax.jit
def step(state: TrainState, x: jax.Array, y: jax.Array):
  loss = lambda p: jnp.mean((state.apply_fn({'params': p}, x) - y) ** 2)
  value, gradient = jax.value_and_grad(loss)(state.params)
  return state.apply_gradients(grads=gradient), value


def main(steps: int = 60) -> tuple[float, float]:
  mesh = nnx_mesh.make_mesh()
  keys = jax.random.split(jax.random.key(1))
  x = jax.random.normal(keys[0], (256, 32))
  y = jnp.sin(x @ jax.random.normal(keys[1], (32, 32)))
  x, y = jax.device_put((x, y), NamedSharding(mesh, P('fsdp')))
  losses = []
  with jax.set_mesh(mesh):
    state = make_state(mesh, x)
    for _ in range(steps):
      state, value = step(state, x, y)
      losses.append(float(value))
  print(f'loss {losses[0]:.4f} -> {losses[-1]:.4f} on {dict(mesh.shape)}')
  return losses[0], losses[-1]


if __name__ == '__main__':
  main()
