"""Theorems 3 and 4 of GoLore, with their parameters, on the counter-example.

All the noise is on rows that don't matter, so that GaLore with single samples
stalls.
"""

import dataclasses
import math

import claim  # isort: skip
import counter
import jax
import matplotlib.pyplot as plt
import numpy as np

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
  return so.theorem_parameters(
    theorem,
    smoothness=1.0,
    gap=counter.GAP,
    noise=NOISE,
    share=DELTA,
    steps=steps,
  )


def descend(theorem: str, steps: int, optimizer, batch: int) -> dict:
  """The mean and the last ||grad f||^2 of one run."""
  p = parameters(theorem, steps)
  tx = optimizer(p.learning_rate, p.update_proj_gap, counter.msgd(p.b1))
  trace = counter.descend(
    tx,
    counter.START,
    steps,
    counter.gradients(SIGMA, batch=batch),
    counter.squared_gradient,
  )
  return {'mean': float(np.mean(trace.mean)), 'last': float(trace.at[-1])}


@dataclasses.dataclass(frozen=True)
class Runs:
  """One theorem's runs, and what they are compared with."""

  theorem: str
  optimizer: object
  batch: bool  # whether gradients are means of the theorem's B samples

  def rows(self) -> list[dict]:
    """A row for every T."""
    rows = []
    with jax.enable_x64(True):
      for steps in claim.track(STEPS, self.theorem):
        p = parameters(self.theorem, steps)
        batch = p.batch_size if self.batch else 1
        of = lambda optimizer, batch, steps=steps: descend(
          self.theorem, steps, optimizer, batch
        )
        rows.append(
          {'steps': steps, **p._asdict(), **of(self.optimizer, batch)}
          | {'galore_last': of(counter.galore, 1)['last']}
        )
    return rows


def slopes(rows: list[dict]) -> tuple[float, float]:
  """Of the mean and of the theorem's rate, over T."""
  steps = [row['steps'] for row in rows]
  of = lambda name: counter.slope(steps, [row[name] for row in rows])
  return of('mean'), of('rate')


def checks(rows: list[dict]) -> tuple[claim.Check, ...]:
  """The slope, the order's constant, the end, and where GaLore ends."""
  found, promised = slopes(rows)
  ratios = [row['mean'] / row['rate'] for row in rows]
  stall = 2 * counter.stall(SIGMA)
  last = rows[-1]
  return (
    claim.near('slope over T, against its rate', found, promised, 0.15),
    claim.Check('mean / rate, largest / smallest', _spread(ratios), most=1.5),
    claim.Check('last ||grad f||^2 at the largest T', last['last'], 0, 0.01),
    claim.near(
      'that of GaLore with single samples', last['galore_last'], stall, 0.2
    ),
  )


def _spread(values: list[float]) -> float:
  return max(values) / min(values)


def table(rows: list[dict]) -> tuple[tuple[str, ...], ...]:
  """The parameters and what was measured, for every T."""
  head = ('T', 'b1', 'tau', 'eta', 'B', 'mean', 'rate', 'last', 'GaLore, last')
  names = ('steps', 'b1', 'update_proj_gap', 'learning_rate', 'batch_size')
  names += ('mean', 'rate', 'last', 'galore_last')
  cells = [tuple(claim.number(row[name]) for name in names) for row in rows]
  return (head, *cells)


def picture(rows: list[dict], path) -> None:
  """The mean and the rate over T, and how runs end."""
  figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
  steps = [row['steps'] for row in rows]
  of = lambda name: [row[name] for row in rows]
  found, promised = slopes(rows)
  axes.plot(steps, of('mean'), 'o-', label=f'mean, slope {found:.2f}')
  axes.plot(
    steps,
    np.multiply(of('rate'), rows[0]['mean'] / rows[0]['rate']),
    'k:',
    label=f'rate of the theorem, moved there, slope {promised:.2f}',
  )
  axes.plot(
    steps, of('galore_last'), 's--', label='GaLore, single samples: last'
  )
  axes.axhline(
    2 * counter.stall(SIGMA),
    color='gray',
    linewidth=0.8,
    label='predicted stall of GaLore',
  )
  counter.axes_of_powers(axes)
  axes.set_xlabel('T')
  axes.set_ylabel('||grad f||^2')
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)
