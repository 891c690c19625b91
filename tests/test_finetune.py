"""Fine-tuning: Hugging Face's format, LoRA, labelled texts, whole runs.

The checkpoints that are read are written here, from the names and formulas of
LLaMA, and the logits are compared with those formulas in NumPy, in float64.
"""

import dataclasses
import functools
import json
import pathlib
import shutil

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
from safetensors import numpy as safetensors_numpy
import tokenizers

import finetune
import finetune_task
import hf_checkpoint
import labelled
import llama
import lora
import recipes
import report
import small_llama
import subspace_optax as so

WIDTH, MLP, LAYERS, HEADS, KV_HEADS, VOCAB = 24, 20, 2, 4, 2, 256
HEAD_WIDTH = WIDTH // HEADS
RAW = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'hidden_act': 'silu',
  'hidden_size': WIDTH,
  'intermediate_size': MLP,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': HEADS,
  'num_key_value_heads': KV_HEADS,
  'rms_norm_eps': 1e-3,
  'rope_theta': 50.0,
  'vocab_size': VOCAB,
  'tie_word_embeddings': False,
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 9))
LABELS = ('animals', 'tools')


# --- A checkpoint, and the model that it means -------------------------------


def shapes():
  """The tensors of the format, each in PyTorch's orientation."""
  kv = KV_HEADS * HEAD_WIDTH
  block = {
    'input_layernorm': (WIDTH,),
    'self_attn.q_proj': (WIDTH, WIDTH),
    'self_attn.k_proj': (kv, WIDTH),
    'self_attn.v_proj': (kv, WIDTH),
    'self_attn.o_proj': (WIDTH, WIDTH),
    'post_attention_layernorm': (WIDTH,),
    'mlp.gate_proj': (MLP, WIDTH),
    'mlp.up_proj': (MLP, WIDTH),
    'mlp.down_proj': (WIDTH, MLP),
  }
  layers = {
    f'model.layers.{i}.{name}.weight': shape
    for i in range(LAYERS)
    for name, shape in block.items()
  }
  ends = {
    'model.embed_tokens.weight': (VOCAB, WIDTH),
    'model.norm.weight': (WIDTH,),
    'lm_head.weight': (VOCAB, WIDTH),
  }
  return layers | ends


@functools.cache
def tensors():
  """Random weights, large enough that every formula matters."""
  rng = np.random.default_rng(1)
  draw = lambda shape: rng.normal(0, 0.4, shape) + (len(shape) == 1)
  return {name: draw(s).astype(np.float32) for name, s in shapes().items()}


def write(folder, weights=None, shards=1, **changes):
  """Writes a checkpoint, sharded as Hugging Face does it."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(RAW | changes))
  weights = tensors() if weights is None else weights
  names = sorted(weights)
  files = {n: f'model-{i % shards}.safetensors' for i, n in enumerate(names)}
  if shards == 1:
    files = dict.fromkeys(names, 'model.safetensors')
  else:
    index = {'metadata': {}, 'weight_map': files}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  for file in set(files.values()):
    part = {n: weights[n] for n in names if files[n] == file}
    safetensors_numpy.save_file(part, folder / file, metadata={'format': 'pt'})
  return folder


def norm(x, scale):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-3) * scale


def slowed(frequency, s):
  """LLaMA 3.1's rule for one frequency."""
  wave, context = 2 * np.pi / frequency, s['original_max_position_embeddings']
  if wave < context / s['high_freq_factor']:
    return frequency
  if wave > context / s['low_freq_factor']:
    return frequency / s['factor']
  low, high = s['low_freq_factor'], s['high_freq_factor']
  smooth = (context / wave - low) / (high - low)
  return (1 - smooth) * frequency / s['factor'] + smooth * frequency


