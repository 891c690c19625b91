"""GoLore's counter-example: where GaLore gets stuck, and what does not."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from benchmarks import harness
from benchmarks.claims import claim
from benchmarks.claims import counter

LR, TAU, SIGMA = 3e-5, 100, 1.0
STEPS, SHOWN = 200_000, (20_000, 60_000, 100_000, 200_000)
BATCH = 100
# The same runs of a plain NumPy program with other random numbers, at the end.
NUMPY = {
  'full SGD': 8.5e-5,
  'GaLore SGD': 2.416,
  'large-batch GaLore SGD': 0.0083,
  'GoLore@75% SGD': 0.067,
  'GoLore@100% SGD': 0.114,
  'GaLore MSGD+MP': 2.416,
  'GoLore@75% MSGD+MP': 0.081,
  'full Adam': 0,
  'GaLore Adam': 2.373,
  'GoLore@50% Adam': 4e-5,
  'large-batch GaLore Adam': 0,
}


def optimizers() -> dict:
  """From the row to the optimizer and the batch of its refreshes."""
  sgd, adam = optax.identity(), optax.scale_by_adam()
  momentum = optax.trace(0.9)  # whose steps are ten times as long
  galore, golore = counter.galore, counter.golore
  quarter, half = STEPS // 4, STEPS // 2
  return {
    'full SGD': (optax.sgd(LR), 0),
    'GaLore SGD': (galore(LR, TAU, sgd), 0),
    'large-batch GaLore SGD': (galore(LR, TAU, sgd), BATCH),
    'GoLore@75% SGD': (golore(LR, TAU, sgd, quarter), 0),
    'GoLore@100% SGD': (golore(LR, TAU, sgd), 0),
    'GaLore MSGD+MP': (galore(LR / 10, TAU, momentum), 0),
    'GoLore@75% MSGD+MP': (golore(LR / 10, TAU, momentum, quarter), 0),
    'full Adam': (optax.adam(LR), 0),
    'GaLore Adam': (galore(LR, TAU, adam), 0),
    'GoLore@50% Adam': (golore(LR, TAU, adam, half), 0),
    'large-batch GaLore Adam': (galore(LR, TAU, adam), BATCH),
  }


def checks(curves: dict) -> Sequence[claim.Check]:
  """What theory says of the last f - f* of each row."""
  last = {name: curve[-1] for name, curve in curves.items()}
  turn = curves['GoLore@75% SGD'][25], curves['GoLore@75% MSGD+MP'][25]
  stall, small = counter.stall(SIGMA), counter.stall(SIGMA / BATCH**0.5)
  decay = lambda share, steps: float(np.exp(-2 * LR * share * steps))
  share, rest = counter.R / counter.N, 3 * STEPS // 4
  # Momentum projection leaves r/n of the momentum at every refresh, and the
  # rest of it takes 0.9 / (1 - 0.9) steps to build up again.
  slower = share * (1 - (1 - share) * 9 / TAU)
  expected = {
    'full SGD': (counter.GAP * decay(1, STEPS), 0.02),
    'GaLore SGD': (stall, 0.02),
    'GaLore MSGD+MP': (stall, 0.02),
    'GaLore Adam': (stall, 0.05),
    'GoLore@100% SGD': (counter.GAP * decay(share, STEPS), 0.25),
    'GoLore@75% SGD': (turn[0] * decay(share, rest), 0.25),
    'GoLore@75% MSGD+MP': (turn[1] * decay(slower, rest), 0.25),
  }
  rows = [claim.near(k, last[k], *v) for k, v in expected.items()]
  for name in ('large-batch GaLore SGD', 'large-batch GaLore Adam'):
    rows.append(claim.Check(name, last[name], 0.0, small))
  for name in ('full Adam', 'GoLore@50% Adam'):
    rows.append(claim.Check(name, last[name], 0.0, 1e-3 * stall))
  return rows


def run() -> claim.Found:
  """Descends with every optimizer of the table."""
  curves = {}
  with jax.enable_x64(True):
    rows = optimizers()
    for name in harness.track(rows, 'counter-example'):
      tx, refresh = rows[name]
      gradient = counter.gradients(SIGMA, refresh=refresh)
      curves[name] = counter.descend(
        tx, counter.START, STEPS, gradient, counter.excess
      ).at.tolist()
  at = [step * 100 // STEPS for step in SHOWN]
  head = (f'{s:,} steps' for s in SHOWN)
  table: claim.Table = [('f - f* after', *head, 'NumPy, 200,000')]
  for name, curve in curves.items():
    table.append([name, *(curve[i] for i in at), NUMPY[name]])
  ends = [curves[f'GaLore {x}'][-1] for x in ('SGD', 'MSGD+MP', 'Adam')]
  rest = max(v[-1] for k, v in curves.items() if not k.startswith('GaLore '))
  numbers = {'stall': counter.stall(SIGMA), 'ends': ends, 'rest': rest}
  return claim.Found(checks(curves), curves, table, numbers)


@harness.picture(1, 2, figsize=(11, 4.5), sharey=True)
def picture(panels: Any, curves: dict) -> None:
  """f - f* of every row, SGD on the left and Adam on the right."""
  for name, curve in curves.items():
    axes = panels[int(name.endswith('Adam'))]
    steps = np.linspace(0, STEPS / 1000, len(curve))
    style = '--' if 'MSGD' in name else '-'
    axes.plot(steps, curve, style, linewidth=1.5, label=name)
  for axes, title in zip(panels, ('SGD and momentum', 'Adam'), strict=True):
    axes.axhline(counter.stall(SIGMA), color='k', linestyle=':')
    axes.set(title=title, yscale='log', ylim=(1e-5, 20))
    axes.set_xlabel('thousands of steps')
    axes.legend(fontsize=8, loc='lower left')
  panels[0].set_ylabel('f - f*')
