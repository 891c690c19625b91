"""Perplexity: RSO beside Adam, GaLore and GoLore."""

from typing import Any

import numpy as np
import optax

from benchmarks import harness
from benchmarks.claims import claim
from benchmarks.claims import training
import subspace_optax as so

RANK, SEEDS, RATES = 16, 2, (0.1, 0.03, 0.01)
GAP, SCALE = training.SETTING.update_proj_gap, training.SETTING.scale
# An independent re-run (PRAC, Table 2), by size: Adam, GaLore, RSO.
PRINTED = {
  '130M': (24.41, 25.12, 25.41),
  '350M': (18.77, 19.65, 19.57),
  '1B': (15.33, 15.64, 15.72),
}


def rso(transport: str):
  """Subproblems as long as GaLore's gap, by Adam."""
  return lambda schedule: so.rso.subproblems(
    so.SubspaceSpec(RANK, side='in'),
    optax.adam(SCALE),
    update_proj_gap=GAP,
    transport=transport,
    schedule=schedule,
    plain=optax.adam(1.0),
  )


def projected(projector: so.projectors.Projector, transport: str):
  adam = optax.scale_by_adam()
  return training.projected(RANK, projector, adam, transport=transport)


METHODS = {
  'Adam': optax.adam,
  'GaLore': projected(training.bases(), 'keep'),
  'GoLore': projected(so.projectors.stiefel(GAP), 'first'),
  'RSO': rso('reset'),
  'RSO, first moment transported': rso('first'),
}


def run() -> claim.Found:
  """Trains all with every seed and rate."""
  found, mean, spread = training.compare(METHODS, SEEDS, RATES)
  rates = [row['rate'] for row in found.values()]
  table: claim.Table = [('', *found), ('best rate', *rates)]
  table.append(('here', *(f'{x:.3f}' for x in mean.values())))
  for size, of in PRINTED.items():
    adam, galore, theirs = (f'{x:.2f}' for x in of)
    table.append((size, adam, galore, '', theirs, ''))
  checks: list[claim.Check] = []
  numbers: dict[str, Any] = {'spread': spread}
  numbers['over_adam'] = spread / mean['Adam']
  for i, name in enumerate(('Adam', 'GaLore')):
    values = (found[k]['values'] for k in ('RSO', name))
    ratio, noise = claim.ratio_of_means(*values)
    worst = max(row[2] / row[i] for row in PRINTED.values())
    checks.append(claim.Check(f'RSO / {name}', ratio, 0, worst, noise))
    numbers[name] = {'ratio': ratio, 'worst': worst}
  return claim.Found(checks, {'found': found}, table, numbers)


@harness.picture(figsize=(6.5, 4))
def picture(axes: Any, data: dict) -> None:
  """A bar and the seeds for every method."""
  for i, row in enumerate(data['found'].values()):
    axes.bar(i, np.mean(row['values']), color=f'C{i}', alpha=0.5)
    axes.plot([i] * len(row['values']), row['values'], 'k.')
  names = [name.replace(', ', ',\n') for name in data['found']]
  axes.set_xticks(range(len(names)), names, fontsize=8)
  axes.set_ylabel('validation perplexity per byte')