def rope(x, scaling=None):
  """x cos + rotate_half(x) sin; (B, T, H, K)."""
  frequency = 1 / 50.0 ** (np.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
  if scaling:
    frequency = np.array([slowed(f, scaling) for f in frequency])
  angle = np.outer(np.arange(x.shape[1]), np.tile(frequency, 2))[:, None]
  first, second = np.split(x, 2, axis=-1)
  turned = np.concatenate([-second, first], axis=-1)
  return x * np.cos(angle) + turned * np.sin(angle)


def attention(w, x, scaling):
  def heads(name):
    y = x @ w[f'self_attn.{name}'].T + w.get(f'self_attn.{name}.bias', 0.0)
    return y.reshape(*y.shape[:2], -1, HEAD_WIDTH)

  q, k = (rope(heads(name), scaling) for name in ('q_proj', 'k_proj'))
  v = heads('v_proj')
  k, v = (np.repeat(y, HEADS // KV_HEADS, axis=2) for y in (k, v))
  score = np.einsum('bthk,bshk->bhts', q, k) / np.sqrt(HEAD_WIDTH)
  score[..., ~np.tri(x.shape[1], dtype=bool)] = -np.inf
  weight = np.exp(score - score.max(axis=-1, keepdims=True))
  weight = weight / weight.sum(axis=-1, keepdims=True)
  return np.einsum('bhts,bshk->bthk', weight, v).reshape(x.shape)


def features(weights, tokens, scaling=None):
  """What the head sees, (B, T, D)."""
  weights = {name: w.astype(np.float64) for name, w in weights.items()}
  x = weights['model.embed_tokens.weight'][tokens]
  for i in range(LAYERS):
    start = f'model.layers.{i}.'
    w = {
      name.removeprefix(start).removesuffix('.weight'): value
      for name, value in weights.items()
      if name.startswith(start)
    }
    y = norm(x, w['input_layernorm'])
    x = x + attention(w, y, scaling) @ w['self_attn.o_proj'].T
    y = norm(x, w['post_attention_layernorm'])
    gate = y @ w['mlp.gate_proj'].T
    y = gate / (1 + np.exp(-gate)) * (y @ w['mlp.up_proj'].T)
    x = x + y @ w['mlp.down_proj'].T
  return norm(x, weights['model.norm.weight'])


@functools.cache
def forward(config):
  graphdef, _ = nnx.split(
    nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
  )
  return jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))


def assert_same_tree(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write(tmp_path_factory.mktemp('checkpoint'))


# --- The format --------------------------------------------------------------


@pytest.mark.parametrize('scan_layers', [True, False])
def test_logits_equal_the_formulas(folder, scan_layers):
  config, params = hf_checkpoint.load(folder, scan_layers=scan_layers)
  want = features(tensors(), TOKENS) @ tensors()['lm_head.weight'].T
  got = forward(config)(params, TOKENS)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# The three wavelengths of a head are 6, 23 and 85: kept, between, slowed down.
LLAMA_3 = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 40,
}


def biases():
  """What Qwen 2 has beside the tensors of LLaMA."""
  rng = np.random.default_rng(2)
  kernels = [n for n in tensors() if n[-13:] in QKV]
  return {
    name.replace('weight', 'bias'): rng.normal(size=len(tensors()[name]))
    for name in kernels
  }


QKV = ('q_proj.weight', 'k_proj.weight', 'v_proj.weight')
QWEN_2 = {'model_type': 'qwen2', 'architectures': ['Qwen2ForCausalLM']}


@pytest.mark.parametrize(
  ('raw', 'kind'),
  [
    ({'model_type': 'mistral', 'sliding_window': None}, 'llama'),
    ({'rope_scaling': LLAMA_3}, 'llama'),
    (QWEN_2 | {'sliding_window': 9, 'use_sliding_window': False}, 'qwen2'),
  ],
  ids=['mistral', 'llama 3.1', 'qwen 2'],
)
def test_relatives_of_llama(tmp_path, raw, kind):
  weights = tensors() | (biases() if kind == 'qwen2' else {})
  config, params = hf_checkpoint.load(write(tmp_path, weights, **raw))
  want = features(weights, TOKENS, raw.get('rope_scaling'))
  got = forward(config)(params, TOKENS)
  want = want @ tensors()['lm_head.weight'].T
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  hf_checkpoint.save(tmp_path / 'again', config, params)
  again, same = hf_checkpoint.load(tmp_path / 'again')
  assert again == config
  assert_same_tree(same, params)
  written = json.loads((tmp_path / 'again' / 'config.json').read_text())
  assert written['model_type'] == kind
  assert written.get('rope_scaling') == raw.get('rope_scaling')


def test_sharded_checkpoint_is_the_same(folder, tmp_path):
  sharded = write(tmp_path, shards=3)
  assert not (sharded / 'model.safetensors').exists()
  assert_same_tree(
    hf_checkpoint.load(sharded)[1], hf_checkpoint.load(folder)[1]
  )


def test_tied_head_is_the_embedding(tmp_path):
  weights = {k: v for k, v in tensors().items() if k != 'lm_head.weight'}
  write(tmp_path, weights, tie_word_embeddings=True)
  config, params = hf_checkpoint.load(tmp_path)
  embedding = weights['model.embed_tokens.weight']
  np.testing.assert_array_equal(params['lm_head']['kernel'], embedding.T)
  hf_checkpoint.save(tmp_path / 'again', config, params, tied=True)
  assert_same_tree(hf_checkpoint.load(tmp_path / 'again')[1], params)
  with safetensors.safe_open(
    tmp_path / 'again' / 'model.safetensors', 'numpy'
  ) as file:
    assert set(file.keys()) == set(weights)


@pytest.mark.parametrize('scan_layers', [True, False])
def test_writing_gives_the_same_tensors(folder, tmp_path, scan_layers):
  config, params = hf_checkpoint.load(folder, scan_layers=scan_layers)
  hf_checkpoint.save(tmp_path, config, params)
  written = safetensors_numpy.load_file(tmp_path / 'model.safetensors')
  assert written.keys() == tensors().keys()
  for name, want in tensors().items():
    np.testing.assert_array_equal(written[name], want, err_msg=name)
  raw = json.loads((tmp_path / 'config.json').read_text())
  assert {name: raw[name] for name in RAW} == RAW


def test_new_form_of_the_rotary_base(tmp_path):
  raw = {'rope_theta': 1.0, 'rope_parameters': {'rope_theta': 9.0}}
  (tmp_path / 'config.json').write_text(json.dumps(RAW | raw))
  assert hf_checkpoint.read_config(tmp_path).rope_base == 9.0


def test_bfloat16_tensors(tmp_path):
  weights = {k: v.astype(jnp.bfloat16) for k, v in tensors().items()}
  write(tmp_path, weights)
  _, params = hf_checkpoint.load(tmp_path)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}
  scale = weights['model.norm.weight'].astype(np.float32)
  np.testing.assert_array_equal(params['final_norm']['scale'], scale)
  _, kept = hf_checkpoint.load(tmp_path, param_dtype='bfloat16')
  assert {x.dtype for x in jax.tree.leaves(kept)} == {jnp.dtype('bfloat16')}


