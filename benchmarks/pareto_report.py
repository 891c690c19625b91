"""The tables of the Pareto benchmark."""

from collections.abc import Sequence
import math
import re
import statistics
from typing import Any, NamedTuple

import numpy as np

from benchmarks import contenders
from benchmarks import corpora
from benchmarks import harness
from benchmarks.harness import MIB

NOTES = """
- **loss** is the test loss in nats per byte, on a text that neither training
  nor the search has seen. It is the mean over the seeds that ran at the
  learning rate and decay with the best validation loss of seed 0. A seed
  changes weights and data.
- **decay** is weight_decay times lr, the share of a weight that a step takes
  away at the peak learning rate.
- **optimizer MiB** is the optimizer state of the whole model. Adam trains
  embedding, head and norms, at one learning rate for all methods, unless a
  method covers the whole model. The moments of this Adam have 8 bits where the
  method's name says 8 or 4 bits, and in `normuon_no_momentum`. The state of
  `lora` includes its factors, that of `rso` its B.
- **all MiB** adds the weights and the memory that a compiled step takes.
- **loss vs adamw** and **z** compare the seeds that both methods ran, since
  some seeds are easier. z is the difference to AdamW's loss over its standard
  error. The error comes from sigma, the standard deviation of one seed, pooled
  over all points of a table that have several seeds. It treats the seeds of two
  methods as independent, which makes z too small if anything. If a method were
  no different from AdamW, z would have Student's t-distribution with sigma's
  degrees of freedom: for one comparison, a z beyond 3.1 would have a chance of
  0.3 % with 86 of them, of 1 % with 11 and of 2 % with 7.
- **AdamW needs** is an upper bound on the tokens that AdamW needs for the same
  loss, as a multiple of the method's. It is interpolated between AdamW's own
  runs of other lengths, linearly in the logarithm of tokens; these lines are
  above any curve that flattens.
- **as AdamW after** is the share of a method's steps after which its training
  loss (of seed 0, the mean of 200 steps) reaches AdamW's last one. The method's
  learning rate has not decayed to 0 at that point.
- **lacks** counts the runs that are missing: neighbours of the best point of
  the search, and seeds at that point.
- **The front** has the methods whose loss is below that of every method with no
  more state.

Methods of Muon's kind have a momentum of 0.95 unless the name says otherwise;
`normuon_4bit` has 0.9. `galore` projects the long side, as optax's does. The
same run of `scale` ended 0.3 % apart on two kinds of processors, on either
corpus.
"""

VARIED = """
How other betas and warmups (a tenth of the steps above) change the loss of
seed 0, at a method's best learning rate and decay.
"""
HEAD = ('method', 'lr', 'decay', 'loss', 'std', 'seeds', 'optimizer MiB')
HEAD += ('all MiB', 'loss vs adamw', 'z', 'state vs adamw', 'AdamW needs')
HEAD += ('as AdamW after', 'lacks')
_CHUNKS = 4  # of 50 steps, whose training losses are one number


def losses(search: dict) -> list[float]:
  """Test losses of all seeds at the best."""
  return [
    math.inf if row['test'] is None else row['test'] for row in at_best(search)
  ]


def at_best(search: dict) -> list[dict]:
  point = (search['best']['lr'], search['best']['decay'])
  return [x for x in search['runs'] if (x['lr'], x['decay']) == point]


def mean(search: dict) -> float:
  return statistics.fmean(losses(search))


class Spread(NamedTuple):
  """How much the losses of one seed vary."""

  sigma: float  # the pooled standard deviation
  free: int  # its degrees of freedom


def spread_of(searches: list[dict]) -> Spread | None:
  """Pooled over all points; None if none has two seeds."""
  points: dict[tuple, list[float]] = {}
  for i, search in enumerate(searches):
    for run in search['runs']:
      if run['test'] is not None:
        point = (i, run['lr'], run['decay'])
        points.setdefault(point, []).append(run['test'])
  several = [x for x in points.values() if len(x) > 1]
  free = sum(len(x) - 1 for x in several)
  squares = sum((len(x) - 1) * statistics.variance(x) for x in several)
  return Spread((squares / free) ** 0.5, free) if free else None


def on_common_seeds(*searches: dict) -> list[list[float]]:
  """Test losses of each search on the seeds that all have: seeds differ."""
  seeds = set.intersection(
    *({row['seed'] for row in at_best(search)} for search in searches)
  )
  common = lambda x: [row for row in at_best(x) if row['seed'] in seeds]
  return [losses(x | {'runs': common(x)}) for x in searches]


