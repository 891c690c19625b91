"""Theorems 3 and 4 of GoLore, with their parameters, on the counter-example.

All the noise is on rows that don't matter, so that GaLore with single samples
stalls.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
import numpy as np

from benchmarks import harness
from benchmarks.claims import claim
from benchmarks.claims import counter
import subspace_optax as so

STEPS = (30_000, 100_000, 300_000, 1_000_000)
DELTA = counter.R / counter.N
# sigma^2 / (L Delta), which both theorems' T grows with, and its inverse.
RATIO = 1 / 30
# Of a sample's whole gradient, and on each of the R entries that carry it.
NOISE = math.sqrt(RATIO * counter.GAP)
SIGMA = NOISE / math.sqrt(counter.R)


def least_steps() -> int:
  """The T from which on the theorems hold."""
  of_noise = (128 * NOISE) ** 2 / (9 * math.sqrt(DELTA) * counter.GAP)
  return math.ceil(2 + 128 / (3 * DELTA) + of_noise)


def parameters(theorem: str, steps: int) -> so.TheoremParameters:
  """What the theorem asks for."""
  of = {'gap': counter.GAP, 'noise': NOISE, 'share': DELTA, 'steps': steps}
  return so.theorem_parameters(theorem, smoothness=1.0, **of)


def descend(
  p: so.TheoremParameters, steps: int, optimizer: Callable, batch: int
) -> dict:
  """The mean and the last ||grad f||^2 of one run."""
  tx = optimizer(p.learning_rate, p.update_proj_gap, counter.msgd(p.b1))
  gradient = counter.gradients(SIGMA, batch=batch)
  measure = counter.squared_gradient
  trace = counter.descend(tx, counter.START, steps, gradient, measure)
  return {'mean': float(np.mean(trace.mean)), 'last': float(trace.at[-1])}


def rows(theorem: str, optimizer: Callable) -> list[dict]:
  """A row for every T; GaLore with single samples beside."""
  found = []
  for steps in harness.track(STEPS, theorem):
    p = parameters(theorem, steps)
    # Theorem 3's gradients are means of its B samples.
    batch = p.batch_size if theorem == 'large_batch_galore' else 1
    stalled = descend(p, steps, counter.galore, 1)
    row = descend(p, steps, optimizer, batch)
    row |= {f'galore_{name}': value for name, value in stalled.items()}
    found.append({'steps': steps, **p._asdict(), **row})
  return found


def slopes(rows: list[dict]) -> tuple[float, float]:
  """Of the mean and of the theorem's rate, over T."""
  steps = [row['steps'] for row in rows]
  of = lambda name: counter.slope(steps, [row[name] for row in rows])
  return of('mean'), of('rate')


def checks(rows: list[dict]) -> Sequence[claim.Check]:
  """The slope, the order's constant, the end, and where GaLore ends."""
  (found, promised), last = slopes(rows), rows[-1]
  ratios = [row['mean'] / row['rate'] for row in rows]
  spread = max(ratios) / min(ratios)
  stalled, stall = last['galore_last'], 2 * counter.stall(SIGMA)
  return (
    claim.near('slope over T, against its rate', found, promised, 0.15),
    claim.Check('mean / rate, largest / smallest', spread, most=1.5),
    claim.Check('last ||grad f||^2 at the largest T', last['last'], 0, 0.01),
    claim.near('the same of GaLore, single samples', stalled, stall, 0.2),
  )


COLUMNS = {
  'T': 'steps',
  'b1': 'b1',
  'tau': 'update_proj_gap',
  'eta': 'learning_rate',
  'B': 'batch_size',
  'mean': 'mean',
  'rate': 'rate',
  'last': 'last',
  'GaLore, mean': 'galore_mean',
  'GaLore, last': 'galore_last',
}


def run(theorem: str, optimizer: Callable) -> claim.Found:
  """What one theorem says, and what runs with its parameters do."""
  with jax.enable_x64(True):
    found = rows(theorem, optimizer)
  slope, promised = slopes(found)
  cells = [[row[key] for key in COLUMNS.values()] for row in found]
  numbers = {
    'slope': slope,
    'promised': promised,
    'least_steps': least_steps(),
    'batches': [row['batch_size'] for row in found],
    'last': claim.number(found[-1]['last']),
    'galore_last': claim.number(found[-1]['galore_last']),
  }
  return claim.Found(checks(found), found, [[*COLUMNS], *cells], numbers)


@harness.picture(1, 2, figsize=(10, 4.5))
def picture(grid: Any, rows: list[dict]) -> None:
  """Means of runs and the rate over T, and beside them how runs end."""
  steps = [row['steps'] for row in rows]
  of = lambda name: [row[name] for row in rows]
  found, promised = slopes(rows)
  mean, last = grid
  mean.plot(steps, of('mean'), 'o-', label=f'mean, slope {found:.2f}')
  moved = np.multiply(of('rate'), rows[0]['mean'] / rows[0]['rate'])
  label = f'rate of the theorem, moved there, slope {promised:.2f}'
  mean.plot(steps, moved, 'k:', label=label)
  last.plot(steps, of('last'), 'o-', label='last')
  for axes, name in ((mean, 'mean'), (last, 'last')):
    label = f'GaLore, single samples: {name}'
    axes.plot(steps, of(f'galore_{name}'), 's--', label=label)
    stall, label = 2 * counter.stall(SIGMA), 'predicted stall of GaLore'
    axes.axhline(stall, color='gray', linewidth=0.8, label=label)
    axes.set(xscale='log', yscale='log', xlabel='T')
    axes.set_ylabel(f'{name} ||grad f||^2')
    axes.legend(fontsize=8, loc='lower left')
