"""Which leaves are matrices, along which axes, as their authors would say."""

import random

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import pytest

import cases
import errors
import model_trees
import subspace_optax as so
from subspace_optax import projectors

# Elsewhere what is assumed or left plain is passed over.
pytestmark = pytest.mark.filterwarnings('error')


@pytest.mark.parametrize('name', model_trees.LIBRARIES)
def test_leaves_are_decided_as_their_authors_would(name):
  library = model_trees.LIBRARIES[name]
  found = model_trees.matches_of(
    {path: shape for path, (shape, _) in library.items()}
  )
  wanted = {path: matrices for path, (_, matrices) in library.items()}
  assert {
    path: model_trees.matrices_of(found[path]) for path in library
  } == wanted
  assert not [path for path, match in found.items() if match.how == 'assumed']


@pytest.mark.parametrize(
  'path',
  [
    *('head/w', 'head/weight', 'head/dense/kernel', 'LMHead_0/kernel'),
    *('tokenEmbedding/w', 'emb/weight', 'tok/w', 'patch/w', 'output/w'),
    *('logits/kernel', 'classifier/kernel', 'score/kernel', 'logitdense/w'),
    *('unembed/kernel', 'mlp_head/kernel', 'decoder/out_proj/kernel'),
    *('vocab_proj/kernel', 'final_layer/w', 'norm/b', 'blocks/ln_1/g'),
    *(
      'pos/w',
      'encoder/posEmb/w',
      'embed_out/kernel',
      'value_head/w',
      'ln_1/weight',
    ),
    *('blocks/3/norm1/weight', 'model.tok_embeddings.weight'),
    *('x/LayerNorm_2', 'ln_1/weight', 'layers/ln1_w', 'attn/ln_g', 'rms/w'),
    # Flat names, biases for short and of heads.
    *('ln1_g', 'lnf_g', 'head_w', 'attn_b', 'mlp_b', 'b1', 'b_qkv', 'betas'),
    *('attn/b_Q', 'attn/q_b', 'attn/bq', 'attn/pos_bias_u', 'attn/bias_q'),
    # Vectors of other models, and buffers.
    *('mixer/A_log', 'log_step', 'attn/alibi_slopes', 'att/time_faaaa'),
    *('att/r_k', 'relative_position_bias_table', 'rope/freqs', 'rope/sin'),
    *('causal_mask', 'attn/rel_pos_h'),
    # Tables.
    *('codebook', 'cls_token', 'query_tokens', 'object_queries', 'W_pos'),
    *('soft_prompt', 'W_E', 'vq/codebook/w'),
    # Heads.
    *('lmhead/w', 'predictions/decoder/kernel', 'dense_prediction/kernel'),
    *('head_a/kernel', 'W_U', 'logits_proj/w', 'gpt2/head/kernel'),
    *('Transformer_0/output/kernel', 'head_1/kernel', 'classifier/1/kernel'),
  ],
)
def test_heads_embeddings_and_norms_stay_plain(path):
  found = model_trees.matches_of({path: (64, 64), 'w': (64, 64)})
  assert found[path].layout is None and found['w'].layout
  assert 'by its name' in found[path].reason


@pytest.mark.parametrize(
  'path',
  [
    *('attention_norm_proj', 'scaled_attn', 'upscale/kernel', 'upscale/w'),
    *('normal_proj/kernel', 'norm1/linear/kernel', 'biased/w', 'scaler/kernel'),
    *('blocks/head_gate/kernel', 'layers/3/output/dense/kernel'),
    *('attention/out/kernel', 'experts/score/w', 'layers_0/head/kernel'),
    *('embedder/layers_0/attn/q/kernel', 'embed_proj/kernel', 'tokenizer/w'),
    *('lstm/output_gate/w', 'head_gate/kernel', 'denorm/w', 'bias_proj/w'),
    *('overhead/w', 'behead', 'throughput/w', 'abnormal/w', 'autoscore/w'),
    *('mlp/pwconv1/kernel', 'conv_ffn_in/w', 'embeddings_project/kernel'),
    *('embedding_hidden_mapping_in/kernel', 'embed_to_hidden', 'emb_gate/w'),
    *('timestep_embedder/linear_1/kernel', 'logit_lens', 'logits_gate/w'),
    *('encoder/3/output/kernel', 'gpt/transformer/5/out/w', 'mixer_3/output/w'),
    *('stage1/unit2/output/kernel', 'cell_2/out_proj/w', 'queries', 'mask/w'),
    *('res_block_1/logits_gate/w', 'lora_b', 'ssm/B_re', 'b_proj', 'attn/wq_b'),
  ],
)
def test_names_that_only_hold_such_words_are_matrices(path):
  assert model_trees.matrices_of(
    model_trees.matches_of({path: (64, 32)})[path]
  ) == (1, 64, 32)


