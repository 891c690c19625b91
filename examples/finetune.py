r"""Fine-tunes a LLaMA or a RoBERTa to label texts, by one optimizer or several.

  python examples/finetune.py
  python examples/finetune.py --optimizer lora --rank 8 --scale 2
  python examples/finetune.py --compare galore,golore,lora,adamw
  python examples/finetune.py --checkpoint TinyLlama_v1.1 --data reviews \
      --dtype bfloat16 --remat --lr 1e-5 --seq 256

A linear head on the last token's features gives the label, as in Hugging Face's
LlamaForSequenceClassification, in whose format the result is saved; a RoBERTa
has the head of RobertaForSequenceClassification on its first. By default
the texts are BBC News articles, and the checkpoint is a small one that is first
pretrained on those of them that are not held out. A run leaves what
`pretrain.py` leaves, and model/; Ctrl-C saves and says how to go on.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import math
import pathlib
import shutil
import sys
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import checkpoint
import finetune_task
from finetune_task import Task
import flags
import labelled
import llama
import loop
import lora
import pretrain
import recipes
import report
import roberta
import run_folder
import settings
from settings import option
import subspace_optax as so
import train_step

# Of a few rates at the default settings, the best; those of adafactor, muon,
# normuon, dion, trion and scale are guesses. See `Config.scale`. Optimizers in
# 8 bits have the same, but for `muon8bit`, whose steps are longer.
LEARNING_RATES = {
  'galore': 2e-3,
  'golore': 2e-3,
  'online_subspace_descent': 2e-3,
  'fira_adamw': 1e-3,
  'apollo_adamw': 1e-3,
  'ldadamw': 1e-3,
  'subspace_adamw': 1e-3,
  'subspace_muon': 1e-3,
  'normuon': 1e-3,
  'dion': 1e-3,
  'trion': 1e-3,
  'scale': 1e-3,
  'contrib_galore': 2e-3,
  'adamw': 1e-3,
  'adafactor': 1e-3,
  'muon': 5e-3,
  'muon8bit': 6e-4,
  'lora': 3e-3,
}
Model = llama.LlamaConfig | roberta.RobertaConfig
# RSO is no optax transformation, which is what is trained with here.
OPTIMIZERS = sorted({*recipes.OPTIMIZERS, 'lora'} - {'rso'})
_SCALED = ('galore', 'golore', 'online_subspace_descent', 'contrib_galore')


@dataclasses.dataclass(frozen=True)
class Config(settings.Config):
  """Fine-tunes a LLaMA to label texts."""

  checkpoint: str = option(
    'model', '', 'a Hugging Face folder (default: pretrains a small LLaMA)'
  )
  model: str = option(
    'model', 'llama_1m', 'what is pretrained without --checkpoint', llama.NAMED
  )
  vocab: int = option('model', 1024, 'of what is pretrained; 0: bytes')
  pretraining_steps: int = option('model', 400, 'of the same batch and length')
  optimizer: str = option('optimizer', 'galore', '', OPTIMIZERS)
  rank: int = option('optimizer', 4, "of the subspaces, or of LoRA's product")
  scale: float = option(
    'optimizer', 4.0, "of updates in galore's subspaces, or of LoRA's A B"
  )
  lr: float | None = option(
    'optimizer', None, 'peak, of galore times scale (default: in finetune.py)'
  )
  data: tuple[str, ...] = option(
    'data', (), 'a folder with a folder of texts for each label (default: BBC)'
  )
  steps: int = 300
  eval_batches: int = option('run', 256, 'of held-out texts, at most')
  out: str = option('run', '', 'folder (default: runs/finetune-OPTIMIZER)')


# --- The configuration -------------------------------------------------------


def check(c: Config):
  """Raises what is wrong with the arguments, by name and value."""
  settings.check(c)
  for name in ('scale', 'pretraining_steps'):
    if not 0 < getattr(c, name) < math.inf:
      raise ValueError(f'{name}={getattr(c, name)!r}: expected more than 0')
  if len(c.data) > 1:
    raise ValueError(f'data={c.data!r}: expected one folder')


def resolve(c: Config) -> Config:
  """Checks the configuration and fills in what depends on other fields."""
  check(c)
  if 'contrib_galore' in settings.optimizers(c):
    c = dataclasses.replace(c, scan_layers=False)
  name = 'compare' if c.compare else c.optimizer
  return dataclasses.replace(c, out=c.out or f'runs/finetune-{name}')


def for_optimizer(c: Config, name: str) -> Config:
  """The configuration of one optimizer's run."""
  lr = recipes.known(name, LEARNING_RATES) if c.lr is None else c.lr
  return dataclasses.replace(settings.alone(c, name), lr=lr)


