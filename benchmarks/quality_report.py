"""The table and the picture of the quality benchmark."""

import math
import statistics
from typing import Any

from benchmarks import harness
from benchmarks import methods
from benchmarks.harness import MIB

NOTES = """
Loss is that of held-out text in nats per byte, the mean of all seeds at the
best learning rate. That rate is chosen by seed 0 on the same text, alike for
all; the seeds change weights and data, not the seed of random bases. Only the
rate of the matrices is tuned: the rest is Adam's at one untuned rate, betas are
defaults, and nothing decays. `lora` trains factors beside frozen random
matrices. Runs are short, and the constants of the `subspace_` recipes were
found on the first corpus: this ranks nothing but itself. `subspace_adamw` and
`subspace_muon` are in their first form: Haar bases, and the latter with b of
0.9, w of 10 and no mean squares.
"""


def loss(row: dict) -> float:
  """The validation loss; a diverged run is worse than any other."""
  return math.inf if row['loss'] is None else row['loss']


def tuned(search: dict) -> list[dict]:
  """The grid of learning rates, in order."""
  rows = [row for row in search['runs'] if row['seed'] == 0]
  return sorted(rows, key=lambda row: row['lr'])


def best_lr(search: dict) -> float:
  return min(tuned(search), key=loss)['lr']


def at_edge(search: dict) -> bool:
  """Whether the best learning rate is the first or last of its grid."""
  grid = [row['lr'] for row in tuned(search)]
  return best_lr(search) in (grid[0], grid[-1])


def losses(search: dict) -> list[float]:
  """Of all seeds, at the best learning rate."""
  lr = best_lr(search)
  return [loss(row) for row in search['runs'] if row['lr'] == lr]


def mean(search: dict) -> float:
  return statistics.fmean(losses(search))


def total_bytes(search: dict) -> int:
  """Weights, optimizer state, and what a step holds besides."""
  return sum(search['memory'].values())


def main_searches(results: dict, corpus: str) -> list[dict]:
  """Of the main comparison: the whole width, one rank for each method."""
  chosen = [
    s
    for s in results['searches']
    if s['corpus'] == corpus and s['width'] == 1 and len(losses(s)) > 1
  ]
  return sorted(chosen, key=mean)


HEAD = ('method', 'rank / width', 'width', 'best lr', 'loss', 'std', 'seeds')
HEAD += ('optimizer MiB', 'training MiB', 'loss vs adamw', 'state vs adamw')


def cells(search: dict, base: dict | None) -> list[str]:
  """The line of one search; the last two are relative to AdamW's."""
  values = losses(search)
  spread = f'{statistics.stdev(values):.4f}' if len(values) > 1 else '-'
  size = search['memory']['optimizer_bytes']
  over_adamw = ['-', '-']
  if base is not None:
    state = 100 * size / base['memory']['optimizer_bytes']
    worse = 100 * (mean(search) / mean(base) - 1)
    over_adamw = [f'{worse:+.1f} %', f'{state:.0f} %']
  return [
    search['method'],
    f'{search["rank"]:g}' if search['rank'] else '-',
    f'{search["width"]:g}',
    f'{best_lr(search):.3g}' + (' (edge)' if at_edge(search) else ''),
    f'{mean(search):.4f}',
    spread,
    str(len(values)),
    f'{size / MIB:.2f}',
    f'{total_bytes(search) / MIB:.1f}',
    *over_adamw,
  ]


def markdown(results: dict[str, Any]) -> str:
  """All searches, corpus by corpus, the best first."""
  of = results['machine']
  text = (
    f'Measured on {of["processor"]}, {of["cores"]} cores, jax {of["jax"]}; '
    f'settings: {results["settings"]}.\n{NOTES}'
  )
  for corpus in results['corpora']:
    every = [s for s in results['searches'] if s['corpus'] == corpus]
    every.sort(key=mean)
    rows = [cells(s, adamw(every, s['width'])) for s in every]
    text += f'\n### {corpus}\n\n{harness.table(HEAD, rows)}\n'
  return text


def adamw(searches: list[dict], width: float) -> dict | None:
  """AdamW's search on a model of the same width, if there is one."""
  found = [s for s in searches if (s['method'], s['width']) == ('adamw', width)]
  return found[0] if found else None


def panel(axes: Any, chosen: list[dict], size: Any) -> None:
  """One scatter of losses over bytes, with the front."""
  for search in chosen:
    name, values = search['method'], losses(search)
    ours = methods.METHODS[name].ours
    recipe = name.startswith('subspace_')
    color = 'tab:red' if recipe else 'tab:blue' if ours else 'tab:gray'
    x, y = size(search) / MIB, mean(search)
    ends = [[y - min(values)], [max(values) - y]]
    marker = 'o' if ours else 's'
    axes.errorbar(x, y, ends, marker=marker, color=color, capsize=3)
    text = {'xytext': (4, 4), 'textcoords': 'offset points', 'fontsize': 7}
    axes.annotate(name, (x, y), color=color, **text)
  line = harness.front([(size(s) / MIB, mean(s)) for s in chosen])
  style = {'color': 'black', 'linewidth': 0.8, 'linestyle': ':'}
  sizes, values = [x for x, _ in line], [y for _, y in line]
  axes.step(sizes, values, where='post', **style)
  axes.grid(alpha=0.3)


def picture(results: dict, rank: float, path: Any) -> None:
  """Loss against optimizer bytes, and against all training bytes."""
  names = list(results['corpora'])
  sizes = {
    'optimizer state, MiB': lambda s: s['memory']['optimizer_bytes'],
    'weights, gradients, activations and state, MiB': total_bytes,
  }
  shape = {'figsize': (7 * len(names), 9), 'squeeze': False, 'layout': None}
  with harness.draw(path, 2, len(names), dpi=130, **shape) as (figure, grid):
    for column, corpus in zip(grid.T, names, strict=True):
      chosen = main_searches(results, corpus)
      for axes, (label, size) in zip(column, sizes.items(), strict=True):
        panel(axes, chosen, size)
        axes.set_xlabel(label)
        axes.set_ylabel('validation loss, nats per byte')
      title = f'tuned, mean and range of seeds, rank {rank:g} of the width'
      column[0].set_title(f'{corpus}: {title}')
    figure.tight_layout()
