"""The counts of `roofline.py` beside those of XLA and of real trees."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

import llama
import roofline
import subspace_optax as so

# Small, but with the proportions of a LLaMA.
CONFIG = llama.LlamaConfig(
  width=256, mlp_width=704, layers=2, heads=4, vocab=1024, scan_layers=False
)
MODEL = roofline.Model(256, 704, 2, 256, vocab=1024)
BATCH, SEQUENCE, SHARE = 4, 128, 0.25


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


def model_flops() -> dict:
  """Forward and backward of a small LLaMA without recomputation."""
  module = nnx.eval_shape(lambda: llama.Llama(CONFIG, nnx.Rngs(0)))
  graph, params = nnx.split(module)

  def loss(params: Any, tokens: jax.Array) -> jax.Array:
    logits = nnx.merge(graph, params)(tokens)
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    )

  tokens = jax.ShapeDtypeStruct((BATCH, SEQUENCE), jnp.int32)
  step = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
  counted = MODEL.flops(BATCH * SEQUENCE, SEQUENCE, remat=False)
  return {
    'what': 'FLOPs of forward and backward',
    'counted': counted,
    'xla': cost(step)['flops'],
  }


def update_flops() -> dict:
  """A step of online subspace descent, which never refreshes."""
  tx = so.online_subspace_descent(1e-3, SHARE)
  params = parameters()
  matrices = {k: v for k, v in params.items() if k.startswith('w')}
  state = jax.eval_shape(tx.init, matrices)
  step = jax.jit(tx.update).lower(matrices, state, matrices).compile()
  method = roofline.METHODS['online_subspace_descent']
  return {
    'what': 'FLOPs of an update of online_subspace_descent',
    'counted': sum(roofline.update_flops(method, MODEL, SHARE)),
    'xla': cost(step)['flops'],
  }


def states() -> list[dict]:
  """The numbers in the state of every method."""
  made = {
    'AdamW': optax.adamw(1e-3),
    'online_subspace_descent': so.online_subspace_descent(1e-3, SHARE),
    'subspace_adamw': so.subspace_adamw(1e-3, SHARE),
  }
  return [
    {
      'what': f'numbers in the state of {name}',
      'counted': roofline.state_numbers(method, MODEL, SHARE),
      'xla': so.memory_report(made[name], parameters()).state / 4,
    }
    for name, method in roofline.METHODS.items()
  ]


def parameters() -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of all parameters of MODEL, matrices in stacks."""
  d, f, layers = CONFIG.width, CONFIG.mlp_width, CONFIG.layers
  shapes = {name: (layers, d, d) for name in ('wq', 'wk', 'wv', 'wo')}
  shapes |= {'w_gate': (layers, d, f), 'w_up': (layers, d, f)}
  shapes |= {'w_down': (layers, f, d), 'norm_scale': (2 * layers + 1, d)}
  shapes |= {'embed': (CONFIG.vocab, d), 'lm_head': (d, CONFIG.vocab)}
  return {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in shapes.items()
  }


def cost(program: Any) -> dict:
  """XLA's account of a compiled program."""
  found = program.cost_analysis()
  return found[0] if isinstance(found, list) else found
