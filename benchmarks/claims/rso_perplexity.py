"""Perplexity: RSO beside Adam, GaLore and GoLore, rates tuned."""

import statistics
from typing import Any

from benchmarks import harness
from benchmarks.claims import claim
from benchmarks.claims import tuned

# An independent re-run (PRAC, Table 2), by size: Adam, GaLore, RSO.
PRINTED = {
  '130M': (24.41, 25.12, 25.41),
  '350M': (18.77, 19.65, 19.57),
  '1B': (15.33, 15.64, 15.72),
}
METHODS = {
  'Adam': 'adamw',
  'GaLore': 'galore, short side',
  'GoLore': 'golore',
  'RSO': 'rso',
  'RSO, first moment transported': 'rso, first moments transported',
}


def run() -> claim.Found:
  """Reads all off the Pareto benchmark."""
  found = tuned.perplexities(METHODS)
  mean = {name: statistics.fmean(values) for name, values in found.items()}
  table: claim.Table = [('', *found)]
  table.append(('here, per byte', *(f'{x:.3f}' for x in mean.values())))
  for size, of in PRINTED.items():
    adam, galore, theirs = (f'{x:.2f}' for x in of)
    table.append((size, adam, galore, '', theirs, ''))
  checks: list[claim.Check] = []
  numbers: dict[str, Any] = {'seeds': len(found['RSO'])}
  for i, name in enumerate(('Adam', 'GaLore')):
    ratio, noise = claim.ratio_of_means(found['RSO'], found[name])
    worst = max(row[2] / row[i] for row in PRINTED.values())
    checks.append(claim.Check(f'RSO / {name}', ratio, 0, worst, noise))
    numbers[name] = {'ratio': ratio, 'worst': worst}
  return claim.Found(checks, found, table, numbers)


@harness.picture(figsize=(6.5, 4))
def picture(axes: Any, data: dict) -> None:
  """Every seed of every method."""
  tuned.draw(axes, data)
