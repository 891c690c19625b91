"""Perplexity: Online Subspace Descent against GaLore."""

from typing import Any

import numpy as np
import optax

from benchmarks import harness
from benchmarks.claims import claim
from benchmarks.claims import training

RANKS, SEEDS, RATES = (4, 16), 2, (0.03, 0.01)
# OSD, GaLore. Table 5 is by rank, for a width of 512, Table 1 by size.
PRINTED = {
  'Table 5, 60M, rank 32 of 512': (85.90, 86.16),
  'Table 5, 60M, rank 128 of 512': (49.01, 48.05),
  'Table 5, 60M, rank 512 of 512': (37.41, 36.93),
  'Table 1, 60M, rank 512': (56.12, 57.03),
  'Table 1, 350M, rank 512': (43.67, 44.34),
  'Table 1, 1B, rank 512': (31.30, 35.52),
}
# What moves the bases.
METHODS = {'OSD': 'Adam', 'GaLore': ''}
WIDTH = training.SETTING.width


def run() -> claim.Found:
  """Trains both at every rank, with every seed and rate."""
  make = lambda rank, bases: training.projected(
    rank, training.bases(bases), optax.scale_by_adam()
  )
  pairs = [(rank, k, bases) for rank in RANKS for k, bases in METHODS.items()]
  grid = {f'{name} {rank}': make(rank, bases) for rank, name, bases in pairs}
  found, mean, spread = training.compare(grid, SEEDS, RATES)
  rows, checks, ratios = {}, [], []
  for rank in RANKS:
    of = [mean[f'{name} {rank}'] for name in METHODS]
    rows[f'here, rank {rank} of {WIDTH}'] = [f'{x:.3f}' for x in of]
    what = f'rank {rank} of {WIDTH}: OSD / GaLore'
    values = (found[f'{name} {rank}']['values'] for name in METHODS)
    ratio, noise = claim.ratio_of_means(*values)
    checks.append(claim.Check(what, ratio, 0, 1, noise))
    ratios.append(f'{ratio:.3f}')
  table: claim.Table = [('', *METHODS, 'OSD / GaLore')]
  table += [(k, *rows[k], x) for k, x in zip(rows, ratios, strict=True)]
  for name, (osd, galore) in PRINTED.items():
    table.append((name, f'{osd:.2f}', f'{galore:.2f}', f'{osd / galore:.3f}'))
  numbers = {
    'ratios': ' and '.join(ratios),
    'ranks': ' and '.join(map(str, RANKS)),
    'spread': spread,
  }
  return claim.Found(checks, {'found': found}, table, numbers)


@harness.picture(figsize=(6, 4))
def picture(axes: Any, data: dict) -> None:
  """Every seed of both, over the rank."""
  for i, method in enumerate(METHODS):
    rows = [data['found'][f'{method} {rank}']['values'] for rank in RANKS]
    axes.plot(RANKS, np.mean(rows, 1), f'C{i}', label=method)
    for rank, values in zip(RANKS, rows, strict=True):
      axes.plot([rank] * len(values), values, f'C{i}o')
  axes.set_xscale('log', base=2)
  axes.set_xticks(RANKS, list(map(str, RANKS)))
  axes.set_xlabel(f'rank, of {WIDTH}')
  axes.set_ylabel('validation perplexity per byte')
  axes.legend()
