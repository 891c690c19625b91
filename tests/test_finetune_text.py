"""Fine-tuning on text and instructions: rows, masks, whole runs.

The checkpoint is a tiny LLaMA with a tied embedding, and a tokenizer of bytes.
"""

import dataclasses
import functools
import json
import shutil
import signal
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

import finetune_text
import hf_checkpoint
import llama
import loop
import lora
import recipes
import small_llama
import subspace_optax as so
import test_pretrain
import text_model
import text_rows

CONTROL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
SEQ = 12


def make_tokenizer(control=CONTROL):
  """Bytes, and control tokens."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {x: i for i, x in enumerate([*control, *letters])}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  made.decoder = tokenizers.decoders.ByteLevel()
  made.add_special_tokens(list(control))
  return made


class Program(finetune_text.Program):
  """One that runs of the same settings share, but for its compilation."""

  lowered: dict[Any, Any] = {}

  def __init__(self, c, model, method):
    super().__init__(c, model, method)
    self._key = dataclasses.replace(c, out='', checkpoint='', resume=False)
    self._key = self._key, model

  def lower(self, example):
    key = *self._key, example.shape
    if key not in self.lowered:
      self.lowered[key] = super().lower(example)
    return self.lowered[key]


class HeldOut(text_model.HeldOut):
  """One whose program others of a model share."""

  sums: dict[Any, Any] = {}

  def __init__(self, model, rows, size):
    super().__init__(model, rows, size)
    self._sums = self.sums.setdefault(model, self._sums)


@pytest.fixture(scope='module', autouse=True)
def few_programs():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(finetune_text, 'Program', Program)
    patch.setattr(Program, 'lowered', {})
    patch.setattr(text_model, 'HeldOut', HeldOut)
    patch.setattr(HeldOut, 'sums', {})
    once = functools.cache(text_model.abstract)
    patch.setattr(text_model, 'abstract', once)
    yield


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  """A folder in Hugging Face's format."""
  folder = tmp_path_factory.mktemp('checkpoint')
  # Of rank 8, bases are those of two matrices: the others are too narrow.
  c = llama.LlamaConfig(16, 8, layers=2, heads=2, kv_heads=1, vocab=259)
  _, params = small_llama.drawn(c)
  params['lm_head'] = {'kernel': params['embed']['embedding'].T}
  hf_checkpoint.save(folder, c, params, tied=True)
  make_tokenizer().save(str(folder / 'tokenizer.json'))
  return folder


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  """Instructions whose responses are always the same."""
  path = tmp_path_factory.mktemp('pairs') / 'pairs.jsonl'
  lines = [{'prompt': f'{i}?', 'response': 'abcabcabc'} for i in range(40)]
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  return path


def config(checkpoint, pairs, out, **changes):
  chosen = {'rank': 2, 'steps': 6, 'batch': 4, 'seq': 136, 'lr': 1e-2}
  return finetune_text.Config(
    checkpoint=str(checkpoint),
    data=(str(pairs),),
    out=str(out),
    **(chosen | {'lr_rest': 1e-2} | changes),
  )


# Of all tests that share its program. Its second bases are those of the last
# step.
SHARED = {
  'optimizer': 'subspace_adamw',
  'rank': 8,
  'clip': 0.0,
  'steps': 3,
  'update_proj_gap': 2,
}


# --- Rows --------------------------------------------------------------------


def test_windows_of_text_count_every_token_but_the_first_once():
  rows = text_rows.windows(np.arange(26), SEQ)
  assert rows.shape == (2, 2, SEQ + 1) and rows.dtype == np.int32
  np.testing.assert_array_equal(rows[:, 0, 1:].ravel(), np.arange(1, 25))
  np.testing.assert_array_equal(rows[:, 0, 0], [0, 12])
  np.testing.assert_array_equal(rows[:, 1], np.ones_like(rows[:, 1]))


def test_template_is_that_of_smollm2():
  assert text_rows.chat('Hello', 'Be kind.') == (
    '<|im_start|>system\nBe kind.<|im_end|>\n'
    '<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n'
  )