def test_constants_of_old_versions_are_ignored(folder, tmp_path):
  constant = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  write(tmp_path, tensors() | {constant: np.ones(3, np.float32)})
  assert_same_tree(
    hf_checkpoint.load(tmp_path)[1], hf_checkpoint.load(folder)[1]
  )


K_PROJ = 'model.layers.1.self_attn.k_proj.weight'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda w: w.pop(K_PROJ), rf"missing tensors \['{K_PROJ}'\]"),
    (lambda w: w.update(q=np.ones(2)), "unexpected tensor 'q'"),
    (
      lambda w: w.update({K_PROJ: np.ones((24, 12))}),
      rf"'{K_PROJ}' has shape \(24, 12\), expected \(12, 24\)",
    ),
    (
      lambda w: w.update({K_PROJ: np.ones((12, 24), np.int8)}),
      rf"'{K_PROJ}' holds int8, expected floats",
    ),
  ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
  weights = dict(tensors())
  change(weights)
  write(tmp_path, weights)
  with pytest.raises(ValueError, match=message):
    hf_checkpoint.load(tmp_path)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model_type': 'gemma'}, "model_type='gemma', expected one of"),
    ({'attention_bias': True}, 'attention_bias=True, expected False'),
    ({'hidden_size': None}, 'hidden_size=None, expected an int'),
    ({'head_dim': 8}, 'head_dim=8 times num_attention_heads=4'),
    ({'rope_scaling': {'rope_type': 'yarn'}}, "rope_type='yarn' is not"),
    ({'rope_scaling': {'rope_type': 'llama3'}}, "'factor' is missing"),
    ({'model_type': 'mistral', 'sliding_window': 9}, 'sliding_window=9 is not'),
  ],
)
def test_models_that_are_no_llama_of_ours(tmp_path, changes, message):
  (tmp_path / 'config.json').write_text(json.dumps(RAW | changes))
  with pytest.raises(ValueError, match=message):
    hf_checkpoint.load(tmp_path)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(ValueError, match='config.json cannot be read'):
    hf_checkpoint.load(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(RAW))
  with pytest.raises(ValueError, match='model.safetensors cannot be read'):
    hf_checkpoint.load(tmp_path)


