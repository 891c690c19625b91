"""Subspace descent with a new random basis at every step.

GD, momentum and Adam on f(W) = sum_ij c_i W_ij^2 / 2 with exact gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks.claims import claim
from benchmarks.claims import counter
import subspace_optax as so

M, COLUMNS, RANKS, COUNT, STEPS = 16, 16, (1, 2, 4, 8, 16), 50, 2000
DRAWN = (1, 4, 16)
RANK = M // 4  # of momentum and Adam
SMOOTHNESS = 3.0
# Equal curvatures, for which the bound is tight, and a spread of 10.
SPREADS = {'equal': 1.0, 'spread': 10.0}
RATES = {'momentum': 0.5 / SMOOTHNESS, 'Adam': 0.3}


def start() -> np.ndarray:
  """W_0, the same for all repetitions."""
  w = np.random.default_rng(0).normal(size=(M, COLUMNS))
  return np.broadcast_to(w, (COUNT, M, COLUMNS))


def curvature(spread: float) -> np.ndarray:
  """c, one for every row."""
  return np.geomspace(SMOOTHNESS / spread, SMOOTHNESS, M)[:, None]


def squares(spread: float, rank: int, inner, lr, transport='keep'):
  """||grad f||^2 before every step, meaned over the repetitions."""
  scale = jnp.asarray(np.broadcast_to(curvature(spread), (COUNT, M, COLUMNS)))
  spec, rule = counter.spec(rank), so.projectors.stiefel(1)
  tx = so.subspace(spec, rule, inner, transport=transport)
  found = counter.descend(
    optax.chain(tx, optax.scale_by_learning_rate(lr)),
    start(),
    STEPS,
    lambda w, key: (scale * w, {}),
    lambda w: jnp.mean(jnp.sum((scale * w) ** 2, (1, 2))),
    blocks=STEPS,
  )
  return found.at


def bound(spread: float, rank: int) -> float:
  """2 m L Delta / r, which is to be divided by T + 1."""
  delta = np.sum(curvature(spread) * start()[0] ** 2) / 2
  return float(2 * M * SMOOTHNESS * delta / rank)


def descend_in_subspaces() -> dict[str, list[float]]:
  """Sums of ||grad f||^2 under GD over their bound, by spread and rank."""
  return {
    f'{name}, r = {rank}': (
      np.cumsum(squares(spread, rank, optax.identity(), 1 / SMOOTHNESS))
      / bound(spread, rank)
    ).tolist()
    for rank in harness.track(RANKS, 'subspace GD')
    for name, spread in SPREADS.items()
  }


def run_others() -> dict[str, list[float]]:
  """||grad f||^2 under momentum and Adam, over the first, by transport."""
  rows, spread = {}, SPREADS['spread']
  optimizers = {'momentum': counter.msgd(0.1), 'Adam': optax.scale_by_adam()}
  for name, inner in optimizers.items():
    rate = optax.cosine_decay_schedule(RATES[name], STEPS)
    for transport in ('keep', 'first'):
      found = squares(spread, RANK, inner, rate, transport)
      rows[f'{name}, {transport}'] = (found / found[0]).tolist()
  return rows


def run() -> claim.Found:
  """GD at every rank and spread; momentum and Adam at one rank."""
  with jax.enable_x64(True):
    of_gd, others = descend_in_subspaces(), run_others()
  checks: list[claim.Check] = []
  table: claim.Table = [('GD', 'sum ||grad||^2 / (2 m L Delta / r)')]
  for name, ratio in of_gd.items():
    what = f'GD, {name}: share of the bound'
    checks.append(claim.Check(what, max(ratio), 0, 1.02))
    table.append((name, max(ratio)))
  for name, found in others.items():
    what = f'{name}: last / first ||grad||^2'
    checks.append(claim.Check(what, found[-1], 0, 1e-2))
    table.append((f'{name}: last / first', found[-1]))
  numbers = {
    'tight': min(max(v) for k, v in of_gd.items() if k.startswith('equal')),
    'loose': max(max(v) for k, v in of_gd.items() if k.startswith('spread')),
    'worst': max(found[-1] for found in others.values()),
  }
  return claim.Found(checks, {'gd': of_gd, 'others': others}, table, numbers)


@harness.picture(1, 2, figsize=(11, 4.5))
def picture(panels: Any, data: dict) -> None:
  """The share of the bound, and the decay of the others."""
  left, right = panels
  for name, ratio in data['gd'].items():
    if (rank := int(name.split('= ')[1])) not in DRAWN:
      continue
    color = f'C{DRAWN.index(rank)}'
    style = '-' if name.startswith('equal') else '--'
    left.plot(range(1, len(ratio) + 1), ratio, style, color=color, label=name)
  left.axhline(1, color='k', linestyle=':')
  left.set(xscale='log', xlabel='T + 1', ylabel='share of the bound')
  left.legend(fontsize=8)
  for name, found in data['others'].items():
    right.plot(found, label=name)
  right.set(yscale='log', xlabel='step', ylabel='||grad f||^2, of the first')
  right.legend(fontsize=8)
