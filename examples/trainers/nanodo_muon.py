"""nanodo's model in its own TrainState and shardings, trained and resumed.

    pip install .
    pip install --no-deps git+https://github.com/google-deepmind/nanodo
    JAX_NUM_CPU_DEVICES=4 python examples/trainers/nanodo_muon.py

Without --no-deps nanodo brings TensorFlow and grain, for data that are not
read here; its model needs jax and flax alone. `init_train_state` and
`train_step` are those of its `train.py`, without metrics.
"""

import tempfile

from flax import linen as nn
from flax.training.train_state import TrainState
import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from nanodo import model
import numpy as np
import optax
import orbax.checkpoint as ocp

import subspace_optax as so

CONFIG = model.DoConfig(D=64, H=4, L=32, N=2, V=128, F=256)
# What follows each token, mostly.
TABLE = np.random.default_rng(0).integers(0, CONFIG.V, CONFIG.V)


def get_optimizer(base: optax.GradientTransformation) -> optax.MultiSteps:
  """As in `nanodo/optimizer.py`, where `base` comes from `optax.adamw`."""
  return optax.MultiSteps(base, 1)


def init_train_state(base, mesh):
  module = model.TransformerDo(CONFIG)
  inputs = jax.ShapeDtypeStruct((1, CONFIG.L), jnp.int32)

  def init(rng, inputs):
    params = module.init(rng, inputs)
    return TrainState.create(
      apply_fn=module.apply,
      params=params['params'],
      tx=get_optimizer(base),
    )

  rng = jax.random.key(0)
  shardings = nn.get_sharding(jax.eval_shape(init, rng, inputs), mesh)
  inputs = jnp.zeros(inputs.shape, inputs.dtype)
  return shardings, jax.jit(init, out_shardings=shardings)(rng, inputs)


def train_step(state, tokens):
  def loss(params):
    logits = state.apply_fn({'params': params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    ).mean()

  value, grads = jax.value_and_grad(loss)(state.params)
  updates, opt_state = state.tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  step = state.opt_state.gradient_step + 1
  return state.replace(step=step, params=params, opt_state=opt_state), value


def batch(step: int, rows: int = 8) -> np.ndarray:
  """A Markov chain: nine tokens in ten follow from the one before."""
  rng = np.random.default_rng(step)
  tokens = [rng.integers(0, CONFIG.V, rows)]
  for _ in range(CONFIG.L - 1):
    noise = rng.integers(0, CONFIG.V, rows)
    tokens.append(np.where(rng.random(rows) < 0.9, TABLE[tokens[-1]], noise))
  return np.stack(tokens, 1)


class Run:
  """A state on the mesh of all devices, and the jitted step."""

  def __init__(self, base: optax.GradientTransformation):
    mesh = Mesh(mesh_utils.create_device_mesh((jax.device_count(),)), ('data',))
    shardings, self.state = init_train_state(base, mesh)
    self.place = NamedSharding(mesh, P('data'))
    self.step = jax.jit(
      train_step,
      in_shardings=(shardings, self.place),
      out_shardings=(shardings, NamedSharding(mesh, P())),
      donate_argnames='state',
    )

  def train(self, steps: range) -> list[float]:
    losses = []
    for i in steps:
      tokens = jax.device_put(jnp.asarray(batch(i)), self.place)
      self.state, loss = self.step(self.state, tokens)
      losses.append(float(loss))
    return losses

  def report(self, name: str, losses: list[float]) -> None:
    leaves = jax.tree.leaves(self.state.opt_state)
    own = sum(x.addressable_shards[0].data.nbytes for x in leaves)
    share = sum(x.nbytes for x in leaves) / jax.device_count()
    last = np.mean(losses[-5:])  # Batches differ in how much noise they have.
    print(
      f'{name:13}  loss {losses[0]:.2f} -> {last:.2f}, '
      f'{own / 1e3:.1f} KB on a device, an equal share is {share / 1e3:.1f}'
    )


def main() -> None:
  adam = Run(optax.adamw(3e-3))
  adam.report('adamw', adam.train(range(30)))

  make = lambda: so.subspace_muon(3e-3, rank=16, update_proj_gap=10)
  run = Run(make())
  losses = run.train(range(15))
  with tempfile.TemporaryDirectory() as folder:
    with ocp.CheckpointManager(folder) as manager:
      manager.save(15, args=ocp.args.StandardSave(run.state))
    losses += run.train(range(15, 30))
    run.report('subspace_muon', losses)

    resumed = Run(make())
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, resumed.state)
    with ocp.CheckpointManager(folder) as manager:
      args = ocp.args.StandardRestore(like)
      resumed.state = manager.restore(15, args=args)
  if resumed.train(range(15, 30)) != losses[15:]:
    raise AssertionError('The losses after the restoration are others.')
  print('Restored at step 15, the losses are the same to the bit.')


if __name__ == '__main__':
  main()
