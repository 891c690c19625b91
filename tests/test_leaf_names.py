"""The leaves of the usual libraries, each decided as its authors would.

Paths and sizes are those of real models. A leaf is None, which stays plain, or
the number of its matrices, their rows and columns.
"""

import random

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import cases
import errors
import subspace_optax as so
from subspace_optax import projectors

# Elsewhere what is assumed or left plain is passed over.
pytestmark = pytest.mark.filterwarnings('error')

LM1B = {
  'decoder/Embed_0/embedding': ((30000, 512), None),
  'decoder/posembed_output/pos_embedding': ((1, 2048, 512), None),
  'decoder/encoderdecoderblock_0/LayerNorm_0/scale': ((512,), None),
  'decoder/encoderdecoderblock_0/MultiHeadDotProductAttention_0/query/kernel': (
    (512, 8, 64),
    (1, 512, 512),
  ),
  'decoder/encoderdecoderblock_0/MultiHeadDotProductAttention_0/out/kernel': (
    (8, 64, 512),
    (1, 512, 512),
  ),
  'decoder/encoderdecoderblock_0/MlpBlock_0/Dense_0/kernel': (
    (512, 2048),
    (1, 512, 2048),
  ),
  'decoder/encoderdecoderblock_0/MlpBlock_0/Dense_0/bias': ((2048,), None),
  'decoder/encoderdecoder_norm/scale': ((512,), None),
  'decoder/logitdense/kernel': ((512, 30000), None),
  'decoder/logitdense/bias': ((30000,), None),
}

NANODO = {
  'embed/embedding': ((32000, 512), None),
  'pos_embed/embedding': ((1024, 512), None),
  'blocks_0/LayerNorm_0/scale': ((512,), None),
  'blocks_0/CausalAttn_0/query/kernel': ((512, 8, 64), (1, 512, 512)),
  'blocks_0/CausalAttn_0/key/kernel': ((512, 8, 64), (1, 512, 512)),
  'blocks_0/CausalAttn_0/value/kernel': ((512, 8, 64), (1, 512, 512)),
  'blocks_0/CausalAttn_0/attn_out_proj/kernel': ((8, 64, 512), (1, 512, 512)),
  'blocks_0/Mlp_0/Dense_0/kernel': ((512, 2048), (1, 512, 2048)),
  'blocks_0/Mlp_0/Dense_1/kernel': ((2048, 512), (1, 2048, 512)),
  'out_ln/scale': ((512,), None),
}

# Flax's example of Gemma 3 1B, where heads are not as wide as the model.
FLAX_GEMMA = {
  'embedder/input_embedding': ((262144, 1152), None),
  'layers/0/pre_attention_norm/scale': ((1152,), None),
  'layers/0/attn/q_einsum/kernel': ((4, 1152, 256), (1, 1152, 1024)),
  'layers/0/attn/kv_einsum/kernel': ((2, 1, 1152, 256), (2, 1152, 256)),
  'layers/0/attn/attn_vec_einsum/kernel': ((4, 256, 1152), (1, 1024, 1152)),
  'layers/0/attn/_query_norm/scale': ((256,), None),
  'layers/0/mlp/gate_proj/kernel': ((1152, 6912), (1, 1152, 6912)),
  'layers/0/mlp/down_proj/kernel': ((6912, 1152), (1, 6912, 1152)),
  'final_norm/scale': ((1152,), None),
}

# Gemma 7B, multi-head attention.
GEMMA = {
  'embedder/input_embedding': ((256128, 3072), None),
  'layer_0/pre_attention_norm/scale': ((3072,), None),
  'layer_0/attn/qkv_einsum/w': ((3, 16, 3072, 256), (3, 3072, 4096)),
  'layer_0/attn/attn_vec_einsum/w': ((16, 256, 3072), (1, 4096, 3072)),
  'layer_0/mlp/gating_einsum': ((2, 3072, 24576), (2, 3072, 24576)),
  'layer_0/mlp/linear': ((24576, 3072), (1, 24576, 3072)),
  'final_norm/scale': ((3072,), None),
}

