"""Perplexity: Online Subspace Descent against GaLore, rates tuned."""

import statistics
from typing import Any

from benchmarks import harness
from benchmarks.claims import claim
from benchmarks.claims import tuned

# OSD, GaLore. Table 5 is by rank, for a width of 512, Table 1 by size.
PRINTED = {
  'Table 5, 60M, rank 32 of 512': (85.90, 86.16),
  'Table 5, 60M, rank 128 of 512': (49.01, 48.05),
  'Table 5, 60M, rank 512 of 512': (37.41, 36.93),
  'Table 1, 60M, rank 512': (56.12, 57.03),
  'Table 1, 350M, rank 512': (43.67, 44.34),
  'Table 1, 1B, rank 512': (31.30, 35.52),
}
METHODS = {'OSD': 'online_subspace_descent', 'GaLore': 'galore, short side'}


def run() -> claim.Found:
  """Reads both off the Pareto benchmark."""
  found = tuned.perplexities(METHODS)
  ratio, noise = claim.ratio_of_means(*found.values())
  check = claim.Check('OSD / GaLore', ratio, 0, 1, noise)
  here = [statistics.fmean(values) for values in found.values()]
  rows = {'here, per byte, rank 16 of 64': here} | PRINTED
  table: claim.Table = [('', *METHODS, 'OSD / GaLore')]
  for name, (osd, galore) in rows.items():
    table.append((name, f'{osd:.2f}', f'{galore:.2f}', f'{osd / galore:.3f}'))
  numbers = {'ratio': ratio, 'seeds': len(found['OSD'])}
  return claim.Found([check], found, table, numbers)


@harness.picture(figsize=(4, 3.5))
def picture(axes: Any, data: dict) -> None:
  """Every seed of both."""
  tuned.draw(axes, data)
