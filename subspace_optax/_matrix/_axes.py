# SPDX-License-Identifier: Apache-2.0
"""Which axes of each leaf form its matrix, and how that is known.

A leaf of three axes may be a stack of layers' matrices, an attention kernel
with separate axes for heads, or a convolution. This module combines the
evidence of other leaves, of axis names in flax's metadata and of the leaf's own
name. If it is not enough, the last two axes are assumed, and reported as such.
"""

from collections.abc import Iterable
import functools
import math
import re
from typing import NamedTuple

from subspace_optax._matrix import _names
from subspace_optax._matrix import _siblings

# Names of axes in the metadata of flax and haliax.
_COUNTS = re.compile(
  # Not `expert` or `stage`, which are axes of meshes, too.
  r'([a-z_]*_)?(layers?|blocks?|experts)|exp|num_activations|qkv|o_groups'
)
# As the last axis, a router's outputs.
_EXPERTS = re.compile(r'([a-z_]*_)?experts|exp')
_HEADS = re.compile(
  r'((q|kv|num)_)?heads?|((q|kv)_)?head_(dim|size)|kv|q_heads_per_group'
)


class Axes(NamedTuple):
  """A leaf's matrix, and how it was found.

  Attributes:
    rows: the axes of the rows; () for leaves without a matrix.
    cols: the axes of the columns; all others count matrices.
    how: 'two axes', 'named', 'metadata', 'siblings', 'name' or 'assumed'.
    reason: why there is no matrix.
    order: 'in_out' or 'out_in' if a bias shows the order of a kernel with one
      axis on each side, else ''.
  """

  rows: tuple[int, ...]
  cols: tuple[int, ...]
  how: str
  reason: str = ''
  order: str = ''

  def reversed(self) -> 'Axes':
    """Returns the axes of a kernel that has its outputs first.

    Separate axes for heads already show which side they are on.
    """
    if len(self.rows) != 1 or len(self.cols) != 1:
      return self
    return self._replace(rows=self.cols, cols=self.rows)


def of_form(form: str, how: str) -> Axes:
  """Returns the axes of a form such as 'bio': `i` rows, `o` columns.

  All others, `b` in a layer's own form and `l` for layers, count matrices.
  """
  of = lambda kind: tuple(i for i, c in enumerate(form) if c == kind)
  return Axes(of('i'), of('o'), how)


def _without_matrix(reason: str, how: str = '') -> Axes:
  return Axes((), (), how, reason)


class Decisions:
  """Decisions on the leaves of a tree, by path, computed on first use."""

  def __init__(self, leaves: Iterable[_siblings.Leaf]):
    self._leaves = tuple(leaves)

  @functools.cached_property
  def family(self) -> _siblings.Family:
    """The leaves, and what leaves near each other show together."""
    return _siblings.Family(self._leaves)

  @functools.cached_property
  def axes(self) -> dict[str, Axes]:
    """The axes of every leaf."""
    return {leaf.path: _axes_of(leaf, self.family) for leaf in self._leaves}

  @functools.cached_property
  def plain_kinds(self) -> dict[str, str]:
    """The kinds that keep leaves plain by name, such as 'a head'; else ''."""
    return {leaf.path: _plain_kind(leaf, self.family) for leaf in self._leaves}


@functools.lru_cache(maxsize=256)
def decisions_of(leaves: tuple[_siblings.Leaf, ...]) -> Decisions:
  """Returns the decisions on a tree, cached since every `update` needs them."""
  return Decisions(leaves)


def _plain_kind(leaf: _siblings.Leaf, family: _siblings.Family) -> str:
  if 'vocab' in (leaf.names or ()):
    return 'an embedding or a head'
  if family.is_bias(leaf.path):
    return 'a bias'
  beside = family.in_attention(leaf.path)
  path = family.without_models(leaf.path)
  return _names.plain_kind(path, len(leaf.shape), beside)


class _Clues(NamedTuple):
  """What is known about a leaf.

  Attributes:
    path: the leaf's path.
    shape: the leaf's shape.
    counted: the leaf's axes of layers or experts; None if unknown.
    bias: the shape of the leaf's bias, if it has one.
  """

  path: str
  shape: tuple[int, ...]
  counted: tuple[int, ...] | None
  bias: tuple[int, ...] | None

  @property
  def core(self) -> list[int]:
    """The axes that are not known to count matrices."""
    return [i for i in range(len(self.shape)) if i not in (self.counted or ())]


