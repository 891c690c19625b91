"""The counts of `roofline.py` beside those of XLA and of real trees."""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from benchmarks import programs
from benchmarks import roofline
import llama
import subspace_optax as so

# Small, but with the proportions of a LLaMA.
CONFIG = llama.LlamaConfig(256, 704, layers=2, heads=4, vocab=1024)
MODEL = roofline.Model(256, 704, 2, 256, vocab=1024)
BATCH, SEQUENCE, SHARE = 4, 128, 0.25
OPTIMIZERS = {
  'AdamW': optax.adamw(1e-3),
  'online_subspace_descent': so.online_subspace_descent(1e-3, SHARE),
  'subspace_adamw': so.subspace_adamw(1e-3, SHARE),
}


def run() -> list[dict]:
  """Compares everything.

  Raises:
    ValueError: a count is more than a tenth off.
  """
  rows = [model_flops(), update_flops(), *states()]
  for row in rows:
    row['ratio'] = row['counted'] / row['xla']
    if not 0.9 <= row['ratio'] <= 1.1:
      raise ValueError(f'{row["what"]}: the count is {row["ratio"]:.3f} of XLA')
  return rows


def flops(f: Any, *args: Any) -> float:
  return programs.count_flops(jax.jit(f).lower(*args).compile())


def model_flops() -> dict:
  """Forward and backward of a small LLaMA without recomputation."""
  # Unrolled, since XLA counts a loop's body once.
  config = dataclasses.replace(CONFIG, scan_layers=False)
  graphdef, params = programs.model(config)
  loss = functools.partial(programs.loss, nnx.merge, graphdef)
  tokens = jax.ShapeDtypeStruct((BATCH, SEQUENCE), jnp.int32)
  return {
    'what': 'FLOPs of forward and backward',
    'counted': MODEL.flops(BATCH * SEQUENCE, SEQUENCE, remat=False),
    'xla': flops(jax.grad(loss), params, tokens),
  }


def update_flops() -> dict:
  """A step of online subspace descent, which never refreshes."""
  name = 'online_subspace_descent'
  tx, method = OPTIMIZERS[name], roofline.METHODS[name]
  blocks = programs.model(CONFIG)[1]['blocks']
  plain = optax.MaskedNode()
  matrices = jax.tree.map(lambda x: x if x.ndim == 3 else plain, blocks)
  state = jax.eval_shape(tx.init, matrices)
  return {
    'what': f'FLOPs of an update of {name}',
    'counted': sum(roofline.update_flops(method, MODEL, SHARE)),
    'xla': flops(tx.update, matrices, state, matrices),
  }


def states() -> list[dict]:
  """The numbers in the state of every method."""
  _, params = programs.model(CONFIG)
  return [
    {
      'what': f'numbers in the state of {name}',
      'counted': roofline.state_numbers(method, MODEL, SHARE),
      'xla': so.memory_report(OPTIMIZERS[name], params).state / 4,
    }
    for name, method in roofline.METHODS.items()
  ]
