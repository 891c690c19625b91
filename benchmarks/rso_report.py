"""The page and the picture of `rso.py`."""

from collections.abc import Callable
from typing import Any

from benchmarks import harness
from benchmarks import rso_layers
from benchmarks.harness import GB

WHOLE = 'whole gradients'
STYLES = {
  'Adam': ('k', '', '--'),
  'GaLore': ('tab:orange', 's', '-'),
  'RSO': ('tab:blue', 'o', '-'),
  'compressed': ('tab:green', '^', '-'),
}
LABELS = {'compressed': 'compressed GoLore'}
RECOMPUTED = {
  'none': 'nothing',
  'layers': 'layers',
  'names': 'all but named products',
  'names and x P': 'all but named products and x P',
}
Row = dict[str, Any]


def label(method: str) -> str:
  return LABELS.get(method, method)


def rank(row: Row) -> str:
  return str(row['rank'] or '')


def gflop(row: Row) -> str:
  return f'{row["flops"] / 1e9:.1f}' if row['flops'] else ''


def unique(values: Any) -> list[Any]:
  """The values in order, each once."""
  return list(dict.fromkeys(values))


def tables(results: dict) -> dict[str, str]:
  """The table of every part that has been counted."""
  makers: dict[str, Callable[[Any], str]] = {
    'layer': layer,
    'llama': whole_model,
    'block': block,
    'sharing': sharing,
    'traffic': traffic,
    'peak': peak,
  }
  return {k: make(results[k]) for k, make in makers.items() if k in results}


def layer(rows: list[Row]) -> str:
  """MFLOP of one layer, predicted and counted."""
  head, lines = ['b, m, n, r'], []
  for name in rso_layers.PREDICTED:
    head += [label(name), 'XLA']
  size_of = lambda row: tuple(row[k] for k in ('b', 'm', 'n', 'r'))
  for size in unique(map(size_of, rows)):
    line = [', '.join(f'{x:,}' for x in size)]
    for row in rows:  # the methods in order
      if size_of(row) == size:
        line += [f'{row[k] / 1e6:,.1f}' for k in ('predicted', 'counted')]
    lines.append(line)
  return harness.table(head, lines)


def whole_model(rows: list[Row]) -> str:
  """FLOPs and gradients of the small LLaMA."""
  full = {x['policy']: x['flops'] for x in rows if not x['rank']}
  saved = lambda x: f'{1 - x["flops"] / full[x["policy"]]:.1%}'
  return harness.table_of(
    rows,
    {
      'recomputed': lambda x: RECOMPUTED[x['policy']],
      'gradients of': lambda x: label(x['method']) if x['rank'] else WHOLE,
      'r': rank,
      'GFLOP': gflop,
      'saved': lambda x: saved(x) if x['rank'] else '',
      'gradients, MiB': harness.megabytes('gradient_bytes'),
      "products of a kernel's shape": '{whole_products}',
    },
  )


def block(rows: list[Row]) -> str:
  """What a block keeps, in numbers per token."""
  plain = [x for x in rows if x['policy'] == 'none']
  policies, lines = unique(x['policy'] for x in rows), []
  for row in plain:
    of = (row['kind'], row['rank'])
    same = [x for x in rows if (x['kind'], x['rank']) == of]
    whole, *others = (f'{x["kept"] + x["scores"]:,.0f}' for x in same)
    saved = plain[0]['kept'] - row['kept']
    predicted = plain[0]['formula'] - row['formula']
    cells = [f'{x:,.0f}' if x else '' for x in (saved, predicted)]
    lines.append([of[0], str(of[1] or ''), whole, *cells, *others])
  first, *rest = (RECOMPUTED[policy] for policy in policies)
  head = ['method', 'r', first, 'saved', 'predicted', *rest]
  return harness.table(head, lines)


def sharing(rows: list[Row]) -> str:
  """What one x P for several layers saves."""
  return harness.table_of(
    rows,
    {
      'layers': lambda x: 'scanned' if x['scan_layers'] else 'unrolled',
      'bases': '{bases}',
      'GFLOP': gflop,
      'temporary, MiB': harness.megabytes('temporary_bytes', 1),
    },
  )


