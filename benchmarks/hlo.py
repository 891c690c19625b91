"""What crosses devices in a compiled program, read from its text.

Follows the program from its entry through loops and branches. A collective
that the compiler has cut in a start, steps in between and a done is one, known
by its channel; those of one computation are as many as they are lines. Loops
count as often as they turn, where the text tells.
"""

from collections.abc import Callable, Iterator
import math
import re
from typing import NamedTuple


class Collective(NamedTuple):
  """One collective, as one device sees it."""

  kind: str
  elements: int  # of its largest array, operand or result
  sent: float  # bytes that a device sends if devices form a ring
  times: int = 1  # how often a run of the program has it


class Transfer(NamedTuple):
  """What one operation moves between a device and the memory of its host."""

  sends: bool  # to the host
  size: float  # bytes
  times: int = 1  # how often a run of the program has it


Found = dict[str, Collective]

_KINDS = (
  'all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|'
  'collective-permute|collective-broadcast'
)
_COLLECTIVE = re.compile(rf'= (.*?) ({_KINDS})(-start)?\(')
_COMPUTATION = re.compile(r'^(ENTRY )?(%?[\w.\-]+) \(.*\{$')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition)=(%?[\w.\-]+)')
_MOVED = re.compile(
  r'= \((.*)\) (copy|dynamic-slice|dynamic-update-slice)-start\('
)
_ON_HOST = 'S(5)'  # the memory space, in a layout
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRUE_FALSE = re.compile(r'(?:true|false)_computation=(%?[\w.\-]+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LIMIT = re.compile(r'= s32\[\]\S* constant\((\d+)\)')


def collectives(text: str, devices: int, branches: str = 'dear') -> Found:
  """Returns a program's collectives by channel.

  Args:
    text: of a compiled program, `compiled.as_text()`.
    devices: how many it runs on.
    branches: of every conditional, take the 'cheap' one, the 'dear' one, or
      'all' of them; by the bytes that they send.
  """
  choose: Callable[[list[Found]], Found] = {
    'cheap': lambda found: min(found, key=sent),
    'dear': lambda found: max(found, key=sent),
    'all': lambda found: _join(*found),
  }[branches]
  entry, computations = _computations(text)

  def walk(name: str) -> Found:
    own: Found = {}
    return _join(*[of_line(name, line, own) for line in computations[name]])

  def of_line(name: str, line: str, own: Found) -> Found:
    one = collective(line, devices, 'all-reduce-scatter' in name)
    # The compiler makes several of one with many arrays, on one channel.
    one = {f'{k}.{len(own)}' if k in own else k: c for k, c in one.items()}
    own |= one
    taken = _branches(line)
    if taken:
      return choose([walk(branch) for branch in taken])
    called = [c for c in _CALLED.findall(line) if c in computations]
    inner = _join(*map(walk, called))
    if ' while(' in line:
      inner = _repeat(inner, trips(line, computations) or 1)
    return _join(one, inner)

  return walk(entry)


def transfers(text: str) -> list[Transfer]:
  """Returns what a program moves between its device and the host."""
  found = [(_transfer(line), times) for line, times in _lines(text)]
  return [x._replace(times=times) for x, times in found if x is not None]


def _transfer(line: str) -> Transfer | None:
  moved = _MOVED.search(line)
  if moved is None or _ON_HOST not in line:
    return None
  types = re.findall(r'[a-z]\w*\[[\d,]*\]\S*', moved[1])
  # (result, operand, ..), ((operand, ..), result, ..), ((operand, update, ..
  one = types[
    {'copy': 0, 'dynamic-slice': -2, 'dynamic-update-slice': 1}[moved[2]]
  ]
  sends = moved[2] == 'dynamic-update-slice' or _ON_HOST in one
  ((size, wide, _),) = _arrays(one)
  return Transfer(sends, size * wide)


def _lines(text: str) -> Iterator[tuple[str, int]]:
  """Yields a program's lines, and how often a run has each."""
  entry, computations = _computations(text)

  def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
    for line in computations[name]:
      yield line, times
      more = (trips(line, computations) or 1) if ' while(' in line else 1
      for called in (*_CALLED.findall(line), *_branches(line)):
        if called in computations:
          yield from walk(called, times * more)

  return walk(entry, 1)


def sent(found: Found) -> float:
  """Returns the bytes that a device sends in all."""
  return sum(c.sent * c.times for c in found.values())


def largest(found: Found) -> int:
  """Returns the elements of the largest array in any collective."""
  return max((c.elements for c in found.values()), default=0)


def collective(line: str, devices: int, scatters: bool = False) -> Found:
  """Returns the collective that a line starts, if it does.

  `scatters` says that a slice of an all-reduce is all that is kept: TPUs have
  such a pair as one reduce-scatter.
  """
  match = _COLLECTIVE.search(line)
  if not match:
    return {}
  result, kind, start = match.groups()
  arrays = [x for x in _arrays(result) if not (start and x[2] == '')]
  if start and kind in ('all-gather', 'collective-permute'):
    arrays = arrays[len(arrays) // 2 :]  # operands come first
  n = group_size(line, devices)
  if kind == 'reduce-scatter':
    arrays = [(size * n, width, dims) for size, width, dims in arrays]
  if kind == 'all-reduce' and scatters:
    kind = 'reduce-scatter'
  size = sum(size * width for size, width, _ in arrays)
  # An all-to-all returns one array in parts, others may carry several arrays.
  most = sum if 'all-to-all' in kind else max
  channel = re.search(r'channel_id=(\d+)', line)
  key = channel[1] if channel else line.split('=')[0].strip()
  hops = {'all-reduce': 2 * (n - 1) / n}
  hops |= dict.fromkeys(('collective-permute', 'collective-broadcast'), 1.0)
  ring = size * hops.get(kind, (n - 1) / n)
  return {key: Collective(kind, most(a[0] for a in arrays), ring)}


def group_size(line: str, devices: int) -> int:
  """Returns how many devices take part in a collective together."""
  groups = re.search(r'replica_groups=(.*)', line)
  text = groups[1] if groups else ''
  if match := re.match(r'\[\d+,(\d+)\]', text):
    return int(match[1])
  if match := re.match(r'\{\{([\d,]+)\}', text):
    return len(match[1].split(','))
  if match := re.match(r'mesh\[([^\]]*)\] ?\{([^}]*)\}', text):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
    # An axis may be split: 'fsdp':(1)2 is a half of it.
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
    return math.prod(int(part or sizes[name]) for name, part in axes)
  return devices


def trips(line: str, computations: dict[str, list[str]]) -> int | None:
  """Returns how often a while loop turns, None if the text does not tell."""
  known = _TRIPS.search(line)
  if known:
    return int(known[1])
  condition = re.search(r'condition=(%?[\w.\-]+)', line)
  lines = computations.get(condition[1], []) if condition else []
  limits = [m[1] for m in map(_LIMIT.search, lines) if m]
  counts_up = any('direction=LT' in x for x in lines)
  return int(limits[0]) if len(limits) == 1 and counts_up else None


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
  """Returns the entry's name, and the lines of every computation."""
  entry, found, lines = '', {}, []
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      lines = found[match[2]] = []
      entry = match[2] if match[1] else entry
    lines.append(line)
  if not entry:
    raise ValueError('text has no ENTRY; give it compiled.as_text().')
  return entry, {name: lines[1:] for name, lines in found.items()}


def _branches(line: str) -> list[str]:
  listed = _BRANCHES.search(line)
  if listed:
    return [name.strip() for name in listed[1].split(',')]
  return _TRUE_FALSE.findall(line)


def _arrays(text: str) -> list[tuple[int, float, str]]:
  """Returns (elements, bytes of one, dimensions) of every array in a type."""
  return [
    (math.prod(int(n) for n in dims.split(',') if n), width(dtype), dims)
    for dtype, dims in re.findall(r'([a-z]+[\w]*)\[([\d,]*)\]', text)
  ]


def width(dtype: str) -> float:
  """Returns the bytes of an element of an HLO dtype such as bf16 or pred."""
  bits = re.search(r'\d+', dtype)
  return int(bits[0]) / 8 if bits else 1.0


def _repeat(found: Found, times: int) -> Found:
  return {k: c._replace(times=c.times * times) for k, c in found.items()}


def _join(*parts: Found) -> Found:
  """Returns all collectives; parts of one that was cut are one."""
  joined: Found = {}
  for part in parts:
    for key, c in part.items():
      old = joined.get(key, c)
      joined[key] = max(old, c, key=lambda x: x.times)
  return joined