def test_only_the_response_counts():
  tokenizer = make_tokenizer()
  tokens, counts = text_rows.instruction(tokenizer, 'Why?', 'Because', 300)
  said = tokenizer.decode(tokens[counts == 1], skip_special_tokens=False)
  assert said == 'Because<|im_end|>\n'
  before = tokens[: np.argmax(counts)]
  asked = tokenizer.decode(before, skip_special_tokens=False)
  assert asked == text_rows.chat('Why?')
  end = np.argmax(counts) + counts.sum()
  assert not tokens[end:].any() and not counts[end:].any()


def test_the_system_text_is_that_of_the_models_own_template():
  asked = lambda template: text_rows.instruction(
    make_tokenizer(), 'Why?', 'No', 300, text_rows.Marks(2, template)
  )
  own = asked("{{ 'system " + text_rows.SYSTEM + "' }}")
  none = asked('{{ messages }}')
  decode = lambda row: make_tokenizer().decode(
    row[0][: np.argmax(row[1])], skip_special_tokens=False
  )
  assert decode(own) == text_rows.chat('Why?', text_rows.SYSTEM)
  assert decode(none) == text_rows.chat('Why?')
  assert 'SmolLM' not in decode(none)


def test_tokens_of_begin_and_end_stand_around_a_pair():
  tokenizer = make_tokenizer(('<s>', '</s>'))
  for template in ('<s> $A', '<s> $A </s>'):
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single=template, special_tokens=[('<s>', 0), ('</s>', 1)]
    )
    tokens, counts = text_rows.instruction(
      tokenizer, 'Why?', 'No', SEQ, text_rows.Marks(1)
    )
    said = tokenizer.decode(tokens[:9], skip_special_tokens=False)
    assert said == '<s>Why?\nNo</s>'
    np.testing.assert_array_equal(counts, [0] * 6 + [1] * 3 + [0] * 4)


def test_a_checkpoint_says_how_texts_end(checkpoint, tmp_path):
  folder = tmp_path / 'model'
  shutil.copytree(checkpoint, folder)
  raw = json.loads((folder / 'config.json').read_text())
  write = lambda name, x: (folder / name).write_text(json.dumps(x))
  write('config.json', raw | {'eos_token_id': [7, 8]})
  write('tokenizer_config.json', {'chat_template': '{{ messages }}'})
  base = text_model.load(str(folder))
  assert base.marks == (7, '{{ messages }}')
  text_model.save_model(tmp_path / 'saved', base, base.params)
  assert text_model.load(str(tmp_path / 'saved')).marks == base.marks


def test_without_control_tokens_each_part_is_a_line():
  tokenizer = make_tokenizer(())
  tokens, counts = text_rows.instruction(tokenizer, 'Why?', 'No', SEQ)
  assert tokenizer.decode(tokens[:8]) == 'Why?\nNo\n'
  np.testing.assert_array_equal(counts, [0] * 5 + [1] * 3 + [0] * 5)


def test_long_responses_are_cut_and_long_prompts_left_out(tmp_path):
  path = tmp_path / 'x.jsonl'
  prompts = ('a', 'p' * 50, 'b', 'c', 'q' * 50, 'd')
  texts = list(zip(prompts, ('r' * 50, 'r', 'r') * 2, strict=True))
  lines = [json.dumps({'prompt': p, 'response': r}) for p, r in texts]
  path.write_text('\n'.join(lines))
  rows = text_rows.load((str(path),), make_tokenizer(()), SEQ, 0)
  assert (len(rows.train), len(rows.validation)) == (3, 1)
  assert '2 left out' in rows.summary
  both = np.concatenate([rows.train, rows.validation])
  assert sorted(both[:, 1].sum(axis=1)) == [2, 2, SEQ - 1, SEQ - 1]


def test_whole_files_are_held_out(tmp_path):
  for i in range(9):
    (tmp_path / f'{i}.txt').write_text(chr(ord('a') + i) * 40)
  rows = text_rows.load((str(tmp_path),), make_tokenizer(), SEQ, 0)
  assert '8 files to train, 1 files held out' in rows.summary
  seen, held = ({*part[:, 0].ravel()} for part in rows[:2])
  assert not seen & held and len(seen | held) == 9


