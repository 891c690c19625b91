"""docs/evidence.md from the claims: a table of all, then a section for each."""

from collections.abc import Sequence
import json
import pathlib
import shutil

from benchmarks import harness
from benchmarks.claims import claim
from benchmarks.harness import DOCS

HEAD = """# Evidence

This page compares what the founding papers claim with what this library
measures. `make evidence` recomputes all numbers and pictures here. Each section
names its script, which you can run by itself. Code derives each verdict from
the checks: *holds* if all do, *fails* if none does, else *partly*. A check of a
mean over seeds that is less than two standard errors from its bound is *too
close to call*, and so is a claim that depends on one. Numbers of papers are
quoted; most experiments here are small, and say so.

Sources: [GaLore](https://arxiv.org/abs/2403.03507) (Zhao et al., 2024, version
2), [Online Subspace Descent](https://arxiv.org/abs/2408.12857) (Liang et al.,
2024), [GoLore](https://arxiv.org/abs/2410.11289) (He et al., 2024), whose
theorems are quoted as Kun Yuan's slides on subspace training give them,
[SubTrack++](https://arxiv.org/abs/2502.01586) (Rajabi et al., 2025), and the
code that their authors published. Anything that a note calls ours is in no
paper.
"""


def markdown(claims: Sequence[claim.Claim]) -> str:
  """The whole page."""
  parts = [HEAD, *_machines(claims), _summary(claims)]
  return '\n'.join([*parts, *map(_section, claims)])


def _machines(claims: Sequence[claim.Claim]) -> list[str]:
  """What the claims were measured on; usually one line."""
  lines = {}
  for c in claims:
    m = c.machine
    devices = ', '.join(sorted(set(m.get('devices', ()))))
    line = (
      f'{m.get("processor")}, {m.get("cores")} cores, {devices}; Python '
      f'{m.get("python")}, jax {m.get("jax")}, optax {m.get("optax")}, flax '
      f'{m.get("flax")}, numpy {m.get("numpy")}'
    )
    lines.setdefault(line, []).append(c)
  return [
    f'Measured on {line}'
    f'{"" if len(lines) == 1 else f" ({len(found)} of the claims)"}.\n'
    for line, found in lines.items()
  ]


def _summary(claims: Sequence[claim.Claim]) -> str:
  head = ('Claim', 'Source', 'Predicted', 'Measured', 'Verdict')
  rows = [
    (
      f'[{c.title}](#{_anchor(c.title)})',
      c.source,
      c.prediction,
      c.measurement,
      f'**{c.verdict}**, {_held(c)} checks',
    )
    for c in claims
  ]
  return harness.table(head, rows) + '\n'


def _held(c: claim.Claim) -> str:
  held = sum(check.verdict == 'yes' for check in c.checks)
  return f'{held} of {len(c.checks)}'


def _anchor(title: str) -> str:
  """As GitHub makes it of a heading."""
  kept = [x for x in title.lower() if x.isalnum() or x in ' -_']
  return ''.join(kept).replace(' ', '-')


def _section(c: claim.Claim) -> str:
  """One claim: its table, its checks, its picture and its notes."""
  script = f'../benchmarks/claims/{c.name}.py'
  parts = [
    f'## {c.title}\n',
    f'{c.source}. Predicted: {c.prediction}.\n',
    f'Measured by [{c.name}.py]({script}): {c.measurement}. Verdict: '
    f'**{c.verdict}**.\n',
  ]
  if c.caption:
    parts += [f'![{c.caption}](evidence/{c.name}.png)\n', f'{c.caption}\n']
  if c.table:
    parts.append(harness.table(c.table[0], c.table[1:]) + '\n')
  parts += [f'- {note}' for note in c.notes]
  checks = [
    (
      check.what,
      claim.number(check.measured),
      check.expected,
      check.verdict if check.verdict == 'yes' else f'**{check.verdict}**',
    )
    for check in c.checks
  ]
  head = ('Check', 'Measured', 'Expected', 'Holds')
  parts += [
    f'\n<details><summary>{_held(c)} checks hold</summary>\n',
    harness.table(head, checks) + '\n',
    '</details>\n',
  ]
  return '\n'.join(parts)


def write(claims: Sequence[claim.Claim], docs: pathlib.Path = DOCS) -> None:
  """Writes evidence.md, evidence.json and the pictures."""
  pictures = docs / 'evidence'
  shutil.rmtree(pictures, ignore_errors=True)
  pictures.mkdir(parents=True)
  for c in claims:
    shutil.copy(claim.CACHE / f'{c.name}.png', pictures)
  kept = [claim.to_dict(c) | {'data': None} for c in claims]
  harness.save_results(docs / 'evidence.json', kept)
  (docs / 'evidence.md').write_text(markdown(claims))


def read(path: pathlib.Path = DOCS / 'evidence.json') -> list[claim.Claim]:
  """The claims that `write` wrote, without what their pictures show."""
  return [claim.from_dict(fields) for fields in json.loads(path.read_text())]
