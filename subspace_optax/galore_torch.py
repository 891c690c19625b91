# SPDX-License-Identifier: Apache-2.0
"""States of the PyTorch package `galore-torch`, taken over.

Its AdamW keeps for each parameter 'step', 'exp_avg', 'exp_avg_sq' and, where it
projects, a 'projector' with the basis in 'ortho_matrix'. By proj_type 'std' the
basis of a weight of at least as many rows as columns is B, (r, columns), beside
the moments of G B^T, (rows, r); else A, (rows, r), beside those of A^T G, (r,
columns). A basis is refreshed in the steps that its gap divides, from 0 on.
"""

from collections.abc import Mapping, Sequence
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_optax._chain import _describe
from subspace_optax._chain import _projection
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _tree
from subspace_optax.low_precision import _coded_state

_KNOWN = {'step', 'exp_avg', 'exp_avg_sq', 'projector'}
_MOST_ERROR = 0.1  # of a basis in bfloat16 it is less
_ANEW = 'or begin with tx.init(params) and a short warm-up'


def from_torch(
  tx: optax.GradientTransformation,
  state: Mapping[Any, Any],
  params: Any,
  names: Mapping[str, Any],
  *,
  transpose: str | None = r'(^|/)kernel$',
) -> Any:
  """Returns a state for `tx`, made from one of `galore-torch`'s `GaLoreAdamW`.

  Training goes on as it would have there, up to rounding, until bases are next
  refreshed: that finds the same subspaces, whose singular vectors may have
  other signs, as they may on another machine there. Counters, those of
  schedules too, are at the step of the state. Moments in 8 or 4 bits
  (`moment_bits`) are rounded to the nearest code.

  What is not in the state has to be said to `tx`: learning rate, betas, epsilon
  and `scale`. docs/migrate.md tells how to write the state to a file, and what
  differs in epsilon and weight decay.

  Args:
    tx: as `from_hf` or `galore` makes it, with the ranks, gap and sides of the
      state; `galore` wants `spec=SubspaceSpec(rank)` for 'std'.
    state: from parameter names, or the numbers of `state_dict()`, to what is
      kept of each: arrays, or what `numpy.asarray` makes arrays of. A projector
      is a dict of its attributes, or has them. Or all of `state_dict()`.
    params: the parameters.
    names: from the path of each leaf to its key in `state`; of a stack of
      layers, to a list of keys, one a matrix.
    transpose: a regular expression of paths whose matrices are (in, out) here
      and (out, in) there, as flax's kernels are; None for none.

  Returns:
    A state with the structure, dtypes and shardings of `tx.init(params)`.

  Raises:
    ValueError: a leaf without a key, or a key without a leaf; a state of 8-bit
      codes, of another `proj_type` than 'std' or of tensors of more axes; a
      rank, gap, side, shape or step that `tx`, `params` or another parameter
      does not have; a `tx` without SVD or without Adam.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2

  Example:
    >>> import jax.numpy as jnp, numpy as np, subspace_optax as so
    >>> tx = so.from_hf(1e-3, 'galore_adamw', 'rank=2', ['mlp'])
    >>> params = {'mlp': {'up': {'kernel': jnp.ones((4, 6))}}}
    >>> projector = {
    ...   'rank': 2,
    ...   'update_proj_gap': 200,
    ...   'scale': 0.25,
    ...   'proj_type': 'std',
    ...   'ortho_matrix': np.eye(2, 4),
    ... }
    >>> state = {
    ...   'mlp.up.weight': {
    ...     'step': 300,
    ...     'projector': projector,
    ...     'exp_avg': np.ones((6, 2)),
    ...     'exp_avg_sq': np.ones((6, 2)),
    ...   }
    ... }
    >>> names = {'mlp/up/kernel': 'mlp.up.weight'}
    >>> state = so.from_torch(tx, state, params, names)
    >>> print(state[0][1].inner.mu['mlp']['up']['kernel'].shape)
    (2, 6)
  """
  if set(state) == {'state', 'param_groups'}:
    state = state['state']
  layouts, gap = _layouts_and_gap(tx, params)
  start = tx.init(params)
  wide = _coded_state.all_decoded(start)
  bare = _tree.unbox(wide)
  shapes = _shapes_of_moments(bare)
  step = _check_states(state, names, shapes)
  leaves = {
    path: _read_leaf(
      _Source(path, names[path], state, transpose), layouts, shape, gap
    )
    for path, shape in shapes.items()
  }
  fill = lambda x: _FILLS[type(x)](x, leaves) if type(x) in _FILLS else x
  new = jax.tree.map(fill, bare, is_leaf=lambda x: type(x) in _FILLS)
  new = jax.tree.map_with_path(
    lambda path, x: jnp.full_like(x, step) if _is_count(path) else x, new
  )
  new = jax.tree.structure(wide).unflatten(jax.tree.leaves(new))
  return _coded_state.all_encoded(new, start)


