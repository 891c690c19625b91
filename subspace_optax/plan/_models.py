# SPDX-License-Identifier: Apache-2.0
"""Models that `plan` knows by name: parameter shapes and functions to trace.

Nothing here is ever run. Suffixes name axes: B batch, T time, D width, F width
of the MLP, K width of a head, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax.plan import _nearest


class Model(NamedTuple):
  """A model as `plan` needs it.

  Attributes:
    name: the name of the model.
    params: tree of `jax.ShapeDtypeStruct`.
    inputs: (batch, seq) -> shape of the inputs.
    embed: (rest, inputs) -> x, or None for a model in one piece.
    block: (one layer's parameters, x) -> x.
    head: (rest, x, inputs) -> loss, with `rest` all parameters but the stack.
    whole: (params, inputs) -> loss, for a model in one piece.
    stack: the key in params of the layers that are stacked along axis 0.
  """

  name: str
  params: Any
  inputs: Callable[[int, int], Any]
  embed: Any = None
  block: Any = None
  head: Any = None
  whole: Any = None
  stack: str = 'blocks'

  def parts(self, params: Any) -> tuple[Any, Any]:
    """Returns the stack, and all other parameters."""
    rest = {k: v for k, v in params.items() if k != self.stack}
    return params[self.stack], rest


def tokens(batch: int, seq: int) -> jax.ShapeDtypeStruct:
  """Returns the shape of tokens (B, T)."""
  return jax.ShapeDtypeStruct((batch, seq), jnp.int32)


def cross_entropy(logits: Any, labels: Any) -> Any:
  """Returns the mean cross-entropy in float32."""
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(
      logits.astype(jnp.float32), labels
    )
  )


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of a transformer: a LLaMA, or with `gpt` a GPT."""

  width: int
  mlp_width: int
  layers: int
  heads: int
  kv_heads: int | None = None
  vocab: int = 32_000
  positions: int = 2048  # number of a GPT's learned positions
  gpt: bool = False


NAMED = {
  'llama_test': Sizes(16, 40, 2, 2),
  'llama_1m': Sizes(128, 352, 4, 4),
  'llama_3m': Sizes(192, 512, 6, 6),
  'llama_10m': Sizes(320, 864, 8, 5),
  'llama_60m': Sizes(512, 1376, 8, 8),
  'llama_130m': Sizes(768, 2048, 12, 12),
  'llama_350m': Sizes(1024, 2736, 24, 16),
  'llama_1b': Sizes(2048, 5461, 24, 32),
  'llama_7b': Sizes(4096, 11_008, 32, 32),
  'llama_13b': Sizes(5120, 13_824, 40, 40),
  'llama_70b': Sizes(8192, 28_672, 80, 64, 8),
  'gpt3_175b': Sizes(12_288, 49_152, 96, 96, vocab=50_257, gpt=True),
}


def named(
  name: str, param_dtype: Any, dtype: Any = None, attention_chunk: int = 0
) -> Model:
  """Returns the model called `name`.

  Args:
    name: see `NAMED`.
    param_dtype: dtype of the parameters.
    dtype: dtype of activations, None for that of the parameters.
    attention_chunk: number of queries whose scores are in memory at a time; 0
      for all.
  """
  if name not in NAMED:
    near = _nearest.did_you_mean(name, NAMED)
    raise ValueError(
      f'model={name!r} is unknown{near}; choose from {sorted(NAMED)}, or give '
      'package.module:callable.'
    )
  sizes, dtype = NAMED[name], jnp.dtype(dtype or param_dtype)
  params = _gpt(sizes) if sizes.gpt else _llama(sizes)
  shape = lambda x: jax.ShapeDtypeStruct(x, jnp.dtype(param_dtype))
  params = jax.tree.map(shape, params, is_leaf=lambda x: isinstance(x, tuple))
  part = functools.partial
  one = part(block, sizes, dtype, attention_chunk)
  return Model(name, params, tokens, part(embed, dtype), one, part(head, dtype))


def _llama(s: Sizes) -> Any:
  """Returns shapes at the paths of the example LLaMA in Flax nnx."""
  D, F, L = s.width, s.mlp_width, s.layers
  kv = D // s.heads * (s.kv_heads or s.heads)
  kernel = lambda m, n: {'kernel': (L, m, n)}
  return {
    'embed': {'embedding': (s.vocab, D)},
    'blocks': {
      'attention_norm': {'scale': (L, D)},
      'attention': {
        'wq': kernel(D, D),
        'wk': kernel(D, kv),
        'wv': kernel(D, kv),
        'wo': kernel(D, D),
      },
      'mlp_norm': {'scale': (L, D)},
      'mlp': {'gate': kernel(D, F), 'up': kernel(D, F), 'down': kernel(F, D)},
    },
    'final_norm': {'scale': (D,)},
    'lm_head': {'kernel': (D, s.vocab)},
  }


def _gpt(s: Sizes) -> Any:
  """Returns shapes of a GPT whose head is its embedding."""
  D, F, L = s.width, s.mlp_width, s.layers
  linear = lambda m, n: {'kernel': (L, m, n), 'bias': (L, n)}
  norm = lambda *shape: {'scale': shape, 'bias': shape}
  return {
    'embed': {
      'embedding': (s.vocab, D),
      'position_embedding': (s.positions, D),
    },
    'blocks': {
      'attention_norm': norm(L, D),
      'attention': {k: linear(D, D) for k in ('wq', 'wk', 'wv', 'wo')},
      'mlp_norm': norm(L, D),
      'mlp': {'up': linear(D, F), 'down': linear(F, D)},
    },
    'final_norm': norm(D),
  }


def embed(dtype: Any, rest: Any, tokens_BxT: Any) -> Any:
  """Returns the input of the first block, (B, T, D)."""
  x_BxTxD = rest['embed']['embedding'].astype(dtype)[tokens_BxT]
  if 'position_embedding' in rest['embed']:
    positions = rest['embed']['position_embedding'].astype(dtype)
    x_BxTxD = x_BxTxD + positions[: tokens_BxT.shape[1]][None]
  return x_BxTxD


def block(s: Sizes, dtype: Any, chunk: int, layer: Any, x_BxTxD: Any) -> Any:
  """Returns a layer's output."""
  y = _norm(layer['attention_norm'], x_BxTxD, dtype)
  x_BxTxD = x_BxTxD + _attention(s, chunk, layer['attention'], y)
  y = _norm(layer['mlp_norm'], x_BxTxD, dtype)
  return x_BxTxD + _mlp(layer['mlp'], y)


def head(dtype: Any, rest: Any, x_BxTxD: Any, tokens_BxT: Any) -> Any:
  """Returns the mean cross-entropy."""
  x_BxTxD = _norm(rest['final_norm'], x_BxTxD, dtype)
  if 'lm_head' in rest:
    logits_BxTxV = _linear(rest['lm_head'], x_BxTxD)
  else:
    logits_BxTxV = x_BxTxD @ rest['embed']['embedding'].astype(dtype).T
  return cross_entropy(logits_BxTxV, tokens_BxT)


def _linear(p: Any, x: Any) -> Any:
  y = x @ p['kernel'].astype(x.dtype)
  if 'bias' not in p:
    return y
  return y + jnp.expand_dims(
    p['bias'].astype(x.dtype), tuple(range(x.ndim - 1))
  )


def _norm(p: Any, x: Any, dtype: Any) -> Any:
  """Returns RMSNorm or, with a bias, LayerNorm, computed in float32."""
  x = x.astype(jnp.float32)
  if 'bias' in p:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
  x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
  x = x * p['scale'].astype(jnp.float32)[None, None]
  if 'bias' in p:
    x = x + p['bias'].astype(jnp.float32)[None, None]
  return x.astype(dtype)


def _rotate(x_BxTxHxK: Any) -> Any:
  T, K = x_BxTxHxK.shape[1], x_BxTxHxK.shape[3]
  frequency = 10_000.0 ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
  angle = jnp.outer(jnp.arange(T, dtype=jnp.float32), frequency)
  cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
  a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
  x = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return x.astype(x_BxTxHxK.dtype)


def _attention(s: Sizes, chunk: int, p: Any, x_BxTxD: Any) -> Any:
  B, T, D = x_BxTxD.shape
  split = lambda x: x.reshape(B, T, -1, D // s.heads)
  q, k, v = (split(_linear(p[name], x_BxTxD)) for name in ('wq', 'wk', 'wv'))
  if not s.gpt:
    q, k = _rotate(q), _rotate(k)
  if 0 < chunk < T:
    y = _in_chunks(q, k, v, chunk)
  else:
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  return _linear(p['wo'], y.reshape(B, T, -1))


def _in_chunks(q_BxTxHxK: Any, k: Any, v: Any, chunk: int) -> Any:
  """Returns causal attention, with the scores of some queries at a time.

  The backward pass recomputes the scores.
  """
  B, T, H, K = q_BxTxHxK.shape
  starts = jnp.arange(0, T, chunk)
  q = jnp.pad(q_BxTxHxK, ((0, 0), (0, len(starts) * chunk - T), *[(0, 0)] * 2))
  q = q.reshape(B, len(starts), chunk, H, K).swapaxes(0, 1)

  @jax.checkpoint
  def of(queries: Any) -> Any:
    q, start = queries
    seen = jnp.arange(T)[None] <= start + jnp.arange(chunk)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=seen[None, None])

  y = jax.lax.map(of, (q, starts)).swapaxes(0, 1)
  return y.reshape(B, -1, H, K)[:, :T]


def _mlp(p: Any, x: Any) -> Any:
  if 'gate' in p:
    h = jax.nn.silu(_linear(p['gate'], x)) * _linear(p['up'], x)
  else:
    h = jax.nn.gelu(_linear(p['up'], x))
  return _linear(p['down'], h)
