"""The memory columns of GaLore's Tables 2 and 6, recomputed to the byte.

Counts weights, Adam's state and GaLore's state for LLaMA of 60M to 7B
parameters in bfloat16, from the shapes of the library's own states; nothing is
allocated.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import optax

from benchmarks import harness
from benchmarks import programs
from benchmarks.claims import claim
import llama
import subspace_optax as so


class Printed(NamedTuple):
  """Its rank, and Tables 6 and 2 in the paper's G."""

  rank: int
  weights: float
  adam: float
  galore: float
  adam_total: float
  galore_total: float


PRINTED = {
  'llama_60m': Printed(128, 0.12, 0.23, 0.13, 0.36, 0.24),
  'llama_130m': Printed(256, 0.25, 0.51, 0.28, 0.76, 0.52),
  'llama_350m': Printed(256, 0.68, 1.37, 0.54, 2.06, 1.22),
  'llama_1b': Printed(512, 2.60, 5.20, 1.78, 7.80, 4.38),
}
COLUMNS = ('weights', 'adam', 'galore')
RANK_7B = 1024
BYTES = 2  # of a bfloat16
# How near to a printed number counts as that number.
ROUNDING, TOLERANCE = 0.005, 0.025


def galore(rank: int) -> optax.GradientTransformation:
  """GaLore as in the paper: the short side projected, all in bfloat16."""
  spec = so.SubspaceSpec(rank, basis_dtype='bfloat16', moment_dtype='parameter')
  return so.subspace(spec, so.projectors.svd(200), optax.scale_by_adam())


def formula(name: str, rank: int) -> int:
  """2 (non-projected) + sum over matrices of mr + 2nr, in bytes."""
  c = llama.named(name)
  narrow, wide = c.width, c.mlp_width
  square = 3 * narrow * rank
  mlp = narrow * rank + 2 * wide * rank
  plain = 2 * c.vocab * narrow + (2 * c.layers + 1) * narrow
  return BYTES * (2 * plain + c.layers * (4 * square + 3 * mlp))


def measure(name: str, rank: int) -> dict:
  """Bytes of one model, which has a leaf for every matrix."""
  config = llama.named(name, param_dtype='bfloat16', scan_layers=False)
  report = so.memory_report(galore(rank), programs.model(config)[1])
  return {
    'rank': rank,
    'weights': report.params,
    'adam': report.adam,
    'galore': report.state,
    'formula': formula(name, rank),
  }


def closest(size: int, printed: float) -> float:
  """In GB or in GiB, whichever is nearer to what is printed."""
  return min((size / 1e9, size / 2**30), key=lambda x: abs(x - printed))


def checks(rows: dict) -> Sequence[claim.Check]:
  """Our states against the formula, the printed columns against our bytes."""
  found = []
  for name, row in rows.items():
    beyond = (row['galore'] - row['formula']) / row['formula']
    what = f'{name}: bytes beyond the formula, over its bytes'
    found.append(claim.Check(what, beyond, 0, 1e-3))
  for name, printed in PRINTED.items():
    for column in COLUMNS:
      value = getattr(printed, column)
      what = f'{name}: {column}, printed {value}, in GB or GiB'
      size = closest(rows[name][column], value)
      margin = max(ROUNDING, TOLERANCE * value)
      found.append(claim.Check(what, size, value - margin, value + margin))
    for column in ('adam', 'galore'):
      value = getattr(printed, f'{column}_total')
      total = printed.weights + getattr(printed, column)
      what = f'{name}: Table 2 with {column}, printed {value}, sum of Table 6'
      found.append(claim.near(what, total, value, 1e-9))
  return found


def lines(name: str, row: dict) -> list[tuple[str, ...]]:
  """Those of one model in the table."""
  both = lambda size: f'{size / 1e9:.3f} / {size / 2**30:.3f}'
  of, printed = PRINTED.get(name), lambda x: f'{x:.2f}'
  return [
    (
      name,
      str(row['rank']),
      column,
      '' if of is None else printed(getattr(of, column)),
      f'{row[column]:,}',
      both(row[column]),
    )
    for column in COLUMNS
  ]


def run() -> claim.Found:
  """Counts every model."""
  ranks = {name: printed.rank for name, printed in PRINTED.items()}
  ranks['llama_7b'] = RANK_7B
  tracked = harness.track(ranks.items(), 'memory')
  rows = {name: measure(name, rank) for name, rank in tracked}
  table: claim.Table = [('', 'rank', '', 'printed', 'exact bytes', 'GB / GiB')]
  for name, row in rows.items():
    table += lines(name, row)
  found = checks(rows)
  of = lambda column: [c for c in found if f': {column}, printed' in c.what]
  numbers = {
    'total': len(PRINTED),
    'held': {c: sum(check.holds for check in of(c)) for c in COLUMNS},
    'beyond': max(r['galore'] - r['formula'] for r in rows.values()),
    'ratio': rows['llama_1b']['galore'] / rows['llama_1b']['adam'],
  }
  return claim.Found(found, rows, table, numbers)


@harness.picture(1, 5, figsize=(10, 3.2))
def picture(grid: Any, rows: dict) -> None:
  """Weights, Adam and GaLore of every size, each on an axis from 0."""
  for axes, (name, row) in zip(grid, rows.items(), strict=True):
    sizes = [row[column] / 1e9 for column in COLUMNS]
    bars = axes.bar(COLUMNS, sizes, color=['C0', 'C1', 'C2'])
    axes.bar_label(bars, [f'{size:.2f}' for size in sizes], fontsize=8)
    if name in PRINTED:
      printed = [getattr(PRINTED[name], column) for column in COLUMNS]
      axes.plot(COLUMNS, printed, 'k_', markersize=16)
    axes.set_title(f'{name}, rank {row["rank"]}', fontsize=9)
    axes.tick_params(labelsize=8)
    axes.margins(y=0.12)
  grid[0].set_ylabel('GB; black lines as printed')
