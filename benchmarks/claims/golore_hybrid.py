"""GoLore@x%: SVDs first, random bases for the last x% of the steps."""

from typing import Any

import jax
import numpy as np

from benchmarks import harness
from benchmarks.claims import claim
from benchmarks.claims import counter

LR, TAU, SIGMA, B1 = 3e-5, 100, 1.0, 0.1
STEPS, SHARES = 200_000, (0, 20, 50, 75, 100)


def turn(share: int) -> int:
  """The first step with random bases."""
  return STEPS - STEPS * share // 100


def expected(share: int, at_turn: float) -> float:
  """The last f - f*: the stall, or from the turn on at GoLore's rate.

  A refresh leaves r/n of the momentum, which then builds up again.
  """
  if share == 0:
    return counter.stall(SIGMA)
  kept = counter.R / counter.N
  rate = kept * (1 - (1 - kept) * (1 - B1) / B1 / TAU)
  return at_turn * float(np.exp(-2 * LR * rate * (STEPS - turn(share))))


def descend(share: int) -> list[float]:
  """f - f* of momentum SGD with momentum projection."""
  momentum = counter.msgd(B1)
  tx = counter.galore(LR, TAU, momentum)
  if share:
    tx = counter.golore(LR, TAU, momentum, turn(share))
  gradient, measure = counter.gradients(SIGMA), counter.excess
  found = counter.descend(tx, counter.START, STEPS, gradient, measure)
  return found.at.tolist()


def run() -> claim.Found:
  """Every x."""
  with jax.enable_x64(True):
    curves = {x: descend(x) for x in harness.track(SHARES, 'GoLore@x%')}
  last = {share: curve[-1] for share, curve in curves.items()}
  checks: list[claim.Check] = []
  table: claim.Table = [('x', 'at the turn', 'predicted end', 'end')]
  for share, curve in curves.items():
    at_turn = curve[100 - share]
    goal, what = expected(share, at_turn), f'GoLore@{share}%: last f - f*'
    checks.append(claim.near(what, last[share], goal, 0.3))
    table.append((f'{share}%', at_turn, goal, last[share]))
  better = last[75] / last[100]
  checks.append(claim.Check('GoLore@75% / GoLore@100%', better, most=1.0))
  ends = ', '.join(f'{claim.number(x)} at {k}%' for k, x in last.items())
  data = {str(share): curve for share, curve in curves.items()}
  return claim.Found(checks, data, table, {'ends': ends})


@harness.picture(figsize=(7, 4.5))
def picture(axes: Any, curves: dict) -> None:
  """f - f* for every x."""
  for share, curve in curves.items():
    steps = np.linspace(0, STEPS, len(curve))
    name = 'GaLore' if share == '0' else f'GoLore@{share}%'
    axes.plot(steps, curve, label=name)
  axes.axhline(counter.stall(SIGMA), color='k', linestyle=':')
  axes.set(yscale='log', xlabel='step', ylabel='f - f*')
  axes.legend()
