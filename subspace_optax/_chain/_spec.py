# SPDX-License-Identifier: Apache-2.0
"""Which leaves to project, as which matrices, at which rank."""

from collections.abc import Callable, Iterable
import dataclasses
import difflib
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_optax._chain import _dtypes
from subspace_optax._chain import _spec_checks
from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _axes
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _siblings
from subspace_optax._matrix import _tree

AUTO = 'auto'
SIDES = ('short', 'long', 'reverse_std', 'in', 'out')


class DimensionNumbers(NamedTuple):
  """Which axes of a leaf form its matrix; the others count matrices.

  Attributes:
    reduction_axis: axis or axes of the rows (the input side).
    output_axis: axis or axes of the columns (the output side).
    output_blocks: widths of the kernels that a fused kernel holds side by side
      along its output axis, such as (3072, 1024, 1024) for query, key and
      value. `residuals.orthogonal`, `scale_by_normuon` and the optimizers made
      from them orthogonalise each kernel separately, with one basis for all of
      them. To everything else, including `dion` and `trion`, they are one
      matrix. None for one kernel.

  Heads need no blocks: with `DimensionNumbers(0, 2)`, the heads of a kernel of
  shape (embed, heads, head_dim) are a stack, with one matrix per head.

  Example:
    >>> import subspace_optax as so
    >>> together = so.DimensionNumbers(0, (1, 2))  # (embed, heads, head_dim)
    >>> each_head = so.DimensionNumbers(0, 2)
    >>> fused = so.DimensionNumbers(0, 1, output_blocks=(3072, 1024, 1024))
  """

  reduction_axis: int | tuple[int, ...] = -2
  output_axis: int | tuple[int, ...] = -1
  output_blocks: tuple[int, ...] | None = None


Rank = int | float | Callable[[str, Any], int | float]


class Match(NamedTuple):
  """How a spec treats one leaf.

  Attributes:
    path: the leaf's path.
    leaf: the leaf.
    layout: how it is projected, None if it stays plain.
    selected: whether the spec selects it, even if it is too small to project.
    reason: why it stays plain.
    how: how its matrix was found, see `SubspaceSpec`; '' if it has none.
    is_clipped: whether the requested rank exceeds its short side.
    is_reversed: whether its bias has the length of its supposed inputs.
    kind: 'an embedding', 'a head' and so on, for a leaf that stays plain
      because of its name; else ''.
  """

  path: str
  leaf: Any
  layout: _layout.Layout | None
  selected: bool = True
  reason: str = ''
  how: str = ''
  is_clipped: bool = False
  is_reversed: bool = False
  kind: str = ''

  @property
  def matrices(self) -> str:
    """The leaf as `3 x (64 x 16)`, inputs by outputs, or why it has no matrix.

    The outputs of blocks are separate, as in `64 x (16 + 4 + 4)`.
    """
    if self.layout is None:
      return self.reason
    count = ' x '.join(map(str, self.layout.batch_shape))
    blocks = ' + '.join(map(str, self.layout.blocks))
    outputs = f'({blocks})' if blocks else self.layout.outputs
    matrix = f'{self.layout.inputs} x {outputs}'
    return f'{count} x ({matrix})' if count else matrix