def test_heads_with_several_layers_are_models():
  dense = {'Dense_0/kernel': (784, 128), 'Dense_1/kernel': (128, 10)}
  for name in ('classifier', 'Classifier_0', 'embedder', 'value_head'):
    found = model_trees.matches_of(
      {f'{name}/{path}': s for path, s in dense.items()}
    )
    assert all(match.layout for match in found.values()), name
  head = {'classifier/dense/kernel': (64, 64), 'classifier/out/kernel': (64, 3)}
  found = model_trees.matches_of(head)
  assert found['classifier/dense/kernel'].layout
  assert not found['classifier/out/kernel'].layout


def test_embedders_with_several_tables_are_no_models():
  shapes = {f'embedder/{name}/w': (99, 64) for name in ('word', 'position')}
  found = model_trees.matches_of(shapes | {'mlp/pos_embed/w': (99, 64)})
  assert not any(match.layout for match in found.values())


def test_pairs_of_low_rank_are_no_biases():
  found = model_trees.matches_of(
    {'q_a': (64, 8), 'q_b': (8, 64), 'k_b': (8, 64)}
  )
  assert found['q_a'].layout and found['q_b'].layout
  assert not found['k_b'].layout


STACKS = {
  # A norm tells that the first axis counts layers.
  'ln/scale, o_proj': (
    {'h/ln/scale': (12, 64), 'h/o_proj/kernel': (12, 64, 64)},
    {'h/ln/scale': None, 'h/o_proj/kernel': (12, 64, 64)},
  ),
  'norm along axis 1': (
    {'h/norm/scale': (64, 12), 'h/query/kernel': (64, 12, 64)},
    {'h/norm/scale': None, 'h/query/kernel': (12, 64, 64)},
  ),
  # Kernels tell by sides that are swapped; vectors are one for each layer.
  'up, down, any vector': (
    {'h/up': (12, 64, 96), 'h/down': (12, 96, 64), 'h/shift': (12, 64)},
    {'h/up': (12, 64, 96), 'h/down': (12, 96, 64), 'h/shift': None},
  ),
  'one kernel and a vector': (
    {'h/mix': (12, 64, 96), 'h/gain': (12, 96)},
    {'h/mix': (12, 64, 96), 'h/gain': None},
  ),
  'layers along axis 1, with biases': (
    {'h/wi/kernel': (16, 3, 16), 'h/wi/bias': (16, 3)},
    {'h/wi/kernel': (3, 16, 16), 'h/wi/bias': None},
  ),
  'w and b': (
    {'h/w': (12, 64, 96), 'h/b': (12, 96)},
    {'h/w': (12, 64, 96), 'h/b': None},
  ),
  'a router is no vector': (
    {'moe/router/w': (4, 64), 'moe/up': (4, 64, 96), 'moe/down': (4, 96, 64)},
    {
      'moe/router/w': (1, 4, 64),
      'moe/up': (4, 64, 96),
      'moe/down': (4, 96, 64),
    },
  ),
  # A bias tells which axes are outputs.
  'bias of heads': (
    {'mixer/kernel': (64, 4, 24), 'mixer/bias': (4, 24)},
    {'mixer/kernel': (1, 64, 96), 'mixer/bias': None},
  ),
  'bias of the width': (
    {'mixer/kernel': (4, 24, 64), 'mixer/bias': (64,)},
    {'mixer/kernel': (1, 96, 64), 'mixer/bias': None},
  ),
  'biases of heads, RWKV, AlphaFold': (
    {
      'h/ln/scale': (6, 64),
      'h/attn/q_b': (6, 4, 16),
      'h/attn/pos_bias_u': (6, 4, 16),
      'h/attn/gating_b': (6, 4, 16),
      'h/att/time_faaaa': (6, 4, 16),
      'h/mixer/A_log': (6, 64, 16),
      'h/short_filter/w': (6, 3, 64),
      'h/up': (6, 64, 96),
    },
    {
      'h/ln/scale': None,
      'h/attn/q_b': None,
      'h/attn/pos_bias_u': None,
      'h/attn/gating_b': None,
      'h/att/time_faaaa': None,
      'h/mixer/A_log': None,
      'h/short_filter/w': None,
      'h/up': (6, 64, 96),
    },
  ),
  'weights of two axes': (
    {'base_weight': (64, 64), 'up': (8, 64, 96), 'down': (8, 96, 64)},
    {'base_weight': (1, 64, 64), 'up': (8, 64, 96), 'down': (8, 96, 64)},
  ),
  'bias of experts': (
    {'moe/gate_up': (4, 64, 96), 'moe/gate_up_bias': (4, 96)},
    {'moe/gate_up': (4, 64, 96), 'moe/gate_up_bias': None},
  ),
}