# Qwen 3, 30B of experts.
TUNIX = {
  'embedder/input_embedding': ((151936, 2048), None),
  'layers/0/input_layernorm/w': ((2048,), None),
  'layers/0/attn/q_proj/w': ((2048, 32, 128), (1, 2048, 4096)),
  'layers/0/attn/k_proj/w': ((2048, 4, 128), (1, 2048, 512)),
  'layers/0/attn/v_proj/w': ((2048, 4, 128), (1, 2048, 512)),
  'layers/0/attn/o_proj/w': ((32, 128, 2048), (1, 4096, 2048)),
  'layers/0/attn/q_norm/w': ((128,), None),
  'layers/0/mlp/router/kernel': ((2048, 128), (1, 2048, 128)),
  'layers/0/mlp/gate_proj': ((128, 2048, 768), (128, 2048, 768)),
  'layers/0/mlp/up_proj': ((128, 2048, 768), (128, 2048, 768)),
  'layers/0/mlp/down_proj': ((128, 768, 2048), (128, 768, 2048)),
  'final_norm/w': ((2048,), None),
  'lm_head/w': ((2048, 151936), None),
}

_LAYER = 'decoder/layers/'
MAXTEXT_SCANNED = {
  'token_embedder/embedding': ((32000, 4096), None),
  _LAYER + 'pre_self_attention_layer_norm/scale': ((4096, 32), None),
  _LAYER + 'self_attention/query/kernel': (
    (4096, 32, 32, 128),
    (32, 4096, 4096),
  ),
  _LAYER + 'self_attention/key/kernel': ((4096, 32, 8, 128), (32, 4096, 1024)),
  _LAYER + 'self_attention/query/bias': ((32, 32, 128), None),
  _LAYER + 'self_attention/sinks': ((32, 32), None),
  _LAYER + 'self_attention/out/kernel': (
    (32, 32, 128, 4096),
    (32, 4096, 4096),
  ),
  _LAYER + 'mlp/wi_0/kernel': ((4096, 32, 14336), (32, 4096, 14336)),
  _LAYER + 'mlp/wo/kernel': ((14336, 32, 4096), (32, 14336, 4096)),
  'decoder/decoder_norm/scale': ((4096,), None),
  'decoder/logits_dense/kernel': ((4096, 32000), None),
}

MAXTEXT = {
  'decoder/layers_0/pre_self_attention_layer_norm/scale': ((4096,), None),
  'decoder/layers_0/self_attention/query/kernel': (
    (4096, 32, 128),
    (1, 4096, 4096),
  ),
  'decoder/layers_0/self_attention/out/kernel': (
    (32, 128, 4096),
    (1, 4096, 4096),
  ),
  'decoder/layers_0/mlp/wi_0/kernel': ((4096, 14336), (1, 4096, 14336)),
  'decoder/decoder_norm/scale': ((4096,), None),
}

_MOE = 'decoder/moe_layers/'
_BLOCK = _MOE + 'DeepSeekMoeBlock_0/'
DEEPSEEK_3 = {
  _MOE + 'self_attention/kv_norm/scale': ((512, 58), None),
  _MOE + 'self_attention/wq_a/kernel': ((7168, 58, 1536), (58, 7168, 1536)),
  _MOE + 'self_attention/wq_b/kernel': (
    (1536, 58, 128, 192),
    (58, 1536, 24576),
  ),
  _MOE + 'self_attention/wkv_b/kernel': ((512, 58, 128, 256), (58, 512, 32768)),
  _MOE + 'self_attention/out/kernel': (
    (128, 58, 128, 7168),
    (58, 16384, 7168),
  ),
  _MOE + 'post_self_attention_layer_norm/scale': ((7168, 58), None),
  _BLOCK + 'MoeBlock_0/gate/kernel': ((7168, 58, 256), (58, 7168, 256)),
  _BLOCK + 'MoeBlock_0/gate/bias': ((256, 58), None),
  _BLOCK + 'MoeBlock_0/wi_0': ((256, 58, 7168, 2048), (256 * 58, 7168, 2048)),
  _BLOCK + 'MoeBlock_0/wo': ((256, 58, 2048, 7168), (256 * 58, 2048, 7168)),
  _BLOCK + 'shared_experts/wo/kernel': ((2048, 58, 7168), (58, 2048, 7168)),
}

