"""The page and the picture of `scaling.py`."""

from typing import Any

from matplotlib import ticker
import numpy as np

from benchmarks import harness

STYLES = {
  'FSDP, AdamW': ('k', 'o'),
  'FSDP, online_subspace_descent': ('tab:blue', 's'),
  'FSDP, subspace_adamw': ('tab:green', '^'),
  'replicas, AdamW': ('k', 'o'),
  'replicas, subspace_adamw': ('tab:green', '^'),
  'replicas, online_subspace_descent, compressed': ('tab:blue', 's'),
}


def markdown(results: dict) -> str:
  """Assumptions, checks and predictions."""
  parts = [assumptions(results['settings']), chips(results['chips'])]
  parts.append(harness.table_of(results['checks'], CHECKS))
  for kind in results['settings']['kinds']:
    for model in results['models']:
      parts += [f'{model} on {kind}:', table(results, kind, model)]
  return '\n\n'.join(parts)


def assumptions(s: dict) -> str:
  """What the flags stand at."""
  return (
    f'- a step has {s["tokens"]:,} tokens, or {s["sequence"]:,} a chip if that '
    f'is more; a chip works on at most {s["micro_tokens"]:,} at once and '
    'accumulates\n'
    f'- products reach {s["matmul_share"]:.0%} of the peak, HBM '
    f'{s["hbm_share"]:.0%}, links {s["link_share"]:.0%}\n'
    f'- ranks are {s["rank"]:g} of the short side\n'
    f'- bytes of a number: weights {s["param_bytes"]}, gradients '
    f'{s["gradient_bytes"]}, optimizer state {s["state_bytes"]}'
  )


def chips(found: dict[str, dict]) -> str:
  """What the chips and their links can do."""
  per_second = lambda key: lambda c: f'{c[key] / 1e9:.4g} GB/s'
  return harness.table_of(
    [{'kind': kind, **c} for kind, c in found.items()],
    {
      '': '{kind}',
      'bf16': lambda c: f'{c["flops"] / 1e12:.0f} TFLOP/s',
      'HBM': per_second('hbm'),
      'capacity': lambda c: f'{c["capacity"] / 1e9:.0f} GB',
      'fast links': per_second('fast'),
      'slow links': per_second('slow'),
      'domain': '{domain} chips',
      'float32 products': '{float32:.1f} times slower',
    },
  )


CHECKS = {
  'of a small LLaMA': '{what}',
  'counted here': '{counted:.4g}',
  'XLA': '{xla:.4g}',
  'ratio': '{ratio:.3f}',
}


def rows_of(results: dict, kind: str, model: str, strategy: str) -> list[dict]:
  key = (kind, model, strategy)
  return [
    row
    for row in results['rows']
    if (row['kind'], row['model'], row['strategy']) == key
  ]


def table(results: dict, kind: str, model: str) -> str:
  """One model on one kind of chip: strategies by numbers of chips."""
  of = lambda strategy: rows_of(results, kind, model, strategy)
  head = [
    f'{row["chips"]:,} chips, {row["batch_tokens"] / 1e6:.1f}M tokens'
    for row in of(next(iter(STYLES)))
  ]
  lines = [[strategy, *map(cell, of(strategy))] for strategy in STYLES]
  return harness.table(['', *head], lines)


def cell(row: dict) -> str:
  """Time, traffic over fast and slow links, and memory."""
  gb = lambda key: number(row[key] / 1e9)
  fits = '' if row['fits'] else ', **does not fit**'
  return (
    f'{number(row["seconds"])} s, {gb("fast_bytes")} + {gb("slow_bytes")} GB, '
    f'{gb("memory_bytes")} GB{fits}'
  )


def number(x: float) -> str:
  """Three digits of a number, or all before its point."""
  return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def picture(results: dict, path: Any) -> None:
  """Time of a step, chip time of a token, and memory, against chips."""
  columns = [(k, m) for k in results['chips'] for m in results['models']]
  size = (3.5 * len(columns), 9)
  with harness.draw(
    path, 3, len(columns), dpi=120, figsize=size, sharex=True
  ) as (figure, panels):
    for column, (kind, model) in zip(panels.T, columns, strict=True):
      draw_column(column, results, kind, model)
    names = 'seconds of a step', 'chip-microseconds of a token', 'GB on a chip'
    for axes, name in zip(panels[:, 0], names, strict=True):
      axes.set_ylabel(name)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3)


def draw_column(column: Any, results: dict, kind: str, model: str) -> None:
  """The three panels of one model on one kind of chip."""
  time, cost, memory = column
  time.set_title(f'{model} on\n{kind} (predicted)', fontsize=11)
  for strategy, (color, marker) in STYLES.items():
    rows = rows_of(results, kind, model, strategy)
    of = lambda key, rows=rows: np.array([row[key] for row in rows])
    chips, seconds = of('chips'), of('seconds')
    style = {'color': color, 'marker': marker, 'markersize': 4}
    style |= {'linestyle': '-' if strategy.startswith('FSDP') else ':'}
    style |= {'label': strategy}
    time.loglog(chips, seconds, **style)
    cost.semilogx(chips, 1e6 * seconds * chips / of('batch_tokens'), **style)
    memory.loglog(chips, of('memory_bytes') / 1e9, **style)
  capacity = results['chips'][kind]['capacity'] / 1e9
  memory.axhline(capacity, color='tab:red', linewidth=0.8)
  note = {'textcoords': 'offset points', 'ha': 'right', 'color': 'tab:red'}
  memory.annotate('capacity', (chips[-1], capacity), (0, 3), **note)
  cost.set_ylim(bottom=0)
  for axes in (time, memory):
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.margins(y=0.12)
  memory.set_xticks(chips, [f'{n:,}' for n in chips])
  memory.minorticks_off()
  memory.set_xlabel('chips')
