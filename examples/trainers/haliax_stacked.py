"""Stacked equinox layers with haliax's named axes, on a mesh of 2 x 2.

    pip install . haliax==1.4.dev453 'jax<0.11'
    JAX_NUM_CPU_DEVICES=4 python examples/trainers/haliax_stacked.py

haliax 1.3 is too old for a jax of today. Its prereleases call
`jax.core.is_constant_dim`, which jax 0.11 no longer has.
"""

import equinox as eqx
import haliax as hax
import haliax.nn as hnn
import jax
from jax.sharding import AxisType
import optax

import subspace_optax as so

EMBED = hax.Axis('embed', 64)
MLP = hax.Axis('mlp', 128)
LAYERS = hax.Axis('layers', 3)
BATCH = hax.Axis('batch', 32)
MAPPING = {'embed': 'fsdp', 'mlp': 'tensor'}
# Kernels of haliax have their outputs first.
SPEC = so.SubspaceSpec(8, outputs_first=True)


def wrap(box, array, names):
  sizes = zip(names, array.shape, strict=True)
  axes = [hax.Axis(k or f'axis_{i}', n) for i, (k, n) in enumerate(sizes)]
  return hax.NamedArray(array, tuple(axes))


so.register_box(hax.NamedArray, lambda box: [x.name for x in box.axes], wrap)


class Block(eqx.Module):
  up: hnn.Linear
  down: hnn.Linear

  @staticmethod
  def init(key):
    up, down = jax.random.split(key)
    return Block(
      hnn.Linear.init(EMBED, MLP, key=up, use_bias=False),
      hnn.Linear.init(MLP, EMBED, key=down, use_bias=False),
    )

  def __call__(self, x):
    return x + self.down(hax.tanh(self.up(x)))


def make_model() -> hnn.Stacked:
  keys = jax.random.split(jax.random.key(0), LAYERS.size)
  return hnn.Stacked.init(LAYERS, Block)(key=keys)


def arrays(model):
  return eqx.filter(model, eqx.is_inexact_array)


def train(tx: optax.GradientTransformation, steps: int = 40):
  """Returns the losses, and the bytes of state of a device and of all."""
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), (AxisType.Auto,) * 2)

  @hax.named_jit(out_axis_resources=MAPPING)
  def init():
    model = make_model()
    return model, tx.init(arrays(model))

  @hax.named_jit(out_axis_resources=MAPPING)
  def step(model, state, x, y):
    loss = lambda model: hax.mean((model.fold(x) - y) ** 2).scalar()
    value, gradient = eqx.filter_value_and_grad(loss)(model)
    updates, state = tx.update(gradient, state, arrays(model))
    return eqx.apply_updates(model, updates), state, value

  losses = []
  with jax.set_mesh(mesh), hax.axis_mapping(MAPPING):
    model, state = init()
    x = hax.random.normal(jax.random.key(1), (BATCH, EMBED))
    for _ in range(steps):
      model, state, value = step(model, state, x, hax.sin(3 * x))
      losses.append(float(value))
  leaves = jax.tree.leaves(state)
  own = sum(x.addressable_shards[0].data.nbytes for x in leaves)
  return losses, own, sum(x.nbytes for x in leaves)


OPTIMIZERS = {
  'adamw': lambda: optax.adamw(3e-3),
  'golore': lambda: so.golore(3e-2, spec=SPEC, update_proj_gap=10),
  'subspace_muon': lambda: so.subspace_muon(1e-2, spec=SPEC),
}


def main() -> dict[str, tuple]:
  if jax.device_count() != 4:
    raise SystemExit('Set JAX_NUM_CPU_DEVICES=4: the mesh is 2 x 2.')
  results = {name: train(make()) for name, make in OPTIMIZERS.items()}
  for name, (losses, own, total) in results.items():
    print(
      f'{name:13}  loss {losses[0]:.3f} -> {losses[-1]:.3f}, '
      f'{own / 1e3:.1f} KB on a device, a quarter is {total / 4e3:.1f}'
    )
  return results


if __name__ == '__main__':
  main()
