"""GGUF files: the model, quantised tensors, the tokenizer.

The files that are read are written here, and the logits are compared with the
formulas of llama.cpp in NumPy, in float64: these turn neighbours.
"""

import functools

from flax import nnx
import jax
import numpy as np
import pytest
import tokenizers

import gguf_checkpoint
import hf_checkpoint
import llama

gguf = pytest.importorskip('gguf', reason='gguf is not installed')

WIDTH, MLP, LAYERS, HEADS, KV_HEADS, VOCAB = 32, 64, 2, 4, 2, 270
HEAD_WIDTH = WIDTH // HEADS
BASE, EPSILON = 50.0, 1e-3
CONTROL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
MERGES = ['t h', 'th e', 'Ġ the', '1 2']
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 9))


# --- A file, and the model that it means -------------------------------------


def shapes(tied):
  """The tensors of the format, (outputs, inputs)."""
  kv = KV_HEADS * HEAD_WIDTH
  block = {
    'attn_norm': (WIDTH,),
    'attn_q': (WIDTH, WIDTH),
    'attn_k': (kv, WIDTH),
    'attn_v': (kv, WIDTH),
    'attn_output': (WIDTH, WIDTH),
    'ffn_norm': (WIDTH,),
    'ffn_gate': (MLP, WIDTH),
    'ffn_up': (MLP, WIDTH),
    'ffn_down': (WIDTH, MLP),
  }
  blocks = {
    f'blk.{i}.{name}.weight': shape
    for i in range(LAYERS)
    for name, shape in block.items()
  }
  ends = {'token_embd.weight': (VOCAB, WIDTH), 'output_norm.weight': (WIDTH,)}
  head = {} if tied else {'output.weight': (VOCAB, WIDTH)}
  return blocks | ends | head


@functools.cache
def tensors(tied=True):
  """Random weights, large enough that every formula matters."""
  rng = np.random.default_rng(1)
  draw = lambda shape: rng.normal(0, 0.4, shape) + (len(shape) == 1)
  return {n: draw(s).astype(np.float32) for n, s in shapes(tied).items()}


def vocabulary():
  """The control tokens, the bytes, what the merges make, and a rest."""
  letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  made = [merge.replace(' ', '') for merge in MERGES]
  tokens = [*CONTROL, *sorted(letters), *made]
  return tokens + [f'<rest{i}>' for i in range(VOCAB - len(tokens))]


def add_tokenizer(writer, kind, types=None):
  writer.add_tokenizer_model('gpt2')
  writer.add_tokenizer_pre(kind)
  writer.add_token_list(vocabulary())
  usual = [3] * len(CONTROL) + [1] * (VOCAB - len(CONTROL))
  writer.add_token_types(types or usual)
  writer.add_token_merges(MERGES)


def write(
  path, weights, kind='smollm', architecture='llama', change=None, types=None
):
  """Writes a GGUF file; `change` adds to it."""
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_embedding_length(WIDTH)
  writer.add_feed_forward_length(MLP)
  writer.add_block_count(LAYERS)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_rope_freq_base(BASE)
  writer.add_layer_norm_rms_eps(EPSILON)
  add_tokenizer(writer, kind, types)
  (change or (lambda writer: None))(writer)
  for name, x in weights.items():
    four_bit = x.dtype == np.uint8
    kind = gguf.GGMLQuantizationType.Q4_1 if four_bit else None
    writer.add_tensor(name, x, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def norm(x, scale):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + EPSILON) * scale