def test_a_prompt_is_trained_on_or_held_out(tmp_path):
  path = tmp_path / 'x.jsonl'
  texts = [(chr(97 + i % 20), 'xyz'[i % 3]) for i in range(120)]
  lines = [json.dumps({'prompt': p, 'response': r}) for p, r in texts]
  path.write_text('\n'.join(lines))
  rows = text_rows.load((str(path),), make_tokenizer(()), SEQ, 0)
  assert len(rows.train) + len(rows.validation) == 60  # each line once
  first = lambda part: set(part[:, 0, 0].tolist())
  assert len(first(rows.validation)) == 2
  assert not first(rows.train) & first(rows.validation)


def test_batches_of_held_out_rows_are_spread(checkpoint):
  base = text_model.load(str(checkpoint))
  rows = np.zeros((10, 2, SEQ + 1), np.int32)
  rows[:, 1] = 1
  rows[:, 0] = np.arange(10)[:, None]
  one = lambda i: text_model.HeldOut(base.model, rows[i : i + 1], 1)(
    base.params, 1
  )
  held = text_model.HeldOut(base.model, rows, 1)
  np.testing.assert_allclose(
    held(base.params, 2), (one(0) + one(9)) / 2, rtol=1e-5
  )


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{"prompt": null, "response": "b"}', 'line 1: expected an object'),
    ('{"prompt": "a"}', 'line 1: expected an object with prompt and response'),
    ('{"prompt": "a", "response": "b"}\n[]', 'line 2: expected an object'),
    ('{"prompt": "a", "response": "b"}', 'too few tokens'),
  ],
)
def test_bad_instructions_are_named(tmp_path, text, message):
  path = tmp_path / 'x.jsonl'
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    text_rows.load((str(path),), make_tokenizer(), SEQ, 0)
  with pytest.raises(ValueError, match='a .jsonl file must be alone'):
    text_rows.load((str(path), 'y'), make_tokenizer(), SEQ, 0)


# --- The loss ----------------------------------------------------------------


def test_loss_is_the_mean_over_what_counts():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 4, 7)).astype(np.float32)
  rows = rng.integers(0, 7, (2, 2, 5)).astype(np.int32)
  rows[:, 1] = [[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]]
  log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  want = [log[0, 1, rows[0, 0, 2]], log[0, 2, rows[0, 0, 3]]]
  want.append(log[1, 2, rows[1, 0, 3]])
  got = jax.jit(text_model.cross_entropy)(logits, rows)
  np.testing.assert_allclose(got, -np.mean(want), rtol=1e-5)


def test_held_out_loss_does_not_depend_on_the_batch(checkpoint, pairs):
  c = config(checkpoint, pairs, '')
  base = text_model.load(c.checkpoint)
  rows = text_rows.load(c.data, base.tokenizer, c.seq, 0).validation
  held = lambda batch: text_model.HeldOut(base.model, rows, batch)(
    base.params, 100
  )
  np.testing.assert_allclose(held(3), held(4), rtol=1e-6)


def test_tied_embedding_gets_both_gradients(checkpoint, pairs):
  """That of a tied model is the sum of those of its two uses."""
  base = text_model.load(str(checkpoint))
  assert 'lm_head' not in base.params
  logits = text_model.make_logits(base.model)
  rows = np.random.default_rng(0).integers(0, 259, (2, 2, 9)).astype(np.int32)
  rows[:, 1] = 1
  loss = lambda p: text_model.cross_entropy(logits(p, rows), rows)
  gradients = lambda p: map(jax.grad(loss), (p, text_model.with_head(p)))
  tied, apart = jax.jit(lambda p: [*gradients(p)])(base.params)
  tied = tied['embed']['embedding']
  both = apart['embed']['embedding'] + apart['lm_head']['kernel'].T
  np.testing.assert_allclose(tied, both, rtol=1e-4, atol=1e-6)


