"""Lemma 5: what a Haar sample of the Stiefel manifold keeps of a gradient.

python benchmarks/claims/golore_lemma.py
"""

import sys

import claim  # isort: skip
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

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


def run() -> claim.Claim:
  """Every rank."""
  return judge([measure(rank) for rank in claim.track(RANKS, 'Lemma 5')])


def judge(rows: list[dict]) -> claim.Claim:
  """What the measurements of all ranks say."""
  checks: list[claim.Check] = []
  table: claim.Table = [('r', '1 - r/m', 'lost', 'standard error', 'by SVD')]
  for row in rows:
    rank, share = row['rank'], 1 - row['rank'] / M
    margin = 5 * row['error']
    checks += [
      claim.Check(
        f'r = {rank}: share of ||G||^2 lost',
        row['lost'],
        share - margin,
        share + margin,
      ),
      claim.Check(
        f'r = {rank}: mean of P P^T - (r/m) I, in standard errors, the worst '
        f'of {M**2}',
        row['worst'],
        most=5,
      ),
    ]
    cells = rank, share, row['lost'], row['error'], row['svd']
    table.append(tuple(map(claim.number, cells)))
  worst = max(abs(row['lost'] - 1 + row['rank'] / M) for row in rows)
  errors = max(row['worst'] for row in rows)
  return claim.Claim(
    title='A random basis keeps r/m of any gradient, in the mean',
    source='GoLore, Lemma 5 and Proposition 1',
    prediction='E[P P^T] = (r/m) I and E||P P^T G - G||^2 = (1 - r/m) ||G||^2',
    measurement=(
      f'over {COUNT:,} samples of {len(RANKS)} ranks of m = {M}, off by '
      f'{worst:.4f} at the most; entries of P P^T by {errors:.1f} standard '
      'errors at the most'
    ),
    checks=tuple(checks),
    table=tuple(table),
    notes=(
      'An SVD always loses less of the gradient that it sees. Lemma 5 is '
      'about any gradient, so that no direction is left out for good.',
      'Paper against code: for wide matrices the code inverts a singular Gram '
      'matrix, which gives orthonormal rows up to rounding and costs an n x n '
      'SVD; here the tall matrix is factorised.',
    ),
    caption='Share of ||G||^2 outside the subspace.',
    data=rows,
  )


def picture(rows: list, path) -> None:
  """The share lost over r/m."""
  figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
  x = [row['rank'] / M for row in rows]
  axes.plot([0, 1], [1, 0], 'k:', label='1 - r/m')
  axes.plot(x, [row['lost'] for row in rows], 'o', label='random bases')
  axes.plot(x, [row['svd'] for row in rows], 's--', label='SVD')
  axes.set_xlabel('r/m')
  axes.set_ylabel('||P P^T G - G||^2 / ||G||^2')
  axes.legend()
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  claim.measure(sys.modules[__name__])