# Linear attention, whose heads are one axis with what each of them holds.
_NEXT = 'decoder/layers/layer_0/'
QWEN_3_NEXT = {
  _NEXT + 'input_layernorm/scale': ((2048, 12), None),
  _NEXT + 'attention/in_proj_qkvz/kernel': (
    (2048, 12, 12288),
    (12, 2048, 12288),
  ),
  _NEXT + 'attention/conv1d/kernel': ((4, 12, 1, 8192), None),
  _NEXT + 'attention/A_log': ((32, 12), None),
  _NEXT + 'attention/norm/rms_norm/scale': ((128, 12), None),
  _NEXT + 'attention/out/kernel': ((4096, 12, 2048), (12, 4096, 2048)),
}

HF_LLAMA = {
  'model/embed_tokens/embedding': ((32000, 4096), None),
  'model/layers/0/input_layernorm/weight': ((4096,), None),
  'model/layers/0/self_attn/q_proj/kernel': ((4096, 4096), (1, 4096, 4096)),
  'model/layers/0/self_attn/o_proj/kernel': ((4096, 4096), (1, 4096, 4096)),
  'model/layers/0/mlp/down_proj/kernel': ((11008, 4096), (1, 11008, 4096)),
  'model/norm/weight': ((4096,), None),
  'lm_head/kernel': ((4096, 32000), None),
}

HF_LLAMA_SCANNED = {
  'model/embed_tokens/embedding': ((32000, 4096), None),
  'model/layers/input_layernorm/weight': ((12, 4096), None),
  'model/layers/self_attn/q_proj/kernel': ((12, 4096, 4096), (12, 4096, 4096)),
  'model/layers/self_attn/k_proj/kernel': ((12, 4096, 1024), (12, 4096, 1024)),
  'model/layers/self_attn/o_proj/kernel': ((12, 4096, 4096), (12, 4096, 4096)),
  'model/layers/mlp/down_proj/kernel': ((12, 11008, 4096), (12, 11008, 4096)),
  'model/norm/weight': ((4096,), None),
  'lm_head/kernel': ((4096, 32000), None),
}

HF_GPT_2 = {
  'transformer/wte/embedding': ((50257, 768), None),
  'transformer/wpe/embedding': ((1024, 768), None),
  'transformer/h/0/ln_1/scale': ((768,), None),
  'transformer/h/0/attn/c_attn/kernel': ((2304, 768), (1, 2304, 768)),
  'transformer/h/0/attn/c_proj/kernel': ((768, 768), (1, 768, 768)),
  'transformer/h/0/mlp/c_fc/kernel': ((3072, 768), (1, 3072, 768)),
  'transformer/ln_f/bias': ((768,), None),
  'score/kernel': ((768, 2), None),
}

_BERT = 'bert/encoder/layer/0/'
HF_BERT = {
  'bert/embeddings/word_embeddings/embedding': ((30522, 768), None),
  'bert/embeddings/LayerNorm/scale': ((768,), None),
  _BERT + 'attention/self/query/kernel': ((768, 768), (1, 768, 768)),
  _BERT + 'attention/output/dense/kernel': ((768, 768), (1, 768, 768)),
  _BERT + 'attention/output/LayerNorm/scale': ((768,), None),
  _BERT + 'intermediate/dense/kernel': ((768, 3072), (1, 768, 3072)),
  _BERT + 'output/dense/kernel': ((3072, 768), (1, 3072, 768)),
  'bert/pooler/dense/kernel': ((768, 768), (1, 768, 768)),
  'cls/predictions/transform/dense/kernel': ((768, 768), (1, 768, 768)),
  'qa_outputs/kernel': ((768, 2), None),
  'classifier/kernel': ((768, 3), None),
}

