"""The example's corpora, batches and trigram, and the three short examples."""

import math
import sys
import types

import numpy as np
import pytest

import data
import linen_train_state
import nnx_layerwise
import nnx_optimizer
import plain_dict
import small_llama
import trigram

DOCUMENTS = {f'file{i}': f'text {i} '.encode() * (i + 1) for i in range(30)}
TEXT = b'the cat sat on the mat, and the dog sat on the log. ' * 40


def test_split_is_by_file_without_overlap():
  train, held = data.split(DOCUMENTS, 0.1)
  assert train.keys() | held.keys() == DOCUMENTS.keys()
  assert not train.keys() & held.keys()
  total = sum(map(len, DOCUMENTS.values()))
  assert 0.1 * total <= sum(map(len, held.values())) < 0.3 * total


def test_split_does_not_depend_on_the_order():
  backwards = dict(reversed(DOCUMENTS.items()))
  assert data.split(backwards) == data.split(DOCUMENTS)


@pytest.mark.parametrize('count', [2, 3])
def test_few_files_leave_one_on_each_side(count):
  few = dict(list(DOCUMENTS.items())[:count])
  train, held = data.split(few, 0.9)
  assert train and held


def test_one_file_is_cut():
  train, held = data.split({'a': TEXT}, 0.1)
  assert b''.join(train.values()) + b''.join(held.values()) == TEXT


def test_docstrings_of_a_package():
  documents = data.installed_docstrings(('optax',))
  assert documents == data.installed_docstrings(('optax',))
  assert b'Adam optimizer' in b''.join(documents.values())
  assert not any('test' in name.split('/') for name in documents)


def test_docstrings_are_taken_once():
  source = b'"""Module."""\ndef f():\n  """Same."""\nclass A:\n  """Same."""\n'
  assert data.docstrings(source) == ['Module.', 'Same.', 'Same.']


def test_folder_files_and_duplicates(tmp_path):
  (tmp_path / 'sub').mkdir()
  for name in ('a.txt', 'b.txt', 'sub/c.md', '.hidden'):
    (tmp_path / name).write_bytes(
      b'same' if name in 'a.txt b.txt' else name.encode()
    )
  assert sorted(data.read_documents([str(tmp_path)]).values()) == [
    b'same',
    b'sub/c.md',
  ]


def test_bytes_are_tokens():
  np.testing.assert_array_equal(
    data.encode({'a': b'ab', 'b': b'c'}), [97, 98, 99]
  )


def test_bpe_round_trip(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_bytes('naïve text, again and again. '.encode() * 200)
  corpus = data.load([str(path)], 270)
  again = data.load([str(path)], 270, corpus.tokenizer)
  np.testing.assert_array_equal(again.train, corpus.train)
  bpe = data.train_bpe({}, 270, corpus.tokenizer)
  assert bpe.decode(corpus.train.tolist()).encode() == corpus.train_text
  assert corpus.train.max() < corpus.vocab == 270
  assert corpus.tokens_per_byte is not None and 0 < corpus.tokens_per_byte < 1


def test_token_file(tmp_path):
  path = tmp_path / 'tokens.bin'
  np.arange(1000, dtype='<u2').tofile(path)
  corpus = data.load([str(path)], 1000)
  np.testing.assert_array_equal(
    np.r_[corpus.train, corpus.validation], np.arange(1000)
  )
  assert corpus.tokens_per_byte is None
  with pytest.raises(ValueError, match='vocab=500 is too small.*tokens.bin'):
    data.load([str(path)], 500)


def test_c4_streams_documents(monkeypatch):
  class Rows(list):
    def take(self, count):
      return self[:count]

  fake = types.ModuleType('datasets')
  rows = Rows({'text': f'page {i}'} for i in range(9))
  fake.load_dataset = lambda *a, **k: rows
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  corpus = data.load(['c4:5'])
  assert sorted((corpus.train_text + corpus.validation_text).split()) == sorted(
    b'page 0 page 1 page 2 page 3 page 4'.split()
  )


def test_c4_without_datasets(monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(
    ValueError, match="data='c4:5' needs `pip install datasets`"
  ):
    data.load(['c4:5'])


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('missing.txt', None, 'cannot be read'),
    ('empty.txt', b'', 'holds no text'),
    ('binary.txt', b'\xff\xfe\x00', 'is not UTF-8 text'),
    ('missing.bin', None, 'cannot be read'),
    ('empty.bin', b'', 'cannot be read'),
  ],
)
def test_bad_files_name_the_argument_and_the_path(
  tmp_path, name, content, message
):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(ValueError, match=f"data='.*{name}' {message}"):
    data.load([str(path)])


