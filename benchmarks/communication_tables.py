"""The tables of `communication.py`: sums over a layer, and Markdown."""

from collections.abc import Mapping
import math

import hlo

# How many of each matrix a layer of LLaMA has.
IN_A_LAYER = {'attention': 4, 'up': 2, 'down': 1}
MIB = 2**20


def by_kind(found: hlo.Found) -> dict[str, float]:
  """Returns the bytes sent by each kind of collective."""
  kinds = sorted({c.kind for c in found.values()})
  of_kind = lambda kind: {k: c for k, c in found.items() if c.kind == kind}
  return {kind: hlo.sent(of_kind(kind)) for kind in kinds}


def fsdp_bytes(size: int, mesh: Mapping[str, int]) -> float:
  """Returns what a device sends for FSDP itself, for `size` bytes of weights.

  They are gathered for the forward and for the backward pass, and their
  gradients are reduced and scattered, each over the axis `fsdp` of a ring.
  """
  n, others = mesh['fsdp'], math.prod(mesh.values()) // mesh['fsdp']
  return 3 * (n - 1) / n * size / others


def of_layer(rows: list[dict], key: str) -> float:
  """Returns the sum of a row's value over the matrices of one layer."""
  return sum(IN_A_LAYER[x['matrix']] * x[key] / x['shape'][0] for x in rows)


def bounds(row: dict, rank: int) -> dict[str, float]:
  """Returns the largest collectives over r(m + n) and mn, and state's share."""
  (_, m, n), layers = row['shape'], row['matrices_at_once']
  low, whole = layers * rank * (m + n), layers * m * n
  return {
    'largest / r(m+n)': row['largest'] / low,
    'largest / mn': row['largest'] / whole,
    'any / r(m+n)': row['largest_at_any_step'] / low,
    'any / mn': row['largest_at_any_step'] / whole,
  }


def state_ratio(row: dict, devices: int) -> float:
  """Returns the state's bytes on a device over an equal share of them."""
  return row['state_bytes_per_device'] * devices / row['state_bytes']


def line(name: str, rows: list[dict], rank: int, devices: int) -> str:
  """Returns one optimizer's line of the table."""
  of_rows = [bounds(row, rank) for row in rows]
  worst = {key: max(x[key] for x in of_rows) for key in of_rows[0]}
  mib = lambda key: of_layer(rows, key) / MIB
  count = lambda key: max(row[key] for row in rows)
  ratio = max(state_ratio(row, devices) for row in rows)
  held = max(row['temporary_bytes'] / row['gradient_bytes'] for row in rows)
  return (
    f'| `{name}` | {mib("sent_bytes"):.2f} | {mib("sent_bytes_at_refresh"):.1f}'
    f' | {count("collectives")} / {count("collectives_at_refresh")}'
    f' | {worst["largest / r(m+n)"]:.2f} | {worst["any / r(m+n)"]:.2f}'
    f' | {worst["any / mn"]:.2f}'
    f' | {mib("state_bytes_per_device"):.2f} | {ratio:.3f}'
    f' | {held:.1f} |'
  )


COLUMNS = (
  'sent a step',
  'at a refresh',
  'collectives',
  'largest / r(m+n)',
  'at any step',
  'largest / mn',
  'state',
  'over an equal share',
  'temporary / gradient',
)
HEADER = f'| | {" | ".join(COLUMNS)} |\n{"|---" * (len(COLUMNS) + 1)}|'


def markdown(results: dict) -> str:
  """Returns a table for every mesh."""
  rank = results['settings']['rank']
  parts = [f'Compiled for {results["compiled_for"]}.']
  for mesh, rows in results['rows'].items():
    devices = math.prod(int(x.split('=')[1]) for x in mesh.split(','))
    fsdp = of_layer(next(iter(rows.values())), 'fsdp_bytes') / MIB
    lines = [line(name, x, rank, devices) for name, x in rows.items()]
    title = (
      f'Mesh `{mesh}`; FSDP itself sends {fsdp:.1f} MiB for these weights:'
    )
    parts.append('\n'.join([title, '', HEADER, *lines]))
  return '\n\n'.join(parts)