def test_save_refuses_what_it_would_lose(folder, tmp_path):
  config, params = hf_checkpoint.load(folder)
  with pytest.raises(ValueError, match='the head differs from the embedding'):
    hf_checkpoint.save(tmp_path, config, params, tied=True)
  with pytest.raises(ValueError, match='do not fit outputs=None'):
    hf_checkpoint.save(tmp_path, config, params, labels=LABELS)


# --- LoRA --------------------------------------------------------------------


@pytest.fixture(scope='module')
def adapted(folder):
  """(parameters of the model, what LoRA trains of them) at rank 2."""
  _, params = hf_checkpoint.load(folder)
  params = jax.tree.map(jnp.asarray, params)
  return params, lora.init(jax.random.key(0), params, 2)


def random_factors(params):
  """B away from zero, so that the product is."""
  rng = np.random.default_rng(2)
  noise = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
  return params | {'b': jax.tree.map(noise, params['b'])}


def test_lora_starts_from_the_model(adapted):
  params, adapters = adapted
  assert_same_tree(lora.merge(adapters, 4.0), params)


def test_lora_adapts_what_the_optimizers_project(adapted):
  params, adapters = adapted
  described = recipes.matrix_mask(params)
  chosen = {p for p, yes in lora.by_path(described).items() if yes}
  assert lora.by_path(adapters['a']).keys() == chosen
  assert len(chosen) == 7
  a, b = (adapters[name]['blocks']['mlp']['up']['kernel'] for name in 'ab')
  assert a.shape == (LAYERS, WIDTH, 2) and b.shape == (LAYERS, 2, MLP)


def test_lora_adds_the_scaled_product(adapted):
  params, adapters = adapted
  adapters = random_factors(adapters)
  merged = lora.by_path(lora.merge(adapters, 4.0))
  a, b = lora.by_path(adapters['a']), lora.by_path(adapters['b'])
  for path, w in lora.by_path(params).items():
    want = w + 4.0 * np.asarray(a[path]) @ b[path] if path in a else w
    np.testing.assert_allclose(merged[path], want, rtol=1e-5, atol=1e-5)


def test_lora_gradients_are_those_of_the_product(adapted):
  """dL/dA = s G B^T and dL/dB = s A^T G, with G of the merged matrix."""
  _, adapters = adapted
  adapters = random_factors(adapters)
  loss = lambda p: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(p))
  g = lora.by_path(jax.jit(jax.grad(loss))(lora.merge(adapters, 4.0)))
  got = jax.jit(jax.grad(lambda p: loss(lora.merge(p, 4.0))))(adapters)
  a, b = lora.by_path(adapters['a']), lora.by_path(adapters['b'])
  turn = lambda x: np.swapaxes(x, -1, -2)
  for path, x in lora.by_path(got['a']).items():
    want = 4.0 * np.asarray(g[path]) @ turn(b[path])
    np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-4)
  for path, x in lora.by_path(got['b']).items():
    want = 4.0 * turn(a[path]) @ np.asarray(g[path])
    np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-4)
  for x in jax.tree.leaves(got['frozen']):
    np.testing.assert_array_equal(x, np.zeros_like(x))


