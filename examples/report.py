"""What a run leaves to look at: a live line, JSON lines, pictures."""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import time
from typing import Any

import matplotlib

matplotlib.use('Agg')  # no window

import matplotlib.pyplot as plt
import rich.console
import rich.progress
import rich.table

import trackers

console = rich.console.Console(highlight=False)
Rows = list[dict]


def mute():
  """Prints and writes nothing from here on: another process does."""
  console.quiet = True


def say(text: str):
  """Prints a line as it is, however wide the terminal."""
  console.print(text, soft_wrap=True, markup=False)


# --- While the run goes ------------------------------------------------------


class LiveLine:
  """A progress bar with numbers; where there is no terminal, plain lines."""

  def __init__(self, name: str, start: int, steps: int, unit: str):
    columns = rich.progress
    self._progress = columns.Progress(
      columns.TextColumn('{task.description}'),
      columns.BarColumn(bar_width=16),
      columns.MofNCompleteColumn(),
      columns.TextColumn('{task.fields[numbers]}'),
      columns.TimeElapsedColumn(),
      columns.TextColumn('left'),
      columns.TimeRemainingColumn(),
      console=console,
      disable=not console.is_terminal,
    )
    self._task = self._progress.add_task(
      name, total=steps, completed=start, numbers='compiling'
    )
    self._steps, self._unit = steps, unit
    self._row: dict[str, float] = {}  # the newest number of each name

  def __enter__(self):
    self._progress.start()
    return self

  def __exit__(self, *unused):
    self._progress.stop()

  def compile(self, program: Callable[[], Any]) -> Any:
    """What `program` makes; says that it is made, and how long that took."""
    if not console.is_terminal:
      say('compiling')
    start = time.perf_counter()
    made = program()
    say(f'compiled in {time.perf_counter() - start:.1f} s')
    self._progress.update(self._task, numbers='first steps')
    return made

  def advance(self, step: int):
    self._progress.update(self._task, completed=step)

  def show(self, row: Mapping[str, float]):
    self._row |= row
    numbers = describe(self._row, self._unit)
    self._progress.update(self._task, numbers=numbers)
    if not console.is_terminal:
      if speed := row.get('steps_per_second'):
        numbers += f'  left {(self._steps - row["step"]) / speed:.0f} s'
      say(f'step {row["step"]}/{self._steps}  {numbers}')


_SHOWN = {
  'validation_accuracy': 'accuracy {:.1%}',
  'tokens_per_second': '{:,.0f} tokens/s',
  'lr': 'lr {:.1e}',
  'captured_energy': 'captured energy {:.0%}',
}


def describe(row: Mapping[str, float], unit: str) -> str:
  names = {'loss': 'loss', 'validation_loss': 'validation'}
  losses = [f'{names[k]} {row[k]:.3f}' for k in names if k in row]
  rest = [text.format(row[k]) for k, text in _SHOWN.items() if k in row]
  return '  '.join([*losses, unit, *rest])


class Meter:
  """Steps per second of the training alone, evaluations left out."""

  def __init__(self, step: int):
    self.seconds, self.steps = 0.0, 0
    self.restart(step)

  def restart(self, step: int):
    self._time, self._step = time.perf_counter(), step

  def read(self, step: int) -> float:
    """The speed since the last reading."""
    seconds, steps = time.perf_counter() - self._time, step - self._step
    self.seconds, self.steps = self.seconds + seconds, self.steps + steps
    self.restart(step)
    return steps / seconds

  @property
  def mean(self) -> float:
    return self.steps / self.seconds if self.steps else 0.0


class Metrics:
  """JSON lines, one a row, and the same numbers in all trackers."""

  def __init__(self, c: Any, step: int):
    path = pathlib.Path(c.out, 'metrics.jsonl')
    rows = [row for row in read_rows(path) if row['step'] <= step]
    write_text(path, ''.join(json.dumps(row) + '\n' for row in rows))
    self._file = open(os.devnull if console.quiet else path, 'a')
    self._trackers = [] if console.quiet else trackers.make(c, step)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._file.close()
    for tracker in self._trackers:
      tracker.close()

  def write(self, row: Mapping[str, float]):
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()
    numbers = {k: x for k, x in row.items() if k != 'step'}
    for tracker in self._trackers:
      tracker.write(int(row['step']), numbers)


