"""The best validation loss of each optimizer over a grid of learning rates.

  python benchmarks/learning_rates.py

Every run trains the example model on the same batches, at the same rank, for
the same number of steps; only the optimizer and the peak learning rate of the
matrices differ (embeddings, head and norms are Adam's at one rate in all runs).
A grid whose best value lies at its edge is extended. Results go to
benchmarks/results/learning_rates.json and .png; what is there already is not
run again, so an interrupted run can simply be started again.
"""

import dataclasses
import json
import math
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / 'examples'))

import jax  # noqa: E402
import matplotlib  # noqa: E402
import tyro  # noqa: E402

import machine  # noqa: E402
import pretrain  # noqa: E402
import settings  # noqa: E402

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# Between neighbours on a grid.
FACTOR = 2.0


@dataclasses.dataclass(frozen=True)
class Args:
  """The grid; see the module."""

  optimizers: tuple[str, ...] = (
    'galore',
    'golore',
    'online_subspace_descent',
    'contrib_galore',
    'adamw',
  )
  lr: float = 0.005  # where the grids start
  lr_rest: float = 0.005
  steps: int = settings.Config.steps
  most: int = 7  # grid points at the most
  out: str = str(ROOT / 'results' / 'learning_rates.json')


def run(args: Args, optimizer: str, lr: float) -> dict:
  """Trains once; returns what the picture and the table need."""
  jax.clear_caches()
  config = settings.Config(
    optimizer=optimizer,
    lr=lr,
    lr_rest=args.lr_rest,
    steps=args.steps,
    scan_layers=False,  # optax.contrib.galore projects 2-D kernels only
    eval_every=args.steps,
    save_every=args.steps,
    out=f'runs/learning_rates/{optimizer}-{lr:.4g}',
  )
  (summary,) = pretrain.main(config)
  names = ('validation_bits_per_byte', 'trigram_bits_per_byte', 'memory')
  row = {'lr': lr} | {name: summary[name] for name in names}
  if not math.isfinite(row[names[0]]):
    row[names[0]] = None  # JSON has no NaN
  return row


def bits(row: dict) -> float:
  """Validation bits per byte; a diverged run is worse than any other."""
  value = row['validation_bits_per_byte']
  return math.inf if value is None else value


def next_lr(rows: list[dict], start: float) -> float | None:
  """The next point: the start, then whichever side of the best is open."""
  known = sorted(rows, key=lambda row: row['lr'])
  if not known:
    return start
  i = min(range(len(known)), key=lambda i: bits(known[i]))
  if i == 0:
    return known[0]['lr'] / FACTOR
  if i == len(known) - 1:
    return known[-1]['lr'] * FACTOR
  return None


def search(args: Args, results: dict, optimizer: str) -> None:
  """Extends one optimizer's grid until its best is inside."""
  rows = results['runs'].setdefault(optimizer, [])
  while len(rows) < args.most and (lr := next_lr(rows, args.lr)) is not None:
    rows.append(run(args, optimizer, lr))
    rows.sort(key=lambda row: row['lr'])
    pathlib.Path(args.out).write_text(json.dumps(results, indent=2) + '\n')
    print(
      f'{optimizer} lr {lr:.4g}: {bits(rows_at(rows, lr)):.4f} bits per byte'
    )


def rows_at(rows: list[dict], lr: float) -> dict:
  """The row of one learning rate."""
  return next(row for row in rows if row['lr'] == lr)


def picture(results: dict, path: pathlib.Path) -> None:
  """Validation bits per byte against the learning rate, a line each."""
  figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
  for optimizer, rows in results['runs'].items():
    best = min(map(bits, rows))
    axes.plot(
      [row['lr'] for row in rows],
      [bits(row) for row in rows],
      marker='o',
      linestyle='--' if optimizer == 'contrib_galore' else '-',
      label=f'{optimizer} (best {best:.3f})',
    )
  trigram = next(iter(results['runs'].values()))[0]['trigram_bits_per_byte']
  axes.axhline(trigram, color='gray', linestyle=':', label='byte trigram')
  axes.set_xscale('log')
  axes.set_xlabel('peak learning rate of the matrices')
  axes.set_ylabel('validation bits per byte')
  axes.legend()
  figure.savefig(path, dpi=150)


def main(args: Args) -> None:
  """Runs what is missing, then draws and prints everything."""
  out = pathlib.Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  fixed = {'steps': args.steps, 'lr_rest': args.lr_rest}
  results = {'machine': machine.describe(), 'settings': fixed, 'runs': {}}
  if out.exists():
    results = json.loads(out.read_text())
    if results['settings'] != fixed:
      raise ValueError(
        f'{out} holds runs with {results["settings"]}, not {fixed}: delete it '
        'or name another --out'
      )
  for optimizer in args.optimizers:
    search(args, results, optimizer)
  picture(results, out.with_suffix('.png'))
  for optimizer, rows in results['runs'].items():
    best = min(rows, key=bits)
    edge = best['lr'] in (rows[0]['lr'], rows[-1]['lr'])
    print(
      f'{optimizer:<24} best {bits(best):.4f} at lr {best["lr"]:.4g}'
      + (' (at the edge of its grid)' if edge else '')
    )


if __name__ == '__main__':
  main(tyro.cli(Args))
