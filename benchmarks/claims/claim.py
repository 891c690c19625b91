"""What a claim is, how its verdict is found, and where its results are kept.

NAME.py measures one claim: its `run` returns checks, which hold numbers and
bounds, and the verdict follows from them alone. NAME.md has the text of the
claim and of the result, with names of numbers in braces. Results and pictures
go to runs/evidence, which git ignores; `__main__` writes docs/evidence.md from
them.
"""

from collections.abc import Sequence
import dataclasses
import hashlib
import json
import math
import pathlib
import statistics
from typing import Any, NamedTuple

from benchmarks import harness

HERE = pathlib.Path(__file__).resolve().parent
CACHE = harness.ROOT / 'runs' / 'evidence'
# Other benchmarks' results, which are quoted.
PROJECTORS, PARETO, PLAN = QUOTED = tuple(
  harness.RESULTS / f'{name}.json' for name in ('projectors', 'pareto', 'plan')
)
# What several scripts share.
_SHARED = ('counter', 'theorems', 'training', 'tuned')
HELPERS = [HERE / f'{name}.py' for name in _SHARED]
HELPERS += [
  HERE.parent / f'{name}.py'
  for name in ('programs', 'plan_check', 'pareto_report', 'corpora')
]


NEAR = 2.0  # standard errors; nearer to a bound than that tells nothing


@dataclasses.dataclass(frozen=True)
class Check:
  """A number and where the claim says that it lies, bounds included."""

  what: str
  measured: float | None  # None where it is no finite number
  least: float | None = None
  most: float | None = None
  noise: float = 0.0  # the standard error of the number

  @property
  def holds(self) -> bool:
    """Whether the number lies where it should; no number never does."""
    x = self.measured
    if x is None or not math.isfinite(x):
      return False
    above = self.least is None or x >= self.least
    return above and (self.most is None or x <= self.most)

  @property
  def is_close(self) -> bool:
    """Whether noise may have put the number on its side of a bound."""
    x = self.measured
    if x is None or not math.isfinite(x) or not self.noise:
      return False
    bounds = [y for y in (self.least, self.most) if y is not None]
    return min(abs(x - y) for y in bounds) < NEAR * self.noise

  @property
  def verdict(self) -> str:
    """'yes', 'no' or 'too close to call'."""
    if self.is_close:
      return 'too close to call'
    return 'yes' if self.holds else 'no'

  @property
  def expected(self) -> str:
    """The bounds in words."""
    if self.least is None:
      return f'at most {number(self.most)}'
    if self.most is None:
      return f'at least {number(self.least)}'
    return f'{number(self.least)} to {number(self.most)}'


Table = list[Sequence[Any]]  # the first row names the columns


