"""Lemma 5: what a Haar sample of the Stiefel manifold keeps of a gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks.claims import claim
import subspace_optax as so

M, COLUMNS, RANKS, COUNT = 12, 16, (1, 2, 4, 6, 8, 10), 4000
GRADIENT = np.random.default_rng(0).normal(size=(M, COLUMNS))


def projections(rank: int) -> np.ndarray:
  """COUNT samples of P P^T, which is what becomes of a gradient I."""
  spec = so.SubspaceSpec(rank, only_if_smaller=False)
  tx = so.subspace(spec, so.projectors.stiefel(1), optax.identity())
  eye = {'w': jnp.broadcast_to(jnp.eye(M, COLUMNS), (COUNT, M, COLUMNS))}
  updates, _ = jax.jit(tx.update)(eye, tx.init(eye))
  return np.asarray(updates['w'], np.float64)[:, :, :M]


def measure(rank: int) -> dict:
  """One rank: both equations, and an SVD's error beside."""
  share, samples = rank / M, projections(rank)
  energy = np.sum(GRADIENT**2)
  found = np.sum((samples @ GRADIENT - GRADIENT) ** 2, (1, 2)) / energy
  values = np.linalg.svd(GRADIENT, compute_uv=False)
  # A diagonal entry of P P^T is Beta(r/2, (m-r)/2); all squares add up to r.
  on = 2 * rank * (M - rank) / (M**2 * (M + 2))
  off = (rank - M * on - rank**2 / M) / (M * (M - 1))
  sigma = np.sqrt(np.where(np.eye(M), on, off) / COUNT)
  errors = (samples.mean(0) - share * np.eye(M)) / sigma
  return {
    'rank': rank,
    'lost': float(found.mean()),
    'error': float(found.std() / COUNT**0.5),
    'svd': float(np.sum(values[rank:] ** 2) / energy),
    'worst': float(np.abs(errors).max()),
  }


def run() -> claim.Found:
  """Every rank."""
  rows = [measure(rank) for rank in harness.track(RANKS, 'Lemma 5')]
  checks: list[claim.Check] = []
  table: claim.Table = [('r', '1 - r/m', 'lost', 'standard error', 'by SVD')]
  entries = f'mean of P P^T - (r/m) I, in standard errors, the worst of {M**2}'
  for row in rows:
    rank, lost, share = row['rank'], row['lost'], 1 - row['rank'] / M
    what, margin = f'r = {rank}: share of ||G||^2 lost', 5 * row['error']
    checks += [
      claim.Check(what, lost, share - margin, share + margin),
      claim.Check(f'r = {rank}: {entries}', row['worst'], most=5),
    ]
    table.append((rank, share, lost, row['error'], row['svd']))
  worst = max(abs(row['lost'] - 1 + row['rank'] / M) for row in rows)
  numbers = {'worst': worst, 'errors': max(row['worst'] for row in rows)}
  return claim.Found(checks, rows, table, numbers | {'ranks': len(RANKS)})


@harness.picture(figsize=(6, 4))
def picture(axes: Any, rows: list) -> None:
  """The share lost over r/m."""
  x = [row['rank'] / M for row in rows]
  axes.plot([0, 1], [1, 0], 'k:', label='1 - r/m')
  axes.plot(x, [row['lost'] for row in rows], 'o', label='random bases')
  axes.plot(x, [row['svd'] for row in rows], 's--', label='SVD')
  axes.set(xlabel='r/m', ylabel='||P P^T G - G||^2 / ||G||^2')
  axes.legend()