def rope(x):
  """Turns the neighbours (2k, 2k + 1) as complex numbers; (B, T, H, K)."""
  frequency = BASE ** (-np.arange(HEAD_WIDTH // 2) / (HEAD_WIDTH // 2))
  angle = np.outer(np.arange(x.shape[1]), frequency)[:, None]
  z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
  return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def attention(w, x):
  split = lambda y: y.reshape(*y.shape[:2], -1, HEAD_WIDTH)
  q, k = (rope(split(x @ w[name].T)) for name in ('attn_q', 'attn_k'))
  v = split(x @ w['attn_v'].T)
  k, v = (np.repeat(y, HEADS // KV_HEADS, axis=2) for y in (k, v))
  score = np.einsum('bthk,bshk->bhts', q, k) / np.sqrt(HEAD_WIDTH)
  score[..., ~np.tri(x.shape[1], dtype=bool)] = -np.inf
  weight = np.exp(score - score.max(axis=-1, keepdims=True))
  weight = weight / weight.sum(axis=-1, keepdims=True)
  y = np.einsum('bhts,bshk->bthk', weight, v).reshape(x.shape)
  return y @ w['attn_output'].T


def mlp(w, x):
  gate = x @ w['ffn_gate'].T
  return (gate / (1 + np.exp(-gate)) * (x @ w['ffn_up'].T)) @ w['ffn_down'].T


def reference(weights, tokens):
  """The logits (B, T, V)."""
  weights = {
    name.removesuffix('.weight'): w.astype(np.float64)
    for name, w in weights.items()
  }
  x = weights['token_embd'][tokens]
  for i in range(LAYERS):
    start = f'blk.{i}.'
    w = {
      name.removeprefix(start): value
      for name, value in weights.items()
      if name.startswith(start)
    }
    x = x + attention(w, norm(x, w['attn_norm']))
    x = x + mlp(w, norm(x, w['ffn_norm']))
  x = norm(x, weights['output_norm'])
  return x @ weights.get('output', weights['token_embd']).T


def logits(config, params, tokens):
  graphdef, _ = nnx.split(
    nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
  )
  run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))
  return run(params, tokens)


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  return write(tmp_path_factory.mktemp('gguf') / 'tiny.gguf', tensors())


# --- GGUF --------------------------------------------------------------------


@pytest.mark.parametrize('scan_layers', [True, False])
@pytest.mark.parametrize('tied', [True, False])
def test_logits_equal_the_formulas(tmp_path, tied, scan_layers):
  path = write(tmp_path / 'x.gguf', tensors(tied))
  config, params = gguf_checkpoint.load(path, scan_layers=scan_layers)
  assert hf_checkpoint.is_tied(params) == tied
  assert (config.rope_base, config.norm_epsilon) == (BASE, EPSILON)
  want = reference(tensors(tied), TOKENS)
  got = logits(config, params, TOKENS)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_hugging_face_gets_the_same_model(file, tmp_path):
  config, params = gguf_checkpoint.load(file)
  hf_checkpoint.save(tmp_path, config, params, tied=True)
  again, same = hf_checkpoint.load(tmp_path)
  assert again == config
  for x, y in zip(*map(jax.tree.leaves, (params, same)), strict=True):
    np.testing.assert_array_equal(x, y)


def four_bits(codes, step, least):
  """Blocks of 32 weights: step and least in float16, then pairs of codes."""
  low, high = codes[..., :16], codes[..., 16:]
  ends = np.stack([step, least], axis=-1).astype('<f2').view(np.uint8)
  return np.concatenate([ends, low | high << 4], axis=-1)


def test_four_bit_blocks_become_floats(tmp_path):
  rng = np.random.default_rng(3)
  blocks = (MLP, WIDTH // 32)
  codes = rng.integers(0, 16, (*blocks, 32)).astype(np.uint8)
  step, least = rng.uniform(0.1, 0.5, (2, *blocks)).astype(np.float16)
  want = codes * step[..., None].astype(float) + least[..., None]
  name = 'blk.1.ffn_up.weight'
  packed = four_bits(codes, step, least).reshape(MLP, -1)
  path = write(tmp_path / 'x.gguf', tensors() | {name: packed})
  _, params = gguf_checkpoint.load(path)
  got = params['blocks']['mlp']['up']['kernel'][1].T
  np.testing.assert_allclose(got, want.reshape(MLP, WIDTH), rtol=1e-6)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'architecture': 'gemma'}, "general.architecture='gemma', expected"),
    (
      {'change': lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
      "rope scaling 'yarn' is not supported",
    ),
    (
      {'change': lambda w: w.add_rope_scaling_factor(4.0)},
      'llama.rope.scaling.factor=4.0 is not supported',
    ),
    (
      {'change': lambda w: w.add_rope_dimension_count(4)},
      'llama.rope.dimension_count=4, expected 8',
    ),
  ],
)
def test_models_that_are_no_llama_of_ours(tmp_path, arguments, message):
  path = write(tmp_path / 'x.gguf', tensors(), **arguments)
  with pytest.raises(ValueError, match=message):
    gguf_checkpoint.load(path)


def test_wrong_tensors_are_named(tmp_path):
  weights = dict(tensors())
  weights['blk.0.odd.weight'] = weights.pop('blk.0.ffn_up.weight')
  path = write(tmp_path / 'x.gguf', weights)
  with pytest.raises(ValueError, match="unexpected tensor 'blk.0.odd.weight'"):
    gguf_checkpoint.load(path)


def test_files_that_are_no_gguf_are_named(tmp_path):
  path = tmp_path / 'x.gguf'
  with pytest.raises(ValueError, match='x.gguf cannot be read'):
    gguf_checkpoint.load(path)
  path.write_bytes(b'nothing of the kind, but long enough to be mapped')
  with pytest.raises(ValueError, match='x.gguf cannot be read'):
    gguf_checkpoint.load(path)


def test_kinds_of_tokens(tmp_path):
  usual = [3] * len(CONTROL) + [1] * (VOCAB - len(CONTROL))
  path = write(tmp_path / 'x.gguf', tensors(), types=[*usual[:-1], 4])
  name = vocabulary()[-1]
  assert gguf_checkpoint.tokenizer(path).encode(f'a{name}').ids[-1] == VOCAB - 1
  path = write(tmp_path / 'y.gguf', tensors(), types=usual[:-1])
  with pytest.raises(ValueError, match='tokens, but the kinds of'):
    gguf_checkpoint.tokenizer(path)


def test_tokenizer_merges_and_splits_digits(file, tmp_path):
  tokenizer = gguf_checkpoint.tokenizer(file)
  text = '<|im_start|>the the12é<|im_end|>'
  encoded = tokenizer.encode(text)
  tokens = ['<|im_start|>', 'the', 'Ġthe', '1', '2', 'Ã', '©', '<|im_end|>']
  assert encoded.tokens == tokens
  assert encoded.ids[0] == 1 and encoded.ids[-1] == 2
  assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
  plain = write(tmp_path / 'x.gguf', tensors(), kind='gpt-2')
  assert '12' in gguf_checkpoint.tokenizer(plain).encode('12').tokens
  for missing in ('', 'default'):  # llama.cpp's own default splits otherwise
    silent = write(tmp_path / 'z.gguf', tensors(), kind=missing)
    with pytest.raises(ValueError, match='tokenizer.ggml.pre'):
      gguf_checkpoint.tokenizer(silent)
  other = write(tmp_path / 'y.gguf', tensors(), kind='other')
  with pytest.raises(ValueError, match="tokenizer.ggml.pre='other'"):
    gguf_checkpoint.tokenizer(other)