def _axes_of(leaf: _siblings.Leaf, family: _siblings.Family) -> Axes:
  """Tries rules that need no other leaves, then all other rules."""
  ndim, bias = len(leaf.shape), family.bias(leaf)
  if ndim < 2:
    return _without_matrix('has fewer than two axes')
  if 0 in leaf.shape:
    axes = Axes((ndim - 2,), (ndim - 1,), 'two axes')
  elif ndim > 2 and sum(size != 1 for size in leaf.shape) < 2:
    return _without_matrix('has fewer than two axes longer than 1')
  else:
    axes = _by_metadata(leaf) or _by_clues(
      _Clues(leaf.path, leaf.shape, family.counted(leaf), bias)
    )
  return _with_order(axes, leaf.shape, bias)


def _by_clues(leaf: _Clues) -> Axes:
  """Tries the evidence of other leaves, then the name."""
  if len(leaf.shape) == 2:
    return _two_axes(leaf)
  if len(leaf.core) < 2:  # there are as many layers as units
    return _assumed(leaf._replace(counted=(0,)))
  found = _by_bias(leaf) or _by_bias(leaf._replace(counted=None))
  if len(leaf.core) == 2 and not found:
    rows, cols = leaf.core
    how = 'assumed' if _names.may_be_vector(leaf.path) else 'siblings'
    return Axes((rows,), (cols,), how)
  return found or _by_name(leaf) or _convolution(leaf) or _assumed(leaf)


def _with_order(
  axes: Axes, shape: tuple[int, ...], bias: tuple[int, ...] | None
) -> Axes:
  """Returns the axes, with their order if a bias shows it."""
  if not len(axes.rows) == len(axes.cols) == 1:
    return axes
  inputs, outputs = (shape[i] for i in axes.rows + axes.cols)
  layers = [n for i, n in enumerate(shape) if i not in axes.rows + axes.cols]
  if inputs == outputs or bias not in ((*layers, inputs), (*layers, outputs)):
    return axes
  return axes._replace(order='in_out' if bias[-1] == outputs else 'out_in')


def _two_axes(leaf: _Clues) -> Axes:
  """Takes a leaf for a matrix, or by its name for one vector per layer.

  If other leaves are stacked along one of its axes, it may be either.
  """
  if not leaf.counted:
    return Axes((0,), (1,), 'two axes')
  if _names.is_weight(leaf.path):
    return Axes((0,), (1,), 'assumed')
  layers = ' x '.join(str(leaf.shape[i]) for i in leaf.counted)
  return _without_matrix(f'is a vector in each of {layers} layers', 'assumed')


def _by_metadata(leaf: _siblings.Leaf) -> Axes | None:
  """Reads the names of axes, if they determine both sides."""
  names = [str(name) for name in leaf.names or ()]
  if len(names) != len(leaf.shape):
    return None
  core = [i for i, x in enumerate(names) if not _COUNTS.fullmatch(x)]
  if _EXPERTS.fullmatch(names[-1]):
    core.append(len(names) - 1)
  heads = tuple(i for i in core if _HEADS.fullmatch(names[i]))
  others = tuple(i for i in core if i not in heads)
  if len(core) < 2:
    return _without_matrix('is a vector by the names of its axes', 'metadata')
  if len(core) == 2 and len(names) > 2:
    return Axes((core[0],), (core[1],), 'metadata')
  if len(heads) < 2 or len(others) != 1:
    return None
  is_out = _names.is_attention_out(leaf.path)
  is_in = _names.is_attention_in(leaf.path)
  heads_first = is_out or (heads[0] == core[0] and not is_in)
  rows, cols = (heads, others) if heads_first else (others, heads)
  return Axes(rows, cols, 'metadata')


def _spread(forms: Iterable[str], leaf: _Clues) -> list[str]:
  """Returns a layer's forms with `l` wherever axes of layers may be."""
  spread = []
  for form in forms:
    if leaf.counted is None:
      spread += [form, 'l' + form, form[0] + 'l' + form[1:]]
    else:
      axes = list(form)
      for i in leaf.counted:
        axes.insert(i, 'l')
      spread.append(''.join(axes))
  return [form for form in spread if len(form) == len(leaf.shape)]


