"""Validation loss against memory: every method, tuned, over several seeds.

A LLaMA over bytes learns two corpora, with every method for as many tokens. The
learning rate of the matrices is tuned for each method, rank and corpus on a
grid of factor 2, which grows until its best lies inside; further seeds run at
the best. The rest of the model is Adam's at one learning rate in all runs.

Results: results/quality.json, .md and .png; what is in the first is not run
again, so an interrupted benchmark goes on where it was. Larger: --model
llama_60m --steps 10000 --workers 1, on the default device of jax.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import functools
import multiprocessing
import os
from typing import Any, NamedTuple

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
  out: str = str(harness.RESULTS / 'quality.json')


class Task(NamedTuple):
  """One search of a learning rate, and the seeds at the best."""

  corpus: str
  setup: fit.Setup
  seeds: int

  @property
  def fields(self) -> dict[str, Any]:
    """What tells this search from others in the results."""
    return self.setup._asdict() | {'corpus': self.corpus}


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


def next_run(
  args: Args, task: Task, rows: list[dict]
) -> tuple[float, int] | None:
  """The learning rate and the seed that are to run next, if any."""
  tuned = [row for row in rows if row['seed'] == 0]
  if len(tuned) < args.most:
    lr = next_lr(tuned, methods.METHODS[task.setup.method].lr)
    if lr is not None:
      return lr, 0
  best = min(tuned, key=loss)['lr']
  known = [(row['lr'], row['seed']) for row in rows]
  wanted = [(best, seed) for seed in range(1, task.seeds)]
  return next((run for run in wanted if run not in known), None)


def finish(args: Args, task_and_search: tuple[Task, dict]) -> dict:
  """Runs what a search lacks."""
  task, search = task_and_search
  trainer, rows = fit.Trainer(settings(args), task.setup), search['runs']
  corpus = load_corpus(task.corpus)
  while (run := next_run(args, task, rows)) is not None:
    lr, seed = run
    rows.append(trainer.run(lr, seed, corpus))
  search['memory'] = search['memory'] or trainer.memory()
  jax.clear_caches()  # compiled programs are not given back otherwise
  return search


def load_corpus(name: str) -> tuple:
  return corpora.load(name, harness.ROOT / 'runs' / 'quality')


def take_core(numbers: Any) -> None:
  """Gives a worker one core, before jax starts its threads.

  Products are small: more threads only get in each other's way.
  """
  if hasattr(os, 'sched_setaffinity'):  # Linux
    allowed = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {allowed[numbers.get() % len(allowed)]})


def finish_all(args: Args, todo: list[tuple[Task, dict]]) -> Iterator[dict]:
  """Yields finished searches; `workers` run at a time."""
  one = functools.partial(finish, args)
  with contextlib.ExitStack() as stack:
    found = map(one, todo)
    if args.workers > 1:
      spawn = multiprocessing.get_context('spawn')
      numbers = spawn.Queue()
      for i in range(args.workers):
        numbers.put(i)
      pool = spawn.Pool(args.workers, take_core, (numbers,))
      found = stack.enter_context(pool).imap_unordered(one, todo)
    yield from harness.track(found, 'Searches', len(todo))


def run_missing(args: Args, results: dict) -> None:
  """Finishes all tasks, and saves each."""
  of = lambda x: tuple(x[k] for k in ('corpus', *fit.Setup._fields))
  found = {of(search): search for search in results.get('searches', ())}
  wanted, todo = [of(task.fields) for task in tasks(args)], []
  for key, task in zip(wanted, tasks(args), strict=True):
    search = found.get(key, task.fields | {'memory': {}, 'runs': []})
    if not search['memory'] or next_run(args, task, search['runs']):
      todo.append((task, search))
  if todo:  # before the workers would all read them
    hashes = {name: load_corpus(name)[2] for name in args.corpora}
    if results.setdefault('corpora', hashes) != hashes:
      raise ValueError(f'{args.out} is about other corpora: name another --out')
  for search in finish_all(args, todo):
    found[of(search)] = search
    results['searches'] = [found[key] for key in wanted if key in found]
    harness.save_results(args.out, results, indent=2)


def main(args: Args) -> None:
  """Runs what is missing, then draws and prints everything."""
  same = settings(args)._asdict()
  results = harness.load_results(args.out, settings=same)
  run_missing(args, results)
  text = quality_report.markdown(results)
  harness.next_to(args.out, '.md').write_text(text)
  path = harness.next_to(args.out, '.png')
  quality_report.picture(results, args.rank, path)
  print(text)


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