def traffic(rows: list[Row]) -> str:
  """What replicas send, predicted and counted."""
  adam = rows[0]['sent_bytes']
  return harness.table_of(
    rows,
    {
      'method': lambda x: label(x['method']),
      'r': rank,
      'predicted, MiB': harness.megabytes('predicted_bytes'),
      'counted, MiB': harness.megabytes('sent_bytes'),
      "of Adam's": lambda x: f'{x["sent_bytes"] / adam:.1%}',
    },
  )


def peak(found: dict[str, list[Row]]) -> str:
  """The memory of training steps, a table for each target."""
  return '\n\n'.join(
    f'Compiled for {where}.\n\n{peak_table(rows)}'
    for where, rows in found.items()
  )


def peak_table(rows: list[Row]) -> str:
  """A line for each method and rank, a column for each model."""
  kind_of = lambda x: (x['policy'], x['method'], x['part'])
  order = lambda kind: (
    list(RECOMPUTED).index(kind[0]),
    list(STYLES).index(kind[1]),
    -kind[2],
  )
  models, by = unique(x['model'] for x in rows), {}
  for x in rows:
    by.setdefault(kind_of(x), {})[x['model']] = x
  lines = []
  for policy, method, part in sorted(by, key=order):
    cells = [cell(by[policy, method, part].get(model)) for model in models]
    rank = f'd/{part}' if part else ''
    lines.append([RECOMPUTED[policy], label(method), rank, *cells])
  return harness.table(['recomputed', 'method', 'r', *models], lines)


def cell(row: Row | None) -> str:
  """Peak memory, and its two parts."""
  if row is None:
    return ''
  if 'refused' in row:
    return 'does not fit'
  size = lambda key: f'{row[f"{key}_bytes"] / GB:.1f}'
  return f'{size("peak")} ({size("argument")} + {size("temporary")})'


def picture(results: dict, path: Any) -> None:
  """Peak memory by rank: a panel per model, a row for recomputed layers."""
  rows = [x for found in results['peak'].values() for x in found]
  rows = [x for x in rows if 'refused' not in x]
  models = unique(x['model'] for x in rows)
  size = (4 * len(models), 4.5)
  with harness.draw(
    path, 1, len(models), dpi=120, figsize=size, squeeze=False
  ) as (figure, panels):
    for axes, model in zip(panels[0], models, strict=True):
      of_model = [x for x in rows if x['model'] == model]
      for policy, alpha in (('none', 1.0), ('layers', 0.45)):
        draw_lines(axes, [x for x in of_model if x['policy'] == policy], alpha)
      axes.set_title(model)
      ranks = sorted({x['rank'] for x in of_model if x['rank']})
      axes.set_xscale('log', base=2)
      axes.set_xticks(ranks, [f'{r:,}' for r in ranks])
      axes.minorticks_off()
      axes.set_xlabel('rank')
      axes.set_ylim(bottom=0)
    panels[0, 0].set_ylabel('GB that a training step holds')
    handles, labels = panels[0, 0].get_legend_handles_labels()
    by = dict(zip(labels, handles, strict=True))
    where = {'loc': 'outside lower center', 'ncols': 4}
    figure.legend(by.values(), by.keys(), **where)


def draw_lines(axes: Any, rows: list[Row], alpha: float) -> None:
  """A line for each method; Adam, which has no rank, is level."""
  for method, (color, marker, line) in STYLES.items():
    found = [x for x in rows if x['method'] == method]
    if not found:
      continue
    name = label(method) + ('' if alpha == 1.0 else ', layers recomputed')
    style = {'color': color, 'linestyle': line, 'alpha': alpha, 'label': name}
    if not found[0]['rank']:
      axes.axhline(found[0]['peak_bytes'] / GB, **style)
      continue
    found.sort(key=lambda x: x['rank'])
    ranks = [x['rank'] for x in found]
    sizes = [x['peak_bytes'] / GB for x in found]
    axes.plot(ranks, sizes, marker=marker, markersize=4, **style)
