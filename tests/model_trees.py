"""Parameter trees of the usual libraries, each leaf as its authors see it.

Paths and sizes are those of real models. A path leads to a leaf's shape and to
its matrices: their number, rows and columns, or None if it is no matrix.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

import cases
import subspace_optax as so

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


def matches_of(shapes: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
  """Returns what a spec of rank 1 makes of every leaf, by path."""
  params = cases.nest(
    {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}
  )
  spec = so.SubspaceSpec(1, only_if_smaller=False, allow_empty=True, **kwargs)
  return {match.path: match for match in spec.match(params)}


def matrices_of(match: Any) -> tuple[int, int, int] | None:
  """Returns the number of matrices, their rows and columns."""
  layout = match.layout
  if layout is None:
    return None
  return math.prod(layout.batch_shape), layout.inputs, layout.outputs
