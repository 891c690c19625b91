"""The page and the picture of `rso.py`."""

from collections.abc import Callable, Sequence
import pathlib
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

import rso_layer

MIB, GB = 2**20, 1e9
WHOLE = 'whole gradients'
STYLES = {
  'Adam': ('k', '', '--'),
  'GaLore': ('tab:orange', 's', '-'),
  'RSO': ('tab:blue', 'o', '-'),
  'compressed': ('tab:green', '^', '-'),
}
LABELS = {'RSO': 'RSO', 'compressed': 'compressed GoLore'}
RECOMPUTED = {
  'none': 'nothing',
  'layers': 'layers',
  'names': 'all but named products',
  'names and x P': 'all but named products and x P',
}
Row = dict[str, Any]


def tables(results: dict) -> dict[str, str]:
  """Returns the table of every part that has been counted."""
  makers: dict[str, Callable[[Any], str]] = {
    'layer': layer,
    'llama': whole_model,
    'block': block,
    'sharing': sharing,
    'traffic': traffic,
    'peak': peak,
  }
  return {k: make(results[k]) for k, make in makers.items() if k in results}


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """Returns Markdown."""
  rows = [head, ['---'] * len(head), *lines]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def layer(rows: list[Row]) -> str:
  """Returns MFLOP of one layer, predicted and counted."""
  methods = list(rso_layer.FORMULAS)
  head = ['b, m, n, r']
  for name in methods:
    head += [f'{LABELS.get(name, name)}', 'XLA']
  sizes = list(dict.fromkeys((x['b'], x['m'], x['n'], x['r']) for x in rows))
  lines = []
  for size in sizes:
    line = [', '.join(f'{x:,}' for x in size)]
    for name in methods:
      [row] = [x for x in rows if _is(x, method=name, size=size)]
      line += [f'{row[k] / 1e6:,.1f}' for k in ('predicted', 'counted')]
    lines.append(line)
  return table(head, lines)


def _is(row: Row, method: str, size: tuple[int, ...]) -> bool:
  sizes = tuple(row[k] for k in ('b', 'm', 'n', 'r'))
  return row['method'] == method and sizes == size


def whole_model(rows: list[Row]) -> str:
  """Returns FLOPs and gradients of the small LLaMA."""
  lines = []
  for row in rows:
    [full] = [x for x in rows if x['policy'] == row['policy'] and not x['rank']]
    lines.append(
      [
        RECOMPUTED[row['policy']],
        WHOLE if row is full else LABELS[row['method']],
        str(row['rank'] or ''),
        f'{row["flops"] / 1e9:.1f}',
        '' if row is full else f'{1 - row["flops"] / full["flops"]:.1%}',
        f'{row["gradient_bytes"] / MIB:.2f}',
        str(row['whole_products']),
      ]
    )
  head = ['recomputed', 'gradients of', 'r', 'GFLOP', 'saved']
  return table([*head, 'gradients, MiB', "products of a kernel's shape"], lines)


def block(rows: list[Row]) -> str:
  """Returns what a block keeps, in numbers per token."""
  plain = [x for x in rows if x['policy'] == 'none']
  lines = []
  for row in plain:
    same = [x for x in rows if _same(x, row)]
    cells = [f'{x["kept"] + x["scores"]:,.0f}' for x in same]
    saved = plain[0]['kept'] - row['kept']
    cells.insert(1, f'{saved:,.0f}' if saved else '')
    predicted = plain[0]['formula'] - row['formula']
    cells.insert(2, f'{predicted:,}' if predicted else '')
    lines.append([row['kind'], str(row['rank'] or ''), *cells])
  head = ['method', 'r', *(RECOMPUTED[x['policy']] for x in same)]
  head[3:3] = ['saved', 'predicted']
  return table(head, lines)


def _same(x: Row, y: Row) -> bool:
  return (x['kind'], x['rank']) == (y['kind'], y['rank'])


def sharing(rows: list[Row]) -> str:
  """Returns what one x P for several layers saves."""
  lines = [
    [
      'scanned' if x['scan_layers'] else 'unrolled',
      x['bases'],
      f'{x["flops"] / 1e9:.1f}' if x['flops'] else '',
      f'{x["temporary_bytes"] / MIB:.1f}',
    ]
    for x in rows
  ]
  return table(['layers', 'bases', 'GFLOP', 'temporary, MiB'], lines)


