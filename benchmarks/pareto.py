"""Test loss against bytes: every optimizer, tuned, at 20 tokens per weight.

Trains a LLaMA over bytes; model, data, batches and their order are the same for
all methods. The search of a method varies its peak learning rate (by factors of
2) and its weight decay (by factors of 3), if it has one, until both neighbours
of the best point have run in both directions, judged by the validation loss of
seed 0. Further seeds run at the best point, and the reported loss is that on a
third text. A search starts from the best point of the most similar one, on
another corpus, length or size. Methods such as `adamw, b2 0.95` and
`adamw, warm-up 0.2` run once, at the best point of `adamw`, to show what other
betas and warmups would gain. Schedules end at 0; no run is stopped early.

Every run is a file in runs/pareto, named by a hash of its settings, of its
whole program and of its text. So an interrupted benchmark can be continued, and
a run whose code or text has changed runs again. Any number of processes may run
side by side: `taskset -c 1 nice python -m benchmarks.pareto` starts one on one
core. `--report` writes results/pareto.json, .md and .png from the runs that are
there.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import time
from typing import Any, NamedTuple

import tyro

from benchmarks import contenders
from benchmarks import corpora
from benchmarks import harness
from benchmarks import pareto_picture
from benchmarks import pareto_report
from benchmarks import pareto_run

RUNS = harness.ROOT / 'runs' / 'pareto'
LR_FACTOR = 2.0
DECAY_FACTOR = 3.0
FIRST_DECAY = 3e-3
ALL = tuple(contenders.CONTENDERS)
JOB = tuple(field.name for field in dataclasses.fields(pareto_run.Job))
SOURCES = ('program', 'text')  # digests of what a job is made of


@dataclasses.dataclass(frozen=True)
class Args:
  """What is compared; see the module."""

  size: str = '0.1M'
  multiple: float = 1.0
  batch: int = 8
  seq: int = 128
  corpora: tuple[str, ...] = tuple(corpora.CORPORA)
  # Without variants, by default.
  methods: tuple[str, ...] = tuple(filter(pareto_report.is_ready_made, ALL))
  seeds: int = 5  # at the best point
  most: int = 14  # points of a search
  seconds: float = math.inf  # after which no run starts
  report: bool = False  # only write what is there
  runs: str = str(RUNS)
  out: str = str(harness.RESULTS / 'pareto.json')
  page: str = ''  # a page whose table to fill in, such as README.md


class Point(NamedTuple):
  """What differs between the runs of a job; rounded, so as to be the same."""

  lr: float
  decay: float
  seed: int = 0

  @classmethod
  def near(cls, lr: float, decay: float) -> 'Point':
    return cls(float(f'{lr:.4g}'), float(f'{decay:.4g}'))


def jobs(args: Args) -> Iterator[pareto_run.Job]:
  """All jobs, corpus by corpus."""
  for corpus in args.corpora:
    for method in args.methods:
      yield pareto_run.Job(
        method, corpus, args.size, args.multiple, args.batch, args.seq
      )


def neighbours(point: Point) -> list[Point]:
  """The points that must be worse before one counts as the best."""
  lr, decay = point.lr, point.decay
  rates = [lr * LR_FACTOR, lr / LR_FACTOR]
  decays = [decay * DECAY_FACTOR, decay / DECAY_FACTOR] if decay else []
  return [Point.near(x, decay) for x in rates] + [
    Point.near(lr, x) for x in decays
  ]


def loss(row: dict) -> float:
  """The validation loss; a diverged run is worse than any other."""
  return math.inf if row['validation'] is None else row['validation']


def best(rows: Sequence[dict]) -> Point:
  row = min((row for row in rows if row['seed'] == 0), key=loss)
  return Point(row['lr'], row['decay'])


def lacking(
  rows: Sequence[dict], seeds: int
) -> tuple[list[Point], list[Point]]:
  """The neighbours of the best, and the seeds at it, that have not run."""
  known = {Point(row['lr'], row['decay'], row['seed']) for row in rows}
  at = best(rows)
  missing = lambda points: [point for point in points if point not in known]
  others = [at._replace(seed=seed) for seed in range(1, seeds)]
  return missing(neighbours(at)), missing(others)


def wanted(start: Point, rows: Sequence[dict], args: Args) -> list[Point]:
  """The runs that come next, the most urgent first."""
  tuned = [row for row in rows if row['seed'] == 0]
  if not tuned:
    return [start]
  around, seeds = lacking(rows, args.seeds)
  return around if around and len(tuned) < args.most else seeds


class Store:
  """Runs in files, and claims of those that are under way."""

  def __init__(self, folder: str):
    self.folder = pathlib.Path(folder)
    self.folder.mkdir(parents=True, exist_ok=True)

  def rows(self, job: pareto_run.Job, sources: dict[str, str]) -> list[dict]:
    """What is known of a job, from its own program and text."""
    same = dataclasses.asdict(job) | sources
    return [x for x in self.all() if same.items() <= x.items()]

  def all(self) -> list[dict]:
    return [json.loads(p.read_text()) for p in self.folder.glob('*.json')]

  def path(self, fields: dict) -> pathlib.Path:
    text = json.dumps(fields, sort_keys=True).encode()
    return self.folder / f'{hashlib.sha256(text).hexdigest()[:16]}.json'

  def claim(self, path: pathlib.Path) -> bool:
    """Whether a run is now this process's to do."""
    claim = path.with_suffix('.claim')
    if claim.exists() and not _alive(claim.read_text()):
      claim.unlink(missing_ok=True)
    try:
      with claim.open('x') as file:
        file.write(str(os.getpid()))
    except FileExistsError:
      return False
    return True

  def restore(self, out: str) -> None:
    """Takes over the runs of an earlier report that are not there."""
    if not pathlib.Path(out).exists():
      return
    for search in json.loads(pathlib.Path(out).read_text())['searches']:
      job = pareto_run.Job(*(search[name] for name in JOB))
      sources = {name: search[name] for name in SOURCES}
      for run in search['runs']:
        point = Point(run['lr'], run['decay'], run['seed'])
        named = fields(job, sources, point)
        path = self.path(named)
        if not path.exists():
          row = named | run | {'memory': search['memory']}
          harness.save_results(path, row, indent=None)

  def save(self, path: pathlib.Path, row: dict) -> None:
    harness.save_results(path, row, indent=None)
    path.with_suffix('.claim').unlink()


