"""Theorem 2: without noise, GaLore with a lazy SVD converges as 1/T.

The loss is smooth and not convex: f(W) = sum rho(A W - C), rho(x) = x^2 / (2 (1
+ x^2)), for which L = ||A||_2^2 and inf f = 0.
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

M, COLUMNS, SHARES = 8, 12, (0.25, 0.5)
STEPS, BLOCKS = 1_000_000, 1000
# T from which on the slope is fitted.
SINCE = 100_000


def problem() -> tuple:
  """A, C and W_0."""
  rng = np.random.default_rng(0)
  orthogonal = np.linalg.qr(rng.normal(size=(M, M)))[0]
  a = orthogonal * np.geomspace(0.5, 1, M)
  return a, 2 * rng.normal(size=(M, COLUMNS)), np.zeros((M, COLUMNS))


def loss(w):
  a, c, _ = problem()
  square = (a @ w - c) ** 2
  return jnp.sum(square / (1 + square)) / 2


def descend(share: float, lr: float, gap: int) -> counter.Trace:
  """||grad f||^2 over a run of GaLore."""
  spec, rule = counter.spec(share), so.projectors.svd(gap)
  tx = so.subspace(spec, rule, optax.identity())
  gradient, start = jax.grad(loss), problem()[2]
  return counter.descend(
    optax.chain(tx, optax.scale(-lr)),
    start,
    STEPS,
    lambda w, key: (gradient(w), {}),
    lambda w: jnp.sum(gradient(w) ** 2),
    BLOCKS,
  )


def measure(share: float) -> dict:
  """One run with Theorem 2's parameters, whose eta and tau know no T."""
  gap = float(loss(jnp.asarray(problem()[2])))
  # The smoothness is ||A||_2^2.
  of = {'smoothness': 1.0, 'gap': gap, 'share': share, 'steps': STEPS}
  p = so.theorem_parameters('galore', **of)
  eta, tau = p.learning_rate, p.update_proj_gap
  found = descend(share, eta, tau)
  once = descend(share, eta, 10 * STEPS)
  steps = np.arange(1, BLOCKS + 1) * (STEPS // BLOCKS)
  running = lambda trace: np.cumsum(trace.mean) / np.arange(1, BLOCKS + 1)
  return {
    'share': share,
    'eta': eta,
    'tau': tau,
    'steps': steps.tolist(),
    'mean': running(found).tolist(),
    'once': running(once).tolist(),
    'last': float(found.at[-1] / found.at[0]),
    'last_once': float(once.at[-1] / once.at[0]),
    'bound': float(2 * loss(jnp.asarray(problem()[2])) / (share * eta)),
  }


def fitted(row: dict) -> float:
  """The slope of the mean over T, from SINCE on."""
  first = SINCE * BLOCKS // STEPS - 1
  return counter.slope(row['steps'][first:], row['mean'][first:])


def run() -> claim.Found:
  """Two shares, each with refreshes and with one basis for good."""
  with jax.enable_x64(True):
    rows = [measure(x) for x in harness.track(SHARES, 'Theorem 2')]
  checks: list[claim.Check] = []
  table: claim.Table = [('delta', 'tau', 'eta', 'slope', 'worst, of the bound')]
  for row in rows:
    at, slope = f'delta = {row["share"]}', fitted(row)
    # In units of its bound, at the worst T.
    worst = np.max(np.multiply(row['mean'], row['steps']) / row['bound'])
    checks += [
      claim.Check(f'{at}: slope', slope, -1.1, -0.9),
      claim.Check(f'{at}: T mean / (2 Delta / (delta eta))', worst, most=1.0),
      claim.Check(f'{at}: last / first ||grad||^2', row['last'], most=1e-6),
      claim.Check(f'{at}: the same, never refreshed', row['last_once'], 1e-3),
    ]
    table.append((row['share'], row['tau'], row['eta'], slope, worst))
  slopes = ' and '.join(f'{fitted(row):.3f}' for row in rows)
  once = ' and '.join(f'{row["last_once"]:.2f}' for row in rows)
  return claim.Found(checks, rows, table, {'slopes': slopes, 'once': once})


@harness.picture(figsize=(7, 4.5))
def picture(axes: Any, rows: list) -> None:
  """The mean over T."""
  for i, row in enumerate(rows):
    t = np.array(row['steps'])
    name = f'delta = {row["share"]}'
    axes.plot(t, row['mean'], f'C{i}', label=name)
    axes.plot(t, row['once'], f'C{i}--', label=f'{name}, never refreshed')
    axes.plot(t, row['bound'] / t, f'C{i}:', label=f'{name}, bound')
  axes.set(xscale='log', yscale='log', xlabel='T')
  axes.set_ylabel('mean of ||grad f||^2 over T steps')
  axes.legend(fontsize=8)