def z_score(one: dict, other: dict, spread: Spread | None) -> float | None:
  """The difference of two losses over its standard error; less is better."""
  if not (spread and spread.sigma) or one is other:
    return None
  pair = on_common_seeds(one, other)
  difference = statistics.fmean(pair[0]) - statistics.fmean(pair[1])
  return difference / (spread.sigma * (2 / len(pair[0])) ** 0.5)


def change(one: dict, other: dict) -> str:
  """The first loss over the second one."""
  pair = map(statistics.fmean, on_common_seeds(one, other))
  return f'{100 * (next(pair) / next(pair) - 1):+.2f} %'


def is_ready_made(method: str) -> bool:
  """Whether it is a ready-made optimizer, at any rank, not a variant of one."""
  return ', ' not in re.sub(r', (rank [\d.]+|short side)$', '', method)


def select_ready(searches: list[dict]) -> list[dict]:
  return [search for search in searches if is_ready_made(search['method'])]


def front(searches: list[dict]) -> list[dict]:
  """Those with less loss than all with no more state, the smallest first."""
  size = lambda search: search['memory']['optimizer_bytes']
  kept: list[dict] = []
  for search in sorted(searches, key=lambda x: (size(x), mean(x))):
    if not kept or mean(search) < mean(kept[-1]):
      kept.append(search)
  return kept


def sentence(searches: list[dict]) -> str:
  """The front in words: from how many bytes on which method, with z."""
  spread, kept = spread_of(searches), front(searches)
  parts = []
  for below, search in zip([None, *kept], kept, strict=False):
    size = search['memory']['optimizer_bytes'] / MIB
    text = f'from {size:.3f} MiB on `{search["method"]}` ({mean(search):.4f}'
    z = None if below is None else z_score(search, below, spread)
    parts.append(f'{text}{"" if z is None else f", z {z:.1f}"})')
  return f'The front: {"; ".join(parts)}; z compares each with the one before.'


def tokens_of_adamw(search: dict, adamws: list[dict]) -> str:
  """How many times as many tokens AdamW needs for the loss of a search."""
  alike = ('corpus', 'size', 'batch', 'seq')
  same = [x for x in adamws if all(x[k] == search[k] for k in alike)]
  if len(same) < 2 or search['method'] == 'adamw':
    return '-'
  same.sort(key=lambda x: x['multiple'])
  logs, means = [math.log(x['multiple']) for x in same], [*map(mean, same)]
  if sorted(means, reverse=True) != means:
    return '-'  # longer runs are no better
  found = np.interp(-mean(search), [-x for x in means], logs)
  times = math.exp(found) / search['multiple']
  bound = {logs[0]: '< ', logs[-1]: '> '}.get(float(found), '')
  if bound == '> ' and search['multiple'] == same[-1]['multiple']:
    return '-'  # no longer run is there to tell
  return f'{bound}{times:.2f} x'


def share_of_steps(search: dict, base: dict) -> float | None:
  """The share of steps after which the training loss reaches AdamW's last."""
  curve, target = (_smooth(x) for x in (search, base))
  reached = np.flatnonzero(curve <= target[-1])
  if search is base or not reached.size:
    return None
  return float(reached[0] + _CHUNKS) / (curve.size + _CHUNKS - 1)


def _smooth(search: dict) -> np.ndarray:
  """Training losses of seed 0 at the best, means of a few chunks."""
  (run,) = [row for row in at_best(search) if row['seed'] == 0]
  losses = np.array([math.inf if x is None else x for x in run['curve']])
  return np.convolve(losses, np.full(_CHUNKS, 1 / _CHUNKS), 'valid')


def cells(
  search: dict,
  base: dict | None = None,
  spread: Spread | None = None,
  adamws: Sequence[dict] = (),
) -> list[str]:
  """One line; some of its cells are relative to AdamW's."""
  values, size = losses(search), search['memory']['optimizer_bytes']
  over_adamw = ['-'] * 5
  if base is not None:
    share = 100 * size / base['memory']['optimizer_bytes']
    z, steps = z_score(search, base, spread), share_of_steps(search, base)
    over_adamw = [
      change(search, base),
      '-' if z is None else f'{z:+.1f}',
      f'{share:.0f} %',
      tokens_of_adamw(search, list(adamws)),
      '-' if steps is None else f'{100 * steps:.0f} %',
    ]
  return [
    search['method'],
    f'{search["best"]["lr"]:.3g}',
    f'{search["best"]["decay"]:.2g}',
    f'{mean(search):.4f}',
    f'{statistics.stdev(values):.4f}' if len(values) > 1 else '-',
    str(len(values)),
    f'{size / MIB:.3f}',
    f'{sum(search["memory"].values()) / MIB:.1f}',
    *over_adamw,
    str(search['lacks'] or ''),
  ]