def recipe(c: Config) -> Config:
  """What `recipes.make` takes: GaLore's scale is a factor of the rate."""
  lr = recipes.known(c.optimizer, LEARNING_RATES) if c.lr is None else c.lr
  lr_rest = lr if c.lr_rest is None else c.lr_rest
  lr = lr * c.scale if c.optimizer.removesuffix('8bit') in _SCALED else lr
  name = 'adamw' if c.optimizer == 'lora' else c.optimizer
  return dataclasses.replace(c, optimizer=name, lr=lr, lr_rest=lr_rest)


# --- The model ---------------------------------------------------------------


def guessing(task: Task) -> float:
  """The accuracy of always naming the most frequent label."""
  most = np.bincount(task.train[:, -1]).argmax()
  return float(np.mean(task.validation[:, -1] == most))


def load_model(c: Config, task: Task) -> tuple[Model, dict]:
  """The checkpoint with a new head of one output for each label."""
  files = finetune_task.format_of(task.checkpoint)
  model, params = files.load(
    task.checkpoint,
    dtype=c.dtype,
    param_dtype=c.param_dtype,
    scan_layers=c.scan_layers,
    remat=c.remat,
  )
  model = dataclasses.replace(model, outputs=len(task.labels))
  key = jax.random.fold_in(jax.random.key(c.seed), 0)
  return model, params | files.first_head(model, key)


def make_logits(model: Model) -> Callable:
  """(parameters, tokens, places of the last ones) -> logits of the labels."""

  def of_llama(params, tokens_BxT, last_B):
    logits_BxTxC = nnx.merge(graphdef, params)(tokens_BxT)
    return logits_BxTxC[jnp.arange(len(last_B)), last_B]

  def of_roberta(params, tokens_BxT, last_B):
    return nnx.merge(graphdef, params)(tokens_BxT, last_B + 1)

  if isinstance(model, roberta.RobertaConfig):
    make, logits = lambda: roberta.Roberta(model, nnx.Rngs(0)), of_roberta
  else:
    make, logits = lambda: llama.Llama(model, nnx.Rngs(0)), of_llama
  graphdef: Any = nnx.split(nnx.eval_shape(make))[0]
  return logits


def make_score(model: Model) -> Callable:
  """(parameters, rows) -> (loss, whether the label is right), one a row."""
  logits = make_logits(model)

  def score(params, rows_BxT2):
    last_B, label_B = rows_BxT2[:, -2], rows_BxT2[:, -1]
    logits_BxC = logits(params, rows_BxT2[:, :-2], last_B)
    loss_B = optax.softmax_cross_entropy_with_integer_labels(
      logits_BxC.astype(jnp.float32), label_B
    )
    return loss_B, jnp.argmax(logits_BxC, axis=-1) == label_B

  return score


class Method(NamedTuple):
  """What is trained, how, and what model it makes."""

  init: Callable  # () -> parameters and optimizer state, to begin with
  like: dict[str, Any]  # their shapes: who resumes needs no second copy
  tx: optax.GradientTransformation
  merge: Callable  # (what is trained) -> parameters of the model
  score: Callable
  model: Model
  trained: int  # parameters