def _alive(pid: str) -> bool:
  try:
    os.kill(int(pid), 0)
  except (ValueError, ProcessLookupError):
    return False
  return True


class Worker:
  """Runs what is missing, one run at a time."""

  def __init__(self, args: Args):
    self.args, self.store = args, Store(args.runs)
    self.store.restore(args.out)
    self.trainers: dict[pareto_run.Job, pareto_run.Trainer] = {}

  def trainer(self, job: pareto_run.Job) -> pareto_run.Trainer:
    if job not in self.trainers:
      self.trainers[job] = pareto_run.Trainer(job)
    return self.trainers[job]

  def start(self, job: pareto_run.Job) -> Point:
    """The best of the search most like this one, or where the method begins."""
    how = contenders.CONTENDERS[job.method]
    names = (job.method, how.varies)
    rows = [row for row in self.store.all() if row['method'] in names]
    alike = lambda row: sum(row[name] == getattr(job, name) for name in JOB)
    most = max(map(alike, rows), default=0)
    nearest = [row for row in rows if alike(row) == most]
    if any(row['seed'] == 0 for row in nearest):
      return best(nearest)
    return Point.near(how.lr, 0.0 if how.loop else FIRST_DECAY)

  def next(self) -> tuple[pareto_run.Job, Point, pathlib.Path] | None:
    """The first run that nobody has done or claimed."""
    for job in jobs(self.args):
      sources = self.trainer(job).sources
      rows = self.store.rows(job, sources)
      points = wanted(self.start(job), rows, self.args)
      if contenders.CONTENDERS[job.method].varies and rows:
        points = []  # one run tells what it would gain
      for point in points:
        path = self.store.path(fields(job, sources, point))
        if not path.exists() and self.store.claim(path):
          return job, point, path
    return None

  def run(self) -> None:
    began = time.monotonic()
    while time.monotonic() - began < self.args.seconds:
      found = self.next()
      if found is None:
        return
      job, point, path = found
      trainer = self.trainer(job)
      row = fields(job, trainer.sources, point) | trainer.run(*point)
      row |= {'memory': trainer.memory()}
      self.store.save(path, row)
      print(
        f'{job.method} {job.corpus} {job.size} x{job.multiple:g}: '
        f'lr {point.lr:g}, decay {point.decay:g}, seed {point.seed}: '
        f'{row["validation"]} in {row["seconds"]} s',
        flush=True,
      )


def fields(
  job: pareto_run.Job, sources: dict[str, str], point: Point
) -> dict[str, Any]:
  """What tells a run from all others."""
  return dataclasses.asdict(job) | point._asdict() | sources


def collect(args: Args) -> dict[str, Any]:
  """The searches in the store, each with what it lacks.

  Runs of programs that the code no longer makes, or of texts that the packages
  no longer hold, are left out.
  """
  found: dict[tuple, list[dict]] = {}
  for row in Store(args.runs).all():
    found.setdefault(tuple(row[name] for name in JOB), []).append(row)
  searches = []
  for key, rows in found.items():
    job = pareto_run.Job(*key)
    if job.method not in contenders.CONTENDERS:
      continue
    sources = pareto_run.Trainer(job).sources
    current = [row for row in rows if sources.items() <= row.items()]
    if current:
      searches.append(_search(job, current, args))
  return {'machine': harness.describe_machine(), 'searches': searches}


def _search(job: pareto_run.Job, rows: list[dict], args: Args) -> dict:
  kept = ('lr', 'decay', 'seed', 'validation', 'test', 'curve')
  kept += ('seconds', 'processor')
  at = best(rows)
  return {
    **dataclasses.asdict(job),
    'steps': job.steps,
    **{name: rows[0][name] for name in SOURCES},
    'best': {'lr': at.lr, 'decay': at.decay},
    'lacks': sum(map(len, lacking(rows, args.seeds))),
    'memory': rows[0]['memory'],
    'runs': [{name: row[name] for name in kept} for row in rows],
  }


def report(args: Args) -> None:
  """Writes and prints what is there."""
  Store(args.runs).restore(args.out)
  results = collect(args)
  harness.save_results(args.out, results, indent=None)
  text = pareto_report.markdown(results)
  harness.next_to(args.out, '.md').write_text(text)
  pareto_picture.picture(results, harness.next_to(args.out, '.png'))
  if args.page:
    harness.fill_page(args.page, {'pareto': pareto_report.summary(results)})
  print(text)


def main(args: Args) -> None:
  if not args.report:
    Worker(args).run()
  report(args)


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