class Found(NamedTuple):
  """What a script's `run` returns.

  Attributes:
    checks: from which the verdict follows.
    data: what the script's `picture` draws.
    table: of strings and numbers.
    numbers: what NAME.md names besides the script's constants.
  """

  checks: Sequence[Check]
  data: Any = None
  table: Table = []
  numbers: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of a paper and what was measured of it."""

  title: str
  source: str
  prediction: str
  measurement: str
  checks: tuple[Check, ...]
  table: tuple[tuple[str, ...], ...] = ()  # the first row names the columns
  notes: tuple[str, ...] = ()
  caption: str = ''  # of the picture
  data: Any = None  # what the picture shows
  name: str = ''  # of the script
  seconds: float = 0.0
  machine: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def verdict(self) -> str:
    """'holds', 'partly', 'fails', or 'too close to call'.

    The last if some checks are and no other fails.
    """
    found = {check.verdict for check in self.checks}
    if found == {'yes'}:
      return 'holds'
    if found and 'no' not in found:
      return 'too close to call'
    return 'partly' if 'yes' in found else 'fails'


def number(x: Any) -> str:
  """A number as a reader likes it; text as it is."""
  if isinstance(x, str):
    return x
  if x is None or not math.isfinite(x):
    return 'not finite'
  if isinstance(x, int) or (x == round(x) and abs(x) < 1e6):
    return f'{round(x):,}'
  if 1e-3 <= abs(x) < 1e5:
    return f'{x:,.4g}'
  return f'{x:.2e}'


def ratio_of_means(
  over: Sequence[float], under: Sequence[float]
) -> tuple[float, float]:
  """A ratio of two means, and its standard error.

  The spread of a single seed is taken for that of the other side's.
  """
  ratio = statistics.fmean(over) / statistics.fmean(under)
  if not all(map(math.isfinite, (*over, *under))):
    return math.inf, 0.0
  spreads = [statistics.stdev(x) if len(x) > 1 else 0.0 for x in (over, under)]
  known = [x for x in spreads if x] or [0.0]
  errors = [
    (spread or max(known)) / len(x) ** 0.5 / statistics.fmean(x)
    for spread, x in zip(spreads, (over, under), strict=True)
  ]
  return ratio, ratio * math.hypot(*errors)


def near(what: str, measured: float, expected: float, rtol: float) -> Check:
  """A check that a number is what is expected, but for a share of it."""
  margin = rtol * abs(expected)
  return Check(what, measured, expected - margin, expected + margin)


# --- Words -------------------------------------------------------------------

_FIELDS = {
  'Source': 'source',
  'Predicted': 'prediction',
  'Measured': 'measurement',
  'Picture': 'caption',
}


def read_words(name: str, numbers: dict[str, Any]) -> dict[str, Any]:
  """The fields of a claim that NAME.md has, its numbers filled in."""
  text = (HERE / f'{name}.md').read_text().format(**numbers)
  title, *blocks = (' '.join(block.split()) for block in text.split('\n\n'))
  fields: dict[str, Any] = {'title': title.removeprefix('# '), 'notes': ()}
  for block in blocks:
    if block.startswith('- '):
      fields['notes'] += (block[2:],)
    else:
      field, rest = block.split(': ', 1)
      fields[_FIELDS[field]] = rest
  return fields


# --- Results -----------------------------------------------------------------


def to_dict(claim: Claim) -> dict[str, Any]:
  """The claim as JSON takes it, the verdict with it."""
  fields = dataclasses.asdict(claim) | {'verdict': claim.verdict}
  return json.loads(json.dumps(_finite(fields)))


def from_dict(fields: dict[str, Any]) -> Claim:
  """The claim that `to_dict` wrote; its verdict is found anew."""
  fields = {k: v for k, v in fields.items() if k not in ('verdict', 'digest')}
  fields['checks'] = tuple(Check(**check) for check in fields['checks'])
  fields['table'] = tuple(tuple(row) for row in fields['table'])
  fields['notes'] = tuple(fields['notes'])
  return Claim(**fields)


def _finite(x: Any) -> Any:
  """JSON has no NaN and no infinity."""
  if isinstance(x, dict):
    return {k: _finite(v) for k, v in x.items()}
  if isinstance(x, list | tuple):
    return [_finite(v) for v in x]
  return None if isinstance(x, float) and not math.isfinite(x) else x


def digest(name: str) -> str:
  """A hash of the sources that a claim's numbers may depend on."""
  folders = [harness.ROOT / 'subspace_optax', harness.ROOT / 'examples']
  files = [*HELPERS, HERE / f'{name}.py', HERE / f'{name}.md']
  files += [path for folder in folders for path in folder.rglob('*.py')]
  files += [path for path in QUOTED if path.exists()]
  text = b''.join(path.read_bytes() for path in sorted(files))
  return hashlib.sha256(text).hexdigest()


def load(name: str) -> Claim | None:
  """The claim of an earlier run of the same sources, if there is one."""
  path = CACHE / f'{name}.json'
  if not path.exists():
    return None
  saved = json.loads(path.read_text())
  return from_dict(saved) if saved['digest'] == digest(name) else None


def measure(script: Any) -> Claim:
  """Runs a script's `run`; keeps the claim and its picture, and prints it."""
  name = pathlib.Path(script.__file__).stem
  sources = {'digest': digest(name)}
  seconds, found = harness.time_call(script.run)
  claim = Claim(
    checks=tuple(found.checks),
    table=tuple(tuple(map(number, row)) for row in found.table),
    data=found.data,
    name=name,
    seconds=round(seconds, 1),
    machine=harness.describe_machine(),
    **read_words(name, vars(script) | found.numbers),
  )
  harness.save_results(CACHE / f'{name}.json', to_dict(claim) | sources)
  script.picture(found.data, CACHE / f'{name}.png')
  print(text(claim), flush=True)
  return claim


def text(claim: Claim) -> str:
  """The claim as it is printed."""
  lines = [
    f'claim        {claim.title}',
    f'source       {claim.source}',
    f'predicted    {claim.prediction}',
    f'measured     {claim.measurement}',
  ]
  for check in claim.checks:
    mark = {'yes': '+', 'no': '-'}.get(check.verdict, '?')
    lines.append(
      f'  {mark} {check.what}: {number(check.measured)} ({check.expected})'
    )
  return '\n'.join([*lines, f'verdict      {claim.verdict}', ''])