_T5 = 'encoder/block/0/layer/'
HF_T5 = {
  'shared/embedding': ((32128, 512), None),
  _T5 + '0/SelfAttention/q/kernel': ((512, 384), (1, 512, 384)),
  _T5 + '0/SelfAttention/o/kernel': ((384, 512), (1, 384, 512)),
  _T5 + '0/SelfAttention/relative_attention_bias/embedding': ((32, 6), None),
  _T5 + '0/layer_norm/weight': ((512,), None),
  _T5 + '1/DenseReluDense/wi_0/kernel': ((512, 1024), (1, 512, 1024)),
  _T5 + '1/DenseReluDense/wo/kernel': ((1024, 512), (1, 1024, 512)),
  'encoder/final_layer_norm/weight': ((512,), None),
  'lm_head/kernel': ((512, 32128), None),
}

EASYDEL = {
  'model/embed_tokens/embedding': ((151936, 2048), None),
  'model/layers/0/input_layernorm/kernel': ((2048,), None),
  'model/layers/0/self_attn/q_proj/kernel': ((2048, 4096), (1, 2048, 4096)),
  'model/layers/0/self_attn/o_proj/kernel': ((4096, 2048), (1, 4096, 2048)),
  'model/layers/0/mlp/gate/kernel': ((2048, 128), (1, 2048, 128)),
  'model/layers/0/mlp/experts/gate_proj/kernel': (
    (128, 2048, 768),
    (128, 2048, 768),
  ),
  'model/layers/0/mlp/experts/down_proj/kernel': (
    (128, 768, 2048),
    (128, 768, 2048),
  ),
  'model/norm/kernel': ((2048,), None),
  'lm_head/kernel': ((2048, 151936), None),
}

HAIKU = {
  'transformer/embed/embeddings': ((50257, 768), None),
  'transformer/~/positional_embeddings': ((1024, 768), None),
  'transformer/h0_ln_1/scale': ((768,), None),
  'transformer/h0_attn/query/w': ((768, 768), (1, 768, 768)),
  'transformer/h0_attn/query/b': ((768,), None),
  'transformer/h0_attn/linear/w': ((768, 768), (1, 768, 768)),
  'transformer/h0_mlp/linear/w': ((768, 3072), (1, 768, 3072)),
  'transformer/ln_f/offset': ((768,), None),
  'lm_head/w': ((768, 50257), None),
}

EQUINOX = {
  'embedder_block/token_embedder/weight': ((30522, 128), None),
  'embedder_block/layernorm/weight': ((128,), None),
  'layers/0/attention_block/attention/query_proj/weight': (
    (128, 128),
    (1, 128, 128),
  ),
  'layers/0/attention_block/attention/output_proj/weight': (
    (128, 128),
    (1, 128, 128),
  ),
  'layers/0/ff_block/mlp/weight': ((512, 128), (1, 512, 128)),
  'conv1/weight': ((64, 32, 3), None),
  'stem/weight': ((64, 32, 3), None),
  'stem/bias': ((64, 1), None),
  'classifier_head/weight': ((2, 128), None),
}

_STACKED = 'transformer/layers/stacked/'
LEVANTER = {
  'embeddings/token_embeddings/weight/0': ((32000, 4096), None),
  _STACKED + 'input_layernorm/weight/0': ((32, 4096), None),
  _STACKED + 'self_attn/q_proj/weight/0': (
    (32, 8, 4, 128, 4096),
    (32, 4096, 4096),
  ),
  _STACKED + 'self_attn/k_proj/weight/0': (
    (32, 8, 128, 4096),
    (32, 4096, 1024),
  ),
  _STACKED + 'self_attn/o_proj/weight/0': (
    (32, 4096, 32, 128),
    (32, 4096, 4096),
  ),
  _STACKED + 'mlp/gate_proj/weight/0': ((32, 14336, 4096), (32, 14336, 4096)),
  _STACKED + 'mlp/down_proj/weight/0': ((32, 4096, 14336), (32, 4096, 14336)),
  'transformer/norm/weight/0': ((4096,), None),
  'lm_head/weight/0': ((32000, 4096), None),
}

