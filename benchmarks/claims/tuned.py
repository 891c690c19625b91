"""Losses of the Pareto benchmark, which claims quote: tuned, long runs."""

from collections.abc import Sequence
import json
import math
import shlex
import statistics
from typing import Any

from benchmarks import corpora
from benchmarks import pareto_report
from benchmarks.claims import claim

SIZE, MULTIPLE = '0.1M', 1


def losses(methods: Sequence[str]) -> dict[str, dict[str, list[float]]]:
  """Test losses of the seeds at the best of every method, by corpus."""
  found: dict[str, dict[str, list[float]]] = {}
  for search in json.loads(claim.PARETO.read_text())['searches']:
    first = (search['size'], search['multiple']) == (SIZE, MULTIPLE)
    if first and search['method'] in methods:
      values = pareto_report.losses(search)
      found.setdefault(search['corpus'], {})[search['method']] = values
  return found


def perplexities(methods: dict[str, str]) -> dict[str, list[float]]:
  """Perplexities per byte of every seed by title, on the first corpus."""
  found = losses([*methods.values()]).get(next(iter(corpora.CORPORA)), {})
  missing = [name for name in methods.values() if name not in found]
  if missing:
    raise LookupError(
      f'{claim.PARETO.name} has no rows of {missing}; run '
      f'python -m benchmarks.pareto --methods {shlex.join(missing)}'
    )
  return {
    title: [math.exp(x) for x in found[name]] for title, name in methods.items()
  }


def draw(axes: Any, found: dict[str, list[float]]) -> None:
  """A point for every seed, and a line at the mean."""
  for i, values in enumerate(found.values()):
    axes.hlines(statistics.fmean(values), i - 0.3, i + 0.3, f'C{i}', lw=2)
    axes.plot([i] * len(values), values, 'k.')
  names = [name.replace(', ', ',\n') for name in found]
  axes.set_xticks(range(len(names)), names, fontsize=8)
  axes.set_ylabel('test perplexity per byte')
