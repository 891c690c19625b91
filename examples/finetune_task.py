"""What is fine-tuned: a checkpoint to begin with, and texts in its tokens."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

import hf_checkpoint
import hf_files
import labelled
import pretrain
import report
import roberta_checkpoint

# --- The checkpoint to begin with --------------------------------------------


def pretraining(c: Any, text: pathlib.Path) -> pretrain.Config:
  """The run that makes the checkpoint."""
  return pretrain.Config(
    model=c.model,
    optimizer='adamw',
    data=(str(text),),
    vocab=c.vocab,
    batch=c.batch,
    seq=c.seq,
    steps=c.pretraining_steps,
    seed=c.seed,
    final_eval_batches=16,
    out=str(pathlib.Path(c.out, 'pretraining')),
    export=True,
    resume=c.resume,
  )


def pretrained(c: Any, texts: list[str]) -> pathlib.Path:
  """A checkpoint of a small LLaMA that has read `texts`, without labels."""
  folder = pathlib.Path(c.out, 'pretraining', 'weights')
  if (folder / 'config.json').exists():
    return folder
  text = pathlib.Path(c.out, 'texts.txt')
  report.write_text(text, '\n\n'.join(texts))
  run = pretraining(c, text)
  report.say(
    f'no checkpoint is given: {c.model} reads the texts to train on for '
    f'{run.steps} steps, which makes a stand-in for a real checkpoint'
  )
  corpus = pretrain.load_corpus(run)
  if corpus.tokenizer:
    path = pathlib.Path(run.out, 'tokenizer.json')
    report.write_text(path, corpus.tokenizer)
  pretrain.train(pretrain.for_optimizer(run, 'adamw'), corpus)
  report.say(f'pretrained; to use it again: --checkpoint {folder}')
  return folder


def format_of(folder: pathlib.Path) -> Any:
  """The module that reads and writes checkpoints of this model's kind."""
  raw = hf_files.read_json(folder / 'config.json')
  is_roberta = raw.get('model_type') == 'roberta'
  return roberta_checkpoint if is_roberta else hf_checkpoint


def check_length(model: Any, path: pathlib.Path, seq: int):
  """Raises if a model has no positions for the longest text."""
  longest = getattr(model, 'longest', seq)
  if seq > longest:
    raise ValueError(f'seq={seq}: {path} has positions for {longest} tokens')


# --- The task ----------------------------------------------------------------


class Task(NamedTuple):
  """A labelled set in the tokens of a checkpoint."""

  checkpoint: pathlib.Path
  train: np.ndarray  # (N, T + 2), see labelled.rows
  validation: np.ndarray
  labels: tuple[str, ...]
  sha256: str


def load_task(c: Any) -> Task:
  """Reads the texts, and makes the checkpoint if none is given."""
  folder = pathlib.Path(c.data[0]) if c.data else labelled.bbc_news()
  texts, labels = labelled.read(folder)
  parts = labelled.split(texts, c.seed)
  report.say(
    f'{folder if c.data else labelled.BBC}: {len(parts[0].texts):,} texts to '
    f'train, {len(parts[1].texts):,} held out, {len(labels)} labels'
  )
  path = pathlib.Path(c.checkpoint or pretrained(c, parts[0].texts))
  model = format_of(path).read_config(path)
  check_length(model, path, c.seq)
  read = lambda texts: labelled.tokens(path, model.vocab, texts, c.seq)
  train, validation = (
    labelled.rows(read(p.texts), p.labels, c.seq) for p in parts
  )
  return Task(path, train, validation, labels, labelled.sha256(*parts))