class _Leaf(NamedTuple):
  """What the state holds of one leaf, in the shapes of `tx`'s state."""

  basis: Any  # None if the leaf is plain
  mean: np.ndarray
  square: np.ndarray


class _Source(NamedTuple):
  """Where a leaf comes from."""

  path: str
  keys: Any  # one, or one for each matrix
  state: Mapping[Any, Any]
  transpose: str | None

  @property
  def parts(self) -> list[tuple[Any, Any]]:
    """The keys, and what is kept of them."""
    return [(key, self.state[key]) for key in _keys(self.keys)]

  @property
  def is_turned(self) -> bool:
    """Whether the axes of a matrix have another order there."""
    return bool(self.transpose and re.search(self.transpose, self.path))


def _keys(keys: Any) -> list[Any]:
  several = isinstance(keys, Sequence) and not isinstance(keys, str)
  return list(keys) if several else [keys]


# --- What tx is --------------------------------------------------------------


def _layouts_and_gap(
  tx: Any, params: Any
) -> tuple[dict[str, _layout.Layout], int]:
  """Returns the matrices that are projected, and T of the SVDs."""
  layouts, gap = {}, 0
  for record in _describe.records_of(tx, params):
    name = record.projector.name
    found = re.match(r'svd\(update_proj_gap=(\d+)', name)
    if not found or 'stagger' in name:
      raise ValueError(
        f'tx finds its bases by {name}, and galore-torch by an SVD of all '
        'matrices at every so many steps; make tx by so.from_hf or so.galore, '
        f'not staggered, {_ANEW}.'
      )
    gap = int(found[1])
    if not jnp.issubdtype(record.spec.basis_dtype, jnp.floating):
      raise ValueError(
        f'basis_dtype={record.spec.basis_dtype!r} of the spec would round the '
        "bases of the state; give basis_dtype='float32'."
      )
    matches = [m for m in record.matches if m and m.layout]
    layouts |= {match.path: match.layout for match in matches}
  return layouts, gap


def _shapes_of_moments(state: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shape of Adam's moments of each leaf."""
  is_it = lambda x: isinstance(x, optax.ScaleByAdamState)
  nodes = [x for x in jax.tree.leaves(state, is_leaf=is_it) if is_it(x)]
  if not nodes:
    raise ValueError(
      f'tx keeps no state of optax.scale_by_adam, as GaLoreAdamW does; {_ANEW}.'
    )
  return {
    path: x.shape
    for node in nodes
    for path, x in _tree.flatten(node.mu)[0]
    if not _tree.is_masked(x)
  }


def _is_count(path: tuple[Any, ...]) -> bool:
  """Whether an array of a state counts steps."""
  return any(getattr(key, 'name', None) == 'count' for key in path)


# --- What is there -----------------------------------------------------------


def _check_states(
  state: Mapping[Any, Any],
  names: Mapping[str, Any],
  shapes: Mapping[str, Any],
) -> int:
  """Returns the number of steps, which is the same of all parameters."""
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
      f'names has {missing}, which state has not, and lacks {lost}, which it '
      'has; give each key of the state once.'
    )
  steps = {}
  for key in keys:
    _check_kept(key, state[key])
    steps.setdefault(int(np.asarray(state[key]['step'])), key)
  if len(steps) > 1:
    told = ', '.join(f'step={n} of {key!r}' for n, key in steps.items())
    raise ValueError(
      f'state has {told}; Adam counts the steps of all leaves at once here, so '
      f'that they must be equal, {_ANEW}.'
    )
  return next(iter(steps), 0)