LEVANTER_GPT_2 = {
  'embeddings/position_embeddings/weight/0': ((1024, 768), None),
  'transformer/blocks/stacked/ln_1/weight/0': ((12, 768), None),
  'transformer/blocks/stacked/attn/c_attn/weight/0': (
    (12, 768, 3, 12, 64),
    (36, 768, 768),
  ),
  'transformer/blocks/stacked/attn/c_attn/bias/0': ((12, 3, 12, 64), None),
  'transformer/blocks/stacked/attn/c_proj/weight/0': (
    (12, 12, 64, 768),
    (12, 768, 768),
  ),
  'transformer/blocks/stacked/mlp/c_fc/weight/0': (
    (12, 768, 3072),
    (12, 768, 3072),
  ),
}

_KERAS = 'decoder_block_0/attention/'
KERAS_GEMMA = {
  'token_embedding/embeddings': ((256000, 2048), None),
  'decoder_block_0/pre_attention_norm/scale': ((2048,), None),
  _KERAS + 'query/kernel': ((8, 2048, 256), (1, 2048, 2048)),
  _KERAS + 'key/kernel': ((1, 2048, 256), (1, 2048, 256)),
  _KERAS + 'attention_output/kernel': ((8, 256, 2048), (1, 2048, 2048)),
  'decoder_block_0/ffw_gating/kernel': ((2048, 16384), (1, 2048, 16384)),
}

AXLEARN = {
  'emb/token_emb/weight': ((32000, 1024), None),
  'h/norm/scale': ((24, 1024), None),
  'h/qkv_proj/w': ((24, 3, 1024, 16, 64), (72, 1024, 1024)),
  'apart/qkv_proj/w': ((3, 1024, 16, 64), (3, 1024, 1024)),
}

LIBRARIES = {
  'lm1b': LM1B,
  'nanodo': NANODO,
  'flax_gemma': FLAX_GEMMA,
  'gemma': GEMMA,
  'tunix_qwen3_moe': TUNIX,
  'maxtext_scanned': MAXTEXT_SCANNED,
  'maxtext': MAXTEXT,
  'maxtext_deepseek3': DEEPSEEK_3,
  'maxtext_qwen3_next': QWEN_3_NEXT,
  'hf_llama': HF_LLAMA,
  'hf_llama_scanned': HF_LLAMA_SCANNED,
  'hf_gpt2': HF_GPT_2,
  'hf_bert': HF_BERT,
  'hf_t5': HF_T5,
  'easydel': EASYDEL,
  'haiku': HAIKU,
  'equinox': EQUINOX,
  'levanter': LEVANTER,
  'levanter_gpt2': LEVANTER_GPT_2,
  'keras_gemma': KERAS_GEMMA,
  'axlearn': AXLEARN,
}


def _matches(shapes, **kwargs):
  params = cases.nest(
    {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}
  )
  spec = so.SubspaceSpec(1, only_if_smaller=False, allow_empty=True, **kwargs)
  return {match.path: match for match in spec.match(params)}


def _matrices(match):
  """Returns the number of matrices, their rows and columns."""
  if match.layout is None:
    return None
  layout = match.layout
  count = 1
  for size in layout.batch_shape:
    count *= size
  return count, layout.inputs, layout.outputs


