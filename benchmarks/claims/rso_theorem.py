"""Theorem 5.5 of RSO, with its parameters, on a quadratic."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks.claims import claim
import subspace_optax as so

M, COLUMNS, RANKS, SEEDS = 24, 16, (2, 6, 12), 4
SUBPROBLEMS, INNER, SMOOTHNESS = 256, 20, 2.0
CURVATURE = np.geomspace(0.02, SMOOTHNESS, M)[:, None]
WANTED = np.random.default_rng(0).standard_normal((M, COLUMNS))
GAP = float(np.sum(CURVATURE * WANTED**2) / 2)


def parameters(rank: int) -> so.rso.TheoremParameters:
  """What the theorem asks for, and its bound."""
  return so.rso.theorem_parameters(
    smoothness=SMOOTHNESS, gap=GAP, share=rank / M, subproblems=SUBPROBLEMS
  )


def descend(rank: int, seed: int) -> np.ndarray:
  """||grad f(W^k)||^2 at the start of every subproblem."""
  p = parameters(rank)
  spec = so.SubspaceSpec(rank, side='in', seed=seed, only_if_smaller=False)
  rso = so.rso.subproblems(
    spec, optax.sgd(p.learning_rate), update_proj_gap=INNER, eta=p.eta
  )

  def one(carry, _):
    params, state = carry
    g = CURVATURE * (rso.merged(params, state)['w'] - WANTED)
    basis = rso.bases(params, state)['w']
    square = jnp.sum((CURVATURE * (params['w'] - WANTED)) ** 2)
    return rso.update({'w': basis.T @ g}, state, params), square

  params = {'w': jnp.zeros((M, COLUMNS))}
  steps = jnp.arange(INNER * SUBPROBLEMS)
  run = jax.jit(lambda carry: jax.lax.scan(one, carry, steps)[1])
  return np.asarray(run((params, rso.init(params))))[::INNER]


def run() -> claim.Found:
  """All ranks and seeds."""
  rows = {
    rank: np.mean([descend(rank, seed) for seed in range(SEEDS)], axis=0)
    for rank in harness.track(RANKS, 'Theorem 5.5')
  }
  checks: list[claim.Check] = []
  table: claim.Table = [('r / m', 'eta', 'mean', 'bound', 'mean / bound')]
  for rank, squares in rows.items():
    p, mean, name = parameters(rank), float(squares.mean()), f'{rank}/{M}'
    fall = float(squares[-1] / squares[0])
    what = f'r/m = {name}: last gradient over the first, squared'
    checks += [
      claim.Check(f'r/m = {name}: mean over bound', mean / p.bound, 0, 1),
      claim.Check(what, fall, 0, 0.1),
    ]
    table.append((name, p.eta, mean, p.bound, mean / p.bound))
  worst = max(check.measured or 0.0 for check in checks[::2])
  data = {str(rank): squares.tolist() for rank, squares in rows.items()}
  return claim.Found(checks, data, table, {'worst': worst})


@harness.picture(figsize=(6, 4))
def picture(axes: Any, data: dict) -> None:
  """The running mean for each rank, and below what it must end."""
  for i, (rank, squares) in enumerate(data.items()):
    means = np.cumsum(squares) / np.arange(1, len(squares) + 1)
    share = f'r/m = {rank}/{M}'
    axes.semilogy(means, f'C{i}', label=f'{share}: mean so far')
    bound = parameters(int(rank)).bound
    axes.axhline(bound, color=f'C{i}', ls='--', label=f'{share}: bound')
  axes.set(xlabel='subproblem', ylabel='||grad f||^2')
  axes.set_ylim(bottom=0.6)  # below the lines there is room for the legend
  axes.legend(fontsize=8, loc='lower left')
