"""Text, tokens and batches.

A corpus is a set of documents (name -> text) of which whole documents, never
parts, are held out for validation. Batches are a pure function of (seed, step),
so that a resumed run reads what the uninterrupted one would have read.
"""

import ast
from collections.abc import Callable, Sequence
import hashlib
import importlib
import importlib.resources
import pathlib
from typing import Any, NamedTuple
import warnings
import zlib

import numpy as np

PACKAGES = ('numpy', 'scipy', 'jax', 'flax', 'optax')
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Corpus(NamedTuple):
  """Tokens of both splits, and the bytes that they stand for."""

  train: np.ndarray
  validation: np.ndarray
  train_text: bytes  # both texts are empty if the data are tokens already
  validation_text: bytes
  vocab: int
  tokenizer: str  # JSON of the BPE, or empty
  sha256: str
  summary: str

  @property
  def tokens_per_byte(self) -> float | None:
    if not self.validation_text:
      return None
    return len(self.validation) / len(self.validation_text)


# --- Documents ---------------------------------------------------------------


def docstrings(source: bytes) -> list[str]:
  """The docstrings of one Python file, in the order of the syntax tree."""
  with warnings.catch_warnings():  # some packages have invalid escapes
    warnings.simplefilter('ignore')
    tree = ast.parse(source)
  nodes = (n for n in ast.walk(tree) if isinstance(n, _DOCUMENTED))
  return [text for n in nodes if (text := ast.get_docstring(n))]


def package_files(package: str) -> dict[str, pathlib.Path]:
  """The source files of an installed package, without its tests."""
  root = pathlib.Path(str(importlib.resources.files(package)))
  files = {p.relative_to(root.parent).as_posix(): p for p in root.rglob('*.py')}
  return {k: v for k, v in sorted(files.items()) if '/tests/' not in k}


def installed_docstrings(
  packages: Sequence[str] = PACKAGES,
) -> dict[str, bytes]:
  """One document a source file; a docstring seen before is left out."""
  documents, seen = {}, set()
  for package in packages:
    for name, path in package_files(package).items():
      source = path.read_bytes()
      if b'"""' not in source:
        continue
      new = [d for d in dict.fromkeys(docstrings(source)) if d not in seen]
      seen.update(new)
      if new:
        documents[name] = '\n\n'.join(new).encode() + b'\n\n'
  return documents


def read_text(path: pathlib.Path) -> bytes:
  """The bytes of a UTF-8 file; anything else is a ValueError."""
  try:
    text = path.read_bytes()
    text.decode()
  except OSError as error:
    raise ValueError(f'data={str(path)!r} cannot be read: {error}') from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f'data={str(path)!r} is not UTF-8 text: {error}'
    ) from error
  return text


