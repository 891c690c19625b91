"""A LLaMA of a Hugging Face folder, trained layer by layer as an nnx model.

  python examples/nnx_layerwise.py FOLDER

`nnx.Optimizer.update` takes the gradient of the whole model, which a layer-wise
step never has. So the step works on the model's parameters, which `nnx.update`
hands back. Without a folder a small model is written first, and read again.
"""

import pathlib
import sys
import tempfile

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

import data
import hf_checkpoint
import llama
import subspace_optax as so
import train_step

TEXT = b'Layers come one by one, and go; what they were is not kept. ' * 40


def small_checkpoint(folder: pathlib.Path) -> pathlib.Path:
  """Writes a model over bytes that was never trained."""
  config = llama.LlamaConfig(64, 176, layers=4, heads=4, vocab=256)
  model = llama.Llama(config, nnx.Rngs(0))
  hf_checkpoint.save(folder, config, nnx.to_pure_dict(nnx.state(model)))
  return folder


def load(folder: pathlib.Path) -> llama.Llama:
  """The model of a folder, with its layers in one stack."""
  config, weights = hf_checkpoint.load(folder)
  model = nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
  nnx.update(model, jax.tree.map(jnp.asarray, weights))
  return model


def main(folder: str = '', steps: int = 40) -> tuple[float, float]:
  with tempfile.TemporaryDirectory() as spare:
    model = load(pathlib.Path(folder or small_checkpoint(pathlib.Path(spare))))
  params = nnx.to_pure_dict(nnx.state(model))
  made = so.layerwise(so.subspace_muon(5e-3), *train_step.by_layer(model))
  step = jax.jit(made.step, donate_argnums=(0, 1))
  state, losses = jax.jit(made.init)(params), []
  tokens = np.frombuffer(TEXT, np.uint8).astype(np.int32)
  for i in range(steps):
    batch = data.batch(tokens, (8,), 32, seed=0, step=i)
    params, state, metrics = step(params, state, batch)
    losses.append(float(metrics.loss))
  nnx.update(model, params)  # as trained, for whatever comes next
  print(f'loss {losses[0]:.4f} -> {losses[-1]:.4f}')
  return losses[0], losses[-1]


if __name__ == '__main__':
  main(sys.argv[1] if len(sys.argv) > 1 else '')
