"""RoBERTa: its format, its formulas in NumPy in float64, and fine-tuning it."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

import finetune
import recipes
import roberta
import roberta_checkpoint

WIDTH, MLP, LAYERS, HEADS, VOCAB, POSITIONS = 16, 20, 2, 2, 256, 14
RAW = {
  'architectures': ['RobertaForMaskedLM'],
  'model_type': 'roberta',
  'hidden_act': 'gelu',
  'hidden_size': WIDTH,
  'intermediate_size': MLP,
  'num_hidden_layers': LAYERS,
  'num_attention_heads': HEADS,
  'max_position_embeddings': POSITIONS,
  'type_vocab_size': 1,
  'pad_token_id': 1,
  'layer_norm_eps': 1e-3,
  'vocab_size': VOCAB,
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (3, 9))
LENGTHS = np.array([9, 4, 1])
LABELS = ('animals', 'tools', 'plants')


def shapes():
  """The tensors of the format, each in PyTorch's orientation."""
  dense = lambda name, rows, columns: {
    f'{name}.weight': (rows, columns),
    f'{name}.bias': (rows,),
  }
  norm = lambda name: {f'{name}.weight': (WIDTH,), f'{name}.bias': (WIDTH,)}
  found = {
    'roberta.embeddings.word_embeddings.weight': (VOCAB, WIDTH),
    'roberta.embeddings.position_embeddings.weight': (POSITIONS, WIDTH),
    'roberta.embeddings.token_type_embeddings.weight': (1, WIDTH),
    **norm('roberta.embeddings.LayerNorm'),
    **dense('classifier.dense', WIDTH, WIDTH),
    **dense('classifier.out_proj', len(LABELS), WIDTH),
  }
  for i in range(LAYERS):
    layer = f'roberta.encoder.layer.{i}'
    for part in ('self.query', 'self.key', 'self.value', 'output.dense'):
      found |= dense(f'{layer}.attention.{part}', WIDTH, WIDTH)
    found |= norm(f'{layer}.attention.output.LayerNorm')
    found |= dense(f'{layer}.intermediate.dense', MLP, WIDTH)
    found |= dense(f'{layer}.output.dense', WIDTH, MLP)
    found |= norm(f'{layer}.output.LayerNorm')
  return found


@functools.cache
def tensors():
  """Random weights, large enough that every formula matters."""
  rng = np.random.default_rng(1)
  return {k: rng.normal(0, 0.4, s).astype('f4') for k, s in shapes().items()}


def write(folder, weights=None, **changes):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(RAW | changes))
  weights = tensors() if weights is None else weights
  safetensors_numpy.save_file(weights, folder / 'model.safetensors')
  return folder


def body():
  """What a checkpoint without a head for labels holds."""
  own = {k: x for k, x in tensors().items() if not k.startswith('classifier')}
  return own | {'lm_head.bias': np.zeros(VOCAB, 'f4')}


def norm(w, name, x):
  x = x - np.mean(x, axis=-1, keepdims=True)
  x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-3)
  return x * w[f'{name}.weight'] + w[f'{name}.bias']


def dense(w, name, x):
  return x @ w[f'{name}.weight'].T + w[f'{name}.bias']