def variations(searches: list[dict]) -> list[list[str]]:
  """How other betas and warmups change seed 0's loss at the method's best."""
  named = {search['method']: search for search in searches}
  rows = []
  for name, search in sorted(named.items()):
    base = named.get(contenders.CONTENDERS[name].varies)
    if base is None:
      continue
    point = lambda x: (x['lr'], x['decay'], x['seed'])
    (same,) = [x for x in at_best(base) if x['seed'] == 0]
    rows += [
      [name, *(_over(run, same, split) for split in _SPLITS)]
      for run in search['runs']
      if point(run) == point(same)
    ]
  return rows


_SPLITS = ('validation', 'test')


def _over(run: dict, base: dict, split: str) -> str:
  if run[split] is None or base[split] is None:
    return 'diverged'
  return f'{100 * (run[split] / base[split] - 1):+.2f} %'


def groups(results: dict) -> dict[str, list[dict]]:
  """The searches of each size, length and corpus, the best first."""
  found: dict[str, list[dict]] = {}
  for search in sorted(results['searches'], key=mean):
    name = '{corpus}, {size}, {multiple:g} x 20 tokens per weight'
    name += ', {steps} steps'
    found.setdefault(name.format(**search), []).append(search)
  return dict(sorted(found.items()))


def adamw(searches: list[dict]) -> dict | None:
  return next((s for s in searches if s['method'] == 'adamw'), None)


def markdown(results: dict[str, Any]) -> str:
  """All groups, one table each."""
  of = results['machine']
  runs = [run for search in results['searches'] for run in search['runs']]
  processors = ' and '.join(sorted({run['processor'] for run in runs}))
  adamws = [s for s in results['searches'] if s['method'] == 'adamw']
  text = (
    f'Measured on {processors}, {of["cores"]} cores, jax {of["jax"]}.\n{NOTES}'
  )
  for name, searches in groups(results).items():
    if all(search['method'] == 'adamw' for search in searches):
      continue  # a length that others are compared with
    spread = spread_of(searches)
    base = adamw(searches)
    rows = [
      cells(search, base, spread, adamws)
      for search in searches
      if not contenders.CONTENDERS[search['method']].varies
    ]
    text += f'\n### {name}\n\n{sentence(select_ready(searches))}\n'
    if spread:
      free = f'{spread.free} degrees of freedom'
      text += f'\nSigma is {spread.sigma:.4f}, with {free}.\n'
    text += f'\n{harness.table(HEAD, rows)}\n'
    if varied := variations(searches):
      text += f'\n{VARIED}\n{harness.table(("method", *_SPLITS), varied)}\n'
  return text


# Kin of `galore` and of `trion`, with one seed; the page of all rows has them.
_LEFT_OUT = ('contrib_galore', 'dion')


def select_shown(searches: list[dict]) -> list[dict]:
  """The ready-made ones; at other ranks only what is on the front."""
  ready = select_ready(searches)
  best = [search['method'] for search in front(ready)]
  return [
    search
    for search in ready
    if (name := search['method']) not in _LEFT_OUT
    and (', rank' not in name or name in best)
  ]


def summary(results: dict[str, Any]) -> str:
  """What is shown of the first corpus, best first, with the other losses."""
  first, second = (
    {search['method']: search for search in _first_searches(results, corpus)}
    for corpus in corpora.CORPORA
  )
  base = first['adamw']['memory']['optimizer_bytes']
  rows = []
  for search in select_shown(sorted(first.values(), key=mean)):
    name = search['method']
    other = second.get(name)
    size = search['memory']['optimizer_bytes']
    rows.append(
      [
        f'`{name}`',
        _with_spread(losses(search)),
        _with_spread(losses(other)) if other else '-',
        f'{size / MIB:.2f}',
        f'{100 * size / base:.0f} %',
      ]
    )
  head = ('', *corpora.CORPORA, 'state, MiB', "of AdamW's")
  return harness.table(head, rows)


def _first_searches(results: dict[str, Any], corpus: str) -> list[dict]:
  """Those of the smallest size and length."""
  place = lambda x: (x['corpus'], x['size'], x['multiple'])
  return [x for x in results['searches'] if place(x) == (corpus, '0.1M', 1)]


def _with_spread(values: list[float]) -> str:
  found = f'{statistics.fmean(values):.3f}'
  if len(values) == 1:
    return found
  return f'{found} ± {statistics.stdev(values):.3f}'
