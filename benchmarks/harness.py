"""What all benchmarks share: machine, results, timing, tables and pictures.

Results are JSON files. An interrupted benchmark continues from them, and tables
and pictures are made from the files alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import time
from typing import Any

import jax
import matplotlib
import numpy as np
from rich import progress

matplotlib.use('Agg')  # no window
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
DOCS = ROOT / 'docs'
MIB, GB = 2**20, 1e9


def describe_machine() -> dict[str, Any]:
  """Processor, cores, devices and versions, as JSON takes them."""
  packages = ('jax', 'jaxlib', 'optax', 'flax', 'numpy')
  return {
    'processor': _name_processor(),
    'cores': os.cpu_count(),
    'devices': [device.device_kind for device in jax.devices()],
    'system': platform.platform(),
    'python': platform.python_version(),
    **{name: importlib.metadata.version(name) for name in packages},
  }


def _name_processor() -> str:
  """The processor's name, where the system tells it."""
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return platform.processor()
  names = [x.split(':', 1)[1].strip() for x in lines if 'model name' in x]
  return names[0] if names else platform.processor()


# --- Results -----------------------------------------------------------------


def settings_of(args: Any, *choices: str) -> dict[str, Any]:
  """Arguments as JSON keeps them.

  Left out are paths, and those `choices` that only say which rows are measured.
  """
  leave = ('out', 'docs', *choices)
  kept = {k: v for k, v in dataclasses.asdict(args).items() if k not in leave}
  return json.loads(json.dumps(kept))


def load_results(path: str | pathlib.Path, **same: Any) -> dict[str, Any]:
  """Loads what an earlier run left, or begins anew.

  Raises:
    ValueError: the file's entries are not those of `same`, such as `settings`.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return {'machine': describe_machine(), **same}
  results = json.loads(path.read_text())
  for name, value in same.items():
    if results.setdefault(name, value) != value:  # older files lack some
      raise ValueError(
        f'{path} holds {name}={results[name]}, not {value}: delete it or name '
        'another --out'
      )
  return results


def save_results(path: str | pathlib.Path, results: Any, indent: Any = 1):
  """Writes JSON, all of it or nothing."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_suffix('.new')
  new.write_text(json.dumps(results, indent=indent) + '\n')
  new.rename(path)


# --- Timing ------------------------------------------------------------------


def track(
  values: Iterable[Any], what: str, total: int | None = None
) -> Iterable[Any]:
  """The values, with a bar that shows how many are done."""
  return progress.track(values, what, total, transient=True)


def time_call(f: Callable[..., Any], *args: Any) -> tuple[float, Any]:
  """The seconds of one call, and what it returns."""
  start = time.perf_counter()
  result = jax.block_until_ready(f(*args))
  return time.perf_counter() - start, result


def median_seconds(f: Callable[..., Any], *args: Any, least: float) -> float:
  """The median of repeated calls that take `least` seconds, the first apart."""
  time_call(f, *args)
  times: list[float] = []
  while not times or (sum(times) < least and len(times) < 50):
    times.append(time_call(f, *args)[0])
  return float(np.median(times))


class Runner:
  """A compiled training step whose every run is timed.

  The program takes (params, state, *others) and returns what it updated first.
  """

  def __init__(self, program: Callable[..., Any], params: Any, state: Any):
    self.program, self.carry = program, (params, state)
    self.times: list[float] = []

  def step(self, *others: Any) -> None:
    seconds, result = time_call(self.program, *self.carry, *others)
    self.carry = result[:2]
    self.times.append(seconds)


# --- Tables and pictures -----------------------------------------------------


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """A Markdown table."""
  cells = [[cell.replace('|', '\\|') for cell in row] for row in (head, *rows)]
  lines = [f'| {" | ".join(row)} |' for row in cells]
  lines.insert(1, '|' + '---|' * len(cells[0]))
  return '\n'.join(lines)


def table_of(
  rows: Iterable[dict], columns: Mapping[str, str | Callable[[dict], str]]
) -> str:
  """A Markdown table of rows of results.

  Each column is what makes its cell, or a format of the row's values.
  """
  cell = lambda column, row: (
    column.format(**row) if isinstance(column, str) else column(row)
  )
  lines = [[cell(column, row) for column in columns.values()] for row in rows]
  return table(columns, lines)


def megabytes(name: str, digits: int = 2) -> Callable[[dict], str]:
  """A column of bytes in MiB."""
  return lambda row: f'{row[name] / MIB:.{digits}f}'


def gigabytes(name: str, digits: int = 2) -> Callable[[dict], str]:
  """A column of bytes in GB."""
  return lambda row: f'{row[name] / GB:.{digits}f}'


def fill_page(path: str | pathlib.Path, texts: dict[str, str]) -> None:
  """Puts each text between `<!-- NAME begins -->` and `<!-- NAME ends -->`."""
  path = pathlib.Path(path)
  page = path.read_text()
  for name, text in texts.items():
    begin, end = f'<!-- {name} begins -->', f'<!-- {name} ends -->'
    if begin not in page or end not in page:
      raise ValueError(f'{path} lacks the lines {begin} and {end}')
    before, rest = page.split(begin)
    page = f'{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}'
  path.write_text(page)


@contextlib.contextmanager
def draw(
  path: str | pathlib.Path,
  rows: int = 1,
  columns: int = 1,
  *,
  dpi: int = 110,
  layout: str | None = 'constrained',
  **options: Any,
) -> Iterator[tuple[Any, Any]]:
  """Yields a figure and its axes, then writes the picture."""
  figure, axes = plt.subplots(rows, columns, layout=layout, **options)
  yield figure, axes
  figure.savefig(path, dpi=dpi)
  plt.close(figure)


def picture(*panels: int, **options: Any) -> Callable[..., Any]:
  """Makes (results, path) -> None of a function that draws (axes, results)."""

  def decorate(fill: Callable[[Any, Any], None]) -> Callable[..., None]:
    @functools.wraps(fill)
    def write(results: Any, path: str | pathlib.Path) -> None:
      with draw(path, *panels, **options) as (_, axes):
        fill(axes, results)

    return write

  return decorate


def draw_ranges(
  axes: Any,
  ranges: Mapping[str, tuple[float, float, float]],
  names: Iterable[str],
  shift: float = 0.0,
  **style: Any,
) -> None:
  """A line for each name: a dot at the middle of its three numbers.

  Args:
    axes: what to draw on; names stand from above to below.
    ranges: from a name to its least, middle and largest number.
    names: all names, those without a range too.
    shift: how far below its name a line stands, of a line's height.
    **style: the dots', and the lines' color.
  """
  names = list(names)
  at = [names.index(name) + shift for name in ranges]
  least, middle, most = zip(*ranges.values(), strict=True)
  (dots,) = axes.plot(middle, at, 'o', markersize=5, **style)
  axes.hlines(at, least, most, color=dots.get_color(), linewidth=2, alpha=0.5)
  axes.set_yticks(range(len(names)), names)
  axes.set_ylim(len(names) - 0.5, -0.5)
  axes.grid(axis='x', which='both', linewidth=0.3)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
  """The points that no other beats in both coordinates."""
  kept, least = [], math.inf
  for x, y in sorted(points):
    if y < least:
      kept.append((x, y))
      least = y
  return kept


def next_to(path: str | pathlib.Path, suffix: str) -> pathlib.Path:
  """The picture or table beside a JSON file."""
  return pathlib.Path(path).with_suffix(suffix)