@pytest.mark.parametrize(
  'bad', [['a.bin', 'b.txt'], ['c4:'], ['c4:x'], ['c4:9', 'a']]
)
def test_bad_data_arguments(bad):
  with pytest.raises(ValueError, match=f"data=.*'{bad[0]}'"):
    data.load(bad)


def test_empty_folder(tmp_path):
  with pytest.raises(ValueError, match='data=.*holds no text'):
    data.load([str(tmp_path)])


def test_vocabulary_smaller_than_the_bytes(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_bytes(TEXT)
  with pytest.raises(ValueError, match='vocab=100'):
    data.load([str(path)], 100)


def test_batches_depend_on_seed_and_step_only():
  tokens = np.random.default_rng(0).integers(0, 99, 1000)
  get = lambda seed, step: data.batch(tokens, (2, 3), 8, seed, step)
  assert get(0, 5).shape == (2, 3, 9) and get(0, 5).dtype == np.int32
  np.testing.assert_array_equal(get(0, 5), get(0, 5))
  assert not np.array_equal(get(0, 5), get(0, 6))
  assert not np.array_equal(get(0, 5), get(1, 5))


def test_batches_are_windows_that_reach_every_token():
  tokens = np.arange(40)
  many = np.concatenate([data.batch(tokens, (8,), 8, 0, i) for i in range(50)])
  np.testing.assert_array_equal(np.diff(many), np.ones((400, 8)))
  np.testing.assert_array_equal(np.unique(many), tokens)


def test_validation_windows_predict_each_token_once():
  some = data.validation_batches(np.arange(1001), 5, 10, 1000)
  assert some.shape == (20, 5, 11)
  np.testing.assert_array_equal(
    np.sort(some[..., 1:].ravel()), np.arange(1, 1001)
  )
  assert data.validation_batches(np.arange(30), 5, 10, 1000).shape == (1, 5, 11)


# --- Trigram -----------------------------------------------------------------


@pytest.mark.parametrize('context', [b'th', b'xq', b'e\xff', b'\x00\x01'])
def test_trigram_probabilities_sum_to_one(context):
  model = trigram.fit(TEXT)
  text = b''.join(context + bytes([c]) for c in range(256))
  every = trigram.probabilities(model, text)[::3]
  np.testing.assert_allclose(every.sum(), 1.0, rtol=1e-12)
  assert (every > 0).all()


def test_trigram_by_hand():
  counts = trigram.count(b'abab')  # c: a, b; bc: ba, ab; abc: aba, bab
  model = trigram.Trigram(counts, np.array([0.1, 0.2, 0.3, 0.4]))
  got = trigram.probabilities(model, b'aba')
  np.testing.assert_allclose(got, [0.1 / 256 + 0.2 * 0.5 + 0.3 + 0.4])


def test_trigram_beats_bigram_and_unigram():
  words = 'alpha beta gamma delta epsilon zeta eta theta iota kappa'.split()
  draw = lambda seed: ' '.join(
    np.random.default_rng(seed).choice(words, 2000)
  ).encode()
  full = trigram.fit(draw(0))
  order = lambda k: full._replace(
    weights=np.eye(4)[k] * 0.999 + 0.001 * np.eye(4)[0]
  )
  scores = [trigram.bits_per_byte(order(k), draw(1)) for k in range(4)]
  assert math.isclose(scores[0], 8.0)
  assert scores[0] > scores[1] > scores[2] > scores[3]
  np.testing.assert_allclose(full.weights.sum(), 1.0)
  assert trigram.bits_per_byte(full, draw(1)) < scores[3] + 0.01


# --- The short examples ------------------------------------------------------


@pytest.mark.parametrize(
  'example', [plain_dict, nnx_optimizer, nnx_layerwise, linen_train_state]
)
def test_short_example_lowers_the_loss(example, capsys, monkeypatch):
  small_llama.thin_in(monkeypatch)
  first, last = example.main()
  assert last < 0.6 * first
  assert capsys.readouterr().out.startswith('loss ')