@pytest.mark.parametrize('name', STACKS)
def test_other_leaves_tell(name):
  shapes, wanted = STACKS[name]
  found = model_trees.matches_of(shapes)
  assert {
    path: model_trees.matrices_of(match) for path, match in found.items()
  } == wanted
  for match in found.values():
    assert match.layout is None or match.how == (
      'siblings' if len(match.leaf.shape) > 2 else 'two axes'
    )


def _layer(rng, D, F, heads, grouped, head_dim, experts, bias, norms):
  """Returns shapes of a layer, and `i`, `o`, `b` for each axis of matrices."""
  q, k, out = rng.choice(
    [('query', 'key', 'out'), ('q_proj', 'k_proj', 'o_proj')]
  )
  H, K, S = heads, grouped, head_dim
  if rng.random() < 0.5:
    leaves = {q: ((D, H, S), 'ioo'), k: ((D, K, S), 'ioo')}
    leaves[out] = ((H, S, D), 'iio')
  else:
    leaves = {q: ((D, H * S), 'io'), k: ((D, K * S), 'io')}
    leaves[out] = ((H * S, D), 'io')
  layer = {f'attention/{name}/kernel': x for name, x in leaves.items()}
  if experts:
    layer['moe/router/kernel'] = ((D, experts), 'io')
    layer['moe/up'] = ((experts, D, F), 'bio')
    layer['moe/down'] = ((experts, F, D), 'bio')
  else:
    layer['mlp/up/kernel'] = ((D, F), 'io')
    layer['mlp/down/kernel'] = ((F, D), 'io')
  if bias:
    for path, (shape, form) in list(layer.items()):
      if path.endswith('kernel'):
        outputs = tuple(n for n, c in zip(shape, form, strict=True) if c == 'o')
        layer[path.replace('kernel', 'bias')] = (outputs, '')
  return layer | ({'ln_1/scale': ((D,), '')} if norms else {})


