"""Perplexity: Online Subspace Descent against GaLore.

python benchmarks/claims/osd_perplexity.py
"""

import sys

import claim  # isort: skip
import matplotlib.pyplot as plt
import numpy as np
import optax
import training

RANKS, SEEDS, RATES = (4, 16), 2, (0.03, 0.01)
# Table 5, LLaMA-60M of width 512, by rank: OSD, GaLore.
TABLE_5 = {32: (85.90, 86.16), 128: (49.01, 48.05), 512: (37.41, 36.93)}
# Table 1, rank 512, by size: OSD, GaLore.
TABLE_1 = {'60M': (56.12, 57.03), '350M': (43.67, 44.34), '1B': (31.30, 35.52)}


def optimizer(method: str, rank: int):
  """Adam in the subspace, and on the bases of OSD."""
  projector = training.bases('Adam' if method == 'OSD' else '')
  return lambda schedule: training.projected(
    rank, projector, optax.scale_by_adam(), schedule
  )


def run() -> claim.Claim:
  """Trains both at every rank, with every seed and rate."""
  pairs = [(rank, method) for rank in RANKS for method in ('OSD', 'GaLore')]
  found = {}
  for rank, method in claim.track(pairs, 'perplexity'):
    grid = training.perplexities(optimizer(method, rank), SEEDS, RATES)
    rate, values = training.best(grid)
    found[f'{method} {rank}'] = {'rate': rate, 'values': values}
  mean = {name: float(np.mean(row['values'])) for name, row in found.items()}
  spread = max(np.ptp(row['values']) / 2 for row in found.values())
  checks: list[claim.Check] = []
  table: claim.Table = [('', 'OSD', 'GaLore', 'OSD / GaLore')]
  width = training.SETTING.width
  for rank in RANKS:
    osd, galore = mean[f'OSD {rank}'], mean[f'GaLore {rank}']
    what = f'rank {rank} of {width}: OSD / GaLore'
    checks.append(claim.Check(what, osd / galore, 0, 1))
    cells = f'{osd:.3f}', f'{galore:.3f}', f'{osd / galore:.3f}'
    table.append((f'here, rank {rank} of {width}', *cells))
  printed = {f'Table 5, 60M, rank {k} of 512': v for k, v in TABLE_5.items()}
  printed |= {f'Table 1, {k}, rank 512': v for k, v in TABLE_1.items()}
  for name, (osd, galore) in printed.items():
    table.append((name, f'{osd:.2f}', f'{galore:.2f}', f'{osd / galore:.3f}'))
  ratios = ' and '.join(f'{check.measured:.3f}' for check in checks)
  s = training.SETTING
  return claim.Claim(
    title='Online Subspace Descent reaches a lower perplexity than GaLore',
    source='Online Subspace Descent, Table 1',
    prediction='OSD / GaLore 0.98, 0.98, 0.88 for 60M, 350M, 1B',
    measurement=(
      f'OSD / GaLore {ratios} at rank {" and ".join(map(str, RANKS))} of '
      f'{width}, seeds within {spread:.2f}'
    ),
    checks=tuple(checks),
    table=tuple(table),
    notes=(
      'The paper against itself: in its Table 5 GaLore is better at every rank '
      'but the smallest, 512 included, where Table 1 has OSD ahead; the two '
      'differ in the length of sequences (1024 and 256).',
      'Against others: the re-run in SubTrack++ (its Table 1) has GaLore ahead '
      'of OSD at every size from 60M to 7B, all at one learning rate. The '
      "absolute perplexities of OSD's paper are far above those of GaLore's "
      '(34.88 for 60M after as many steps), on another pipeline.',
      f'Small: width {width}, {s.layers} layers, bytes, {s.steps} steps, '
      f'{SEEDS} seeds, the better of the rates {RATES} for each, which '
      'is a short grid; the rate of the bases is not tuned. A run so short '
      'says little about bases that learn slowly.',
    ),
    caption='Validation perplexity per byte, a point for every seed.',
    data={'found': found},
  )


def picture(data: dict, path) -> None:
  """Every seed of both, over the rank."""
  figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
  for i, method in enumerate(('OSD', 'GaLore')):
    rows = [data['found'][f'{method} {rank}']['values'] for rank in RANKS]
    axes.plot(RANKS, np.mean(rows, 1), f'C{i}', label=method)
    for rank, values in zip(RANKS, rows, strict=True):
      axes.plot([rank] * len(values), values, f'C{i}o')
  axes.set_xscale('log', base=2)
  axes.set_xticks(RANKS, list(map(str, RANKS)))
  axes.set_xlabel(f'rank, of {training.SETTING.width}')
  axes.set_ylabel('validation perplexity per byte')
  axes.legend()
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  claim.measure(sys.modules[__name__])
