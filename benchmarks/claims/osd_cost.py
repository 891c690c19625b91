"""What a step of online PCA costs against an SVD, by shape.

Quotes results/projectors.json, which `projectors` makes: it is not measured
here.
"""

import json
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks import projectors
from benchmarks.claims import claim

RULE, GAP = 'online_pca adam', 200
DEVICES = ('RTX 3090', 'A100')
# SVD over a step of online PCA, in PyTorch: Figure 2 on two devices.
PRINTED = {f'{m} x {n}': of for (m, n), of in projectors.PAPER.items()}


def quote() -> dict[str, float]:
  """The ratio for each shape at a quarter of its short side."""
  if not claim.PROJECTORS.exists():
    return {}
  rows = json.loads(claim.PROJECTORS.read_text())['rows']
  return {
    '{} x {}'.format(*row['shape']): row['times_faster_than_svd']
    for row in rows
    if row['rule'] == RULE and 4 * row['rank'] == row['shape'][0]
  }


def run() -> claim.Found:
  """Reads the other benchmark's result."""
  found = quote()
  table: claim.Table = [('shape', *DEVICES, 'here', f'here / {GAP}')]
  for shape, of in PRINTED.items():
    cells = ('not measured', '')
    if shape in found:
      cells = f'{found[shape]:.1f}x', f'{found[shape] / GAP:.2f}x'
    table.append((shape, *(f'{of[k]:.2f}x' for k in DEVICES), *cells))
  checks = [
    claim.Check(f'{shape}: SVD / step of online PCA', ratio, least=10)
    for shape, ratio in found.items()
  ]
  ratios = list(found.values())
  per_gap = max(ratios, default=float('nan')) / GAP
  if len(ratios) > 1:
    grows = ratios[-1] / ratios[0]
    checks.append(claim.Check('largest / smallest shape', grows, least=1.0))
    what = f'an SVD every {GAP} steps / online PCA at every step, at most'
    checks.append(claim.Check(what, per_gap, least=1.0))
  words = ', '.join(f'{x:.0f}x at {shape}' for shape, x in found.items())
  numbers = {'words': words or 'nothing', 'per_gap': per_gap}
  return claim.Found(checks, {'here': found}, table, numbers)


@harness.picture(figsize=(7, 4))
def picture(axes: Any, data: dict) -> None:
  """Printed and measured ratios by shape."""
  x = np.arange(len(PRINTED))
  for device in DEVICES:
    ratios = [of[device] for of in PRINTED.values()]
    axes.plot(x, ratios, 's--', label=f'printed, {device}')
  here = [data['here'].get(shape, np.nan) for shape in PRINTED]
  axes.plot(x, here, 'o-', label='this library, CPU')
  axes.axhline(GAP, color='k', linestyle=':', label=f'an SVD every {GAP} steps')
  axes.set_xticks(x, list(PRINTED))
  axes.set(yscale='log', ylabel='SVD / step of online PCA')
  axes.legend(fontsize=8)
