# SPDX-License-Identifier: Apache-2.0
"""What the leaves of a tree show about each other's axes.

Norms have a single axis in a layer, so a norm of two axes shows that layers are
stacked, and along which axis. Biases have the axes of their kernel's outputs.
The kernels of an MLP differ in the order of their two sides.
"""

from collections.abc import Iterable
import itertools
import re
from typing import Any, NamedTuple

from subspace_optax._matrix import _names


class Leaf(NamedTuple):
  """A leaf, and the names of its axes if a box holds them."""

  path: str
  shape: tuple[int, ...]
  names: tuple[str | None, ...] | None = None


class Family:
  """The leaves of a tree, and what leaves near each other show together."""

  def __init__(self, leaves: Iterable[Leaf]):
    self._shapes = {_parts(leaf.path): leaf.shape for leaf in leaves}
    self._below: dict[tuple[str, ...], list[Leaf]] = {}
    for leaf in leaves:
      for above in _ancestors(leaf.path):
        self._below.setdefault(above, []).append(leaf)
    self._known: dict[Any, tuple] = {}

  def in_attention(self, path: str) -> bool:
    """Whether two of query, key and value are next to a leaf or its module.

    A single one may be the value of a policy.
    """
    parts = _parts(path)
    is_inside = _names.is_weight(path) and '_' not in parts[-1]
    above = parts[: -2 if is_inside else -1]
    beside = {
      _names.module(x.path)
      for x in self._below.get(above, ())
      if _names.is_attention_in(x.path) and len(_parts(x.path)) == len(parts)
    }
    return len(beside) > 1

  def is_bias(self, path: str) -> bool:
    """Whether a leaf is a bias named `b`, and not one half of a pair a, b."""
    *above, name = _parts(path)
    has = lambda other: (*above, other) in self._shapes
    if name == 'b':
      return has('w')
    other = re.sub(r'(?<![A-Za-z])b(?![A-Za-z])', 'a', name)
    is_half = other != name and has(other)
    return _names.shortens_bias(path) and not is_half

  def without_models(self, path: str) -> str:
    """Returns a path without heads and embedders that hold several weights.

    An example is `classifier` with layers below it, which are matrices.
    """
    kept = list(_parts(path))
    for i, part in enumerate(_parts(path)):
      above = _parts(path)[: i + 1]
      if _names.may_be_model(part, path) and self._is_model(above):
        kept[i] = '~'
    return '/'.join(kept)

  def _is_model(self, above: tuple[str, ...]) -> bool:
    """Whether there are several weights below a component."""
    weights = [
      x
      for x in self._below.get(above, ())
      if len(x.shape) > 1
      and _names.is_weight(x.path)
      and not _names.is_norm(x.path)
    ]
    return len(weights) > 1

  def bias(self, leaf: Leaf) -> tuple[int, ...] | None:
    """Returns the shape of a weight's bias, which has one entry per output."""
    parts = list(_parts(leaf.path))
    i = len(parts) - (2 if parts[-1].isdigit() and len(parts) > 1 else 1)
    name = {'kernel': 'bias', 'weight': 'bias', 'w': 'b'}.get(parts[i])
    if name is None:
      return self._shapes.get((*parts[:-1], f'{parts[-1]}_bias'))
    return self._shapes.get((*parts[:i], name, *parts[i + 1 :]))

  def counted(self, leaf: Leaf) -> tuple[int, ...] | None:
    """Returns the axes that count layers or experts; None if unknown.

    The nearest norm shows layers, and kernels show experts within layers.
    """
    ndim = len(leaf.shape) if _is_kernel(leaf) else 0
    # A router's weight may share an axis with its experts.
    is_matrix = len(leaf.shape) == 2 and _names.is_weight(leaf.path)
    told = []
    for above in _ancestors(leaf.path):
      by_norms, by_kernels = self._told(above, ndim)
      told += [by_norms, None if is_matrix else by_kernels]
      if by_norms is not None:
        break
    told = [axes for axes in told if axes is not None]
    return tuple(sorted({*itertools.chain(*told)})) if told else None

  def _told(self, above: tuple[str, ...], ndim: int) -> tuple:
    """Returns what norms and kernels show, those of `ndim` axes or all."""
    if (above, ndim) not in self._known:
      leaves = self._below[above]
      of_all = _by_kernels(leaves, ndim) if ndim else _shared_by_all(leaves)
      self._known[above, ndim] = _by_norms(above, leaves), of_all
    return self._known[above, ndim]


