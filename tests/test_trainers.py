"""State in trainers that read from boxes how to shard it, unasked.

Parameters are those of the trainers, smaller: their paths, their boxes and the
names of their axes. Each trainer's own calls say where the state goes.
"""

import functools
import math

from flax import linen as nn
from flax import nnx
import jax
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

import cases
import grid

LAYERS, D, H, K, F, V = 4, 64, 4, 16, 128, 256

_DENSE = 'decoder/encoderdecoderblock_0/MlpBlock_0/Dense_'
_ATTENTION = 'decoder/encoderdecoderblock_0/MultiHeadDotProductAttention_0/'
LM1B = {
  'decoder/Embed_0/embedding': ((V, D), ('vocab', 'embed')),
  'decoder/encoderdecoderblock_0/LayerNorm_0/scale': ((D,), ('embed',)),
  # Named before the heads are axes of their own.
  _ATTENTION + 'query/kernel': ((D, H, K), ('embed', 'kv')),
  _ATTENTION + 'key/kernel': ((D, H, K), ('embed', 'kv')),
  _ATTENTION + 'value/kernel': ((D, H, K), ('embed', 'kv')),
  _ATTENTION + 'out/kernel': ((H, K, D), ('embed', 'kv')),
  _DENSE + '0/kernel': ((D, F), ('embed', 'mlp')),
  _DENSE + '0/bias': ((F,), ('mlp',)),
  _DENSE + '1/kernel': ((F, D), ('mlp', 'embed')),
  _DENSE + '1/bias': ((D,), ('embed',)),
  'decoder/encoderdecoder_norm/scale': ((D,), ('embed',)),
  'decoder/logitdense/kernel': ((D, V), ('embed', 'vocab')),
}
LM1B_RULES = (
  ('mlp', 'tensor'),
  ('vocab', 'tensor'),
  ('embed', 'fsdp'),
  ('heads', 'tensor'),
)

NANODO = {
  'embed/embedding': ((V, D), (None, 'data')),
  'blocks_0/LayerNorm_0/scale': ((D,), None),
  'blocks_0/CausalAttn_0/query/kernel': ((D, H, K), ('data', None, None)),
  'blocks_0/CausalAttn_0/key/kernel': ((D, H, K), ('data', None, None)),
  'blocks_0/CausalAttn_0/value/kernel': ((D, H, K), ('data', None, None)),
  'blocks_0/CausalAttn_0/attn_out_proj/kernel': (
    (H, K, D),
    (None, None, 'data'),
  ),
  'blocks_0/Mlp_0/Dense_0/kernel': ((D, F), ('data', None)),
  'blocks_0/Mlp_0/Dense_1/kernel': ((F, D), ('data', None)),
  'out_ln/scale': ((D,), None),
}

_LAYER = 'decoder/layers/'
MAXTEXT = {
  'token_embedder/embedding': ((V, D), ('vocab', 'embed_vocab')),
  _LAYER + 'pre_self_attention_layer_norm/scale': (
    (D, LAYERS),
    ('norm', 'layers'),
  ),
  _LAYER + 'self_attention/query/kernel': (
    (D, LAYERS, H, K),
    ('embed', 'layers', 'q_heads', 'kv'),
  ),
  _LAYER + 'self_attention/key/kernel': (
    (D, LAYERS, H, K),
    ('embed', 'layers', 'kv_heads', 'kv_head_dim'),
  ),
  _LAYER + 'self_attention/out/kernel': (
    (H, LAYERS, K, D),
    ('heads', 'layers', 'kv', 'embed'),
  ),
  _LAYER + 'mlp/wi_0/kernel': ((D, LAYERS, F), ('embed', 'layers', 'mlp')),
  _LAYER + 'mlp/wo/kernel': ((F, LAYERS, D), ('mlp', 'layers', 'embed')),
  'decoder/logits_dense/kernel': ((D, V), ('embed_vocab', 'vocab')),
}
MAXTEXT_RULES = (
  ('vocab', ('tensor',)),
  ('embed_vocab', ('fsdp',)),
  ('embed', ('fsdp',)),
  ('norm', ('tensor',)),
  ('heads', ('tensor',)),
  ('q_heads', ('tensor',)),
  ('kv_heads', ('tensor',)),
  ('mlp', ('tensor',)),
  ('layers', ()),
  ('kv', ()),
  ('kv_head_dim', ()),
)

