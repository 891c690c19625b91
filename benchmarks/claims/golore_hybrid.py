"""GoLore@x%: SVDs first, random bases for the last x% of the steps.

python benchmarks/claims/golore_hybrid.py
"""

import sys

import claim  # isort: skip
import counter
import jax
import matplotlib.pyplot as plt
import numpy as np

LR, TAU, SIGMA, B1 = 3e-5, 100, 1.0, 0.1
STEPS, SHARES = 200_000, (0, 20, 50, 75, 100)


def turn(share: int) -> int:
  """The first step with random bases."""
  return STEPS - STEPS * share // 100


def expected(share: int, at_turn: float) -> float:
  """The last f - f*, from that at the turn on at GoLore's rate.

  A refresh leaves r/n of the momentum, which then builds up again.
  """
  kept = counter.R / counter.N
  rate = kept * (1 - (1 - kept) * (1 - B1) / B1 / TAU)
  return at_turn * float(np.exp(-2 * LR * rate * (STEPS - turn(share))))


def run() -> claim.Claim:
  """Momentum SGD with momentum projection, at every x."""
  curves = {}
  with jax.enable_x64(True):
    for share in claim.track(SHARES, 'GoLore@x%'):
      make = counter.golore if share else counter.galore
      extra = {'random_from': turn(share)} if share else {}
      curves[str(share)] = counter.descend(
        make(LR, TAU, counter.msgd(B1), **extra),
        counter.START,
        STEPS,
        counter.gradients(SIGMA),
        counter.excess,
      ).at.tolist()
  stall = counter.stall(SIGMA)
  checks: list[claim.Check] = []
  table: claim.Table = [('x', 'at the turn', 'predicted end', 'end')]
  for share in SHARES:
    curve = curves[str(share)]
    at_turn, last = curve[100 - share], curve[-1]
    goal = stall if share == 0 else expected(share, at_turn)
    check = claim.near(f'GoLore@{share}%: last f - f*', last, goal, 0.3)
    checks.append(check)
    cells = map(claim.number, (at_turn, goal, last))
    table.append((f'{share}%', *cells))
  last = {share: curves[str(share)][-1] for share in SHARES}
  better = last[75] / last[100]
  checks.append(claim.Check('GoLore@75% / GoLore@100%', better, most=1.0))
  ends = ', '.join(f'{claim.number(last[x])} at {x}%' for x in SHARES)
  return claim.Claim(
    title='GoLore@x% is as fast as GaLore at first and converges after',
    source='GoLore, Figure 1; Yuan, Subspace Training in LLMs (slides)',
    prediction=(
      'f - f* falls to the stall of GaLore, and from the turn on at r/n of the '
      'rate of full SGD, less what momentum loses at refreshes; so that '
      'GoLore@75% beats random bases from the start'
    ),
    measurement=f'last f - f*: {ends}',
    checks=tuple(checks),
    table=tuple(table),
    notes=(
      'The counter-example again, MSGD with momentum projection, b1 = 0.1. '
      'The predicted rate is ours: a refresh keeps r/n of the momentum in the '
      'mean.',
      'The best x is the one that turns when GaLore stalls: here after some '
      '45,000 steps, and 75% is the nearest to that. On language models the '
      'paper turns for the last 20%, and the gain read off its Figure 3 is 0.9 '
      'perplexity at 60M (43.9 to 43.0); no pre-training result above 60M '
      'could be confirmed.',
      'Paper against code: GoLore@20% is rand_ratio = 0.8 in the code, and '
      'draw.py calls GoLore@75% "Golore0.25".',
    ),
    caption='f - f* over the steps; dotted: the stall of GaLore.',
    data=curves,
  )


def picture(curves: dict, path) -> None:
  """f - f* for every x."""
  figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
  for share, curve in curves.items():
    steps = np.linspace(0, STEPS, len(curve))
    name = 'GaLore' if share == '0' else f'GoLore@{share}%'
    axes.plot(steps, curve, label=name)
  axes.axhline(counter.stall(SIGMA), color='k', linestyle=':')
  axes.set_yscale('log')
  axes.set_xlabel('step')
  axes.set_ylabel('f - f*')
  axes.legend()
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  claim.measure(sys.modules[__name__])
