"""A RoBERTa in Flax nnx that labels texts: norms behind, GELU, a tanh head.

Liu et al., RoBERTa: A Robustly Optimized BERT Pretraining Approach, 2019,
https://arxiv.org/abs/1907.11692.

Axes are named in the suffix of each array: B batch, T time, D width, F width of
the MLP, H heads, K width of a head, C labels.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

_INIT = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class RobertaConfig:
  """Sizes of a RoBERTa with a head of `outputs` labels."""

  width: int
  mlp_width: int
  layers: int
  heads: int
  vocab: int
  positions: int  # rows of their embedding
  first_position: int = 2  # that of the first token; rows before are not used
  types: int = 1  # rows of the embedding of which only the first is used
  outputs: int = 2
  norm_epsilon: float = 1e-5
  dtype: str = 'float32'  # of the activations and the matrix products
  param_dtype: str = 'float32'
  scan_layers: bool = True  # one stack of kernels and one scan
  remat: bool = False  # recompute each block in the backward pass

  @property
  def longest(self) -> int:
    """Tokens of the longest text that has positions."""
    return self.positions - self.first_position


def linear(c: RobertaConfig, inputs: int, outputs: int, rngs: nnx.Rngs):
  return nnx.Linear(
    inputs,
    outputs,
    kernel_init=_INIT,
    dtype=c.dtype,
    param_dtype=c.param_dtype,
    rngs=rngs,
  )


def norm(c: RobertaConfig, rngs: nnx.Rngs):
  return nnx.LayerNorm(
    c.width,
    epsilon=c.norm_epsilon,
    dtype=c.dtype,
    param_dtype=c.param_dtype,
    rngs=rngs,
  )


def embedding(c: RobertaConfig, rows: int, rngs: nnx.Rngs):
  return nnx.Embed(
    rows,
    c.width,
    embedding_init=_INIT,
    dtype=c.dtype,
    param_dtype=c.param_dtype,
    rngs=rngs,
  )


class Attention(nnx.Module):
  """Every token sees all tokens of its text."""

  def __init__(self, c: RobertaConfig, rngs: nnx.Rngs):
    make = functools.partial(linear, c, c.width, c.width, rngs)
    self.wq, self.wk, self.wv, self.wo = make(), make(), make(), make()
    self.heads = c.heads

  def __call__(self, x_BxTxD, length_B):
    split = lambda x: x.reshape(*x.shape[:2], self.heads, -1)
    y_BxTxHxK = jax.nn.dot_product_attention(
      split(self.wq(x_BxTxD)),
      split(self.wk(x_BxTxD)),
      split(self.wv(x_BxTxD)),
      key_value_seq_lengths=length_B,
    )
    return self.wo(y_BxTxHxK.reshape(x_BxTxD.shape))


class Mlp(nnx.Module):
  """down(gelu(up x))."""

  def __init__(self, c: RobertaConfig, rngs: nnx.Rngs):
    self.up = linear(c, c.width, c.mlp_width, rngs)
    self.down = linear(c, c.mlp_width, c.width, rngs)

  def __call__(self, x_BxTxD):
    return self.down(jax.nn.gelu(self.up(x_BxTxD), approximate=False))


class Block(nnx.Module):
  def __init__(self, c: RobertaConfig, rngs: nnx.Rngs):
    self.attention = Attention(c, rngs)
    self.attention_norm = norm(c, rngs)
    self.mlp = Mlp(c, rngs)
    self.mlp_norm = norm(c, rngs)

  def __call__(self, x_BxTxD, length_B):
    x_BxTxD = self.attention_norm(x_BxTxD + self.attention(x_BxTxD, length_B))
    return self.mlp_norm(x_BxTxD + self.mlp(x_BxTxD))


class Head(nnx.Module):
  """The first token's features to the logits of the labels."""

  def __init__(self, c: RobertaConfig, rngs: nnx.Rngs):
    self.dense = linear(c, c.width, c.width, rngs)
    self.out = linear(c, c.width, c.outputs, rngs)

  def __call__(self, x_BxD):
    return self.out(jnp.tanh(self.dense(x_BxD)))


def stack(c: RobertaConfig, rngs: nnx.Rngs) -> Any:
  """All blocks: as one module of stacked kernels, or as a list of modules."""
  if not c.scan_layers:
    return nnx.List([Block(c, rngs) for _ in range(c.layers)])
  return nnx.vmap(lambda r: Block(c, r))(rngs.split(c.layers))


class Roberta(nnx.Module):
  """Tokens (B, T), of which each text has its first few, to logits (B, C)."""

  def __init__(self, c: RobertaConfig, rngs: nnx.Rngs):
    self.config = c
    self.embed = embedding(c, c.vocab, rngs)
    self.positions = embedding(c, c.positions, rngs)
    self.types = embedding(c, c.types, rngs)
    self.embed_norm = norm(c, rngs)
    self.blocks = stack(c, rngs)
    self.head = Head(c, rngs)

  def look_up(self, tokens_BxT):
    """Tokens (B, T) to the blocks' input (B, T, D)."""
    first, count = self.config.first_position, tokens_BxT.shape[1]
    place_1xT = jnp.arange(first, first + count)[None]
    type_1x1 = jnp.zeros((1, 1), jnp.int32)
    x_BxTxD = self.embed(tokens_BxT) + self.positions(place_1xT)
    return self.embed_norm(x_BxTxD + self.types(type_1x1))

  def __call__(self, tokens_BxT, length_B):
    c = self.config
    step = lambda x, block: (block(x, length_B), None)
    if c.remat:
      step = jax.checkpoint(step)
    x_BxTxD = self.look_up(tokens_BxT)
    if c.scan_layers:
      x_BxTxD, _ = jax.lax.scan(step, x_BxTxD, self.blocks)
    else:
      for block in self.blocks:
        x_BxTxD, _ = step(x_BxTxD, block)
    return self.head(x_BxTxD[:, 0])
