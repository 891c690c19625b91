"""A pretrained language model: where it is read, its loss, how it is saved.

Rows (B, 2, T + 1) are those of `text_rows`: tokens, and which of them count.
"""

from collections.abc import Callable, Mapping
import pathlib
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers

import gguf_checkpoint
import hf_checkpoint
import labelled
import llama
import text_rows
import train_step


class Base(NamedTuple):
  """A pretrained model."""

  model: llama.LlamaConfig
  params: dict[str, Any]  # in NumPy; without a head if that is the embedding
  tokenizer: tokenizers.Tokenizer
  marks: text_rows.Marks  # what it says of prompts and responses


def load(checkpoint: str, **changes: Any) -> Base:
  """Reads a checkpoint, a .gguf file or a folder in Hugging Face's format.

  Args:
    checkpoint: where it is.
    **changes: fields of the configuration that no checkpoint decides.

  Raises:
    ValueError: `llama.Llama` or a tokenizer can't be made of it, or its head
      is a classifier's.
  """
  path = pathlib.Path(checkpoint)
  gguf = path.suffix == '.gguf'
  read = gguf_checkpoint.load if gguf else hf_checkpoint.load
  model, params = read(path, **changes)
  if model.outputs is not None:
    raise ValueError(f'{path}: a classifier, not a language model')
  if hf_checkpoint.is_tied(params):
    params.pop('lm_head')
  if gguf:
    tokenizer = gguf_checkpoint.tokenizer(path)
    labelled.check_vocabulary(tokenizer, model.vocab, path)
    marks = gguf_checkpoint.marks(path)
  else:
    tokenizer = labelled.tokenizer(path, model.vocab)
    marks = hf_checkpoint.marks(path)
  return Base(model, params, tokenizer, text_rows.Marks(*marks))


def with_head(params: Mapping) -> dict[str, Any]:
  """The parameters of `llama.Llama`: a tied head is the embedding."""
  tied = {'kernel': params['embed']['embedding'].T}
  return {'lm_head': tied, **params}


def cross_entropies(logits_BxTxV, rows_Bx2xT1):
  """(losses of the tokens that count, or 0; whether they count), (B, T)."""
  losses_BxT = optax.softmax_cross_entropy_with_integer_labels(
    logits_BxTxV.astype(jnp.float32), rows_Bx2xT1[:, 0, 1:]
  )
  counts_BxT = rows_Bx2xT1[:, 1, 1:].astype(jnp.float32)
  return losses_BxT * counts_BxT, counts_BxT


def cross_entropy(logits_BxTxV, rows_Bx2xT1):
  """The mean over the tokens that count, in nats."""
  losses_BxT, counts_BxT = cross_entropies(logits_BxTxV, rows_Bx2xT1)
  return jnp.sum(losses_BxT) / jnp.maximum(jnp.sum(counts_BxT), 1.0)


def abstract(model: llama.LlamaConfig) -> llama.Llama:
  return nnx.eval_shape(lambda: llama.Llama(model, nnx.Rngs(0)))


def make_logits(model: llama.LlamaConfig) -> Callable:
  """(parameters, rows) -> the logits of all tokens but the first."""
  graphdef, _ = nnx.split(abstract(model))

  def logits(params, rows_Bx2xT1):
    run = nnx.merge(graphdef, with_head(params))
    return run(rows_Bx2xT1[:, 0, :-1])

  return logits


def by_layer(model: llama.LlamaConfig) -> tuple[Callable, Callable, Callable]:
  """The functions of the model for `so.layerwise`."""
  embed, block, head = train_step.by_layer(abstract(model), cross_entropy)
  return (
    lambda params, rows: embed(with_head(params), rows[:, 0]),
    block,
    lambda params, x, rows: head(with_head(params), x, rows),
  )


class HeldOut:
  """The mean loss of the tokens that count in the held-out rows."""

  def __init__(self, model: llama.LlamaConfig, rows: np.ndarray, size: int):
    logits = make_logits(model)

    def sums(params, rows):
      return jax.tree.map(jnp.sum, cross_entropies(logits(params, rows), rows))

    self._sums = jax.jit(sums)
    missing = np.zeros((-len(rows) % size, *rows.shape[1:]), rows.dtype)
    filled = np.concatenate([rows, missing])  # rows that count for nothing
    self._batches = filled.reshape(-1, size, *rows.shape[1:])

  def __call__(self, params, batches: int) -> float:
    count = min(batches, len(self._batches))
    # Spread, since rows are in the order of their files.
    places = np.linspace(0, len(self._batches) - 1, count).astype(int)
    sums = np.array([self._sums(params, x) for x in self._batches[places]])
    loss, count = sums.sum(axis=0, dtype=float)
    return float(loss / count)


def save_model(folder: pathlib.Path, base: Base, params: Mapping):
  """Writes the fine-tuned model in Hugging Face's format."""
  tied = 'lm_head' not in params
  hf_checkpoint.save(
    folder, base.model, with_head(params), tied=tied, marks=base.marks
  )
  base.tokenizer.save(str(folder / 'tokenizer.json'))