def _parts(path: str) -> tuple[str, ...]:
  return tuple(_names.split(path))


def _ancestors(path: str) -> list[tuple[str, ...]]:
  """Returns the ancestors of a leaf, the nearest one first."""
  parts = _parts(path)
  return [parts[:i] for i in range(len(parts) - 1, -1, -1)]


def _by_norms(
  above: tuple[str, ...], leaves: list[Leaf]
) -> tuple[int, ...] | None:
  """Returns the axis of layers, () if norms of a layer have a single axis.

  A final norm, which is outside layers, shows nothing about them.
  """
  norms = [x for x in leaves if _names.is_norm(x.path)]
  ndims = {len(x.shape) for x in norms}
  if ndims == {1} and _names.in_layer('/'.join(above)):
    return ()
  if ndims == {2} and any(len(x.shape) > 2 for x in leaves):
    return _layers(leaves)
  return None


def _layers(leaves: list[Leaf]) -> tuple[int, ...] | None:
  """Returns the axis that all leaves share, if layers are fewer than units.

  If there are as many, the axis is unknown.
  """
  axes = {_size(leaves, axis): (axis,) for axis in (0, 1)}
  if len(axes) < 2:
    return None
  return axes[min(size for size in axes if size is not None)]


def _size(leaves: list[Leaf], axis: int) -> int | None:
  """Returns the size of an axis, if it is the same in all leaves.

  For a leaf with a single axis, which may hold one number per layer, it uses
  that axis.
  """
  sizes = {x.shape[axis if len(x.shape) > 1 else 0] for x in leaves if x.shape}
  return sizes.pop() if len(sizes) == 1 else None


def _by_kernels(leaves: list[Leaf], ndim: int) -> tuple[int, ...] | None:
  """Returns the shared axes of kernels whose other axes differ in order.

  An example is (L, width, hidden) and (L, hidden, width).
  """
  kernels = [x for x in leaves if len(x.shape) == ndim and _is_kernel(x)]
  axes = []
  for axis in (0, 1):
    rests = {x.shape[:axis] + x.shape[axis + 1 :] for x in kernels}
    swapped = len(rests) > len({tuple(sorted(rest)) for rest in rests})
    swapped = swapped and _size(kernels, axis) is not None
    if swapped or _has_vectors(leaves, kernels, axis):
      axes.append(axis)
  return tuple(axes) or None


def _shared_by_all(leaves: list[Leaf]) -> tuple[int, ...] | None:
  """Returns the axes that kernels show and every other leaf shares."""
  if any(_names.is_norm(x.path) for x in leaves):
    return None
  ndims = {len(x.shape) for x in leaves if _is_kernel(x)}
  told = {i for ndim in ndims for i in _by_kernels(leaves, ndim) or ()}
  shared = [axis for axis in told if _size(leaves, axis) is not None]
  return tuple(shared) or None


def _is_kernel(leaf: Leaf) -> bool:
  return len(leaf.shape) > 2 and not (
    _names.attention_forms(leaf.path)
    or _names.forms(leaf.path)
    or _names.is_convolution(leaf.path)
    or has_window(leaf.shape)
  )


def _has_vectors(leaves: list[Leaf], kernels: list[Leaf], axis: int) -> bool:
  """Whether a kernel has a vector per layer next to it, for one of its sides.

  Layers are fewer than units. Along axis 1, only a vector named as a bias
  counts.
  """
  if _size(leaves, axis) is None:
    return False
  sides = {n for x in kernels for n in x.shape[:axis] + x.shape[axis + 1 :]}
  tells = _names.is_bias if axis else lambda path: not _names.is_weight(path)
  return any(
    len(x.shape) == 2
    and tells(x.path)
    and x.shape[axis] <= x.shape[1 - axis]
    and x.shape[1 - axis] in sides
    for x in leaves
  )


def has_window(shape: tuple[int, ...]) -> bool:
  """Whether a convolution's height and width are first or last."""
  if len(shape) < 4:
    return False
  is_window = lambda sizes, out: (
    len(set(sizes)) == 1 and sizes[0] < out and sizes[0] in (3, 5, 7, 9, 11)
  )
  return is_window(shape[:-2], shape[-1]) or is_window(shape[2:], shape[0])
