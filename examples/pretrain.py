r"""Trains a LLaMA on text, by one optimizer or by several side by side.

  python examples/pretrain.py
  python examples/pretrain.py --optimizer galore --rank 16 --out runs/galore
  python examples/pretrain.py --out runs/galore --resume ...
  python examples/pretrain.py --optimizer golore --compressed --export
  python examples/pretrain.py --preset one_card --wandb
  python examples/pretrain.py --mesh data=2,fsdp=2,tensor=2
  python examples/pretrain.py --compare
  python examples/pretrain.py --compare subspace_muon8bit,scale,adamw
  python examples/pretrain.py --model llama_60m --data c4:2000000 \
      --vocab 32000 --seq 256 --batch 512 --accumulation 8 --rank 128 \
      --steps 10000 --dtype bfloat16 --remat

By default the text is the docstrings of the installed packages, so nothing is
downloaded. A run leaves config.json, metrics.jsonl, curves.png, summary.json
and checkpoints/ in its folder. Losses are in nats a token unless a name says
bits. Ctrl-C saves and says how to go on.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import hashlib
import math
import pathlib
import shutil
import sys
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

import data
import flags
import hf_checkpoint
import llama
import loop
import mesh
import recipes
import report
import run_folder
import settings
from settings import MeshConfig as Config
import subspace_optax as so
import train_step
import trigram

# --- The configuration -------------------------------------------------------


def resolve(c: Config) -> Config:
  """Checks the configuration and fills in what depends on other fields."""
  settings.check(c)
  names = settings.optimizers(c)
  if c.scan_layers and 'contrib_galore' in names:
    report.say(
      'contrib_galore projects 2-D kernels only: '
      'the layers are not stacked in this run'
    )
    c = dataclasses.replace(c, scan_layers=False)
  name = 'compare' if c.compare else c.optimizer
  return dataclasses.replace(
    c,
    out=c.out or f'runs/{c.model}-{name}',
    rank=c.rank or llama.named(c.model).width // 4,
  )


def for_optimizer(c: Config, name: str) -> Config:
  """The configuration of one optimizer's run."""
  c = settings.alone(c, name)
  lr, lr_rest = recipes.rates(c)
  return dataclasses.replace(c, lr=lr, lr_rest=lr_rest)


# --- Training ----------------------------------------------------------------


class Plan(NamedTuple):
  """What a run is made of, before its first array."""

  config: llama.LlamaConfig
  loss: Callable
  tx: Any  # as `optimizer` makes it
  method: train_step.Method
  init: Callable  # () -> state, made where it belongs
  like: Any  # shapes and shardings of the state


def optimizer(c: Config, model: llama.Llama) -> Any:
  """An optax optimizer, `so.rso.subproblems` or `so.layerwise`."""
  tx = recipes.make(c, clip=not c.layerwise)
  if not c.layerwise:
    return tx
  if not isinstance(tx, optax.GradientTransformation):
    raise ValueError(
      "layerwise=True with optimizer='rso': it has a step of its own"
    )
  parts = train_step.by_layer(model)
  return so.layerwise(tx, *parts, max_norm=c.clip or None, clip=c.clip_by)


def plan(c: Config, vocab: int, devices: Mesh) -> Plan:
  model = llama.named(
    c.model,
    vocab=vocab,
    dtype=c.dtype,
    param_dtype=c.param_dtype,
    scan_layers=c.scan_layers,
    remat=c.remat,
    attention_chunk=c.attention_chunk,
    **mesh.constraints(devices),
  )
  create = lambda: llama.Llama(model, nnx.Rngs(jax.random.key(c.seed)))
  abstract = nnx.eval_shape(create)
  tx = optimizer(c, abstract)
  graphdef, shapes = nnx.split(abstract)
  shapes = nnx.to_pure_dict(shapes)
  params = mesh.parameters(devices, shapes, report.say)
  placed = {
    'params': mesh.shardings(params),
    'opt_state': so.state_sharding(tx, params),
  }

  def make():
    params = nnx.to_pure_dict(nnx.state(create()))
    return {'params': params, 'opt_state': tx.init(params)}

  init = jax.jit(
    make, out_shardings=placed, compiler_options=mesh.compiler_options()
  )
  like = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(init),  # traced once: the call of it reuses that
    placed,
  )
  inside = recipes.micro_steps(c) > 1
  method = train_step.method(tx, c.compressed, c.clip, inside)
  return Plan(model, train_step.make_loss(graphdef), tx, method, init, like)


def build(c: Config, vocab: int):
  """(loss, optimizer, initial state) of a run on one device."""
  run = plan(c, vocab, mesh.make())
  return run.loss, run.tx, run.init()


