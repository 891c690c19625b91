"""The table and the picture of the quality benchmark."""

import math
import pathlib
import statistics
from typing import Any

import matplotlib

import methods

matplotlib.use('Agg')
import matplotlib.pyplot as plt

MIB = 2**20

NOTES = """
Loss is that of held-out text in nats per byte, the mean of all seeds at the
best learning rate. That rate is chosen by seed 0 on the same text, alike for
all; the seeds change weights and data, not the seed of random bases. Only the
rate of the matrices is tuned: the rest is Adam's at one untuned rate, betas are
defaults, and nothing decays. `lora` trains factors beside frozen random
matrices. Runs are short, and the constants of the `subspace_` recipes were
found on the first corpus: this ranks nothing but itself.
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


def row(search: dict, base: dict | None) -> list[str]:
  """The cells of one search; the last two are relative to AdamW's."""
  values = losses(search)
  spread = statistics.stdev(values) if len(values) > 1 else None
  size = search['memory']['optimizer_bytes']
  return [
    search['method'],
    f'{search["rank"]:g}' if search['rank'] else '-',
    f'{search["width"]:g}',
    f'{best_lr(search):.3g}' + (' (edge)' if at_edge(search) else ''),
    f'{mean(search):.4f}',
    '-' if spread is None else f'{spread:.4f}',
    str(len(values)),
    f'{size / MIB:.2f}',
    f'{total_bytes(search) / MIB:.1f}',
    '-' if base is None else f'{100 * (mean(search) / mean(base) - 1):+.1f} %',
    '-'
    if base is None
    else f'{100 * size / base["memory"]["optimizer_bytes"]:.0f} %',
  ]


HEAD = (
  'method',
  'rank / width',
  'width',
  'best lr',
  'loss',
  'std',
  'seeds',
  'optimizer MiB',
  'training MiB',
  'loss vs adamw',
  'state vs adamw',
)


def markdown(rows: list[list[str]]) -> str:
  lines = [HEAD, ['---'] * len(HEAD), *rows]
  return ''.join('| ' + ' | '.join(line) + ' |\n' for line in lines)


def table(results: dict[str, Any]) -> str:
  """All searches as Markdown, corpus by corpus, the best first."""
  of = results['machine']
  text = (
    f'Measured on {of["processor"]}, {of["cores"]} cores, jax {of["jax"]}; '
    f'settings: {results["settings"]}.\n{NOTES}'
  )
  for corpus in results['corpora']:
    every = [s for s in results['searches'] if s['corpus'] == corpus]
    rows = [row(s, adamw(every, s['width'])) for s in sorted(every, key=mean)]
    text += f'\n### {corpus}\n\n{markdown(rows)}'
  return text


def adamw(searches: list[dict], width: float) -> dict | None:
  """AdamW's search on a model of the same width, if there is one."""
  found = [s for s in searches if (s['method'], s['width']) == ('adamw', width)]
  return found[0] if found else None


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
  """The points that no other beats in both coordinates."""
  kept, least = [], math.inf
  for x, y in sorted(points):
    if y < least:
      kept.append((x, y))
      least = y
  return kept


def panel(axes: Any, chosen: list[dict], size: Any) -> None:
  """One scatter of losses over bytes, with the front."""
  for search in chosen:
    ours = methods.METHODS[search['method']].ours
    recipe = search['method'].startswith('subspace_')
    color = 'tab:red' if recipe else 'tab:blue' if ours else 'tab:gray'
    values = losses(search)
    x, y = size(search) / MIB, mean(search)
    axes.errorbar(
      x,
      y,
      [[y - min(values)], [max(values) - y]],
      marker='o' if ours else 's',
      color=color,
      capsize=3,
    )
    axes.annotate(
      search['method'],
      (x, y),
      xytext=(4, 4),
      textcoords='offset points',
      fontsize=7,
      color=color,
    )
  line = front([(size(s) / MIB, mean(s)) for s in chosen])
  axes.step(
    [x for x, _ in line],
    [y for _, y in line],
    where='post',
    color='black',
    linewidth=0.8,
    linestyle=':',
  )
  axes.grid(alpha=0.3)


def picture(results: dict, rank: float, path: pathlib.Path) -> None:
  """Loss against optimizer bytes, and against all training bytes."""
  names = list(results['corpora'])
  figure, grid = plt.subplots(
    2, len(names), figsize=(7 * len(names), 9), squeeze=False
  )
  sizes = {
    'optimizer state, MiB': lambda s: s['memory']['optimizer_bytes'],
    'weights, gradients, activations and state, MiB': total_bytes,
  }
  for column, corpus in enumerate(names):
    chosen = main_searches(results, corpus)
    for axes, (label, size) in zip(grid[:, column], sizes.items(), strict=True):
      panel(axes, chosen, size)
      axes.set_xlabel(label)
      axes.set_ylabel('validation loss, nats per byte')
    grid[0, column].set_title(
      f'{corpus}: tuned, mean and range of seeds, rank {rank:g} of the width'
    )
  figure.tight_layout()
  figure.savefig(path, dpi=130)
  plt.close(figure)