@dataclasses.dataclass(frozen=True)
class SubspaceSpec:
  """Chooses the leaves to project, their matrices, ranks and dtypes.

  Attributes:
    rank: r, as an int, a fraction of the short side in (0, 1], or a callable
      of (path, leaf) that returns either. A rank above the short side is
      clipped to it, and `init` warns.
    include: regular expression; only leaves in whose path `re.search` finds it
      are projected. Paths look like `blocks/mlp/up`. None for all.
    exclude: regular expression; leaves in whose path `re.search` finds it stay
      plain, that is, they are not projected. 'auto' excludes embeddings, heads,
      norms, biases and convolutions, by the names that the usual libraries give
      to whole components of a path: `head/kernel` is a head, `head_gate` in a
      layer is not. None excludes nothing. Not used if
      `weight_dimension_numbers` is a tree, which then names the leaves.
    side: the side the basis spans: 'short' (the papers), 'long'
      (`optax.contrib.galore`), 'reverse_std' (the long side in the code of
      GaLore's authors), 'in' (rows) or 'out' (columns). For a square
      matrix, 'short', 'long' and 'in' are the rows, 'out' and 'reverse_std' the
      columns.
    weight_dimension_numbers: the axes that form each matrix: one
      `DimensionNumbers` for all leaves, a tree of them with None for leaves
      that stay plain, or a callable from the parameters to such a tree
      ('named' in the column `axes` of `describe`). With None, the first of
      these rules that applies decides:
      1. A leaf of two axes is a matrix ('two axes'), unless it may be a stack
         of vectors next to stacks of matrices.
      2. Flax's metadata names the axes ('metadata').
      3. Other leaves show the axes ('siblings'): a norm of (layers, width)
         shows that layers are stacked, a bias of (heads, head_dim) the outputs.
      4. The leaf's name and sizes show them ('name'), as for query, key and
         out.
      5. The last two axes form the matrix ('assumed'), and `init` warns.
    only_if_smaller: whether a leaf stays plain if its basis and two moments
      would not take fewer bytes than Adam's two moments. 'moments' does not
      count the basis; `subspace`, and so every ready-made optimizer, chooses
      this if its projector stores no basis. False projects all leaves.
    allow_empty: whether to accept trees in which no leaf is matched.
    seed: seed of all randomness, folded with each leaf's path.
    key_group: a function from a leaf's path to a name that replaces the path in
      random keys. Leaves with the same name and shape, such as query, key and
      value, draw the same random bases, unless they are staggered.
    basis_dtype: dtype of the bases: a float, 'int8' or 'int4'. Integers are
      codes, with one float32 scale for at most 128 rows of a column (int8) or
      64 (int4); every step makes the decoded bases orthonormal. Projectors that
      move bases by small steps, or recompute them, accept only floats.
    moment_dtype: dtype of the inner optimizer's state, for projected and plain
      leaves. None is float32, or the parameter's dtype if that is wider: in
      bfloat16 a second moment cannot decay by 0.1 % per step, and in float16
      the square of a gradient of 1e-4 is 0. 'parameter' is the parameter's
      dtype, as in optax. Coordinates are always float32 or wider.
    outputs_first: whether kernels are (out, in), as in equinox, haliax and
      PyTorch, instead of (in, out), as in Flax and haiku. It has no effect
      where `weight_dimension_numbers` names the axes, or heads are separate
      axes. It affects the sides 'in' and 'out'; the side on which a square
      matrix is projected; `subspace_muon`, `dion` and `trion`, whose steps grow
      with the number of outputs; and `scale`.

  Raises:
    ValueError: a rank that is not positive, a fraction outside (0, 1], an
      unknown side, `only_if_smaller`, or dtype of bases or moments.
    TypeError: a rank that is not a number; a pattern that is not a string.

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> spec = so.SubspaceSpec(rank=4)
    >>> params = {'up': jnp.ones((16, 64)), 'lm_head': jnp.ones((16, 99))}
    >>> print(so.describe(spec, params))
    path     shape    as matrices  rank  side   axes      basis
    lm_head  (16,99)  -            -     plain  -         is a head by its name
    up       (16,64)  16 x 64      4     rows   two axes  float32(16,4)
  """

  rank: Rank
  include: str | None = None
  exclude: str | None = AUTO
  side: str = 'short'
  weight_dimension_numbers: Any = None
  only_if_smaller: bool | str = True
  allow_empty: bool = False
  seed: int = 0
  key_group: Callable[[str], str] | None = None
  basis_dtype: Any = jnp.float32
  moment_dtype: Any = None
  outputs_first: bool = False

  def __post_init__(self):
    if not callable(self.rank):
      _spec_checks.check_rank(self.rank, '')
    if self.side not in SIDES:
      raise ValueError(f'side must be one of {SIDES}, got {self.side!r}.')
    if self.only_if_smaller not in (True, False, 'moments'):
      raise ValueError(
        "only_if_smaller must be True, 'moments' or False, got "
        f'{self.only_if_smaller!r}.'
      )
    _dtypes.check_dtype('basis_dtype', self.basis_dtype, _dtypes.BASIS_DTYPES)
    if self.moment_dtype not in (None, 'parameter'):
      hint = '; scale_by_adam8bit keeps moments in 8 bits'
      _dtypes.check_dtype(
        'moment_dtype', self.moment_dtype, _dtypes.FLOATS, hint
      )
    _arguments.check_pattern('include', self.include)
    _arguments.check_pattern('exclude', self.exclude)

  def match(
    self, params: Any, axis_names: _tree.AxisNames | None = None
  ) -> list[Match | None]:
    """Returns a `Match` for every entry of the tree, None for masked ones.

    Args:
      params: the tree, boxed or not.
      axis_names: names of axes by path; None for those in the tree's boxes.

    Raises:
      ValueError: no leaf of a non-empty tree is matched; dimension numbers
        that overlap or name a missing axis; a bad rank from a callable.
      TypeError: a leaf that is not an array, or is in an unregistered box; a
        selected leaf with a dtype other than float16, bfloat16, float32 and
        float64.
    """
    pairs, _ = _tree.flatten_params(params)
    _check_distinct([path for path, _ in pairs])
    numbers_of = self._dimension_numbers(params, pairs)
    names = _tree.axis_names(params) if axis_names is None else axis_names
    leaves = tuple(
      _siblings.Leaf(path, tuple(leaf.shape), names.get(path))
      for path, leaf in pairs
      if not _tree.is_masked(leaf)
    )
    decisions = _axes.decisions_of(leaves)
    matches = [
      None
      if _tree.is_masked(leaf)
      else self._match_leaf(decisions, path, leaf, dims)
      for (path, leaf), dims in zip(pairs, numbers_of, strict=True)
    ]
    self._check_any(matches)
    return matches

  def _match_leaf(
    self, decisions: _axes.Decisions, path: str, leaf: Any, dims: Any
  ) -> Match:
    reason = self._exclusion(decisions, path, leaf, dims)
    if reason:
      kind = decisions.plain_kinds[path] if self.exclude == AUTO else ''
      return Match(path, leaf, None, False, reason, kind=kind)
    if dims is None:
      axes = decisions.axes[path]
      axes = axes.reversed() if self.outputs_first else axes
    else:
      axes = _axes.Axes(*_spec_checks.name_axes(path, leaf, dims), 'named')
    if axes.reason:
      return Match(path, leaf, None, False, axes.reason, axes.how)
    if not _dtypes.is_float(leaf.dtype):
      raise TypeError(
        f'leaf {path!r} of dtype {leaf.dtype} is selected for projection, '
        f'which needs one of {_dtypes.FLOATS}; name it in `exclude`.'
      )
    layout, is_clipped = self._layout(path, leaf, axes.rows, axes.cols)
    blocks = _spec_checks.name_blocks(path, leaf, dims, axes.cols)
    layout = dataclasses.replace(layout, blocks=blocks)
    plain = functools.partial(Match, path, leaf, None, how=axes.how)
    if 0 in leaf.shape:
      return plain(selected=False, reason='has no elements')
    if self.only_if_smaller and not self._is_smaller(layout, leaf.dtype):
      r, m, n = layout.rank, layout.m, layout.n
      counted = '' if self.only_if_smaller == 'moments' else 'a basis and '
      reason = f'rank {r} of {m} x {n} saves nothing with {counted}2 moments'
      return plain(selected=min(m, n) > 1, reason=reason)
    wrong = 'in_out' if self.outputs_first else 'out_in'
    return Match(
      path,
      leaf,
      layout,
      how=axes.how,
      is_clipped=is_clipped,
      is_reversed=axes.order == wrong,
    )

  def dtype_of_moments(self, dtype: Any) -> Any:
    """Returns the dtype of a leaf's moments, given that of the leaf."""
    wanted = self.moment_dtype
    if isinstance(wanted, str) and wanted == 'parameter':
      return dtype
    if not _dtypes.is_float(dtype):  # jax does not promote 8-bit floats
      return jnp.dtype('float32') if _dtypes.is_real(dtype) else dtype
    if self.moment_dtype is None:
      return jnp.promote_types(dtype, jnp.float32)
    return jnp.dtype(self.moment_dtype)

  def _is_smaller(self, layout: _layout.Layout, dtype: Any) -> bool:
    """Whether `only_if_smaller` counts fewer bytes than Adam's moments take."""
    r, m, n = layout.rank, layout.m, layout.n
    basis = m * r * _dtypes.bits(self.basis_dtype) // 8
    if self.only_if_smaller == 'moments':
      basis = 0
    moments = 2 * n * r * self.dtype_of_moments(dtype).itemsize
    return basis + moments < 2 * m * n * self.dtype_of_moments(dtype).itemsize

  def _exclusion(
    self, decisions: _axes.Decisions, path: str, leaf: Any, dims: Any
  ) -> str:
    if self.include is not None and not re.search(self.include, path):
      return f'path matches no include={self.include!r}'
    given = self.weight_dimension_numbers
    if given is not None and not _is_dims(given):  # the tree names the leaves
      return '' if dims is not None else 'has no weight_dimension_numbers'
    if len(leaf.shape) < 2:
      return 'has fewer than two axes'
    if self.exclude == AUTO:
      kind = decisions.plain_kinds[path]
      return f'is {kind} by its name' if kind else ''
    found = re.search(self.exclude, path) if self.exclude is not None else None
    return f'path matches exclude ({found.group()!r})' if found else ''

  def _layout(
    self, path: str, leaf: Any, rows, cols
  ) -> tuple[_layout.Layout, bool]:
    """Returns the layout, and whether its rank was clipped."""
    m = math.prod(leaf.shape[i] for i in rows)
    n = math.prod(leaf.shape[i] for i in cols)
    project_rows = {
      'short': m <= n,
      'long': m >= n,
      'reverse_std': m > n,
      'in': True,
      'out': False,
    }[self.side]
    rank = self.rank(path, leaf) if callable(self.rank) else self.rank
    rank = _spec_checks.check_rank(rank, path)
    if isinstance(rank, float):
      rank = max(1, round(rank * min(m, n)))
    shape, clipped = tuple(leaf.shape), min(rank, m, n)
    layout = _layout.Layout(shape, rows, cols, project_rows, clipped)
    return layout, clipped < rank

  def _dimension_numbers(self, params, pairs) -> list[Any]:
    given = self.weight_dimension_numbers
    if callable(given):
      given = given(params)
    if _is_dims(given):
      return [given] * len(pairs)
    if given is None:
      return [None] * len(pairs)
    found, _ = jax.tree.flatten_with_path(
      given, is_leaf=lambda x: x is None or _is_dims(x) or _tree.is_masked(x)
    )
    by_path = {_tree.path_str(path): dims for path, dims in found}
    missing = [path for path, _ in pairs if path not in by_path]
    if missing:
      raise ValueError(
        'weight_dimension_numbers has no entry for leaf '
        f'{missing[0]!r}; give every leaf a DimensionNumbers or None.'
      )
    return [by_path[path] for path, _ in pairs]

  def _check_any(self, matches: Iterable[Match | None]) -> None:
    known = [match for match in matches if match is not None]
    may_be_empty = self.allow_empty or _notices.takes_empty()
    if known and not any(m.selected for m in known) and not may_be_empty:
      nearest = sorted(known, key=self._unlikeness)[:5]
      lines = [f'  {m.path} {tuple(m.leaf.shape)}: {m.reason}' for m in nearest]
      raise ValueError(
        f'SubspaceSpec(rank={self.rank!r}, include={self.include!r}, '
        f'exclude={self.exclude!r}) matches no leaf. Nearest paths:\n'
        + '\n'.join(lines)
      )

  def _unlikeness(self, match: Match) -> tuple[int, float]:
    """Sorts matrices first, then paths that resemble the pattern."""
    words = difflib.SequenceMatcher(None, self.include or '', match.path)
    return -len(match.leaf.shape), -words.ratio()


def check_spec(spec: Any) -> None:
  """Raises unless `spec` is a `SubspaceSpec`."""
  if not isinstance(spec, SubspaceSpec):
    raise TypeError(f'spec must be a SubspaceSpec, got {spec!r}.')


def _check_distinct(paths: list[str]) -> None:
  if len(set(paths)) != len(paths):
    twice = next(path for path in paths if paths.count(path) > 1)
    raise ValueError(f'two leaves have the path {twice!r}; rename one.')


def group_of(spec: SubspaceSpec, path: str) -> str:
  """Returns the name whose hash seeds a leaf's bases."""
  return spec.key_group(path) if spec.key_group else path


def _is_dims(x: Any) -> bool:
  """Whether `x` has the fields of dimension numbers, ours or optax's."""
  return hasattr(x, 'reduction_axis') and hasattr(x, 'output_axis')