@pytest.mark.parametrize('name', LIBRARIES)
def test_leaves_are_decided_as_their_authors_would(name):
  library = LIBRARIES[name]
  found = _matches({path: shape for path, (shape, _) in library.items()})
  wanted = {path: matrices for path, (_, matrices) in library.items()}
  assert {path: _matrices(found[path]) for path in library} == wanted
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
  found = _matches({path: (64, 64), 'w': (64, 64)})
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
  assert _matrices(_matches({path: (64, 32)})[path]) == (1, 64, 32)


def test_heads_with_several_layers_are_models():
  dense = {'Dense_0/kernel': (784, 128), 'Dense_1/kernel': (128, 10)}
  for name in ('classifier', 'Classifier_0', 'embedder', 'value_head'):
    found = _matches({f'{name}/{path}': s for path, s in dense.items()})
    assert all(match.layout for match in found.values()), name
  head = {'classifier/dense/kernel': (64, 64), 'classifier/out/kernel': (64, 3)}
  found = _matches(head)
  assert found['classifier/dense/kernel'].layout
  assert not found['classifier/out/kernel'].layout


def test_embedders_with_several_tables_are_no_models():
  shapes = {f'embedder/{name}/w': (99, 64) for name in ('word', 'position')}
  found = _matches(shapes | {'mlp/pos_embed/w': (99, 64)})
  assert not any(match.layout for match in found.values())


def test_pairs_of_low_rank_are_no_biases():
  found = _matches({'q_a': (64, 8), 'q_b': (8, 64), 'k_b': (8, 64)})
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
  found = _matches(shapes)
  assert {path: _matrices(match) for path, match in found.items()} == wanted
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
    found = _matches({path: shape for path, (shape, _) in model.items()})
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


def _init(params, **kwargs):
  spec = so.SubspaceSpec(2, **kwargs)
  return jax.eval_shape(so.project(spec, projectors.stiefel(2)).init, params)


ASSUMED = {
  'w': ((5, 16, 24), (5, 16, 24)),
  'o_proj/kernel': ((12, 64, 64), (12, 64, 64)),
  'query/kernel': ((12, 64, 64), (12, 64, 64)),
  'key/w': ((12, 64, 16), (12, 64, 16)),
  'attention/out/kernel': ((64, 12, 32), (12, 64, 32)),
  'moe/w': ((4, 2, 16, 24), (8, 16, 24)),
  'out': ((3, 3, 64, 32), None),
  'query': ((3, 3, 32, 64), None),
  'filters': ((64, 32, 5, 5), None),
  'value': ((3, 3, 3, 16, 32), None),
}


@pytest.mark.parametrize('path', ASSUMED)
def test_what_nothing_tells_is_assumed_with_a_warning(path):
  shape, wanted = ASSUMED[path]
  match = _matches({path: shape})[path]
  assert _matrices(match) == wanted and match.how == 'assumed'
  params = cases.nest({path: jnp.ones(shape), 'plain': jnp.ones((16, 24))})
  words = [path, *shape, 'assumed', 'weight_dimension_numbers', 'exclude']
  with _warns(*words):
    _init(params)


LAYERS = {'h/up': (12, 64, 96), 'h/down': (12, 96, 64), 'h/ln/scale': (12, 64)}
SQUARE = {'h/up/kernel': (64, 64, 64), 'h/up/bias': (64, 64)}
EITHER = {
  'a weight as long as layers are many': (
    {'in_proj/kernel': (12, 64)} | LAYERS,
    {'in_proj/kernel': (1, 12, 64)},
  ),
  'a vector of no usual name': (
    {'h/shift': (12, 64)} | LAYERS,
    {'h/shift': None},
  ),
  'a router of no usual name': (
    {'moe/assign': (8, 64), 'moe/w1': (8, 64, 256), 'moe/w2': (8, 256, 64)},
    {'moe/assign': None},
  ),
  "RWKV's u": ({'h/attn/u': (12, 4, 16)} | LAYERS, {'h/attn/u': (12, 4, 16)}),
  'layers as many as units': (SQUARE, {'h/up/kernel': (64, 64, 64)}),
  'and norms': (
    SQUARE | {'h/ln/scale': (64, 64)},
    {'h/up/kernel': (64, 64, 64)},
  ),
  'and heads': (
    {'query/kernel': (64, 64, 8, 8)},
    {'query/kernel': (64, 64, 64)},
  ),
  'and heads, norms': (
    {'h/query/kernel': (64, 64, 8, 8), 'h/ln/scale': (64, 64)},
    {'h/query/kernel': (64, 64, 64)},
  ),
}