def _check_kept(key: Any, kept: Mapping[str, Any]) -> None:
  for name in kept:
    if name not in _KNOWN:
      raise ValueError(
        f'{key!r} keeps {name!r}, which GaLoreAdamW does not: states of 8-bit '
        'codes, of Adafactor and of APOLLO are not converted; go on there with '
        f'GaLoreAdamW, {_ANEW}.'
      )
  for name in ('step', 'exp_avg', 'exp_avg_sq'):
    if name not in kept:
      raise ValueError(
        f'{key!r} keeps no {name!r}, but {sorted(kept)}; give the state of a '
        f'parameter that was trained, {_ANEW}.'
      )
    dtype = np.asarray(kept[name]).dtype
    if name != 'step' and not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(
        f'{name} of {key!r} is of dtype {dtype}, and no array of floats; '
        f'codes of 8 bits are not converted, {_ANEW}.'
      )


def _read_projector(key: Any, projector: Any, gap: int) -> np.ndarray:
  """Returns the basis of a projector that does what `tx` does."""
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
      f'first step and of tensors of more axes are not converted, {_ANEW}.'
    )
  wide = basis if basis.shape[0] <= basis.shape[1] else basis.T
  error = float(np.max(np.abs(wide @ wide.T - np.eye(len(wide)))))
  if not error < _MOST_ERROR:
    raise ValueError(
      f'{key!r} has an ortho_matrix that is {error:.2g} off orthonormal; '
      f'random bases, as those of APOLLO, are not converted, {_ANEW}.'
    )
  return basis


# --- From there to here ------------------------------------------------------


def _read_leaf(
  source: _Source,
  layouts: Mapping[str, _layout.Layout],
  shape: tuple[int, ...],
  gap: int,
) -> _Leaf:
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
    return _Leaf(
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
  return _Leaf(basis, _to_coords(layout, mean), _to_coords(layout, square))


def _read_plain(
  source: _Source, name: str, shape: tuple[int, ...]
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
  """Whether axes are those of `whole`, some of them split in several."""
  ends = lambda sizes: [int(np.prod(sizes[:i])) for i in range(len(sizes) + 1)]
  same_size = ends(whole)[-1] == ends(parts)[-1]
  return same_size and set(ends(whole)) <= set(ends(parts))


def _read_matrix(
  source: _Source,
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


# --- Into the state ----------------------------------------------------------


def _fill_adam(
  state: optax.ScaleByAdamState, leaves: Mapping[str, _Leaf]
) -> optax.ScaleByAdamState:
  mean = lambda path, x: _put(path, leaves[path].mean, x)
  square = lambda path, x: _put(path, leaves[path].square, x)
  return state._replace(
    mu=_map_leaves(mean, state.mu), nu=_map_leaves(square, state.nu)
  )


def _fill_project(
  state: _projection.ProjectState, leaves: Mapping[str, _Leaf]
) -> _projection.ProjectState:
  basis = lambda path, x: _put(path, leaves[path].basis, x)
  subspaces = state.subspaces
  return state._replace(
    subspaces=subspaces._replace(basis=_map_leaves(basis, subspaces.basis))
  )


_FILLS = {
  optax.ScaleByAdamState: _fill_adam,
  _projection.ProjectState: _fill_project,
}


def _map_leaves(f: Any, tree: Any) -> Any:
  keep = lambda path, x: x if _tree.is_masked(x) else f(path, x)
  return _tree.map_entries(keep, tree)


def _put(path: str, x: Any, like: jax.Array) -> jax.Array:
  """Returns an array as one of the state is: of its dtype, and in its place."""
  if x.shape != like.shape:
    raise ValueError(
      f'tx keeps an array of shape {like.shape} of leaf {path!r}, where the '
      f"state's is {x.shape}; make tx without per_matrix and 'reset', {_ANEW}."
    )
  array = jnp.asarray(x, like.dtype)
  return jax.device_put(array, like.sharding) if like.committed else array
