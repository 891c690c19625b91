"""Rows that a causal language model is fine-tuned on: tokens, and what counts.

A row (2, seq + 1) holds tokens, and beside each whether its prediction counts:
all tokens of plain text do, of instruction data those of the responses.
"""

import hashlib
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

import data

# What SmolLM2's own template puts before every conversation.
SYSTEM = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
_START, _END = '<|im_start|>', '<|im_end|>'


class Marks(NamedTuple):
  """What a checkpoint says of prompts and responses."""

  end: int | None = None  # the token that ends a response
  template: str = ''  # of its chats


_UNKNOWN = Marks()


class Rows(NamedTuple):
  """Both splits, (N, 2, seq + 1) int32 each."""

  train: np.ndarray
  validation: np.ndarray
  sha256: str
  summary: str


# --- Plain text --------------------------------------------------------------


def windows(ids: np.ndarray, seq: int) -> np.ndarray:
  """Windows side by side; each begins with the last token of the one before."""
  count = (len(ids) - 1) // seq
  starts = seq * np.arange(count)
  tokens_NxT1 = data.windows(ids, starts, seq)
  return np.stack([tokens_NxT1, np.ones_like(tokens_NxT1)], axis=1)


def _encode(documents: dict[str, bytes], tokenizer: Any) -> np.ndarray:
  """The tokens of all documents in a row."""
  texts = [text.decode(errors='replace') for text in documents.values()]
  found = tokenizer.encode_batch_fast(texts)
  return np.concatenate([np.asarray(e.ids, np.int32) for e in found])


def of_text(names: tuple[str, ...], tokenizer: Any, seq: int) -> Rows:
  """Rows of text files or, by default, of docstrings; files are held out."""
  documents, name = data.documents_of(names)
  parts = data.split(documents)
  train, held = (windows(_encode(part, tokenizer), seq) for part in parts)
  count = lambda part: f'{len(part)} files'
  summary = f'{name}: {count(parts[0])} to train, {count(parts[1])} held out'
  return _checked(train, held, summary)


# --- Instructions ------------------------------------------------------------


def read_pairs(path: pathlib.Path) -> list[tuple[str, str]]:
  """The (prompt, response) of every line of a JSONL file."""
  pairs = []
  for number, line in enumerate(data.read_text(path).splitlines(), 1):
    try:
      pair = json.loads(line)
      prompt, response = pair['prompt'], pair['response']
      if not isinstance(prompt, str) or not isinstance(response, str):
        raise TypeError
      pairs.append((prompt, response))
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f'{path}, line {number}: expected an object with prompt and response'
      ) from error
  return pairs


def chat(prompt: str, system: str = '') -> str:
  """What comes before the response in ChatML."""
  turn = lambda role, text: f'{_START}{role}\n{text}{_END}\n'
  first = turn('system', system) if system else ''
  return first + turn('user', prompt) + f'{_START}assistant\n'


def _parts(
  tokenizer: Any, prompt: str, response: str, marks: Marks
) -> tuple[list[int], list[int]]:
  """Tokens of the prompt and of the response; ChatML if there are its tokens.

  They are encoded apart, so that no token is of both. A token that the
  tokenizer puts before every text stands before the prompt.
  """
  encode = lambda text, **how: tokenizer.encode(text, **how).ids
  only = lambda text: encode(text, add_special_tokens=False)
  if tokenizer.token_to_id(_START) is not None:
    system = SYSTEM if SYSTEM in marks.template else ''
    text, after = chat(prompt, system), only(f'{response}{_END}\n')
  elif marks.end is None:
    text, after = f'{prompt}\n', only(f'{response}\n')
  else:
    text, after = f'{prompt}\n', [*only(response), marks.end]
  before = encode(text)
  return before[:-1] if before[-1:] == [marks.end] else before, after


def instruction(
  tokenizer: Any, prompt: str, response: str, seq: int, marks: Marks = _UNKNOWN
) -> np.ndarray:
  """One row, cut or filled up at the end; only the response counts."""
  before, after = _parts(tokenizer, prompt, response, marks)
  row = np.zeros((2, seq + 1), np.int32)
  tokens = [*before, *after][: seq + 1]
  row[0, : len(tokens)] = tokens
  row[1, len(before) : len(tokens)] = 1
  return row


def of_pairs(
  path: pathlib.Path, tokenizer: Any, seq: int, seed: int, marks: Marks
) -> Rows:
  """Rows of a JSONL file; a tenth of its prompts, drawn at random, is held out.

  A line whose prompt alone is longer than a row is left out, and so is one that
  was there before.
  """
  pairs = list(dict.fromkeys(read_pairs(path)))
  rows = np.zeros((len(pairs), 2, seq + 1), np.int32)
  for row, pair in zip(rows, pairs, strict=True):
    row[:] = instruction(tokenizer, *pair, seq, marks)
  fits = rows[:, 1].any(axis=1)
  prompts = [pairs[i][0] for i in np.flatnonzero(fits)]
  kept, held = rows[fits], _hold_out(prompts, seed)
  train, validation = kept[~held], kept[held]
  summary = (
    f'{path}: {len(train)} lines to train, {len(validation)} held '
    f'out, {len(rows) - len(kept)} left out for prompts of more than seq={seq} '
    'tokens'
  )
  return _checked(train, validation, summary)


def _hold_out(prompts: list[str], seed: int) -> np.ndarray:
  """Which lines are held out: all of a prompt, or none."""
  known = list(dict.fromkeys(prompts))
  order = np.random.default_rng(seed).permutation(len(known))
  chosen = {known[i] for i in order[: max(1, len(known) // 10)]}
  return np.array([prompt in chosen for prompt in prompts], bool)


# --- Both --------------------------------------------------------------------


def _checked(train: np.ndarray, held: np.ndarray, summary: str) -> Rows:
  if not len(train) or not len(held):
    raise ValueError(f'too few tokens for a row in each split ({summary})')
  whole = hashlib.sha256(train.tobytes() + held.tobytes())
  return Rows(train, held, whole.hexdigest(), summary)


def load(
  names: tuple[str, ...],
  tokenizer: Any,
  seq: int,
  seed: int,
  marks: Marks = _UNKNOWN,
) -> Rows:
  """Rows of one .jsonl file of instructions, or of text."""
  lines = [name for name in names if name.endswith('.jsonl')]
  if not lines:
    return of_text(names, tokenizer, seq)
  if len(names) > 1:
    raise ValueError(f'data={names!r}: a .jsonl file must be alone')
  return of_pairs(pathlib.Path(lines[0]), tokenizer, seq, seed, marks)