def _model(rng):
  """Returns a transformer, its layers apart or stacked along some axis."""
  S, H = rng.choice([16, 64, 128]), rng.choice([2, 4, 12, 32])
  D = H * S * rng.choice([1, 1, 2])
  layer = _layer(
    *(rng, D, rng.choice([D * 2, D * 8 // 3]), H, rng.choice([1, 2, H]), S),
    experts=rng.choice([0, 0, 4, 64]),
    bias=rng.random() < 0.4,
    norms=rng.random() < 0.8,
  )
  axis, L = rng.choice([None, 0, 1]), rng.choice([2, 6, 12, 32])
  model = {'embed/embedding': ((999, D), ''), 'final_norm/scale': ((D,), '')}
  for path, (shape, form) in layer.items():
    if axis is None:
      model[f'layers_0/{path}'] = shape, form
    else:
      shape = shape[:axis] + (L,) + shape[axis:]
      form = form and form[:axis] + 'b' + form[axis:]
      model[f'layers/{path}'] = shape, form
  return model


def _sides(leaf, form):
  """Returns the sizes of the rows' and of the columns' axes, longer than 1."""
  axes = list(zip(leaf.shape, form, strict=False))  # no form: no matrix
  side = lambda kind: [n for n, c in axes if c == kind and n > 1]
  return side('i'), side('o')


def test_what_is_not_assumed_is_right_in_random_transformers():
  decided, assumed = 0, 0
  for seed in range(200):
    model = _model(random.Random(seed))
    found = model_trees.matches_of(
      {path: shape for path, (shape, _) in model.items()}
    )
    for path, (shape, form) in model.items():
      if found[path].how == 'assumed':
        assumed += 1
        continue
      decided += 1
      layout, got = found[path].layout, ''
      if layout:
        got = ''.join(
          'i' if i in layout.rows else 'o' if i in layout.cols else 'b'
          for i in range(len(shape))
        )
      leaf = found[path].leaf
      assert _sides(leaf, got) == _sides(leaf, form), (seed, path, shape, got)
  assert decided > 50 * assumed > 0


def _partitioned(shape, names):
  return nn.LogicallyPartitioned(jnp.ones(shape), names)


def _variable(shape, names):
  return nnx.Param(jnp.ones(shape), out_sharding=names, eager_sharding=False)


METADATA = {
  'mixer/w': ((12, 16, 2, 8), ('layers', 'embed', 'heads', 'kv'), (12, 16, 16)),
  'mixer/v': ((16, 12, 24), ('embed', 'layers', 'mlp'), (12, 16, 24)),
  'mixer/back': ((2, 8, 16), ('heads', 'head_dim', 'embed'), (1, 16, 16)),
  'moe/w': ((4, 16, 24), ('exp', 'fsdp', 'tensor'), (4, 16, 24)),
  'moe/gate_1': ((4, 16, 8), ('layers', 'embed', 'experts'), (4, 16, 8)),
  'moe/gate_2': ((16, 4, 8), ('embed', 'layers', 'exp'), (4, 16, 8)),
  'h/vector': ((12, 16), ('layers', 'embed'), None),
  'h/vectors': ((12, 8, 16), ('layers', 'exp', 'embed'), None),
  'table': ((16, 99), ('embed', 'vocab'), None),
}


@pytest.mark.parametrize('box', [_partitioned, _variable])
def test_names_of_axes_tell(box):
  params = cases.nest(
    {p: box(s, names) for p, (s, names, _) in METADATA.items()}
  )
  spec = so.SubspaceSpec(1, only_if_smaller=False)
  found = {match.path: match for match in spec.match(params)}
  for path, (_, _, wanted) in METADATA.items():
    assert model_trees.matrices_of(found[path]) == wanted, path
    assert found[path].how in ('metadata', ''), path
  jax.eval_shape(so.project(spec, projectors.stiefel(2)).init, params)


def test_routers_are_matrices_in_boxes_as_without():
  kernel = _partitioned((64, 8), ('embed', 'exp'))
  (match,) = so.SubspaceSpec(1).match({'router': {'kernel': kernel}})
  assert model_trees.matrices_of(match) == (1, 64, 8)


def test_exclude_as_a_pattern_replaces_the_names():
  shapes = {'lm_head/kernel': (64, 99), 'blocks/up': (64, 99)}
  assert model_trees.matches_of(shapes)['lm_head/kernel'].layout is None
  assert model_trees.matches_of(shapes, exclude='up')['lm_head/kernel'].layout
  found = model_trees.matches_of(shapes, exclude=None)
  assert all(match.layout for match in found.values())


def test_the_value_of_a_policy_is_no_attention():
  dense = lambda *shape: {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}
  params = {
    'hidden': dense(3136, 512),
    'logits': dense(512, 6),
    'value': dense(512, 1),
    'lm_head': dense(512, 999),
  }
  matches = so.SubspaceSpec(4).match(params)
  assert [m.path for m in matches if m.layout] == ['hidden/kernel']


@pytest.mark.parametrize('sep', [None, '.', '::'])
def test_flat_keys_are_the_paths_that_they_spell(sep):
  """Of `flax.traverse_util.flatten_dict`; norms are stacked, as kernels are."""
  shapes = {
    'embed/embedding': (100, 32),
    'layers/attn/query/kernel': (3, 32, 4, 8),
    'layers/attn/key/kernel': (3, 32, 4, 8),
    'layers/attn/value/kernel': (3, 32, 4, 8),
    'layers/attn/out/kernel': (3, 4, 8, 32),
    'layers/mlp/kernel': (3, 32, 64),
    'layers/mlp/bias': (3, 64),
    'layers/norm/scale': (3, 32),
    # A bias only by its sibling, whose outputs it tells.
    'proj/w': (32, 4, 16),
    'proj/b': (4, 16),
    'head/kernel': (32, 100),
  }
  spell = lambda path: tuple(path.split('/'))
  if sep is not None:
    spell = lambda path: path.replace('/', sep)
  params = {
    spell(path): jax.ShapeDtypeStruct(shape, jnp.float32)
    for path, shape in shapes.items()
  }
  found = {
    m.path.replace(sep or '/', '/'): (m.matrices, m.how)
    for m in so.SubspaceSpec(1, only_if_smaller=False).match(params)
  }
  nested = model_trees.matches_of(shapes)
  assert found == {path: (m.matrices, m.how) for path, m in nested.items()}
  assert found['layers/attn/out/kernel'][0] == '3 x (32 x 32)'
  assert nested['head/kernel'].layout is None
  assert nested['proj/b'].layout is None


def test_a_flat_key_beside_the_path_that_it_spells():
  params = {('a', 'b'): jnp.ones((8, 8)), ('a/b',): jnp.ones((8, 8))}
  with errors.raises(ValueError, "'a/b'", 'rename'):
    so.SubspaceSpec(1).match(params)
