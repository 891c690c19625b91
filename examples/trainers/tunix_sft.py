"""Tunix's `PeftTrainer`, full fine-tuning, with an optimizer of this library.

    pip install . google-tunix
    JAX_NUM_CPU_DEVICES=4 python examples/trainers/tunix_sft.py

Tunix's command line takes names of optax alone (`getattr(optax, opt_type)`), so
these optimizers are for its Python interface.
"""

import functools
import pathlib

from flax import nnx
import jax
from jax.sharding import AxisType
import numpy as np
import optax
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer

import subspace_optax as so

CONFIG = llama3.ModelConfig(
  num_layers=2,
  vocab_size=256,
  embed_dim=64,
  hidden_dim=128,
  num_heads=4,
  head_dim=16,
  num_kv_heads=2,
  rope_theta=10_000,
  norm_eps=1e-5,
  weight_tying=False,
)
SEQ, BATCH = 32, 16


def batches(steps):
  """Bytes of this file."""
  text = np.frombuffer(pathlib.Path(__file__).read_bytes(), np.uint8)
  rng = np.random.default_rng(0)
  for _ in range(steps):
    first = rng.integers(0, len(text) - SEQ, (BATCH, 1))
    tokens = text[first + np.arange(SEQ)].astype('int32')
    yield peft_trainer.TrainingInput(
      input_tokens=tokens, input_mask=np.ones_like(tokens)
    )


def model_input(x):
  causal = np.tril(np.ones((SEQ, SEQ), bool))
  return {
    'input_tokens': x.input_tokens,
    'input_mask': x.input_mask,
    'positions': np.broadcast_to(np.arange(SEQ), (BATCH, SEQ)),
    'attention_mask': np.broadcast_to(causal, (BATCH, SEQ, SEQ)),
  }


@functools.partial(nnx.jit, static_argnums=0)
def make_model(config):
  model = llama3.Llama3(config, rngs=nnx.Rngs(0))
  state = nnx.state(model)
  specs = nnx.get_partition_spec(state)
  nnx.update(model, jax.lax.with_sharding_constraint(state, specs))
  return model


def train(tx, mesh, steps=60):
  """Returns all losses, and the bytes of state of one device and of all."""
  losses = []

  class Trainer(peft_trainer.PeftTrainer):
    def _log_metrics(self, loss, *args, **kwargs):
      losses.append(float(loss))
      super()._log_metrics(loss, *args, **kwargs)

  with mesh:
    model = make_model(CONFIG)
    config = peft_trainer.TrainingConfig(
      eval_every_n_steps=1000, max_steps=steps
    )
    trainer = Trainer(model, tx, config).with_gen_model_input_fn(model_input)
    trainer.train(list(batches(steps)))
  arrays = jax.tree.leaves(nnx.state(trainer.optimizer, nnx.optimizer.OptState))
  own = sum(x.addressable_shards[0].data.nbytes for x in arrays)
  return losses, own, sum(x.nbytes for x in arrays)


def main():
  """Trains by AdamW and in subspaces, on a mesh of 2 x 2."""
  kinds = (AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tp'), axis_types=kinds)
  results = {}
  for name, tx in {
    'adamw': optax.adamw(3e-3),
    'subspace_muon': so.subspace_muon(3e-3, 16),
  }.items():
    losses, own, total = results[name] = train(tx, mesh)
    print(
      f'{name:14s} loss {losses[0]:.3f} -> {losses[-1]:.3f}, '
      f'{own / 1e3:.1f} KB on a device, a quarter is {total / 4e3:.1f}'
    )
  return results


if __name__ == '__main__':
  main()