def build(c: Config, task: Task) -> Method:
  """Loads the model and sets up its training."""
  model, loaded = load_model(c, task)
  tx, start, merge = recipes.make(recipe(c)), lambda p: p, lambda p: p
  if c.optimizer == 'lora':
    key = jax.random.fold_in(jax.random.key(c.seed), 1)
    start = lambda p: lora.init(key, p, c.rank)
    tx, merge = lora.make(recipe(c)), lambda p: lora.merge(p, c.scale)
  begin = loop.beginning(tx, start)
  init = lambda: begin(jax.tree.map(jnp.array, loaded))
  like = checkpoint.shapes(begin, loaded)
  trained = lora.trained(like['params'])
  return Method(init, like, tx, merge, make_score(model), model, trained)


class Validation:
  """(loss, accuracy) on the held-out texts."""

  def __init__(self, c: Config, method: Method, table: np.ndarray):
    score = lambda p, rows: method.score(method.merge(p), rows)
    self._score = jax.jit(score)
    self._batch = c.batch
    self._table = table

  def __call__(self, params, batches: int) -> tuple[float, float]:
    table = self._table[: batches * self._batch]
    count = -len(table) % self._batch  # the last batch is filled up
    filled = np.concatenate([table, np.repeat(table[:1], count, axis=0)])
    scores = [
      self._score(params, rows)
      for rows in filled.reshape(-1, self._batch, table.shape[1])
    ]
    loss, right = np.concatenate([np.stack(s) for s in scores], axis=1)
    loss, right = loss[: len(table)], right[: len(table)]
    return float(np.mean(loss, dtype=float)), float(np.mean(right))


# --- Training ----------------------------------------------------------------


def batches(c: Config, task: Task, start: int) -> Iterator[np.ndarray]:
  """The batches of the steps from `start` on, (A, B / A, T + 2) each."""
  for step in range(start, c.steps):
    rows = labelled.batch(task.train, c.batch, c.seed, step)
    yield rows.reshape(c.accumulation, -1, rows.shape[1])


def compiled(c: Config, task: Task, method: Method):
  """The step for these shapes only: it can't compile a second time."""
  loss = lambda p, rows: jnp.mean(method.score(method.merge(p), rows)[0])
  program = jax.jit(train_step.make_step(loss, method.tx), donate_argnums=0)
  return program.lower(method.like, next(batches(c, task, 0))).compile()


def job(
  c: Config, task: Task, method: Method, validate: Validation
) -> loop.Job:
  names = ('validation_loss', 'validation_accuracy')
  score = lambda state: validate(state['params'], c.eval_batches)
  return loop.Job(
    method.tx,
    method.like,
    method.init,
    lambda: compiled(c, task, method),
    lambda start: batches(c, task, start),
    recipes.schedule(recipes.rates(recipe(c))[0], c.steps, c.schedule),
    lambda state: dict(zip(names, score(state), strict=True)),
    unit='nats/text',
  )


def train(c: Config, task: Task) -> dict[str, Any]:
  """Runs one optimizer to the end and returns the summary of it."""
  out = pathlib.Path(c.out)
  run_folder.check_same_run(c, task.sha256)
  method = build(c, task)
  report.say(
    f'\n{c.optimizer}: {c.steps} steps of {c.batch} texts; trains '
    f'{method.trained:,} parameters'
  )
  validate = Validation(c, method, task.validation)
  ended = loop.run(c, job(c, task, method, validate))
  if ended.signal:
    loop.leave(c, ended)
  params, speed = ended.state['params'], ended.speed * c.batch * c.seq
  save_model(out / 'model', method, task, params)
  return summarize(c, task, method, validate, params, speed)