def test_lora_moves_factors_and_head_only(adapted):
  _, adapters = adapted
  config = finetune.recipe(finetune.Config(optimizer='lora', weight_decay=0.1))
  tx = lora.make(config)
  gradients = jax.tree.map(jnp.ones_like, adapters)
  state = jax.jit(tx.init)(adapters)
  updates, _ = jax.jit(tx.update)(gradients, state, adapters)
  moved = optax.apply_updates(adapters, updates)
  assert_same_tree(moved['frozen'], adapters['frozen'])
  for name in ('a', 'b', 'lm_head'):
    for x, y in zip(
      *(jax.tree.leaves(t[name]) for t in (moved, adapters)), strict=True
    ):
      assert not np.isclose(x, y, rtol=0, atol=1e-6).any()
  trained = sum(
    x.nbytes
    for n in ('a', 'b', 'lm_head')
    for x in jax.tree.leaves(adapters[n])
  )
  state_bytes = so.memory_report(tx, adapters).state
  assert 2 * trained <= state_bytes <= 2 * trained + 64


# --- Labelled texts ----------------------------------------------------------


def test_bbc_news_is_read_whole():
  texts, labels = labelled.read(labelled.bbc_news())
  assert labels == ('business', 'entertainment', 'politics', 'sports', 'tech')
  assert len(set(texts.texts)) == len(texts.texts) > 2_000
  assert np.bincount(texts.labels).min() > 300
  words = ['shares', 'film', 'minister', 'match', 'computer']
  count = np.array([[w in t for w in words] for t in texts.texts])
  shares = np.stack([count[texts.labels == i].mean(0) for i in range(5)])
  np.testing.assert_array_equal(shares.argmax(0), range(5))


def make_texts(folder, count=30):
  """Texts whose label is a word of theirs, among other words."""
  words = {'animals': ('cat', 'dog'), 'tools': ('saw', 'axe')}
  rng = np.random.default_rng(0)
  for label, own in words.items():
    (folder / label).mkdir(parents=True)
    for i in range(count):
      others = ' '.join(rng.choice(['a', 'the', 'one', 'old'], 2))
      text = (
        f'{others} {rng.choice(own)} {rng.integers(10**6)} {rng.choice(own)}'
      )
      (folder / label / f'{i}.txt').write_text(text)
  return folder


def test_equal_texts_are_kept_once_and_split_by_the_seed(tmp_path):
  folder = make_texts(tmp_path)
  copy = (folder / 'animals' / '0.txt').read_text()
  (folder / 'tools' / 'copy.txt').write_text(copy + '\n')
  texts, labels = labelled.read(folder)
  assert labels == LABELS and len(texts.texts) == 60
  train, held = labelled.split(texts, seed=3)
  assert len(held.texts) == 12
  assert sorted(train.texts + held.texts) == sorted(texts.texts)
  label_of = dict(zip(texts.texts, texts.labels, strict=True))
  assert all(label_of[t] == i for t, i in zip(*held, strict=True))
  assert labelled.split(texts, seed=3)[1].texts == held.texts
  assert labelled.split(texts, seed=4)[1].texts != held.texts


def test_rows_hold_tokens_last_place_and_label():
  got = labelled.rows([[5, 6], [7, 8, 9, 10]], np.array([1, 0]), 3)
  np.testing.assert_array_equal(got, [[5, 6, 0, 1, 1], [7, 8, 9, 2, 0]])


def test_a_text_that_is_cut_ends_as_all_do(tmp_path):
  words = {'<s>': 0, '</s>': 1, 'a': 2, 'b': 3, 'c': 4}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='a'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)]
  )
  made.save(str(tmp_path / 'tokenizer.json'))
  got = labelled.tokens(tmp_path, 5, ['a b c c', 'b'], 4)
  assert got == [[0, 2, 3, 1], [0, 3, 1]]


def test_every_epoch_goes_through_all_rows():
  table = np.arange(10)[:, None]
  steps = [labelled.batch(table, 4, seed=0, step=i) for i in range(5)]
  first, second = np.concatenate(steps).reshape(2, 10)
  np.testing.assert_array_equal(np.sort(first), np.arange(10))
  np.testing.assert_array_equal(np.sort(second), np.arange(10))
  assert (first != second).any()


def test_texts_that_are_not_there(tmp_path):
  with pytest.raises(ValueError, match='is no folder'):
    labelled.read(tmp_path / 'none')
  with pytest.raises(ValueError, match='has 0 folders'):
    labelled.read(tmp_path)
  with pytest.raises(ValueError, match='300 tokens, but no tokenizer.json'):
    labelled.tokens(tmp_path, 300, ['text'], 9)