def read_rows(path: pathlib.Path) -> Rows:
  """Every whole line; a run that was killed may have left half of one."""
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


def write_text(path: pathlib.Path, text: str):
  """Replaces a file in one go: a reader sees the old one or the new one."""
  if console.quiet:
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_name(path.name + '.tmp')
  draft.write_text(text)
  os.replace(draft, path)


def write_json(path: pathlib.Path, content: Mapping):
  write_text(path, json.dumps(content, indent=2) + '\n')


# --- At the end --------------------------------------------------------------


def table(rows: Sequence[Mapping[str, str]]):
  """One line a row, under the names of its cells."""
  made = rich.table.Table(box=None, padding=(0, 2, 0, 0))
  for i, name in enumerate(rows[0]):
    made.add_column(name, justify='right' if i else 'left', no_wrap=True)
  for row in rows:
    made.add_row(*row.values())
  console.print(made)


def results_row(s: Mapping) -> dict[str, str]:
  """The line of one optimizer."""
  state, adam = s['memory']['state'], s['memory']['adam']
  bits = s['validation_bits_per_byte']
  return {
    'optimizer': s['optimizer'],
    'nats/token': f'{s["validation_loss"]:.3f}',
    'bits/byte': '-' if bits is None else f'{bits:.3f}',
    'state MiB': f'{state / 2**20:.2f}',
    'of Adam': f'{state / adam:.3f}',
    'tokens/s': f'{s["tokens_per_second"]:,.0f}',
  }


def column(rows: Rows, name: str) -> tuple[list, list]:
  chosen = [row for row in rows if name in row]
  return [row['step'] for row in chosen], [row[name] for row in chosen]


def draw_curves(axes, runs: Mapping[str, Rows], bar: float | None):
  """Validation as dots, training as faint lines, the trigram as dashes."""
  for i, (name, rows) in enumerate(runs.items()):
    color = f'C{i}'
    axes.plot(*column(rows, 'loss'), color=color, alpha=0.35, linewidth=1)
    axes.plot(
      *column(rows, 'validation_loss'),
      'o-',
      color=color,
      markersize=4,
      label=name,
    )
  if bar is not None:
    axes.axhline(bar, color='black', linestyle='--', linewidth=1)
    axes.annotate(
      f'trigram {bar:.2f}',
      (0.99, bar),
      xycoords=('axes fraction', 'data'),
      ha='right',
      va='bottom',
    )
  axes.set(
    xlabel='step',
    ylabel='loss in nats per token',
    title='validation (dots) and training',
  )
  axes.legend(frameon=False)


def draw_memory(axes, memory: Mapping[str, Mapping[str, int]]):
  """Bytes of each optimizer's state, and Adam's as a line."""
  adam = max(m['adam'] for m in memory.values()) / 2**20
  sizes = [m['state'] / 2**20 for m in memory.values()]
  bars = axes.barh(
    list(memory), sizes, color=[f'C{i}' for i in range(len(sizes))]
  )
  axes.bar_label(bars, fmt='%.2f', padding=3)
  axes.axvline(adam, color='black', linestyle='--', linewidth=1)
  axes.invert_yaxis()
  axes.margins(x=0.15)
  axes.set(xlabel='MiB', title='optimizer state (dashed: Adam)')


def picture(
  path: pathlib.Path,
  runs: Mapping[str, Rows],
  bar: float | None,
  memory: Mapping[str, Mapping[str, int]] | None = None,
):
  """Writes a PNG of the curves and, when given, of the memory beside them."""
  if console.quiet:
    return
  style: Any = {
    'font.size': 11,
    'axes.spines.top': False,
    'axes.spines.right': False,
  }
  with plt.rc_context(style):
    figure, axes = plt.subplots(
      1,
      2 if memory else 1,
      squeeze=False,
      layout='constrained',
      figsize=(12, 4.5) if memory else (7, 4.5),
      width_ratios=(3, 2)[: 2 if memory else 1],
    )
    draw_curves(axes[0, 0], runs, bar)
    if memory:
      draw_memory(axes[0, 1], memory)
    figure.savefig(path, dpi=150)
    plt.close(figure)
