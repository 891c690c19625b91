"""Table 6 of Online Subspace Descent: which optimizers go well together."""

from collections.abc import Callable
import statistics
from typing import Any

import numpy as np
import optax

from benchmarks import harness
from benchmarks.claims import claim
from benchmarks.claims import training

RANK = 16
SEEDS = 3

# Perplexity of LLaMA-60M, rank 128 of 512, sequences of 1024: W, then P.
PRINTED = {
  'Lion': 52.65,
  'Adafactor': 33.45,
  'Adam': 29.77,
  'SGD': 3469.14,
  'GaLore Lion': 46.90,
  'GaLore Adafactor': 34.32,
  'GaLore Adam': 48.05,
  'OSD Lion + Lion': 57.97,
  'OSD Adafactor + Adafactor': 47.61,
  'OSD Adam + Adam': 49.01,
  'OSD Lion + Adam': 44.76,
  'OSD Adafactor + Adam': 34.15,
  'OSD Adam + SGD': 53.53,
}
# Pairs of rows, the better one first as printed, that the paper is about.
ORDER = (
  ('Adam', 'Adafactor'),
  ('Adafactor', 'Lion'),
  ('Lion', 'SGD'),
  ('OSD Lion + Adam', 'OSD Lion + Lion'),
  ('OSD Adafactor + Adam', 'OSD Adafactor + Adafactor'),
  ('OSD Adam + Adam', 'OSD Adam + SGD'),
  ('OSD Lion + Adam', 'GaLore Lion'),
  ('OSD Adafactor + Adam', 'GaLore Adafactor'),
  ('GaLore Adam', 'OSD Adam + Adam'),
  ('OSD Adafactor + Adam', 'OSD Adam + Adam'),
)


def make(row: str) -> Callable:
  """The row's optimizer, given a schedule."""
  method, _, rest = row.partition(' ')
  if method not in ('GaLore', 'OSD'):
    scale = optax.scale_by_learning_rate
    return lambda schedule: optax.chain(
      training.OPTIMIZERS[row](), scale(schedule)
    )
  weights, _, bases = rest.partition(' + ')
  options = {}
  if weights == 'Adafactor':
    # It looks at whole matrices, and asks for params (their shapes).
    options = {'per_matrix': True, 'params': 'coordinates'}
  projector, inner = training.bases(bases), training.OPTIMIZERS[weights]()
  return training.projected(RANK, projector, inner, **options)


def kendall(found: dict[str, float]) -> float:
  """Share of pairs ordered as printed, less that of the others."""
  names = list(PRINTED)
  signs = [
    np.sign(PRINTED[a] - PRINTED[b]) * np.sign(found[a] - found[b])
    for i, a in enumerate(names)
    for b in names[:i]
  ]
  return float(np.mean(signs))


def compare(
  best: dict[str, list[float]], over: str, under: str, **bound: float
) -> claim.Check:
  """A check of the ratio of two rows."""
  ratio, noise = claim.ratio_of_means(best[over], best[under])
  return claim.Check(f'{over} / {under}', ratio, noise=noise, **bound)


def run() -> claim.Found:
  """Trains every row at every rate."""
  tracked = harness.track(PRINTED, 'Table 6')
  grids = {row: training.perplexities(make(row), SEEDS) for row in tracked}
  rates = {row: training.best(grid)[0] for row, grid in grids.items()}
  best = {row: grid[rates[row]] for row, grid in grids.items()}
  found = {row: statistics.fmean(values) for row, values in best.items()}
  checks = [compare(best, worse, better, least=1.0) for better, worse in ORDER]
  verdicts = [check.verdict for check in checks]
  checks.append(compare(best, 'OSD Adafactor + Adam', 'Adafactor', most=1.05))
  worst = max((row for row in found if 'OSD' in row), key=found.__getitem__)
  printed = PRINTED['OSD Lion + Lion'] / PRINTED['Adam']
  checks.append(compare(best, worst, 'Adam', most=printed))
  agree = kendall(found)
  checks.append(claim.Check("Kendall's tau of all rows", agree, least=0.5))
  table: claim.Table = [
    ('W, then P', 'printed, 60M', 'here, per byte', 'std', 'rate')
  ]
  for row, values in best.items():
    deviation = statistics.stdev(values)
    here = f'{found[row]:.3f}', f'{deviation:.3f}'
    table.append((row, f'{PRINTED[row]:,.2f}', *here, rates[row]))
  numbers = {
    'as_printed': verdicts.count('yes'),
    'reversed': verdicts.count('no'),
    'pairs': len(ORDER),
    'agree': agree,
    'found': found,
  }
  data = {'found': found, 'best': best}
  return claim.Found(checks, data, table, numbers)


KINDS = ('GaLore', 'OSD', 'full rank')


def kind(row: str) -> str:
  first = row.split(' ')[0]
  return first if first in KINDS else KINDS[-1]


@harness.picture(figsize=(8, 5))
def picture(axes: Any, data: dict) -> None:
  """Rows as printed, and the range of their seeds here."""
  names = {
    row: f'{row} ({PRINTED[row]:,.2f})'
    for row in sorted(PRINTED, key=PRINTED.__getitem__)
  }
  for of in KINDS:
    ranges = {
      names[row]: (min(values), statistics.fmean(values), max(values))
      for row, values in data['best'].items()
      if kind(row) == of and row != 'SGD'  # far to the right
    }
    harness.draw_ranges(axes, ranges, names.values(), label=of)
  last, sgd = len(names) - 1, data['found']['SGD']
  axes.text(
    1, last, f'{sgd:.1f} → ', ha='right', transform=axes.get_yaxis_transform()
  )
  axes.set_xlabel(
    'validation perplexity per byte here: mean and range of seeds'
  )
  axes.set_ylabel('row of the paper (its perplexity)')
  axes.legend(fontsize=8, loc='upper left')