def attend(w, name, x):
  """One text alone, of its own length."""
  split = lambda part: np.split(dense(w, f'{name}.self.{part}', x), HEADS, -1)
  mixed = []
  parts = map(split, ('query', 'key', 'value'))
  for q, k, v in zip(*parts, strict=True):
    scores = np.exp(q @ k.T / math.sqrt(WIDTH // HEADS))
    mixed.append(scores / scores.sum(axis=-1, keepdims=True) @ v)
  return dense(w, f'{name}.output.dense', np.concatenate(mixed, -1))


def logits_of(w, tokens):
  """The logits of one text, in float64."""
  w = {name: x.astype(float) for name, x in w.items()}
  table = lambda name: w[f'roberta.embeddings.{name}_embeddings.weight']
  places = 2 + np.arange(len(tokens))
  x = table('word')[tokens] + table('position')[places] + table('token_type')[0]
  x = norm(w, 'roberta.embeddings.LayerNorm', x)
  gelu = np.vectorize(lambda t: t * (1 + math.erf(t / math.sqrt(2))) / 2)
  for i in range(LAYERS):
    layer = f'roberta.encoder.layer.{i}'
    y = attend(w, f'{layer}.attention', x)
    x = norm(w, f'{layer}.attention.output.LayerNorm', x + y)
    y = gelu(dense(w, f'{layer}.intermediate.dense', x))
    y = dense(w, f'{layer}.output.dense', y)
    x = norm(w, f'{layer}.output.LayerNorm', x + y)
  return dense(
    w, 'classifier.out_proj', np.tanh(dense(w, 'classifier.dense', x[0]))
  )


def head():
  """The head of the tensors in the tree of the model."""
  part = lambda name: {
    'kernel': tensors()[f'classifier.{name}.weight'].T,
    'bias': tensors()[f'classifier.{name}.bias'],
  }
  return {'head': {'dense': part('dense'), 'out': part('out_proj')}}


@pytest.mark.parametrize('scan_layers', [True, False])
def test_logits_equal_the_formulas(tmp_path, scan_layers):
  c, params = roberta_checkpoint.load(
    write(tmp_path, body()), scan_layers=scan_layers
  )
  c = dataclasses.replace(c, outputs=len(LABELS))
  score = jax.jit(finetune.make_logits(c))
  found = score(params | head(), jnp.array(TOKENS), jnp.array(LENGTHS - 1))
  for i, length in enumerate(LENGTHS):
    want = logits_of(tensors(), TOKENS[i, :length])
    np.testing.assert_allclose(found[i], want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize('scan_layers', [True, False])
def test_writing_gives_the_same_tensors(tmp_path, scan_layers):
  labelled = {'id2label': {str(i): x for i, x in enumerate(LABELS)}}
  c, params = roberta_checkpoint.load(
    write(tmp_path / 'old', **labelled), scan_layers=scan_layers
  )
  roberta_checkpoint.save(tmp_path / 'new', c, params | head(), labels=LABELS)
  found = safetensors_numpy.load_file(tmp_path / 'new' / 'model.safetensors')
  assert found.keys() == tensors().keys()
  for name, x in tensors().items():
    np.testing.assert_array_equal(found[name], x, strict=True, err_msg=name)
  same = dataclasses.replace(c, scan_layers=True)
  assert roberta_checkpoint.read_config(tmp_path / 'new') == same
  with pytest.raises(ValueError, match='do not fit outputs=3'):
    roberta_checkpoint.save(tmp_path, c, params | head(), labels=LABELS[:2])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'hidden_act': 'relu'}, "hidden_act='relu', expected 'gelu'"),
    ({'position_embedding_type': 'relative_key'}, 'position_embedding_type'),
    ({'vocab_size': None}, 'vocab_size=None, expected an int'),
    ({'vocab_size': 300}, r'shape \(256, 16\), expected \(300, 16\)'),
  ],
)
def test_models_that_are_no_roberta_of_ours(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    roberta_checkpoint.load(write(tmp_path, **changes))


def test_wrong_tensors_are_named(tmp_path):
  less = {k: x for k, x in body().items() if 'layer.1.output.dense' not in k}
  with pytest.raises(ValueError, match='missing tensors.*1.output.dense.bias'):
    roberta_checkpoint.load(write(tmp_path / 'less', less))
  more = body() | {'roberta.more': np.zeros(1, 'f4')}
  with pytest.raises(ValueError, match="unexpected tensor 'roberta.more'"):
    roberta_checkpoint.load(write(tmp_path / 'more', more))


def test_attention_and_mlp_are_projected_and_the_head_is_not():
  c = roberta.RobertaConfig(WIDTH, MLP, LAYERS, HEADS, VOCAB, POSITIONS)
  params = {'head': roberta_checkpoint.first_head(c, jax.random.key(0))['head']}
  mask = recipes.matrix_mask(params | {'blocks': {'mlp': {'kernel': 0}}})
  assert mask['blocks'] == {'mlp': {'kernel': True}}
  assert not any(jax.tree.leaves(mask['head']))


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  """Texts of two labels whose first letters tell them apart."""
  folder = tmp_path_factory.mktemp('texts')
  rng = np.random.default_rng(2)
  for label, first in (('one', 'a'), ('two', 'z')):
    (folder / label).mkdir()
    for i in range(40):
      rest = ''.join(rng.choice(list('mnop'), 5))
      (folder / label / f'{i}.txt').write_text(first * 3 + rest)
  return folder


@pytest.mark.parametrize('optimizer', ['trion', 'lora'])
def test_it_learns_labels_and_what_is_saved_is_read(optimizer, texts, tmp_path):
  config = finetune.Config(
    checkpoint=str(write(tmp_path / 'base', body())),
    data=(str(texts),),
    optimizer=optimizer,
    rank=4,
    batch=8,
    seq=8,
    steps=40,
    lr=4e-3 if optimizer == 'trion' else 3e-2,
    eval_every=40,
    out=str(tmp_path / 'run'),
  )
  finetune.main(config)
  summary = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert summary['validation_accuracy'] == 1.0
  assert summary['guessing_accuracy'] < 0.8
  saved = tmp_path / 'run' / 'model'
  weights = safetensors_numpy.load_file(saved / 'model.safetensors')
  for text, label in (('aaamnopm', 0), ('zzzmnopm', 1)):
    tokens = np.frombuffer(text.encode(), np.uint8).astype(int)
    assert int(np.argmax(logits_of(weights, tokens))) == label
  with pytest.raises(ValueError, match='seq=13: .* positions for 12 tokens'):
    finetune.main(dataclasses.replace(config, seq=13))