def folder_files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Every file below a folder but the hidden ones."""
  files = (p for p in sorted(folder.rglob('*')) if p.is_file())
  return [
    p
    for p in files
    if not any(part.startswith('.') for part in p.relative_to(folder).parts)
  ]


def read_documents(paths: Sequence[str]) -> dict[str, bytes]:
  """The documents of text files and folders; equal texts count once."""
  by_text = {}
  for path in map(pathlib.Path, paths):
    files = folder_files(path) if path.is_dir() else [path]
    texts = {str(p): read_text(p) for p in files}
    if not any(texts.values()):
      raise ValueError(f'data={str(path)!r} holds no text')
    by_text |= {text: name for name, text in texts.items() if text}
  return {name: text for text, name in by_text.items()}


def c4_documents(count: int) -> dict[str, bytes]:
  """The first `count` documents of C4, streamed by `pip install datasets`."""
  try:
    datasets = importlib.import_module('datasets')
  except ImportError as error:
    raise ValueError(
      f"data='c4:{count}' needs `pip install datasets` and a network"
    ) from error
  rows = datasets.load_dataset(
    'allenai/c4', 'en', split='train', streaming=True
  )
  texts = (row['text'].encode() + b'\n\n' for row in rows.take(count))
  return {f'c4/{i:09d}': text for i, text in enumerate(texts)}


# --- Splits and tokens -------------------------------------------------------


def split(documents: dict[str, bytes], fraction: float = 0.02):
  """(train, validation) by a hash of the names; both orders are shuffled by it.

  A single document is cut at its last `fraction`, since there is no other way.
  """
  if len(documents) == 1:
    ((name, text),) = documents.items()
    cut = len(text) - max(1, int(fraction * len(text)))
    return {f'{name}:head': text[:cut]}, {f'{name}:tail': text[cut:]}
  names = sorted(documents, key=lambda n: (zlib.crc32(n.encode()), n))
  sizes = np.cumsum([len(documents[n]) for n in names])
  held = int(np.searchsorted(sizes, fraction * sizes[-1])) + 1
  held = min(held, len(names) - 1)
  pick = lambda chosen: {n: documents[n] for n in chosen}
  return pick(names[held:]), pick(names[:held])


def train_bpe(train: dict[str, bytes], vocab: int, known: str = ''):
  """A byte-level BPE trained on the training documents, or the one known."""
  import tokenizers  # pylint: disable=g-import-not-at-top

  if not known:
    bpe = tokenizers.ByteLevelBPETokenizer()
    texts = (t.decode(errors='replace') for t in train.values())
    bpe.train_from_iterator(texts, vocab_size=vocab, show_progress=False)
    if bpe.get_vocab_size() > vocab:
      raise ValueError(
        f'vocab={vocab}: a byte-level BPE has at least '
        f'{bpe.get_vocab_size()} tokens'
      )
    known = bpe.to_str()
  return tokenizers.Tokenizer.from_str(known)


def encode(documents: dict[str, bytes], bpe=None) -> np.ndarray:
  """The tokens of all documents in a row."""
  if bpe is None:
    return np.frombuffer(b''.join(documents.values()), np.uint8)
  texts = [t.decode(errors='replace') for t in documents.values()]
  return np.concatenate(
    [np.asarray(e.ids, np.uint16) for e in bpe.encode_batch_fast(texts)]
  )


def token_file(
  path: pathlib.Path, vocab: int, fraction: float = 0.02
) -> Corpus:
  """A flat file of little-endian uint16 tokens; its last part is held out."""
  try:
    tokens = np.memmap(path, '<u2', mode='r')
  except (OSError, ValueError) as error:
    raise ValueError(f'data={str(path)!r} cannot be read: {error}') from error
  if not 0 <= tokens.max() < vocab:
    raise ValueError(
      f'vocab={vocab} is too small for data={str(path)!r}, '
      f'which holds the token {tokens.max()}'
    )
  cut = len(tokens) - max(1, int(fraction * len(tokens)))
  sha256 = hashlib.sha256(tokens.data).hexdigest()
  summary = (
    f'{len(tokens):,} tokens of {path}, the last {len(tokens) - cut:,} held out'
  )
  return Corpus(
    tokens[:cut], tokens[cut:], b'', b'', vocab, '', sha256, summary
  )


def documents_of(data: Sequence[str]) -> tuple[dict[str, bytes], str]:
  """The documents that the argument `data` names, and how to call them."""
  if not data:
    return installed_docstrings(), 'docstrings of ' + ', '.join(PACKAGES)
  if data[0].startswith('c4:'):
    count = data[0].removeprefix('c4:')
    if len(data) > 1 or not count.isdigit() or int(count) < 2:
      raise ValueError(f'data={tuple(data)!r}: expected c4:COUNT, COUNT >= 2')
    return c4_documents(int(count)), f'{data[0]} documents'
  return read_documents(data), ', '.join(data)


def load(
  data: Sequence[str] = (), vocab: int = 0, tokenizer: str = ''
) -> Corpus:
  """Reads, splits and encodes; bytes are the tokens unless `vocab` is given."""
  if any(d.endswith('.bin') for d in data):
    if len(data) > 1:
      raise ValueError(f'data={tuple(data)!r}: a .bin file must be alone')
    return token_file(pathlib.Path(data[0]), vocab or 256)
  documents, name = documents_of(data)
  train, held = split(documents)
  bpe = train_bpe(train, vocab, tokenizer) if vocab else None
  train_text, held_text = b''.join(train.values()), b''.join(held.values())
  summary = (
    f'{name}: {len(train)} files ({len(train_text):,} bytes) to train, '
    f'{len(held)} files ({len(held_text):,} bytes) held out'
  )
  return Corpus(
    encode(train, bpe),
    encode(held, bpe),
    train_text,
    held_text,
    vocab or 256,
    bpe.to_str() if bpe else '',
    hashlib.sha256(train_text + b'\0' + held_text).hexdigest(),
    summary,
  )


# --- Batches -----------------------------------------------------------------


def windows(tokens: np.ndarray, starts: np.ndarray, seq: int) -> np.ndarray:
  """(..., seq + 1) int32: the inputs and, one to the right, the targets."""
  return tokens[starts[..., None] + np.arange(seq + 1)].astype(np.int32)


def reader(
  tokens: np.ndarray, shape: tuple[int, ...], seq: int, seed: int, step: int
) -> Callable[[Any], np.ndarray]:
  """Reads what an index picks of `batch`, and no more of the tokens."""
  random = np.random.default_rng((seed, step))
  starts = random.integers(0, len(tokens) - seq, size=shape)
  return lambda index: windows(tokens, starts[index[: len(shape)]], seq)


def batch(
  tokens: np.ndarray, shape: tuple[int, ...], seq: int, seed: int, step: int
) -> np.ndarray:
  """The random windows of step `step`: (*shape, seq + 1)."""
  return reader(tokens, shape, seq, seed, step)(())


def validation_batches(
  tokens: np.ndarray, batch_size: int, seq: int, count: int
):
  """At most `count` batches of windows side by side, spread over the tokens."""
  available = (len(tokens) - 1) // seq
  count = min(count, max(1, available // batch_size))
  chosen = np.linspace(0, available - 1, count * batch_size).astype(int)
  return windows(tokens, chosen.reshape(count, batch_size) * seq, seq)