def traffic(rows: list[Row]) -> str:
  """Returns what replicas send, predicted and counted."""
  adam = rows[0]['sent_bytes']
  lines = [
    [
      LABELS.get(x['method'], x['method']),
      str(x['rank'] or ''),
      f'{x["predicted_bytes"] / MIB:.2f}',
      f'{x["sent_bytes"] / MIB:.2f}',
      f'{x["sent_bytes"] / adam:.1%}',
    ]
    for x in rows
  ]
  head = ['method', 'r', 'predicted, MiB', 'counted, MiB', "of Adam's"]
  return table(head, lines)


def peak(found: dict[str, list[Row]]) -> str:
  """Returns the memory of training steps, a table for each target."""
  return '\n\n'.join(_peak(where, rows) for where, rows in found.items())


def _peak(where: str, rows: list[Row]) -> str:
  models = list(dict.fromkeys(x['model'] for x in rows))
  kinds = {(x['policy'], x['method'], x['part']) for x in rows}
  order = lambda kind: (
    list(RECOMPUTED).index(kind[0]),
    list(STYLES).index(kind[1]),
    -kind[2],
  )
  lines = []
  for kind in sorted(kinds, key=order):
    policy, method, part = kind
    of = {
      x['model']: x
      for x in rows
      if (x['policy'], x['method'], x['part']) == kind
    }
    cells = [cell(of.get(model)) for model in models]
    name = LABELS.get(method, method)
    rank = f'd/{part}' if part else ''
    lines.append([RECOMPUTED[policy], name, rank, *cells])
  head = ['recomputed', 'method', 'r', *models]
  return f'Compiled for {where}.\n\n{table(head, lines)}'


def cell(row: Row | None) -> str:
  """Returns peak memory, and its two parts."""
  if row is None:
    return ''
  if 'refused' in row:
    return 'does not fit'
  size = lambda key: f'{row[f"{key}_bytes"] / GB:.1f}'
  return f'{size("peak")} ({size("argument")} + {size("temporary")})'


def picture(results: dict, path: pathlib.Path) -> None:
  """Peak memory by rank: a panel per model, a row for recomputed layers."""
  rows = [x for found in results['peak'].values() for x in found]
  rows = [x for x in rows if 'refused' not in x]
  models = list(dict.fromkeys(x['model'] for x in rows))
  figure, panels = plt.subplots(
    1,
    len(models),
    figsize=(4 * len(models), 4.5),
    layout='constrained',
    squeeze=False,
  )
  for axes, model in zip(panels[0], models, strict=True):
    of_model = [x for x in rows if x['model'] == model]
    for policy, alpha in (('none', 1.0), ('layers', 0.45)):
      _draw(axes, [x for x in of_model if x['policy'] == policy], alpha)
    axes.set_title(model)
    ranks = sorted({x['rank'] for x in of_model if x['rank']})
    axes.set_xscale('log', base=2)
    axes.set_xticks(ranks, [f'{r:,}' for r in ranks])
    axes.minorticks_off()
    axes.set_xlabel('rank')
    axes.set_ylim(bottom=0)
  panels[0, 0].set_ylabel('GB that a training step holds')
  handles, labels = panels[0, 0].get_legend_handles_labels()
  unique = dict(zip(labels, handles, strict=True))
  figure.legend(
    unique.values(), unique.keys(), loc='outside lower center', ncols=4
  )
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _draw(axes: Any, rows: list[Row], alpha: float) -> None:
  for method, (color, marker, line) in STYLES.items():
    found = [x for x in rows if x['method'] == method]
    if not found:
      continue
    label = LABELS.get(method, method)
    label += '' if alpha == 1.0 else ', layers recomputed'
    style = {'color': color, 'linestyle': line, 'alpha': alpha, 'label': label}
    if not found[0]['rank']:
      axes.axhline(found[0]['peak_bytes'] / GB, **style)
      continue
    found.sort(key=lambda x: x['rank'])
    ranks = [x['rank'] for x in found]
    sizes = [x['peak_bytes'] / GB for x in found]
    axes.plot(ranks, sizes, marker=marker, markersize=4, **style)