@pytest.mark.parametrize('name', EITHER)
def test_what_may_be_either_is_warned_of(name):
  shapes, wanted = EITHER[name]
  found = _matches(shapes)
  for path, matrices in wanted.items():
    assert _matrices(found[path]) == matrices
    assert found[path].how == 'assumed'
  params = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}
  with _warns(*wanted, 'weight_dimension_numbers'):
    _init(cases.nest(params))


def _warns(*words):
  return pytest.warns(UserWarning, match='(?s)' + _all(words))


def _all(words):
  return ''.join(f'(?=.*{word})' for word in words)


def test_one_warning_names_every_leaf_and_the_callers_line():
  params = {'a': jnp.ones((3, 8, 12)), 'b': jnp.ones((5, 8, 12))}
  tx = so.golore(1e-3, rank=2)
  with pytest.warns(UserWarning) as found:
    tx.init(params)
  assert len(found) == 1 and found[0].filename == __file__
  message = str(found[0].message)
  assert 'a (3, 8, 12): 3 x (8 x 12)' in message and 'b (5, 8, 12)' in message


def test_only_init_warns():
  params = {'w': jnp.ones((5, 16, 24))}
  tx = so.golore(1e-3, rank=2)
  with pytest.warns(UserWarning, match='assumed'):
    state = tx.init(params)
  so.describe(tx, params)
  so.memory_report(tx, params)
  so.state_sharding(tx, params)
  tx.update(params, state, params)


def test_what_is_named_or_confirmed_needs_no_warning():
  numbers = so.DimensionNumbers(-2, -1)
  _init({'w': jnp.ones((5, 16, 24))}, weight_dimension_numbers=numbers)
  _init({'h': {'up': jnp.ones((5, 16, 24)), 'down': jnp.ones((5, 24, 16))}})
  _init({'query': jnp.ones((16, 2, 8)), 'out': jnp.ones((2, 8, 16))})
  _init({'w': jnp.ones((5, 16, 24)), 'x': jnp.ones((16, 24))}, exclude='w')


def _partitioned(shape, names):
  return nn.LogicallyPartitioned(jnp.ones(shape), names)


def _variable(shape, names):
  return nnx.Param(jnp.ones(shape), out_sharding=names, eager_sharding=False)


