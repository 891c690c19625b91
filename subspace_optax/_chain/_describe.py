# SPDX-License-Identifier: Apache-2.0
"""Shows what is projected, and why the rest is not.

A chain does not reveal its parts. So every `project`, optimizer of whole
matrices and `subproblems` records its arguments at `init`, if a context
variable holds a list. This is the only data here that is neither an argument
nor a result, since neither would work:

- A box around each parameter could carry the list to `init`. But masks and
  labels are functions of the parameters, and those that read the last key of a
  path or a leaf's `ndim` fail on such boxes. A tree that is masked as a whole
  would carry nothing.
- An extra argument could carry it to `update`. But `describe` would then fail
  for optimizers that do not pass on extra arguments or need their own, and a
  table would trace every factorisation of a step.
- A state that names its spec would hold a value that is not an array, and two
  optimizers with equal specs would have states of different structures.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_optax._chain import _spec
from subspace_optax._matrix import _notices
from subspace_optax.projectors import _base

Matches = list[_spec.Match | None]

_records: contextvars.ContextVar[list | None] = contextvars.ContextVar(
  'records', default=None
)


class Record(NamedTuple):
  """The arguments of an initialised `project`."""

  spec: _spec.SubspaceSpec
  matches: Matches
  projector: _base.Projector
  keep_gradient: bool


class Whole(NamedTuple):
  """The arguments of an initialised optimizer of whole matrices."""

  name: str
  rows: list[tuple[str, ...]]  # path, shape, role, inputs and treatment


class Drawn(NamedTuple):
  """What decides bases that are drawn again at every step, by path."""

  settings: dict[str, dict[str, Any]]


def record_drawn(settings: dict[str, dict[str, Any]]) -> None:
  """Adds a `Drawn` to the current list, if there is one."""
  records = _records.get()
  if records is not None:
    records.append(Drawn(settings))


def record_whole(
  name: str,
  matches: Matches,
  tell: Callable[[_spec.Match], tuple[str, str, str] | None],
) -> None:
  """Adds a `Whole` to the current list, if there is one.

  Args:
    name: name of the optimizer.
    matches: matches of its leaves.
    tell: maps a match to its role, inputs and treatment; to None for a leaf
      that stays plain.
  """
  records = _records.get()
  if records is None:
    return
  rows = [
    (
      match.path,
      _shape(match.leaf.shape),
      *(tell(match) or ('plain', '-', match.reason or '-')),
    )
    for match in matches
    if match
  ]
  # `init` may be traced more than once, for boxes and for codes.
  if Whole(name, rows) not in records:
    records.append(Whole(name, rows))


def record(spec: _spec.SubspaceSpec, matches: Matches, *args: Any) -> None:
  """Adds a `Record` to the current list, if there is one."""
  records = _records.get()
  if records is not None:
    # No tracer may outlive its trace.
    records.append(Record(spec, [m and _of_shape(m) for m in matches], *args))


@contextlib.contextmanager
def _listening(records: list | None) -> Iterator[None]:
  """A context in which `record` adds to this list, or for None to no list."""
  token = _records.set(records)
  try:
    yield
  finally:
    _records.reset(token)


def unheard() -> contextlib.AbstractContextManager[None]:
  """A context in which `record` adds nothing."""
  return _listening(None)


def is_asked() -> bool:
  """Whether `init` is traced only for its records."""
  return _records.get() is not None


def _of_shape(match: _spec.Match) -> _spec.Match:
  shape = jax.ShapeDtypeStruct(match.leaf.shape, match.leaf.dtype)
  return match._replace(leaf=shape)


def records_of(tx: Any, params: Any) -> list[Record]:
  """Returns the records of all `project`s in an optimizer."""
  records = projections_of(tx, params)
  if not records:
    raise ValueError(
      'the optimizer projects nothing: it holds no `subspace_optax.project`. '
      '`memory_report` counts the bytes of any.'
    )
  return records


def projections_of(tx: Any, params: Any) -> list[Record]:
  """Returns the result of `records_of`, or an empty list if it would raise."""
  return [x for x in heard(tx, params) if isinstance(x, Record)]


def heard(tx: Any, params: Any) -> list[Record | Whole | Drawn]:
  """Returns the records of all parts of an optimizer at `init`.

  What `init` says to users is not said. A part that is traced twice, as by
  `optax.MultiSteps`, is there twice.
  """
  records: list[Record | Whole | Drawn] = []
  with _listening(records), _notices.quiet(errors=True):
    # A new function each time, since jax caches traces by function.
    jax.eval_shape(lambda p: tx.init(p), params)
  return records


def describe(tx_or_spec: Any, params: Any) -> str:
  """Shows how every leaf is projected, or why it is not.

  Args:
    tx_or_spec: a `SubspaceSpec`, or an optimizer with `project`,
      `scale_by_normuon` or `scale` anywhere in it.
    params: the parameters, or their shapes (`jax.eval_shape`).

  Returns:
    A table with one line per leaf: its path and shape, the number and shape of
    its matrices, their rank, the side that the basis spans, how the matrix's
    axes were found (see `SubspaceSpec`), and the dtype and shape of the basis
    in the state, or why there is none. Blocks of fused kernels show as
    `64 x (16 + 4 + 4)`. For `normuon` and `scale`, which have no subspace, the
    table shows the role of each leaf, the number of its inputs and the form of
    its update.

  Raises:
    ValueError: the optimizer holds none of these.

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> tx = so.galore(1e-3, rank=4)
    >>> w = jnp.ones((3, 64, 16))
    >>> print(so.describe(tx, {'w': w, 'bias': jnp.ones((3, 16))}))
    svd(update_proj_gap=200, method='auto') [exact; on a mesh or TPU randomized]
    path  shape      as matrices    rank  side   axes      basis
    bias  (3,16)     -              -     plain  -         is a bias by its name
    w     (3,64,16)  3 x (64 x 16)  4     rows   siblings  float32(3,64,4)
  """
  if isinstance(tx_or_spec, _spec.SubspaceSpec):
    return _table(tx_or_spec.match(params), tx_or_spec)
  found = heard(tx_or_spec, params)
  shown = [x for x in found if not isinstance(x, Drawn)]
  return '\n'.join(map(_shown, shown or records_of(tx_or_spec, params)))


def _shown(record: Record | Whole) -> str:
  if isinstance(record, Whole):
    return f'{record.name}\n{_aligned([_HEADER_OF_WHOLE, *record.rows])}'
  drawn = record.projector.rebuild is not None
  table = _table(record.matches, record.spec, drawn)
  return f'{record.projector.name}\n{table}'


_HEADER_OF_WHOLE = ('path', 'shape', 'as', 'inputs', 'update')
_HEADER = ('path', 'shape', 'as matrices', 'rank', 'side', 'axes', 'basis')


def _table(
  matches: Matches, spec: _spec.SubspaceSpec, drawn: bool = False
) -> str:
  rows = [_HEADER, *(_row(match, spec, drawn) for match in matches if match)]
  return _aligned(rows)


def _aligned(rows: list[tuple[str, ...]]) -> str:
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    for row in rows
  ]
  return '\n'.join(line.rstrip() for line in lines)


def _row(
  match: _spec.Match, spec: _spec.SubspaceSpec, drawn: bool
) -> tuple[str, ...]:
  shape = _shape(match.leaf.shape)
  layout = match.layout
  if layout is None:
    how = match.how or '-'
    return match.path, shape, '-', '-', 'plain', how, match.reason
  side = 'rows' if layout.project_rows else 'columns'
  basis = f'{jnp.dtype(spec.basis_dtype).name}{_shape(layout.basis_shape)}'
  basis = 'drawn at every step' if drawn else basis
  rank = str(layout.rank)
  return match.path, shape, match.matrices, rank, side, match.how, basis


def _shape(shape: tuple[int, ...]) -> str:
  return f'({",".join(map(str, shape))})'
