"""The picture of the Pareto benchmark: test loss over bytes of state."""

from typing import Any

from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import LogLocator
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

from benchmarks import contenders
from benchmarks import harness
from benchmarks import pareto_report
from benchmarks.harness import MIB

# Where a name may stand: right, left or above its point, points up.
_PLACES = [
  (side, up) for up in (0, 8, -8, 16, -16, 24, -24) for side in (1, -1)
]
_PLACES += [(0, up) for up in (12, -12, 36, -36, 48, -48)]

_IN_SUBSPACES = ('subspace_', 'galore', 'golore', 'online_', 'rso', 'dct_')
_IN_SUBSPACES += ('trion', 'dion', 'lora', 'contrib_galore')
_COLORS = {
  'in subspaces': 'tab:red',
  'whole matrices': 'tab:blue',
  "whole matrices, optax's": 'tab:gray',
}


def _kind(name: str) -> str:
  if name.startswith(_IN_SUBSPACES):
    return 'in subspaces'
  ours = contenders.CONTENDERS[name].ours
  return 'whole matrices' if ours else "whole matrices, optax's"


def _legend(axes: Any) -> None:
  """What colours, bars and the line are."""
  points = [
    Line2D([], [], color=color, marker='o', ls='', ms=4, label=kind)
    for kind, color in _COLORS.items()
  ]
  line = Line2D([], [], color='black', lw=0.8, ls=':', label='the front')
  axes.legend(handles=[*points, line], title='bars: range of seeds', fontsize=8)


def _panel(axes: Any, searches: list[dict]) -> None:
  """Losses over bytes of state, with the front."""
  points, names = [], []
  size = lambda search: search['memory']['optimizer_bytes']
  for search in sorted(searches, key=size):
    values, y = pareto_report.losses(search), pareto_report.mean(search)
    x = size(search) / MIB
    points.append((x, y))
    name = search['method']
    color = _COLORS[_kind(name)]
    ends = [[y - min(values)], [max(values) - y]]
    axes.errorbar(x, y, ends, marker='o', color=color, capsize=3, markersize=4)
    names.append((x, y, name, color))
  line = harness.front(points)
  axes.step(
    *zip(*line, strict=True), where='post', color='black', lw=0.8, ls=':'
  )
  axes.set_xscale('log')
  axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.xaxis.set_major_formatter('{x:g}')
  axes.xaxis.set_minor_locator(NullLocator())
  axes.margins(x=0.25, y=0.12)
  axes.grid(alpha=0.3)
  _write_names(axes, names)


def _write_names(axes: Any, names: list[tuple]) -> None:
  """Writes each name beside its point, where it meets no other and no edge."""
  figure = axes.figure
  figure.draw_without_rendering()  # else nobody knows how large a text is
  shown = axes.transData.transform
  corners = [shown(x[:2]) - 4 for x in names]
  taken = [Bbox.from_bounds(left, low, 8, 8) for left, low in corners]
  inside = axes.get_window_extent()
  for x, y, name, color in names:
    for side, up in _PLACES:
      far = {'arrowstyle': '-', 'color': color, 'lw': 0.5, 'shrinkB': 3}
      text = axes.annotate(
        name,
        (x, y),
        (6 * side, up),
        arrowprops=far if abs(up) > 12 else None,
        textcoords='offset points',
        ha={1: 'left', 0: 'center', -1: 'right'}[side],
        va='center',
        fontsize=8,
        color=color,
        bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 0.5},
      )
      box = _box(text)
      fits = inside.x0 < box.x0 and box.x1 < inside.x1
      if fits and not any(box.overlaps(other) for other in taken):
        break
      text.remove()
    else:
      text = axes.annotate(name, (x, y), fontsize=8, color=color)
    taken.append(_box(text))


def _box(text: Any) -> Bbox:
  """Where a text is, without the line to its point."""
  text.get_window_extent()  # which puts it there
  return Text.get_window_extent(text)


def picture(results: dict, path: Any) -> None:
  """A panel for each group of what is shown."""
  found = {
    name: pareto_report.select_shown(searches)
    for name, searches in pareto_report.groups(results).items()
  }
  found = {name: x for name, x in found.items() if len(x) > 2}
  if not found:
    return
  shape = {'figsize': (10, 5 * len(found)), 'squeeze': False}
  with harness.draw(path, len(found), 1, dpi=110, **shape) as (_, grid):
    for axes, (name, searches) in zip(grid[:, 0], found.items(), strict=True):
      axes.set_title(name, fontsize=10)
      axes.set_xlabel('optimizer state, MiB')
      axes.set_ylabel('test loss, nats per byte')
      _panel(axes, searches)
    _legend(grid[0, 0])