METADATA = {
  'mixer/w': ((12, 16, 2, 8), ('layers', 'embed', 'heads', 'kv'), (12, 16, 16)),
  'mixer/v': ((16, 12, 24), ('embed', 'layers', 'mlp'), (12, 16, 24)),
  'mixer/back': ((2, 8, 16), ('heads', 'head_dim', 'embed'), (1, 16, 16)),
  'moe/w': ((4, 16, 24), ('exp', 'fsdp', 'tensor'), (4, 16, 24)),
  'h/vector': ((12, 16), ('layers', 'embed'), None),
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
    assert _matrices(found[path]) == wanted, path
    assert found[path].how in ('metadata', ''), path
  jax.eval_shape(so.project(spec, projectors.stiefel(2)).init, params)


@jax.tree_util.register_pytree_node_class
class NamedArray:
  """An array with named axes as haliax has it."""

  def __init__(self, array, axes):
    self.array, self.axes = array, axes

  def tree_flatten(self):
    return (self.array,), self.axes

  @classmethod
  def tree_unflatten(cls, axes, arrays):
    return cls(arrays[0], axes)


class Axis:
  def __init__(self, name):
    self.name = name


def test_names_of_haliax_axes_tell():
  axes = tuple(map(Axis, ('layers', 'embed', 'heads', 'head_size')))
  array = jax.ShapeDtypeStruct((3, 64, 2, 8), jnp.float32)
  spec = so.SubspaceSpec(1)
  (match,) = spec.match({'o_proj': {'weight': NamedArray(array, axes)}})
  assert _matrices(match) == (3, 16, 64) and match.how == 'metadata'


def test_exclude_as_a_pattern_replaces_the_names():
  shapes = {'lm_head/kernel': (64, 99), 'blocks/up': (64, 99)}
  assert _matches(shapes)['lm_head/kernel'].layout is None
  assert _matches(shapes, exclude='up')['lm_head/kernel'].layout
  found = _matches(shapes, exclude=None)
  assert all(match.layout for match in found.values())


@pytest.mark.parametrize('rank', [16, 128, 1.0, lambda path, leaf: 999])
@pytest.mark.parametrize('allow_empty', [False, True])
def test_a_rank_that_leaves_nothing_is_refused(rank, allow_empty):
  params = {'a': {'up': jnp.ones((16, 24))}, 'b': jnp.ones((2, 12, 16))}
  spec = so.SubspaceSpec(rank, allow_empty=allow_empty)
  words = ['a/up', '16 x 24', 'b', '12 x 16', 'only_if_smaller', 'exclude']
  words += [] if callable(rank) else [f'rank={rank}']
  tx = so.subspace(spec, projectors.stiefel(2), optax.scale_by_adam())
  with errors.raises(ValueError, *words):
    tx.init(params)
  assert 'as much state as Adam' in so.describe(tx, params)


def test_matrices_that_stay_plain_are_named():
  params = {'up': jnp.ones((16, 24)), 'a': {'thin': jnp.ones((2, 24))}}
  with _warns('a/thin', 'rank 2 of 2 x 24', 'only_if_smaller', 'exclude'):
    _init(params | {'column': jnp.ones((16, 1))})
  _init(params, exclude='thin')


@pytest.mark.parametrize('rank', [128, 65, lambda path, leaf: 999])
def test_ranks_clipped_to_the_full_side_are_named(rank):
  params = {'up': jnp.ones((64, 256)), 'a': {'w': jnp.ones((3, 256, 64))}}
  words = ['full rank', 'up: rank 64 of 64 x 256', 'exclude']
  words += [r'a/w: rank 64 of 3 x \(256 x 64\)']
  words += [] if callable(rank) else [f'rank={rank}']
  numbers = so.DimensionNumbers()
  tx = so.galore(1e-3, rank=rank, weight_dimension_numbers=numbers)
  with _warns(*words):
    jax.eval_shape(tx.init, params)


@pytest.mark.parametrize('rank', [8, 64, 1.0])
def test_ranks_up_to_the_full_side_are_as_asked_for(rank):
  tx = so.galore(1e-3, rank=rank)
  jax.eval_shape(tx.init, {'up': jnp.ones((64, 256))})


def test_trees_without_a_matrix_need_allow_empty():
  with errors.raises(ValueError, 'matches no leaf', 'bias'):
    _init({'bias': jnp.ones(8)})
  _init({'bias': jnp.ones(8)}, allow_empty=True)


def test_subproblems_refuse_a_rank_that_leaves_nothing():
  rso = so.rso.subproblems(so.SubspaceSpec(8, side='in'), optax.sgd(0.1))
  with errors.raises(ValueError, 'w', '8 x 16', 'rank=8'):
    rso.init({'w': jnp.ones((8, 16))})


def test_unproject_honours_allow_empty():
  spec = so.SubspaceSpec(2, allow_empty=True)
  tx = optax.chain(
    so.project(spec, projectors.stiefel(2)),
    so.in_subspace(optax.scale_by_adam(), spec),
    so.unproject(spec=spec),
  )
  params = {'bias': jnp.ones(8)}
  updates, _ = tx.update(params, tx.init(params), params)
  assert updates['bias'].shape == (8,)


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