def save_model(folder: pathlib.Path, method: Method, task: Task, params):
  """Writes the fine-tuned model as a checkpoint of its own."""
  files = finetune_task.format_of(task.checkpoint)
  files.save(folder, method.model, method.merge(params), labels=task.labels)
  tokenizer = task.checkpoint / 'tokenizer.json'
  if tokenizer.exists():
    shutil.copy(tokenizer, folder)


def memory(method: Method, params) -> dict[str, int]:
  """Bytes; Adam's are those for the whole model, which LoRA does not train."""
  model = jax.eval_shape(method.merge, params)
  adam = so.memory_report(optax.adam(0.0), model).adam
  return so.memory_report(method.tx, params)._asdict() | {'adam': adam}


def summarize(
  c: Config, task: Task, method: Method, validate: Validation, params, speed
) -> dict[str, Any]:
  loss, accuracy = validate(params, c.final_eval_batches)
  summary = {
    'optimizer': c.optimizer,
    'checkpoint': str(task.checkpoint),
    'steps': c.steps,
    'validation_loss': loss,
    'validation_accuracy': accuracy,
    'guessing_accuracy': guessing(task),
    'trained_parameters': method.trained,
    'tokens_per_second': speed,
    'memory': memory(method, params),
    'data_sha256': task.sha256,
    'params_sha256': pretrain.digest(params),
  }
  report.write_json(pathlib.Path(c.out, 'summary.json'), summary)
  return summary


# --- The program -------------------------------------------------------------


def results_row(s: dict) -> dict[str, str]:
  """The line of one optimizer."""
  return {
    'optimizer': s['optimizer'],
    'accuracy': f'{s["validation_accuracy"]:.1%}',
    'nats/text': f'{s["validation_loss"]:.3f}',
    'trained': f'{s["trained_parameters"]:,}',
    'state MiB': f'{s["memory"]["state"] / 2**20:.2f}',
    'tokens/s': f'{s["tokens_per_second"]:,.0f}',
  }


def draw_accuracy(axes, rows: dict[str, report.Rows], guess: float):
  for name, of_one in rows.items():
    steps, accuracy = report.column(of_one, 'validation_accuracy')
    axes.plot(steps, accuracy, 'o-', markersize=4, label=name)
  axes.axhline(guess, color='black', linestyle='--', linewidth=1)
  axes.set(
    xlabel='step',
    ylabel='accuracy on held-out texts',
    title='fine-tuning (dashed: the most frequent label)',
  )
  axes.legend(frameon=False)


def picture(c: Config, summaries: list[dict]):
  """Writes the accuracy over the steps, and the memory beside it."""
  folders = {
    s['optimizer']: pathlib.Path(c.out, s['optimizer'] if c.compare else '')
    for s in summaries
  }
  rows = {n: report.read_rows(f / 'metrics.jsonl') for n, f in folders.items()}
  figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout='constrained')
  draw_accuracy(axes[0], rows, summaries[0]['guessing_accuracy'])
  report.draw_memory(axes[1], {s['optimizer']: s['memory'] for s in summaries})
  figure.savefig(pathlib.Path(c.out, 'curves.png'), dpi=150)
  plt.close(figure)


def main(c: Config) -> list[dict]:
  """Fine-tunes as the configuration asks; the summaries."""
  c = resolve(c)
  run_folder.make_room(c)
  task = finetune_task.load_task(c)
  names = settings.optimizers(c)
  summaries = [train(for_optimizer(c, name), task) for name in names]
  if c.compare:
    by_name = {s['optimizer']: s for s in summaries}
    report.write_json(pathlib.Path(c.out, 'summary.json'), by_name)
  picture(c, summaries)
  report.table([results_row(s) for s in summaries])
  report.say(f'the most frequent label: {guessing(task):.1%}')
  report.say(f'everything is in {c.out}')
  return summaries


def cli(argv: Sequence[str] | None = None) -> int:
  """Runs the program with these flags; returns its exit status."""
  return flags.run(main, Config, __doc__ or '', {}, argv)


if __name__ == '__main__':
  sys.exit(cli())
