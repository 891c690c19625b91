"""An nnx model trained layer by layer; a FOLDER holds a LLaMA of Hugging Face.

  python examples/nnx_layerwise.py [FOLDER]

`nnx.Optimizer.update` takes the gradient of the whole model, which a layer-wise
step never has. So the step works on the model's parameters, which `nnx.update`
hands back.
"""

import sys

from flax import nnx
import jax
import jax.numpy as jnp

import hf_checkpoint
import llama
import subspace_optax as so
import train_step


def main(folder: str = '', steps: int = 40) -> tuple[float, float]:
  model = llama.Llama(llama.named('llama_test', vocab=256), nnx.Rngs(0))
  if folder:
    config, weights = hf_checkpoint.load(folder)
    model = nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(jnp.asarray, weights))
  params = nnx.to_pure_dict(nnx.state(model))
  made = so.layerwise(
    so.subspace_muon(5e-3, rank=4), *train_step.by_layer(model)
  )
  state, losses = jax.jit(made.init)(params), []
  step = jax.jit(made.step, donate_argnums=(0, 1))
  batch = jnp.asarray([[*b'layer by layer, and not at once']] * 4)
  for _ in range(steps):
    params, state, metrics = step(params, state, batch)
    losses.append(float(metrics.loss))
  nnx.update(model, params)  # as trained, for whatever comes next
  print(f'loss {losses[0]:.4f} -> {losses[-1]:.4f} nats a token')
  return losses[0], losses[-1]


if __name__ == '__main__':
  main(sys.argv[1] if sys.argv[1:] else '')