def _by_bias(leaf: _Clues) -> Axes | None:
  """Takes the axes that a kernel's bias has for its columns."""
  own = (*_names.forms(leaf.path), *_names.attention_forms(leaf.path))
  for forms in (own, ('io', 'ioo', 'iio')):
    fits = [
      form
      for form in _spread(forms, leaf)
      if _bias_shape(form, leaf.shape) == leaf.bias
    ]
    if len(fits) == 1:
      return of_form(fits[0], 'siblings')
  return None


def _bias_shape(form: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of a bias whose axes of layers are the kernel's."""
  axes = list(zip(shape, form, strict=True))
  bias = [n for n, c in axes if c in 'bo']
  for i, (n, c) in enumerate(axes):
    if c == 'l':
      bias.insert(i, n)
  return tuple(bias)


def _by_name(leaf: _Clues) -> Axes | None:
  """Takes the meaning of a name in every library, if the sizes agree."""
  forms = [x for x in _names.forms(leaf.path) if len(x) == len(leaf.core)]
  if forms:
    return of_form(squarest(_spread(forms, leaf), leaf.shape), 'name')
  forms = _spread(_names.attention_forms(leaf.path), leaf)
  exact = [form for form in forms if _is_exact(form, leaf)]
  if exact:
    # If there are as many layers as units, they may be on either side.
    of_layer = [x.replace('l', '') for x in exact]
    is_sure = of_layer.count(of_layer[0]) == 1
    # A head as wide as a small model also fits the other way round by accident.
    usual = forms[0].replace('l', '')
    is_sure &= usual in of_layer or _ratio(forms[0], leaf.shape) > 8
    return of_form(exact[0], 'name' if is_sure else 'assumed')
  if not forms or leaf.counted is None:
    return None
  form = squarest(forms, leaf.shape)
  # If it is far from square, the name has another meaning.
  return of_form(form, 'name') if _ratio(form, leaf.shape) <= 8 else None


def squarest(forms: Iterable[str], shape: tuple[int, ...]) -> str:
  """Returns the squarest form, the first one among those up to a ratio of 2."""
  return min(forms, key=lambda form: max(2.0, _ratio(form, shape)))


def _ratio(form: str, shape: tuple[int, ...]) -> float:
  short, long = sorted(_widths(form, shape))
  return long / short


def _widths(form: str, shape: tuple[int, ...]) -> tuple[int, int]:
  """Returns the width of all heads, and the width of the model."""
  size = lambda kind: math.prod(
    n for n, c in zip(shape, form, strict=True) if c == kind
  )
  inputs, outputs = size('i'), size('o')
  return (outputs, inputs) if form.count('o') > 1 else (inputs, outputs)


def _is_exact(form: str, leaf: _Clues) -> bool:
  """Whether all heads are as wide as the model, or a part of it for keys.

  Heads around the model's axis may also be layers, unless layers are known.
  """
  heads, width = _widths(form, leaf.shape)
  is_known = leaf.counted is not None
  if _names.is_grouped(leaf.path) and (is_known or 'oio' not in form):
    return width % heads == 0
  return heads == width


def _convolution(leaf: _Clues) -> Axes | None:
  """Detects convolutions, which have no standard form as matrices.

  Flax keeps (height, width, in, out), equinox (out, in, height, width).
  """
  shape, bias = leaf.shape, leaf.bias
  reason = 'looks like a convolution'
  of_equinox = shape[:1] + (1,) * (len(shape) - 2)
  if bias == of_equinox or (len(shape) > 3 and bias == shape[-1:]):
    return _without_matrix(reason, 'siblings')
  if _siblings.has_window(shape) and not leaf.counted:
    return _without_matrix(reason, 'assumed')
  return None


def _assumed(leaf: _Clues) -> Axes:
  """Takes the squarest matrix for attention kernels, else the last two axes."""
  forms = _names.attention_forms(leaf.path)[:1]
  if forms:
    layers = leaf.counted or ((0,) if leaf.shape[0] <= leaf.shape[1] else (1,))
    spread = _spread(forms, leaf)
    spread += _spread(['io'], leaf._replace(counted=layers))
    if spread:
      return of_form(squarest(spread, leaf.shape), 'assumed')
  *_, rows, cols = leaf.core
  return Axes((rows,), (cols,), 'assumed')
