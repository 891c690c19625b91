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
  """Time of a step over that of FSDP with AdamW, and memory, against chips."""
  kinds, models = results['chips'], results['models']
  size = 2 * len(models), len(kinds)
  style = {'sharex': True, 'sharey': 'row', 'figsize': (10, 11)}
  with harness.draw(path, *size, dpi=110, **style) as (figure, panels):
    for column, kind in zip(panels.T, kinds, strict=True):
      column[0].set_title(f'{kind} (predicted)', fontsize=11)
      column[-1].set_xlabel('chips')
      for i, model in enumerate(models):
        draw_model(column[2 * i : 2 * i + 2], results, kind, model)
    for i, model in enumerate(models):
      panels[2 * i, 0].set_ylabel(f'{model}: step / AdamW, FSDP')
      panels[2 * i, 0].set_ylim(bottom=0)
      panels[2 * i + 1, 0].set_ylabel(f'{model}: GB on a chip')
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3)


def draw_model(panels: Any, results: dict, kind: str, model: str) -> None:
  """The two panels of one model on one kind of chip."""
  time, memory = panels
  base = None
  for strategy, (color, marker) in STYLES.items():
    rows = rows_of(results, kind, model, strategy)
    of = lambda key, rows=rows: np.array([row[key] for row in rows])
    chips, seconds = of('chips'), of('seconds')
    base = seconds if base is None else base
    style = {'color': color, 'marker': marker, 'markersize': 4}
    style |= {'linestyle': '-' if strategy.startswith('FSDP') else ':'}
    style |= {'label': strategy}
    time.semilogx(chips, seconds / base, **style)
    memory.loglog(chips, of('memory_bytes') / 1e9, **style)
  capacity = results['chips'][kind]['capacity'] / 1e9
  memory.axhline(capacity, color='tab:red', lw=0.8, label='capacity')
  memory.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  memory.yaxis.set_major_formatter('{x:g}')
  memory.yaxis.set_minor_formatter(ticker.NullFormatter())
  memory.set_xticks(chips, [f'{n:,}' for n in chips])
  memory.minorticks_off()
