# SPDX-License-Identifier: Apache-2.0
"""The state of the PyTorch package `galore-torch`, in this package's shapes.

With proj_type 'std', a weight with at least as many rows as columns has the
basis B, (r, columns), and the moments of G B^T, (rows, r). Otherwise it has the
basis A, (rows, r), and the moments of A^T G, (r, columns); Zhao et al., `GaLore
<https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2.
"""

from collections.abc import Mapping, Sequence
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from subspace_optax._matrix import _layout

_KNOWN = {'step', 'exp_avg', 'exp_avg_sq', 'projector'}
_MOST_ERROR = 0.1  # a basis in bfloat16 has less
ANEW = 'or begin with tx.init(params) and a short warm-up'


class Leaf(NamedTuple):
  """The state of one leaf, in the shapes of `tx`'s state."""

  basis: Any  # None if the leaf is plain
  mean: np.ndarray
  square: np.ndarray


class Source(NamedTuple):
  """Where the state of a leaf comes from."""

  path: str
  keys: Any  # one key, or one per matrix
  state: Mapping[Any, Any]
  transpose: str | None

  @property
  def parts(self) -> list[tuple[Any, Any]]:
    """The keys and their entries in the state."""
    return [(key, self.state[key]) for key in _keys(self.keys)]

  @property
  def is_turned(self) -> bool:
    """Whether the axes of a matrix are swapped in the source."""
    return bool(self.transpose and re.search(self.transpose, self.path))


def _keys(keys: Any) -> list[Any]:
  several = isinstance(keys, Sequence) and not isinstance(keys, str)
  return list(keys) if several else [keys]


def check_states(
  state: Mapping[Any, Any],
  names: Mapping[str, Any],
  shapes: Mapping[str, Any],
) -> int:
  """Returns the number of steps, which must be equal for all parameters."""
  if set(names) != set(shapes):
    raise ValueError(
      f'names lacks {sorted(set(shapes) - set(names))}, and has '
      f'{sorted(set(names) - set(shapes))}, which tx does not train; give the '
      'paths of all leaves that it trains.'
    )
  keys = [key for path in shapes for key in _keys(names[path])]
  lost = [key for key in state if key not in keys]
  missing = [key for key in keys if key not in state]
  if lost or missing or len(set(keys)) < len(keys):
    raise ValueError(
      f'names has {missing}, which are not in state, and lacks {lost}, which '
      'are; give each key of the state once.'
    )
  steps = {}
  for key in keys:
    _check_kept(key, state[key])
    steps.setdefault(int(np.asarray(state[key]['step'])), key)
  if len(steps) > 1:
    told = ', '.join(f'step={n} of {key!r}' for n, key in steps.items())
    raise ValueError(
      f'state has {told}; Adam counts the steps of all leaves at once here, so '
      f'that they must be equal, {ANEW}.'
    )
  return next(iter(steps), 0)


def _check_kept(key: Any, kept: Mapping[str, Any]) -> None:
  for name in kept:
    if name not in _KNOWN:
      raise ValueError(
        f'{key!r} keeps {name!r}, which GaLoreAdamW does not: states of 8-bit '
        'codes, of Adafactor and of APOLLO are not converted; go on there with '
        f'GaLoreAdamW, {ANEW}.'
      )
  for name in ('step', 'exp_avg', 'exp_avg_sq'):
    if name not in kept:
      raise ValueError(
        f'{key!r} keeps no {name!r}, but {sorted(kept)}; give the state of a '
        f'parameter that was trained, {ANEW}.'
      )
    dtype = np.asarray(kept[name]).dtype
    if name != 'step' and not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f'{name} of {key!r} is of dtype {dtype}, and no array of floats; '
        f'codes of 8 bits are not converted, {ANEW}.'
      )


def _read_projector(key: Any, projector: Any, gap: int) -> np.ndarray:
  """Returns the basis of a projector, if it works as that of `tx` does."""
  attributes = projector if isinstance(projector, Mapping) else vars(projector)
  kind = attributes.get('proj_type')
  if kind != 'std':
    raise ValueError(
      f'{key!r} has proj_type={kind!r}, and only those of std are converted; '
      f'make tx with the side of {kind!r}, see docs/migrate.md, and begin with '
      'tx.init(params) and a short warm-up.'
    )
  other = attributes.get('update_proj_gap')
  if other != gap:
    raise ValueError(
      f'{key!r} has update_proj_gap={other}, and tx has {gap}; give tx that of '
      'the state.'
    )
  basis = attributes.get('ortho_matrix')
  basis = np.asarray(basis, np.float64) if hasattr(basis, 'shape') else None
  if basis is None or basis.ndim != 2:
    raise ValueError(
      f'{key!r} has no matrix as its ortho_matrix, but '
      f'{type(attributes.get("ortho_matrix")).__name__}; states before the '
      f'first step and of tensors of more axes are not converted, {ANEW}.'
    )
  wide = basis if basis.shape[0] <= basis.shape[1] else basis.T
  error = float(np.max(np.abs(wide @ wide.T - np.eye(len(wide)))))
  if not error < _MOST_ERROR:
    raise ValueError(
      f'{key!r} has an ortho_matrix that is {error:.2g} off orthonormal; '
      f'random bases, as those of APOLLO, are not converted, {ANEW}.'
    )
  return basis