def test_lora_without_a_head_moves_the_factors_only(checkpoint, pairs):
  c = config(checkpoint, pairs, '', optimizer='lora', rank=2)
  base = text_model.load(c.checkpoint)
  params = jax.tree.map(jnp.asarray, base.params)
  adapters = lora.init(jax.random.key(0), params, 2, train_head=False)
  assert set(adapters) == {'frozen', 'a', 'b'}
  tx = finetune_text.optimizer(finetune_text.for_optimizer(c, 'lora'), None)
  updates, _ = jax.jit(tx.update)(
    jax.tree.map(jnp.ones_like, adapters), jax.jit(tx.init)(adapters), adapters
  )
  moved = optax.apply_updates(adapters, updates)
  same = jax.tree.map(lambda x, y: np.array_equal(x, y), moved, adapters)
  assert jax.tree.all(same['frozen'])
  assert not any(jax.tree.leaves((same['a'], same['b'])))
  merged = lora.merge(adapters, 2.0)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  trained = sum(x.nbytes for n in 'ab' for x in jax.tree.leaves(adapters[n]))
  state = so.memory_report(tx, adapters).state
  assert 2 * trained <= state <= 2 * trained + 64


# --- Whole runs --------------------------------------------------------------


def test_run_learns_and_saves_a_tied_model(checkpoint, pairs, tmp_path):
  c = config(checkpoint, pairs, tmp_path / 'run', steps=20)
  c = dataclasses.replace(c, compare='adamw8bit', eval_every=20)
  found = finetune_text.main(c)
  run = found['runs']['adamw8bit']
  assert run['validation_loss'] < found['validation_loss_before'] - 1.0
  assert run['memory']['state'] < run['memory']['adam']
  saved = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert saved['runs']['adamw8bit']['validation_loss'] == run['validation_loss']
  model = str(tmp_path / 'run' / 'adamw8bit' / 'model')
  base = text_model.load(model)
  assert 'lm_head' not in base.params
  rows = text_rows.load(c.data, base.tokenizer, c.seq, 0)
  held = text_model.HeldOut(base.model, rows.validation, c.batch)
  np.testing.assert_allclose(
    held(base.params, 100), run['validation_loss'], rtol=1e-5
  )


def test_a_resumed_run_equals_an_uninterrupted_one(
  checkpoint, pairs, tmp_path, monkeypatch
):
  name = SHARED['optimizer']
  whole = config(checkpoint, pairs, tmp_path / 'whole', **SHARED)
  parts = dataclasses.replace(whole, out=str(tmp_path / 'parts'))
  wanted = finetune_text.main(whole)['runs'][name]
  with monkeypatch.context() as patch:
    test_pretrain.stop_at(patch, 2, signal.SIGINT)
    with pytest.raises(SystemExit):
      finetune_text.main(parts)
  # The parameters and the state to begin with are not made again.
  monkeypatch.setattr(loop, 'beginning', no_arrays(loop.beginning))
  resumed = dataclasses.replace(parts, resume=True)
  found = finetune_text.main(resumed)['runs'][name]
  assert found['params_sha256'] == wanted['params_sha256']
  assert found['validation_loss'] == wanted['validation_loss']


def no_arrays(beginning):
  """What begins a run, for shapes alone."""

  def make(tx, start):
    begin = beginning(tx, start)

    def check(params):
      assert isinstance(jax.tree.leaves(params)[0], jax.core.Tracer)
      return begin(params)

    return check

  return make


def test_lora_of_an_untied_gguf_file(pairs, tmp_path, monkeypatch):
  # Factors of few kernels, as each costs a trace and a compilation.
  few = lambda path: (
    'attention/w' in jax.tree_util.keystr(path, simple=True, separator='/')
  )
  monkeypatch.setattr(recipes, 'is_matrix', few)
  gguf_file = pytest.importorskip('test_gguf_checkpoint')
  weights = gguf_file.tensors(tied=False)
  path = gguf_file.write(tmp_path / 'model.gguf', weights)
  argv = ['--checkpoint', str(path), '--data', str(pairs), '--rank', '2']
  argv += ['--preset', 'adapter', '--batch', '4', '--seq', '96', '--lr', '0.01']
  argv += [
    '--steps',
    '20',
    '--eval-every',
    '20',
    '--out',
    str(tmp_path / 'run'),
  ]
  assert finetune_text.cli(argv) == 0
  found = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  run = found['runs']['lora']
  assert run['validation_loss'] < found['validation_loss_before'] - 0.5
  base = text_model.load(str(path))
  assert 'lm_head' in base.params
  assert run['trained_parameters'] < lora.trained(base.params) / 4
  saved = text_model.load(str(tmp_path / 'run' / 'model')).params
  same = jax.tree.map(np.array_equal, saved, base.params)
  assert same['lm_head']['kernel'] and same['embed']['embedding']
  assert not same['blocks']['attention']['wq']['kernel']


