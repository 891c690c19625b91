"""A LLaMA in Flax nnx: RMSNorm, rotary positions, causal attention, SwiGLU.

Touvron et al., LLaMA: Open and Efficient Foundation Language Models, 2023,
https://arxiv.org/abs/2302.13971.

Axes are named in the suffix of each array: B batch, T time, D width, F width of
the MLP, H heads, K width of a head, V vocabulary.
"""

import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from subspace_optax import plan

_INIT = nnx.initializers.lecun_normal()
_EMBED_INIT = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How LLaMA 3.1 slows the rotation of long waves down, by `factor`.

  A wave that fits into the original context less than `low` times is slowed
  down, one that fits more than `high` times is not, and between is between.
  """

  factor: float
  low: float
  high: float
  context: int  # the original one, in tokens


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
  """Sizes of a LLaMA; `NAMED` holds those that have a name."""

  width: int
  mlp_width: int
  layers: int
  heads: int
  kv_heads: int | None = None  # of keys and values; None: as many as `heads`
  vocab: int = 32_000
  outputs: int | None = None  # of the head; None: as many as `vocab`
  dtype: str = 'float32'  # of the activations and the matrix products
  param_dtype: str = 'float32'
  scan_layers: bool = (
    True  # one stack of kernels (layers, in, out) and one scan
  )
  remat: bool = False  # recompute each block in the backward pass
  attention_chunk: int = 0  # queries at a time, recomputed backward; 0: all
  # Where these live on the mesh in use, if there is one.
  activations: PartitionSpec | None = None  # (B, T, D)
  looked_up: PartitionSpec | None = None  # the embedding (V, D) as it is read
  rope_base: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_epsilon: float = 1e-6
  qkv_bias: bool = False  # of queries, keys and values, as in Qwen 2


_SIZES = ('width', 'mlp_width', 'layers', 'heads', 'kv_heads', 'vocab')
# From llama_test to llama_70b: those that the planner knows.
NAMED = {
  name: LlamaConfig(**{k: getattr(sizes, k) for k in _SIZES})
  for name, sizes in plan.NAMED.items()
  if not sizes.gpt
}


def named(name: str, **changes) -> LlamaConfig:
  """The configuration called `name`, with some fields changed."""
  if name not in NAMED:
    raise ValueError(f'model={name!r} is unknown; choose from {sorted(NAMED)}')
  return dataclasses.replace(NAMED[name], **changes)


class RMSNorm(nnx.Module):
  """x / rms(x) * scale, computed in float32."""

  def __init__(self, c: LlamaConfig):
    self.scale = nnx.Param(jnp.ones((c.width,), c.param_dtype))
    self.epsilon = c.norm_epsilon
    self.dtype = c.dtype

  def __call__(self, x_BxTxD):
    x = x_BxTxD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + self.epsilon)
    scale_1x1xD = self.scale[...].astype(jnp.float32)[None, None]
    return (x * scale_1x1xD).astype(self.dtype)


def linear(
  c: LlamaConfig, inputs: int, outputs: int, rngs: nnx.Rngs, bias: bool = False
):
  return nnx.Linear(
    inputs,
    outputs,
    use_bias=bias,
    kernel_init=_INIT,
    dtype=c.dtype,
    param_dtype=c.param_dtype,
    rngs=rngs,
  )


def frequencies(K: int, base: float, scaling: RopeScaling | None):
  """base^(-2k/K), of which some are slowed down."""
  frequency_K2 = base ** (-jnp.arange(0, K, 2, dtype=jnp.float32) / K)
  if scaling is None:
    return frequency_K2
  waves_K2 = scaling.context * frequency_K2 / (2 * jnp.pi)
  kept_K2 = (waves_K2 - scaling.low) / (scaling.high - scaling.low)
  kept_K2 = jnp.clip(kept_K2, 0.0, 1.0)
  return frequency_K2 * (kept_K2 + (1.0 - kept_K2) / scaling.factor)


def rotate(x_BxTxHxK, base: float, scaling: RopeScaling | None = None):
  """Turns the pair (k, k + K/2) of position t by t times its frequency."""
  T, K = x_BxTxHxK.shape[1], x_BxTxHxK.shape[3]
  frequency_K2 = frequencies(K, base, scaling)
  angle_TxK2 = jnp.outer(jnp.arange(T, dtype=jnp.float32), frequency_K2)
  cos, sin = jnp.cos(angle_TxK2), jnp.sin(angle_TxK2)
  cos, sin = cos[None, :, None], sin[None, :, None]
  a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
  x = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return x.astype(x_BxTxHxK.dtype)


def attend(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, chunk: int):
  """Causal attention, whose (B, H, T, T) scores are never there at once."""
  T = q_BxTxHxK.shape[1]
  if not chunk or T <= chunk:
    return jax.nn.dot_product_attention(
      q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, is_causal=True
    )
  if T % chunk:
    raise ValueError(f'attention_chunk={chunk} does not divide {T} tokens')

  @jax.checkpoint
  def rows(start):
    q_BxCxHxK = jax.lax.dynamic_slice_in_dim(q_BxTxHxK, start, chunk, 1)
    past_CxT = jnp.arange(T)[None] <= start + jnp.arange(chunk)[:, None]
    return jax.nn.dot_product_attention(
      q_BxCxHxK, k_BxTxHxK, v_BxTxHxK, mask=past_CxT[None, None]
    )

  y_NxBxCxHxK = jax.lax.map(rows, jnp.arange(0, T, chunk))
  return jnp.moveaxis(y_NxBxCxHxK, 0, 1).reshape(q_BxTxHxK.shape)


class Attention(nnx.Module):
  """Causal self-attention; kernels are matrices, since the heads are merged."""

  def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
    head_width = c.width // c.heads
    kv_width = head_width * (c.kv_heads or c.heads)
    self.wq = linear(c, c.width, c.width, rngs, c.qkv_bias)
    self.wk = linear(c, c.width, kv_width, rngs, c.qkv_bias)
    self.wv = linear(c, c.width, kv_width, rngs, c.qkv_bias)
    self.wo = linear(c, c.width, c.width, rngs)
    self.head_width = head_width
    self.rope = c.rope_base, c.rope_scaling
    self.chunk = c.attention_chunk

  def __call__(self, x_BxTxD):
    B, T, D = x_BxTxD.shape
    split = lambda x: x.reshape(B, T, -1, self.head_width)
    q_BxTxHxK = rotate(split(self.wq(x_BxTxD)), *self.rope)
    k_BxTxHxK = rotate(split(self.wk(x_BxTxD)), *self.rope)
    v_BxTxHxK = split(self.wv(x_BxTxD))
    y_BxTxHxK = attend(q_BxTxHxK, k_BxTxHxK, v_BxTxHxK, self.chunk)
    return self.wo(y_BxTxHxK.reshape(B, T, D))


class Mlp(nnx.Module):
  """SwiGLU: down(silu(gate x) * up x)."""

  def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
    self.gate = linear(c, c.width, c.mlp_width, rngs)
    self.up = linear(c, c.width, c.mlp_width, rngs)
    self.down = linear(c, c.mlp_width, c.width, rngs)

  def __call__(self, x_BxTxD):
    h_BxTxF = jax.nn.silu(self.gate(x_BxTxD)) * self.up(x_BxTxD)
    return self.down(h_BxTxF)


class Block(nnx.Module):
  def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
    self.attention_norm = RMSNorm(c)
    self.attention = Attention(c, rngs)
    self.mlp_norm = RMSNorm(c)
    self.mlp = Mlp(c, rngs)

  def __call__(self, x_BxTxD):
    x_BxTxD = x_BxTxD + self.attention(self.attention_norm(x_BxTxD))
    return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))


def stack(c: LlamaConfig, rngs: nnx.Rngs) -> Any:
  """All blocks: as one module of stacked kernels, or as a list of modules."""
  if not c.scan_layers:
    return nnx.List([Block(c, rngs) for _ in range(c.layers)])
  return nnx.vmap(lambda r: Block(c, r))(rngs.split(c.layers))


def place(x: jax.Array, spec: PartitionSpec | None) -> jax.Array:
  """Says where `x` lives; left alone, activations follow some kernel."""
  return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


class Llama(nnx.Module):
  """Tokens (B, T) to logits (B, T, V)."""

  def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
    self.config = c
    self.embed = nnx.Embed(
      c.vocab,
      c.width,
      embedding_init=_EMBED_INIT,
      dtype=c.dtype,
      param_dtype=c.param_dtype,
      rngs=rngs,
    )
    self.blocks = stack(c, rngs)
    self.final_norm = RMSNorm(c)
    self.lm_head = linear(c, c.width, c.outputs or c.vocab, rngs)

  def look_up(self, tokens_BxT):
    """Tokens (B, T) to the blocks' input (B, T, D)."""
    c = self.config
    embedding_VxD = self.embed.embedding[...].astype(c.dtype)
    x_BxTxD = place(embedding_VxD, c.looked_up)[tokens_BxT]
    return place(x_BxTxD, c.activations)

  def logits(self, x_BxTxD):
    """The blocks' output (B, T, D) to logits (B, T, V)."""
    return self.lm_head(self.final_norm(x_BxTxD))

  def __call__(self, tokens_BxT):
    c = self.config
    step = lambda x, block: (place(block(x), c.activations), None)
    if c.remat:
      step = jax.checkpoint(step)
    x_BxTxD = self.look_up(tokens_BxT)
    if c.scan_layers:
      x_BxTxD, _ = jax.lax.scan(step, x_BxTxD, self.blocks)
    else:
      for block in self.blocks:
        x_BxTxD, _ = step(x_BxTxD, block)
    return self.logits(x_BxTxD)
