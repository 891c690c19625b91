"""Validation loss against memory: every method, tuned, over several seeds.

A LLaMA over bytes learns two corpora, with every method for as many tokens. The
learning rate of the matrices is tuned for each method, rank and corpus on a
grid of factor 2, which grows until its best lies inside; further seeds run at
the best. The rest of the model is Adam's at one learning rate in all runs.

Every run is a JSON file under runs/quality, and is not run again; an
interrupted benchmark goes on where it was. Results: results/quality.json, .md
and .png. Larger: --model llama_60m --steps 10000 --workers 1, on the default
device of jax.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
from typing import Any

import jax
import tyro

from benchmarks import corpora
from benchmarks import fit
from benchmarks import harness
from benchmarks import methods
from benchmarks import quality_report
from benchmarks.quality_report import loss

FACTOR = 2.0


@dataclasses.dataclass(frozen=True)
class Args:
  """What is compared; see the module."""

  model: str = 'llama_1m'  # a name of llama.NAMED, over bytes
  steps: int = 400
  batch: int = 8
  seq: int = 64
  update_proj_gap: int = 100
  lr_rest: float = 5e-3
  clip: float = 1.0
  corpora: tuple[str, ...] = tuple(corpora.CORPORA)
  methods: tuple[str, ...] = tuple(methods.METHODS)
  rank: float = 0.25  # over the width; all corpora, all seeds
  more_ranks: tuple[float, ...] = (0.0625, 0.5)  # of our methods, first corpus
  more_widths: tuple[float, ...] = (0.5,)  # of the recipes, first corpus
  seeds: int = 3
  most: int = 8  # points of a grid
  workers: int = 2  # processes, a core each
  cache: str = 'runs/quality'
  out: str = str(harness.RESULTS / 'quality.json')


@dataclasses.dataclass(frozen=True)
class Task:
  """One search of a learning rate, and the seeds at the best."""

  corpus: str
  setup: fit.Setup
  seeds: int

  @property
  def name(self) -> str:
    s = self.setup
    return f'{self.corpus}-{s.method}-rank{s.rank:g}-width{s.width:g}'


def settings(args: Args) -> fit.Settings:
  return fit.Settings(*(getattr(args, name) for name in fit.Settings._fields))


def tasks(args: Args) -> Iterator[Task]:
  """What runs, the main comparison first."""
  for corpus in args.corpora:
    for name in args.methods:
      rank = args.rank if methods.METHODS[name].ranked else 0.0
      if not methods.METHODS[name].variant:
        yield Task(corpus, fit.Setup(name, rank, 1.0), args.seeds)
  recipes = [m for m in args.methods if m in methods.RECIPES]
  is_ranked = lambda of: of.ranked and of.ours and not of.variant
  ranked = [m for m in args.methods if is_ranked(methods.METHODS[m])]
  first = args.corpora[0]
  for name in args.methods:
    if methods.METHODS[name].variant:
      yield Task(first, fit.Setup(name, args.rank, 1.0), 1)
  for name in recipes + [m for m in ranked if m not in recipes]:
    for rank in args.more_ranks:
      yield Task(first, fit.Setup(name, rank, 1.0), 1)
    for width in args.more_widths if name in recipes else ():
      yield Task(first, fit.Setup(name, args.rank, width), 1)


def folder(args: Args) -> pathlib.Path:
  """Where runs with these settings are kept."""
  text = json.dumps(settings(args)._asdict(), sort_keys=True)
  return (
    pathlib.Path(args.cache) / hashlib.sha256(text.encode()).hexdigest()[:8]
  )


def next_lr(rows: list[dict], start: float) -> float | None:
  """The next point: the start, then whichever side of the best is open."""
  known = sorted(rows, key=lambda row: row['lr'])
  if not known:
    return start
  i = min(range(len(known)), key=lambda i: loss(known[i]))
  if i == 0:
    return known[0]['lr'] / FACTOR
  if i == len(known) - 1:
    return known[-1]['lr'] * FACTOR
  return None


class Search:
  """Runs what is missing of a task; compiles only if something is."""

  def __init__(self, args: Args, task: Task):
    self.args, self.task = args, task
    self.path = folder(args) / f'{task.name}.json'
    found = json.loads(self.path.read_text()) if self.path.exists() else {}
    self.rows: list[dict] = found.get('runs', [])
    self.memory: dict = found.get('memory', {})
    self.setup = task.setup._asdict() | {'corpus': task.corpus}

  @functools.cached_property
  def trainer(self) -> fit.Trainer:
    return fit.Trainer(settings(self.args), self.task.setup)

  @functools.cached_property
  def corpus(self) -> tuple:
    return corpora.load(self.task.corpus, pathlib.Path(self.args.cache))

  def of_seed(self, seed: int) -> list[dict]:
    return [row for row in self.rows if row['seed'] == seed]

  def run(self, lr: float, seed: int) -> None:
    self.rows.append(self.trainer.run(lr, seed, self.corpus))
    self.save()

  def save(self) -> None:
    found = {'setup': self.setup, 'memory': self.memory, 'runs': self.rows}
    harness.save_results(self.path, found, indent=2)

  def finish(self) -> str:
    """Tunes, runs the seeds, and returns a line to show."""
    start = methods.METHODS[self.task.setup.method].lr
    while len(tuned := self.of_seed(0)) < self.args.most:
      if (lr := next_lr(tuned, start)) is None:
        break
      self.run(lr, 0)
    best = min(self.of_seed(0), key=loss)
    for seed in range(1, self.task.seeds):
      known = [row['lr'] for row in self.of_seed(seed)]
      if best['lr'] not in known:
        self.run(best['lr'], seed)
    if not self.memory:
      self.memory = self.trainer.memory()
      self.save()
    return f'{self.task.name}: {loss(best):.4f} at lr {best["lr"]:g}'


def finish(args: Args, task: Task) -> str:
  """One task, in a process that takes many."""
  line = Search(args, task).finish()
  jax.clear_caches()  # compiled programs are not given back otherwise
  return line


def take_core(numbers: Any) -> None:
  """Gives a worker one core, before jax starts its threads.

  Products are small: more threads only get in each other's way.
  """
  if hasattr(os, 'sched_setaffinity'):  # Linux
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {allowed[numbers.get() % len(allowed)]})


def run_all(args: Args) -> None:
  """Finishes all tasks, `workers` at a time."""
  todo = list(tasks(args))
  for name in args.corpora:  # before the workers would both read it
    corpora.load(name, pathlib.Path(args.cache))
  one = functools.partial(finish, args)
  with contextlib.ExitStack() as stack:
    lines = map(one, todo)
    if args.workers > 1:
      spawn = multiprocessing.get_context('spawn')
      numbers = spawn.Queue()
      for i in range(args.workers):
        numbers.put(i)
      pool = spawn.Pool(args.workers, take_core, (numbers,))
      lines = stack.enter_context(pool).imap_unordered(one, todo)
    for line in harness.track(lines, 'Searches', len(todo)):
      print(line)


def collect(args: Args) -> dict[str, Any]:
  """All that was measured with these settings."""
  cache = pathlib.Path(args.cache)
  found = [Search(args, task) for task in tasks(args)]
  return {
    'machine': harness.describe_machine(),
    'settings': settings(args)._asdict(),
    'corpora': {name: corpora.load(name, cache)[2] for name in args.corpora},
    'searches': [
      s.setup | {'memory': s.memory, 'runs': s.rows} for s in found if s.rows
    ],
  }


def main(args: Args) -> None:
  """Runs what is missing, then draws and prints everything."""
  run_all(args)
  results = collect(args)
  harness.save_results(args.out, results, indent=2)
  text = quality_report.markdown(results)
  harness.next_to(args.out, '.md').write_text(text)
  path = harness.next_to(args.out, '.png')
  quality_report.picture(results, args.rank, path)
  print(text)


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