def test_a_run_may_go_on_from_its_own_model(checkpoint, pairs, tmp_path):
  c = config(checkpoint, pairs, tmp_path / 'run', **SHARED)
  finetune_text.main(c)
  again = dataclasses.replace(c, checkpoint=str(tmp_path / 'run' / 'model'))
  finetune_text.main(again)
  assert (tmp_path / 'run.1' / 'model' / 'config.json').exists()
  done = finetune_text.main(dataclasses.replace(again, resume=True))
  assert done['runs'][SHARED['optimizer']]['tokens_per_second'] > 0
  with pytest.raises(ValueError, match='nowhere'):
    finetune_text.main(dataclasses.replace(c, data=('nowhere.jsonl',)))
  assert (tmp_path / 'run' / 'model').exists()


def test_a_tokenizer_neither_cuts_nor_fills_up(checkpoint, tmp_path):
  folder = tmp_path / 'model'
  shutil.copytree(checkpoint, folder)
  made = text_model.load(str(folder)).tokenizer
  made.enable_truncation(3)
  made.enable_padding(length=8)
  made.save(str(folder / 'tokenizer.json'))
  ids = text_model.load(str(folder)).tokenizer.encode('abcdefghij').ids
  assert len(ids) == len(make_tokenizer().encode('abcdefghij').ids)
  made.add_tokens([f'token{i}' for i in range(1000)])
  made.save(str(folder / 'tokenizer.json'))
  with pytest.raises(ValueError, match='tokens, the model'):
    text_model.load(str(folder))


def test_a_classifier_is_no_language_model(checkpoint, tmp_path):
  model = dataclasses.replace(text_model.load(str(checkpoint)).model, outputs=3)
  _, params = small_llama.drawn(model)
  hf_checkpoint.save(tmp_path, model, params, labels=('a', 'b', 'c'))
  with pytest.raises(ValueError, match='a classifier'):
    text_model.load(str(tmp_path))


def one_run(c):
  """The parameters after a run."""
  c = finetune_text.for_optimizer(c, c.optimizer)
  base = text_model.load(c.checkpoint)
  rows = text_rows.load(c.data, base.tokenizer, c.seq, 0)
  method = finetune_text.build(c, base)
  program = finetune_text.Program(c, base.model, method)
  step = program.compile(next(finetune_text.batches(c, rows.train, 0)))
  assert program.bytes is None or program.bytes > 0
  state = method.init()
  for batch in finetune_text.batches(c, rows.train, 0):
    state, _ = step(state, batch)
  return state['params']


def test_layerwise_steps_are_the_ordinary_ones(checkpoint, pairs):
  c = config(checkpoint, pairs, '', **SHARED)
  plain = one_run(c)
  layerwise = one_run(dataclasses.replace(c, layerwise=True))
  for x, y in zip(*map(jax.tree.leaves, (plain, layerwise)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  'name', test_pretrain.without_alike(finetune_text.OPTIMIZERS)
)
def test_every_optimizer_can_be_set_up(checkpoint, pairs, name):
  c = finetune_text.for_optimizer(config(checkpoint, pairs, ''), name)
  base = text_model.load(c.checkpoint)
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'scale takes .* as the head')
    like = finetune_text.build(c, base).like
  assert jax.tree.leaves(like['opt_state'])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'optimizer': 'sgd'}, "optimizer='sgd' is unknown; choose from"),
    ({'layerwise': True, 'optimizer': 'lora'}, "optimizer='lora' with layer"),
    ({'layerwise': True, 'accumulation': 2}, 'accumulation=2 with layer-wise'),
    ({'lora_scale': 0.0}, 'lora_scale must be positive'),
    (
      {'accumulation': 2, 'data': ('x.jsonl',)},
      'accumulation=2 with instructions',
    ),
    ({'compare': 'adamw,adafactor8bit'}, "optimizer='adafactor8bit' is unkn"),
    ({'batch': 0}, 'batch=0: expected more than 0'),
  ],
)
def test_wrong_arguments_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    finetune_text.check(finetune_text.Config(**changes))
