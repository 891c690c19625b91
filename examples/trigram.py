"""An interpolated byte trigram: the bar that a language model has to clear.

  p(c | a b) = w3 n(abc)/n(ab.) + w2 n(bc)/n(b.) + w1 n(c)/n + w0/256

The counts come from the training text, the weights from a held-out part of it
by expectation maximisation (Jelinek and Mercer, 1980).
"""

from typing import NamedTuple

import numpy as np


class Trigram(NamedTuple):
  counts: list[tuple[np.ndarray, np.ndarray]]  # of orders 1, 2, 3: see `count`
  weights: np.ndarray  # of orders 0, 1, 2, 3; they add up to one


def codes(text: bytes) -> list[np.ndarray]:
  """For each byte but the first two: c, bc and abc as integers."""
  x = np.frombuffer(text, np.uint8).astype(np.int64)
  return [x[2:], x[1:-1] << 8 | x[2:], x[:-2] << 16 | x[1:-1] << 8 | x[2:]]


def count(text: bytes) -> list[tuple[np.ndarray, np.ndarray]]:
  """How often each of c, bc, abc occurs, and each context: nothing, b., ab."""
  return [
    (
      np.bincount(code, minlength=256 ** (order + 1)),
      np.bincount(code >> 8, minlength=256**order),
    )
    for order, code in enumerate(codes(text))
  ]


def order_probabilities(counts, text: bytes) -> np.ndarray:
  """(bytes - 2, 4): what each order says of each byte of `text`.

  An order that never saw the context says what the order below says.
  """
  columns = [np.full(len(text) - 2, 1 / 256)]
  for (n, context), code in zip(counts, codes(text), strict=True):
    seen = context[code >> 8]
    p = n[code] / np.maximum(seen, 1)
    columns.append(np.where(seen > 0, p, columns[-1]))
  return np.stack(columns, axis=1)


def fit(
  text: bytes, held_fraction: float = 0.05, iterations: int = 50
) -> Trigram:
  """Counts from all of `text`; the weights from its last `held_fraction`."""
  cut = len(text) - max(3, int(held_fraction * len(text)))
  p = order_probabilities(count(text[:cut]), text[cut:])
  weights = np.full(4, 0.25)
  for _ in range(iterations):
    share = p * weights
    share = np.sum(share / share.sum(axis=1, keepdims=True), axis=0)
    weights = (share + 1) / (share + 1).sum()  # the 1 keeps every order alive
  return Trigram(count(text), weights)


def probabilities(model: Trigram, text: bytes) -> np.ndarray:
  """(bytes - 2,): the probability of each byte after the first two."""
  return order_probabilities(model.counts, text) @ model.weights


def bits_per_byte(model: Trigram, text: bytes) -> float:
  return float(-np.mean(np.log2(probabilities(model, text))))