# --- Whole runs --------------------------------------------------------------


@pytest.fixture(scope='module')
def tiny(folder, tmp_path_factory):
  """A configuration that learns its task in a second, once it is compiled."""
  texts = make_texts(tmp_path_factory.mktemp('texts'))
  return finetune.Config(
    checkpoint=str(folder), data=(str(texts),), rank=2, batch=8, seq=24,
    steps=40, update_proj_gap=10, lr=5e-3, log_every=20,
    eval_every=20, save_every=20, compare='adamw8bit,lora',
    out=str(tmp_path_factory.mktemp('runs')),
  )  # fmt: skip


def alone(config, out):
  """Goes on with LoRA's run of a comparison."""
  return dataclasses.replace(
    config, optimizer='lora', compare='', out=str(out), resume=True
  )


@pytest.fixture(scope='module')
def compared(tiny):
  """{optimizer: (folder, summary)} of one call."""
  summaries = finetune.main(tiny)
  out = pathlib.Path(tiny.out)
  return {s['optimizer']: (out / s['optimizer'], s) for s in summaries}


@pytest.fixture(scope='module')
def whole(compared):
  return compared['adamw8bit']


@pytest.fixture(scope='module')
def with_lora(compared):
  return compared['lora']


def saved_model(config, out):
  """(parameters, held-out rows in its own tokens) of a run's model."""
  model, params = hf_checkpoint.load(out / 'model')
  texts, _ = labelled.read(pathlib.Path(config.data[0]))
  _, held = labelled.split(texts, config.seed)
  ids = labelled.tokens(out / 'model', model.vocab, held.texts, config.seq)
  return params, labelled.rows(ids, held.labels, config.seq)


def test_saved_model_has_the_accuracy_that_is_reported(tiny, whole):
  """Scores every text alone, at its own length, by the formulas."""
  out, summary = whole
  weights = safetensors_numpy.load_file(out / 'model' / 'model.safetensors')
  assert weights.keys() == tensors().keys() - {'lm_head.weight'} | {
    'score.weight'
  }
  _, table = saved_model(tiny, out)
  losses, right = [], []
  for *ids, last, label in table:
    x = features(weights, np.array([ids[: last + 1]]))[0, -1]
    logits = x @ weights['score.weight'].T
    losses.append(np.log(np.exp(logits).sum()) - logits[label])
    right.append(logits.argmax() == label)
  np.testing.assert_allclose(summary['validation_accuracy'], np.mean(right))
  np.testing.assert_allclose(
    summary['validation_loss'], np.mean(losses), rtol=1e-3
  )
  assert summary['guessing_accuracy'] < 0.7 < summary['validation_accuracy']


def test_saved_model_names_its_labels(whole):
  raw = json.loads((whole[0] / 'model' / 'config.json').read_text())
  assert raw['architectures'] == ['LlamaForSequenceClassification']
  assert raw['id2label'] == {'0': 'animals', '1': 'tools'}


def test_lora_learns_and_changes_matrices_by_its_rank_only(
  folder, tiny, with_lora
):
  out, summary = with_lora
  assert summary['validation_accuracy'] > 0.7
  before, after = hf_checkpoint.load(folder)[1], saved_model(tiny, out)[0]
  before, after = lora.by_path(before), lora.by_path(after)
  for path, w in before.items():
    if path[0] == 'blocks' and path[-1] == 'kernel':
      singular = np.linalg.svd(after[path] - w, compute_uv=False)
      assert (singular[..., 1] > 1e-4).all(), path
      assert (singular[..., 2:] < 1e-5).all(), path
    elif path[0] != 'lm_head':
      np.testing.assert_array_equal(after[path], w, err_msg=str(path))


def test_memory_is_that_of_each_method(whole, with_lora):
  whole, with_lora = whole[1], with_lora[1]
  assert with_lora['trained_parameters'] < whole['trained_parameters'] / 4
  assert whole['memory']['adam'] >= 8 * whole['trained_parameters']
  assert with_lora['memory']['adam'] == whole['memory']['adam']
  state = with_lora['memory']['state']
  assert state < whole['memory']['state'] < whole['memory']['adam']
  assert state == pytest.approx(8 * with_lora['trained_parameters'], abs=64)