class Validation:
  """Mean loss on fixed windows of the validation tokens."""

  def __init__(self, c: Config, run: Plan, tokens: np.ndarray, devices: Mesh):
    loss = lambda state, batch: run.loss(run.method.model(**state), batch)
    self._loss = jax.jit(loss, compiler_options=mesh.compiler_options())
    self._devices = devices
    pick = lambda count: data.validation_batches(tokens, c.batch, c.seq, count)
    self._some, self._all = pick(c.eval_batches), pick(c.final_eval_batches)

  def __call__(self, state, final: bool = False) -> float:
    batches = self._all if final else self._some
    put = lambda b: mesh.batch(self._devices, b.shape, 0, b.__getitem__)
    losses = [float(self._loss(state, put(b))) for b in batches]
    return float(np.mean(losses))


def bits_per_byte(loss: float, corpus: data.Corpus) -> float | None:
  """Of nats a token; None where bytes are unknown."""
  if corpus.tokens_per_byte is None:
    return None
  return loss / math.log(2) * corpus.tokens_per_byte


def nats_per_token(bits: float | None, corpus: data.Corpus) -> float | None:
  """Of bits a byte."""
  if bits is None or corpus.tokens_per_byte is None:
    return None
  return bits * math.log(2) / corpus.tokens_per_byte


def digest(params) -> str:
  """A hash of every bit of the parameters."""
  sha256 = hashlib.sha256()
  for x in jax.tree.leaves(params):
    layers = (x[i] for i in range(len(x))) if x.ndim > 2 else [x]
    for part in layers:  # of which one is gathered at a time
      sha256.update(mesh.whole(part).tobytes())
  return sha256.hexdigest()