TUNIX = {
  'embedder/input_embedding': ((V, D), ('tp', 'fsdp')),
  'layers/0/input_layernorm/w': ((D,), ('tp',)),
  'layers/0/attn/q_proj/w': ((D, H, K), ('fsdp', 'tp', None)),
  'layers/0/attn/k_proj/w': ((D, 2, K), ('fsdp', 'tp', None)),
  'layers/0/attn/o_proj/w': ((H, K, D), ('tp', None, 'fsdp')),
  'layers/0/mlp/gate_proj/kernel': ((D, F), ('fsdp', 'tp')),
  'layers/0/mlp/down_proj/kernel': ((F, D), ('tp', 'fsdp')),
  'lm_head/w': ((D, V), ('fsdp', 'tp')),
}


def normal(shape):
  return np.random.default_rng(shape).standard_normal(shape, np.float32)


def linen_tree(tree, box):
  return cases.nest(
    {
      path: normal(shape) if names is None else box(normal(shape), names)
      for path, (shape, names) in tree.items()
    }
  )


def nnx_tree(tree):
  make = lambda shape, names: nnx.Param(
    normal(shape), out_sharding=names, eager_sharding=False
  )
  return nnx.State(cases.nest({k: make(*x) for k, x in tree.items()}))


def mesh_of(**axes):
  kinds = (AxisType.Auto,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)


# Each from an optimizer to the shapes of its state and their shardings.


def lm1b(tx):
  params = linen_tree(LM1B, nn.LogicallyPartitioned)
  mesh = mesh_of(data=1, fsdp=4, tensor=1)
  state = jax.eval_shape(tx.init, params)
  specs = nn.get_partition_spec(state)
  return state, nn.logical_to_mesh_sharding(specs, mesh, LM1B_RULES)


def nanodo(tx):
  state = jax.eval_shape(tx.init, linen_tree(NANODO, nn.Partitioned))
  return state, nn.get_sharding(state, mesh_of(data=4))


def maxtext_linen(tx):
  params = linen_tree(MAXTEXT, nn.LogicallyPartitioned)
  mesh = mesh_of(fsdp=2, tensor=2)
  with nn.logical_axis_rules(MAXTEXT_RULES):
    state = jax.eval_shape(tx.init, params)
  specs = nn.get_partition_spec(state)
  return state, nn.logical_to_mesh_sharding(specs, mesh, MAXTEXT_RULES)


def maxtext_nnx(tx):
  params, mesh = nnx_tree(MAXTEXT), mesh_of(fsdp=2, tensor=2)
  with jax.set_mesh(mesh), nn.logical_axis_rules(MAXTEXT_RULES):
    state = nnx.eval_shape(lambda: to_opt_state(tx.init(params)))
    return state, nnx.get_named_sharding(state, mesh)


def tunix(tx):
  params, mesh = nnx_tree(TUNIX), mesh_of(fsdp=2, tp=2)
  state = nnx.eval_shape(lambda: to_opt_state(tx.init(params)))
  return state, nnx.get_named_sharding(state, mesh)


def to_opt_state(state):
  """Returns what `nnx.Optimizer` makes of a state: variables of its own."""

  class Holder(nnx.Module):
    pass

  holder = Holder()
  tx = optax.GradientTransformation(lambda _: state, lambda *_: None)
  return nnx.state(nnx.Optimizer(holder, tx, wrt=nnx.Param).opt_state)


TRAINERS = {
  'lm1b': lm1b,
  'nanodo': nanodo,
  'maxtext_linen': maxtext_linen,
  'maxtext_nnx': maxtext_nnx,
  'tunix': tunix,
}


def bytes_of(tx, trainer):
  """Returns the bytes of the state on one device, and its share if equal.

  Without one number for each output, which has no other axis than the outputs'.
  """
  state, shardings = TRAINERS[trainer](tx)
  own = total = 0
  for x, place in zip(*map(jax.tree.leaves, (state, shardings)), strict=True):
    if 1 in x.shape:
      continue
    own += math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
    total += math.prod(x.shape) * x.dtype.itemsize
  return own, total / 4


@functools.cache
def bytes_of_adam(trainer):
  return bytes_of(optax.adamw(1e-3), trainer)[0]


@pytest.mark.parametrize(
  'name, trainer', grid.cover(cases.READY_MADE, TRAINERS, of=5)
)
def test_state_is_sharded_as_that_of_adam(trainer, name):
  own, share = bytes_of(cases.ready_made(name, rank=8)(1e-3), trainer)
  assert own <= bytes_of_adam(trainer)
  assert own <= 1.05 * share