def test_resumed_run_ends_with_the_same_bits(tiny, with_lora, tmp_path):
  out, summary = with_lora
  shutil.copytree(out, tmp_path / 'lora')
  shutil.rmtree(tmp_path / 'lora' / 'checkpoints' / '40')
  (resumed,) = finetune.main(alone(tiny, tmp_path / 'lora'))
  assert resumed['params_sha256'] == summary['params_sha256']
  rows = report.read_rows(tmp_path / 'lora' / 'metrics.jsonl')
  assert [row['step'] for row in rows] == [20, 20, 40, 40]
  assert [row['step'] for row in rows if 'loss' in row] == [20, 40]


def test_run_with_other_arguments_is_not_continued(tiny, with_lora):
  config = dataclasses.replace(alone(tiny, with_lora[0]), rank=3)
  with pytest.raises(ValueError, match="optimizer='lora' and rank=3: the chec"):
    finetune.main(config)


def test_comparison_leaves_numbers_and_a_picture(tiny, compared):
  out = pathlib.Path(tiny.out)
  saved = json.loads((out / 'summary.json').read_text())
  assert saved == {name: summary for name, (_, summary) in compared.items()}
  assert list(saved) == ['adamw8bit', 'lora']
  assert (out / 'curves.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_without_a_checkpoint_one_is_pretrained(tiny, tmp_path, monkeypatch):
  small_llama.thin_in(monkeypatch, small_llama.BLOCK)
  config = dataclasses.replace(
    tiny, checkpoint='', model='llama_test', vocab=300, pretraining_steps=2,
    seq=4, out=str(tmp_path),
  )  # fmt: skip
  task = finetune_task.load_task(config)
  assert task.checkpoint == tmp_path / 'pretraining' / 'weights'
  model, params = hf_checkpoint.load(task.checkpoint)
  assert model == llama.named('llama_test', vocab=300, kv_heads=2)
  scale = params['blocks']['mlp_norm']['scale']
  assert scale.shape == (2, 16) and (scale != 1).all()  # has been trained
  assert task.train.max() > 255  # tokens that are no bytes
  texts, _ = labelled.read(pathlib.Path(config.data[0]))
  train, held = labelled.split(texts, config.seed)
  read = (tmp_path / 'texts.txt').read_text()
  assert all(t in read for t in train.texts)
  assert not any(t in read for t in held.texts)


def test_contrib_galore_gets_plain_kernels():
  config = finetune.Config(compare='contrib_galore,lora')
  assert not finetune.resolve(config).scan_layers


def test_scale_is_that_of_galore():
  config = finetune.Config(
    rank=8, scale=2.0, lr=0.01, schedule='constant', clip=0.0
  )
  params = {
    'embed': {'embedding': np.ones((12, 16), np.float32)},
    'wq': {
      'kernel': np.random.default_rng(0).standard_normal((12, 16), np.float32)
    },
  }
  got, want = (
    jax.jit(lambda p, tx=tx: tx.update(p, tx.init(p), p)[0])(params)
    for tx in (
      recipes.make(finetune.recipe(config)),
      so.galore(0.01, 8, scale=2.0),
    )
  )
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_every_optimizer_has_a_rate():
  # RSO is no optax transformation, which is what is tuned here.
  assert {*finetune.OPTIMIZERS} == {*recipes.OPTIMIZERS, 'lora'} - {'rso'}
  rates = finetune.LEARNING_RATES
  assert all(recipes.known(name, rates) for name in finetune.OPTIMIZERS)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'optimizer': 'sgd'}, "optimizer='sgd' is unknown"),
    ({'compare': 'lora,sgd'}, "optimizer='sgd' is unknown"),
    ({'scale': 0.0}, 'scale=0.0: expected more than 0'),
    ({'rank': 0}, 'rank=0: expected more than 0'),
    ({'data': ('a', 'b')}, 'expected one folder'),
  ],
)
def test_wrong_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    finetune.resolve(finetune.Config(**changes))