def batches(
  c: Config, corpus: data.Corpus, start: int, devices: Mesh
) -> Iterator[jax.Array]:
  """The batches of the steps from `start` on, (A, B / A, T + 1) each."""
  rows = (c.accumulation, c.batch // c.accumulation)
  for step in range(start, c.steps):
    read = data.reader(corpus.train, rows, c.seq, c.seed, step)
    yield mesh.batch(devices, (*rows, c.seq + 1), 1, read)


def compiled(run: Plan, devices: Mesh, example: jax.Array):
  """The step for these shapes only: it can't compile a second time."""
  placed = mesh.shardings(run.like)
  everywhere = NamedSharding(devices, PartitionSpec())
  program = jax.jit(
    train_step.make_step(run.loss, run.method, placed['params']),
    donate_argnums=0,
    out_shardings=(placed, everywhere),
    compiler_options=mesh.compiler_options(),
  )
  return program.lower(run.like, example).compile()


def job(
  c: Config, corpus: data.Corpus, run: Plan, validate: Validation, devices: Mesh
) -> loop.Job:
  read = lambda first: batches(c, corpus, first, devices)
  return loop.Job(
    run.tx,
    run.like,
    run.init,
    lambda: compiled(run, devices, next(read(0))),
    read,
    recipes.schedule(recipes.rates(c)[0], c.steps, c.schedule),
    lambda state: {'validation_loss': validate(state)},
  )


def draw(c: Config, corpus: data.Corpus, bar: float | None):
  out, bar = pathlib.Path(c.out), nats_per_token(bar, corpus)
  rows = report.read_rows(out / 'metrics.jsonl')
  report.picture(out / 'curves.png', {c.optimizer: rows}, bar)


def train(c: Config, corpus: data.Corpus, bar: float | None = None) -> dict:
  """Runs one optimizer to the end and returns the summary of it."""
  out = pathlib.Path(c.out)
  run_folder.check_same_run(c, corpus.sha256)
  report.say(f'\n{c.optimizer}: {c.steps} steps of {c.batch} x {c.seq} tokens')
  devices = mesh.make(c.mesh)
  with jax.set_mesh(devices):
    run = plan(c, corpus.vocab, devices)
    validate = Validation(c, run, corpus.validation, devices)
    ended = loop.run(c, job(c, corpus, run, validate, devices))
    draw(c, corpus, bar)
    if ended.signal:
      loop.leave(c, ended)
    summary = summarize(c, corpus, run, ended.state, validate, ended.speed)
  summary['trigram_bits_per_byte'] = bar
  report.write_json(out / 'summary.json', summary)
  return summary


def export(c: Config, run: Plan, params):
  """Writes plain weights; all processes gather them, one writes."""
  params = jax.tree.map(mesh.whole, params)
  folder, tokenizer = (
    pathlib.Path(c.out, name) for name in ('weights', 'tokenizer.json')
  )
  if mesh.is_first():
    hf_checkpoint.save(folder, run.config, params)
    if tokenizer.exists():
      shutil.copy(tokenizer, folder)
  report.say(f'weights are in {folder}')


def summarize(
  c: Config, corpus: data.Corpus, run: Plan, state, validate, speed
) -> dict:
  params = run.method.merged(**state)
  if c.export:
    export(c, run, params)
  loss = validate(state, final=True)
  return {
    'model': c.model,
    'optimizer': c.optimizer,
    'parameters': sum(x.size for x in jax.tree.leaves(params)),
    'steps': c.steps,
    'validation_loss': loss,
    'validation_perplexity': math.exp(min(loss, 700.0)),
    'validation_bits_per_byte': bits_per_byte(loss, corpus),
    'tokens_per_second': speed * c.batch * c.seq,
    'memory': so.memory_report(
      run.method.step(run.loss, jax.value_and_grad), params
    )._asdict(),
    'data_sha256': corpus.sha256,
    'params_sha256': digest(params),
  }


# --- The program -------------------------------------------------------------


def trigram_bar(corpus: data.Corpus) -> float | None:
  """Bits per byte of the trigram on the validation text, if there is text."""
  if min(len(corpus.train_text), len(corpus.validation_text)) < 100:
    return None
  return trigram.bits_per_byte(
    trigram.fit(corpus.train_text), corpus.validation_text
  )


def load_corpus(c: Config) -> data.Corpus:
  tokenizer = pathlib.Path(c.out, 'tokenizer.json')
  known = tokenizer.read_text() if c.resume and tokenizer.exists() else ''
  corpus = data.load(c.data, c.vocab, known)
  for name, tokens in (
    ('train', corpus.train),
    ('validation', corpus.validation),
  ):
    if len(tokens) <= c.seq:
      raise ValueError(
        f'seq={c.seq} is too long for data={c.data!r}, which has '
        f'{len(tokens)} {name} tokens'
      )
  report.say(f'{corpus.summary}\nsha256 {corpus.sha256}')
  return corpus


def compare_pictures(c: Config, corpus: data.Corpus, summaries, bar):
  """All curves in one picture, and the memory beside them."""
  out = pathlib.Path(c.out)
  names = [s['optimizer'] for s in summaries]
  rows = {n: report.read_rows(out / n / 'metrics.jsonl') for n in names}
  memory = {s['optimizer']: s['memory'] for s in summaries}
  bar = nats_per_token(bar, corpus)
  report.picture(out / 'curves.png', rows, bar, memory)
  report.write_json(
    out / 'summary.json', {s['optimizer']: s for s in summaries}
  )


def verdict(summaries, bar: float | None):
  """The final lines: results, memory beside Adam's, and the trigram."""
  report.table([report.results_row(s) for s in summaries])
  for s in summaries:
    report.say(f'\n{s["optimizer"]}\n{so.MemoryReport(**s["memory"])}')
  if bar is None:
    return
  report.say('\nBits per byte of the validation files:')
  scores = {s['optimizer']: s['validation_bits_per_byte'] for s in summaries}
  for name, score in (scores | {'byte trigram': bar}).items():
    report.say(f'{name:<24} {score:.3f}')


def main(c: Config) -> list[dict]:
  """Trains what the configuration asks for; the summaries."""
  mesh.join(c.coordinator, c.processes, c.process)
  if not mesh.is_first():
    report.mute()
  c = resolve(c)
  mesh.check_rows(mesh.make(c.mesh), c.batch, c.accumulation)
  corpus = load_corpus(c)
  run_folder.is_taken(c)  # raises in every process, or in none
  settled = dataclasses.replace(c, process=0)
  mesh.check_agree(f'{settled}{corpus.sha256}{corpus.tokenizer}')
  if mesh.is_first():
    run_folder.make_room(c)
  mesh.wait()
  if corpus.tokenizer:
    report.write_text(pathlib.Path(c.out, 'tokenizer.json'), corpus.tokenizer)
  bar = trigram_bar(corpus)
  runs = [for_optimizer(c, name) for name in settings.optimizers(c)]
  summaries = [train(run, corpus, bar) for run in runs]
  if c.compare:
    compare_pictures(c, corpus, summaries, bar)
  verdict(summaries, bar)
  report.say(f'everything is in {c.out}')
  return summaries


def cli(argv: Sequence[str] | None = None) -> int:
  """Runs the program with these flags; returns its exit status."""
  return flags.run(main, Config, __doc__ or '', settings.PRETRAINING, argv)


if __name__ == '__main__':
  sys.exit(cli())