def read_leaf(
  source: Source,
  layouts: Mapping[str, _layout.Layout],
  shape: tuple[int, ...],
  gap: int,
) -> Leaf:
  """Returns the converted state of a leaf.

  Args:
    source: where it comes from.
    layouts: layouts of the projected leaves, by path.
    shape: shape of the moments of the leaf.
    gap: steps between refreshes, which must be those of the state.
  """
  layout = layouts.get(source.path)
  for key, kept in source.parts:
    if ('projector' in kept) != (layout is not None):
      here = 'plain' if layout is None else 'projected'
      raise ValueError(
        f'{key!r} has {"a" if layout is None else "no"} projector, but leaf '
        f'{source.path!r} is {here} by tx; make tx project the leaves of the '
        'state, by optim_target_modules or by include and exclude of the spec.'
      )
  if layout is None:
    return Leaf(
      None, *(_read_plain(source, k, shape) for k in ('exp_avg', 'exp_avg_sq'))
    )
  count = int(np.prod(layout.batch_shape))
  if len(source.parts) != count:
    raise ValueError(
      f'names has {len(source.parts)} keys of {source.path!r}, whose shape '
      f'{layout.shape} is {count} matrices; give a key for each.'
    )
  matrices = [
    _read_matrix(source, key, kept, layout, gap) for key, kept in source.parts
  ]
  basis, mean, square = map(np.stack, zip(*matrices, strict=True))
  basis = layout.from_matrix(jnp.asarray(basis, jnp.float32))
  return Leaf(basis, _to_coords(layout, mean), _to_coords(layout, square))


def _read_plain(
  source: Source, name: str, shape: tuple[int, ...]
) -> np.ndarray:
  arrays = [np.asarray(kept[name]) for _, kept in source.parts]
  if source.is_turned:
    arrays = [x.T if x.ndim == 2 else x for x in arrays]
  alike = len({x.shape for x in arrays}) == 1
  whole = arrays[0] if len(arrays) == 1 else np.stack(arrays) if alike else None
  if whole is None or not _is_split(whole.shape, shape):
    found = sorted({np.asarray(kept[name]).shape for _, kept in source.parts})
    raise ValueError(
      f'{name} of {_keys(source.keys)} has shape {found}, and leaf '
      f'{source.path!r} has {shape}; see names and '
      f'transpose={source.transpose!r}.'
    )
  return whole.reshape(shape)


def _is_split(whole: tuple[int, ...], parts: tuple[int, ...]) -> bool:
  """Whether `parts` are the axes of `whole`, some of them split."""
  ends = lambda sizes: [int(np.prod(sizes[:i])) for i in range(len(sizes) + 1)]
  same_size = ends(whole)[-1] == ends(parts)[-1]
  return same_size and set(ends(whole)) <= set(ends(parts))


def _read_matrix(
  source: Source,
  key: Any,
  kept: Mapping[str, Any],
  layout: _layout.Layout,
  gap: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the basis (m, r) and the moments (r, n) of one matrix."""
  basis = _read_projector(key, kept['projector'], gap)
  moments = [np.asarray(kept[name]) for name in ('exp_avg', 'exp_avg_sq')]
  shape = (layout.inputs, layout.outputs)
  shape = shape[::-1] if source.is_turned else shape
  right = shape[0] >= shape[1]
  if right != (layout.project_rows == source.is_turned):
    side = 'in' if layout.cols == layout.projected else 'out'
    raise ValueError(
      f'{key!r} of shape {shape} has a basis of its '
      f'{"columns" if right else "rows"} by proj_type=std, and tx one of the '
      f'other side; give the spec side={side!r}, or see '
      f'transpose={source.transpose!r}.'
    )
  if right:
    basis, moments = basis.T, [x.T for x in moments]
  rank = basis.shape[1]
  if rank != layout.rank:
    raise ValueError(
      f'{key!r} has rank={rank}, and tx has {layout.rank} for {source.path!r}; '
      'give tx the rank of the state, and take what this returns to another '
      'one by so.resize_rank.'
    )
  wanted = (layout.m, rank), (rank, layout.n), (rank, layout.n)
  found = tuple(x.shape for x in (basis, *moments))
  if found != wanted:
    raise ValueError(
      f'{key!r} has a basis of shape {found[0]} and moments of {found[1:]}, '
      f'and leaf {source.path!r} wants {wanted[0]} and {wanted[1:]}; see names '
      f'and transpose={source.transpose!r}.'
    )
  return basis, moments[0], moments[1]


def _to_coords(layout: _layout.Layout, x: np.ndarray) -> np.ndarray:
  """Returns matrices (batch, r, n) in the shape of the leaf's coordinates."""
  axes = layout.coords_axes()
  sizes = dict(zip(axes, layout.coords_shape, strict=True))
  free = ''.join(layout.leaf_axes[i] for i in layout.free)
  order = layout.batch_axes + 'y' + free
  split = x.reshape([sizes[c] for c in order])
  return np.transpose(split, [order.index(c) for c in axes])
