"""The page and the picture of `scaling.py`."""

import pathlib

import matplotlib
import numpy as np

matplotlib.use('Agg')
from matplotlib import ticker
import matplotlib.pyplot as plt

STYLES = {
  'FSDP, AdamW': ('k', 'o'),
  'FSDP, online_subspace_descent': ('tab:blue', 's'),
  'FSDP, subspace_adamw': ('tab:green', '^'),
  'replicas, AdamW': ('k', 'o'),
  'replicas, subspace_adamw': ('tab:green', '^'),
  'replicas, online_subspace_descent, compressed': ('tab:blue', 's'),
}


def markdown(results: dict) -> str:
  """Returns assumptions, checks and predictions."""
  parts = [assumptions(results), checks(results['checks'])]
  for kind in results['settings']['kinds']:
    for model in results['models']:
      parts.append(table(results, kind, model))
  return '\n\n'.join(parts)


def assumptions(results: dict) -> str:
  """Returns what the flags stand at, and the chips."""
  s = results['settings']
  lines = [
    f'- a step has {s["tokens"]:,} tokens, or {s["sequence"]:,} a chip if that '
    f'is more; a chip works on at most {s["micro_tokens"]:,} at once and '
    'accumulates',
    f'- products reach {s["matmul_share"]:.0%} of the peak, HBM '
    f'{s["hbm_share"]:.0%}, links {s["link_share"]:.0%}',
    f'- ranks are {s["rank"]:g} of the short side',
    f'- bytes of a number: weights {s["param_bytes"]}, gradients '
    f'{s["gradient_bytes"]}, optimizer state {s["state_bytes"]}',
  ]
  head = (
    '| | bf16 | HBM | capacity | fast links | slow links | domain | float32 '
    'products |\n|---|---|---|---|---|---|---|---|'
  )
  rows = [
    f'| {kind} | {c["flops"] / 1e12:.0f} TFLOP/s | {c["hbm"] / 1e9:.0f} GB/s '
    f'| {c["capacity"] / 1e9:.0f} GB | {c["fast"] / 1e9:.0f} GB/s '
    f'| {c["slow"] / 1e9:.4g} GB/s | {c["domain"]} chips '
    f'| {c["float32"]:.1f} times slower |'
    for kind, c in results['chips'].items()
  ]
  return '\n'.join([*lines, '', head, *rows])


def checks(rows: list[dict]) -> str:
  """Returns how close the counts are."""
  lines = [
    f'| {x["what"]} | {x["counted"]:.4g} | {x["xla"]:.4g} | {x["ratio"]:.3f} |'
    for x in rows
  ]
  head = '| of a small LLaMA | counted here | XLA | ratio |\n|---|---|---|---|'
  return '\n'.join([head, *lines])


def rows_of(results: dict, kind: str, model: str, strategy: str) -> list[dict]:
  key = (kind, model, strategy)
  return [
    row
    for row in results['rows']
    if (row['kind'], row['model'], row['strategy']) == key
  ]


def table(results: dict, kind: str, model: str) -> str:
  """Returns one model on one kind of chip: strategies by numbers of chips."""
  some = rows_of(results, kind, model, next(iter(STYLES)))
  head = ' | '.join(
    f'{row["chips"]:,} chips, {row["batch_tokens"] / 1e6:.1f}M tokens'
    for row in some
  )
  rule = '|---' * (len(some) + 1) + '|'
  lines = [f'{model} on {kind}:', '', f'| | {head} |', rule]
  for strategy in STYLES:
    cells = ' | '.join(
      cell(row) for row in rows_of(results, kind, model, strategy)
    )
    lines.append(f'| {strategy} | {cells} |')
  return '\n'.join(lines)


def cell(row: dict) -> str:
  """Returns time, traffic over fast and slow links, and memory."""
  gb = lambda key: number(row[key] / 1e9)
  fits = '' if row['fits'] else ', **does not fit**'
  return (
    f'{number(row["seconds"])} s, {gb("fast_bytes")} + {gb("slow_bytes")} GB, '
    f'{gb("memory_bytes")} GB{fits}'
  )


def number(x: float) -> str:
  """Returns three digits of a number, or all before its point."""
  return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def picture(results: dict, path: pathlib.Path) -> None:
  """Time of a step, chip time of a token, and memory, against chips."""
  columns = [(k, m) for k in results['chips'] for m in results['models']]
  figure, panels = plt.subplots(
    3,
    len(columns),
    figsize=(3.5 * len(columns), 9),
    sharex=True,
    layout='constrained',
  )
  for column, (kind, model) in zip(panels.T, columns, strict=True):
    column[0].set_title(f'{model} on\n{kind} (predicted)', fontsize=11)
    for strategy, (color, marker) in STYLES.items():
      rows = rows_of(results, kind, model, strategy)
      chips = np.array([row['chips'] for row in rows])
      seconds = np.array([row['seconds'] for row in rows])
      tokens = np.array([row['batch_tokens'] for row in rows])
      held = np.array([row['memory_bytes'] for row in rows]) / 1e9
      style = {
        'color': color,
        'marker': marker,
        'markersize': 4,
        'label': strategy,
        'linestyle': '-' if strategy.startswith('FSDP') else ':',
      }
      column[0].loglog(chips, seconds, **style)
      column[1].semilogx(chips, 1e6 * seconds * chips / tokens, **style)
      column[2].loglog(chips, held, **style)
    capacity = results['chips'][kind]['capacity'] / 1e9
    column[2].axhline(capacity, color='tab:red', linewidth=0.8)
    column[2].annotate(
      'capacity',
      (chips[-1], capacity),
      (0, 3),
      textcoords='offset points',
      ha='right',
      color='tab:red',
    )
    column[1].set_ylim(bottom=0)
    for axes in (column[0], column[2]):
      axes.yaxis.set_major_formatter('{x:g}')
      axes.yaxis.set_minor_formatter(ticker.NullFormatter())
      axes.margins(y=0.12)
    column[2].set_xticks(chips, [f'{n:,}' for n in chips])
    column[2].minorticks_off()
    column[2].set_xlabel('chips')
  panels[0, 0].set_ylabel('seconds of a step')
  panels[1, 0].set_ylabel('chip-microseconds of a token')
  panels[2, 0].set_ylabel('GB on a chip')
  handles, labels = panels[0, 0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=3)
  figure.savefig(path, dpi=120)
  plt.close(figure)
