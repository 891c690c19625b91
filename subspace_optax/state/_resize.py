# SPDX-License-Identifier: Apache-2.0
"""States saved at one rank, for an optimizer of another rank."""

from collections.abc import Collection, Iterator
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax

from subspace_optax._chain import _describe
from subspace_optax._chain import _in_subspace
from subspace_optax._chain import _projection
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax.bases import _quantized_basis
from subspace_optax.low_precision import _coded_state


def resize_rank(
  tx: optax.GradientTransformation, state: Any, params: Any
) -> Any:
  """Returns a state for `tx` from a state of the same optimizer at other ranks.

  If a leaf's rank shrinks, its basis keeps its first r columns, and all moments
  keep the coordinates of these. If it grows, orthonormal columns are appended:
  the last columns of the basis that `tx` starts with, made orthogonal to the
  old span by matrix products. Their moments start as in `tx`, at zero. (Adam's
  counter continues, so steps along the new columns are at first up to (1 - b1)
  / sqrt(1 - b2) times the learning rate, 3.2 times with its defaults.)
  Counters, seeds and everything else are copied, with the dtypes and shardings
  of `tx.init(params)`.

  For a basis in int8 or int4, the codes of columns that stay are copied. When
  they are made orthonormal with the new columns, they turn by less than their
  rounding error. Moments in 8 or 4 bits are decoded, resized and rounded to the
  nearest code of the new blocks. At another rank they may lose or gain codes,
  since small matrices keep float32.

  A basis that is recomputed at every step (`regenerate=True`, as in
  `apollo_adamw`; `dct`, as in `subspace_adamw`, `subspace_muon` and `trion`) is
  a different basis at another rank, so its moments are reset, except those of
  whole matrices. If `dct` chooses columns by the gradient, they are random
  until they are next due.

  Args:
    tx: the optimizer to continue with, at other ranks.
    state: the saved state of the old optimizer. To restore it, use the shapes
      of `jax.eval_shape(old_tx.init, params)`.
    params: the parameters, or their shapes with shardings.

  Returns:
    A state with the structure of `tx.init(params)`. Learning rates, gaps and
    ranks may differ from the old ones, and so may projectors whose states have
    the same form. Injected hyperparameters are those of the state.

  Raises:
    ValueError: the optimizers differ in more than ranks, such as the projector,
      the inner optimizer, the parameters, the side or which leaves are
      projected; `tx` holds no `project`; a basis without full rank.

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> params = {'w': jnp.ones((8, 16))}
    >>> state = so.golore(1e-3, rank=2).init(params)
    >>> state = so.resize_rank(so.golore(1e-3, rank=4), state, params)
    >>> print(state[0][0].subspaces.basis['w'].shape)
    (8, 4)
  """
  _describe.records_of(tx, params)  # raises if there are none
  return carry_over(tx, state, params, tx.init(params))


def carry_over(
  tx: Any,
  state: Any,
  params: Any,
  start: Any,
  anew: Collection[str] = (),
) -> Any:
  """Returns `resize_rank(tx, state, params)` for `start = tx.init(params)`.

  Args:
    tx: see `resize_rank`; it may hold no `project`.
    state: see `resize_rank`.
    params: see `resize_rank`.
    start: the first state.
    anew: paths of leaves whose basis differs from that of the saved state, so
      that their coordinates are reset.
  """
  layouts = {
    match.path: match.layout
    for record in _describe.projections_of(tx, params)
    for match in record.matches
    if match and match.layout
  }
  # At another rank, quantized moments have other blocks.
  old, new = map(_coded_state.all_decoded, (state, start))
  pairs = list(_pairs(old, new))
  leaves = _projected_leaves(pairs, new, layouts, anew)
  fresh = _fresh_paths(pairs, new, params, leaves)
  arrays = [
    new if path in fresh else _resized(path, old, new, leaves)
    for path, old, new in pairs
  ]
  wide = jax.tree.structure(new).unflatten(jax.tree.leaves(arrays))
  return _coded_state.all_encoded(wide, start)


class _Leaf(NamedTuple):
  """A projected parameter."""

  layout: _layout.Layout  # at the new rank
  basis: str  # path of its basis in the state
  old_rank: int | None  # None if the basis is not stored, or is another one
  anew: bool  # whether its coordinates are reset, even at the same rank


def _pairs(
  old: Any, new: Any, path: tuple[Any, ...] = ()
) -> Iterator[tuple[str, Any, Any]]:
  """Yields (path, old array, new array) of two states of the same form.

  The arrays may also be two bases in integers.
  """
  old_parts, old_form = _tree.children(old)
  new_parts, new_form = _tree.children(new)
  if old_form != new_form:
    raise ValueError(
      f'state holds {_kind(old)} at {_tree.path_str(path)!r}, where tx has '
      f'{_kind(new)}; only ranks may differ: make tx with the projector, inner '
      'optimizer and tree of the saved state, and at ranks at which the same '
      'leaves are projected.'
    )
  both = (old, new)
  quantized = all(isinstance(x, _projected.QuantizedBasis) for x in both)
  if quantized or (new_parts and not new_parts[0][0]):
    yield _tree.path_str(path), old, new
    return
  for (key, old), (_, new) in zip(old_parts, new_parts, strict=True):
    yield from _pairs(old, new, (*path, *key))


def _kind(node: Any) -> str:
  if _tree.is_masked(node):
    return 'nothing'
  if isinstance(node, _projected.QuantizedBasis):
    return f'a basis in {node.dtype.name}'
  if hasattr(node, 'shape'):
    return f'an array of shape {tuple(node.shape)}'
  if isinstance(node, dict):
    return f'a dict of {sorted(map(str, node))}'
  return f'{type(node).__name__} of {len(jax.tree.leaves(node))} arrays'


def _projected_leaves(
  pairs: list[Any],
  start: Any,
  layouts: dict[str, _layout.Layout],
  anew: Collection[str],
) -> dict[str, _Leaf]:
  """Returns the projected parameters by path, with the paths of their bases."""
  ranks = {path: old.shape[-1] for path, old, _ in pairs if old.ndim}
  leaves = {}
  for path, state in _tree.find(start, _projection.ProjectState):
    for leaf in _projection.paths(state):
      of_state = (path, 'subspaces/basis', leaf)
      basis = '/'.join(filter(None, of_state))
      rank = None if leaf in anew else ranks.get(basis)
      leaves[leaf] = _Leaf(layouts[leaf], basis, rank, leaf in anew)
  return leaves


def _fresh_paths(
  pairs: list[Any], start: Any, params: Any, leaves: dict[str, _Leaf]
) -> set[str]:
  """Returns the paths of arrays for coordinates that are reset.

  These are all arrays that an inner optimizer keeps for such a leaf and, in
  other states, arrays with the shape of coordinates, such as their sums. The
  coordinates of a leaf whose basis is not stored are reset if its rank changes.
  """
  nodes = _tree.find(start, _in_subspace.InSubspaceState)
  roots = [path + '/' for path, _ in nodes]
  owners = _tree.owners(start, params)
  changed = {
    owners.get(path) for path, old, new in pairs if _shape(old) != _shape(new)
  }
  fresh = set()
  for path, _, new in pairs:
    leaf = leaves.get(owners.get(path, ''))
    if leaf is None or _shape(new) is None:
      continue
    if not leaf.anew and (leaf.old_rank or owners[path] not in changed):
      continue
    # If the tree is one array, counters seem to belong to it, too.
    kept = owners[path] or new.ndim > 0
    inside = kept and any(path.startswith(root) for root in roots)
    if inside or _is_in_subspace(new.shape, leaf.layout):
      fresh.add(path)
  return fresh


def _shape(x: Any) -> tuple[int, ...] | None:
  """Returns an array's shape; None for a basis in integers."""
  return None if isinstance(x, _projected.QuantizedBasis) else x.shape


def _ends_with(path: str, leaf: str) -> bool:
  return not leaf or path == leaf or path.endswith('/' + leaf)


def _resized(path: str, old: Any, new: Any, leaves: dict[str, _Leaf]) -> Any:
  """Returns one array of the state, or one basis."""
  if isinstance(new, _projected.QuantizedBasis):
    return _resized_codes(path, old, new, leaves)
  # The longest first: `attention` is the end of `encoder/attention`, too.
  found = [
    of
    for leaf, of in sorted(leaves.items(), key=lambda x: -len(x[0]))
    if _ends_with(path, leaf)
  ]
  if old.shape == new.shape:
    return _put(old, new)
  for of in found:
    axis = _rank_axis(path, old.shape, new.shape, of)
    if axis is None:
      continue
    if of.old_rank is None:
      return new
    old, whole = _put(old, new, axis), _put(new, new, axis)
    if path != of.basis or of.old_rank > of.layout.rank:
      return _put(_fit(old, whole, axis), new)
    return _put(_extended(path, of.layout, old, whole), new)
  raise ValueError(_no_change_of_rank(path, old, new))


def _is_in_subspace(shape: tuple[int, ...], layout: _layout.Layout) -> bool:
  """Whether a shape is that of coordinates, per leaf or stacked per matrix."""
  sizes = dict(zip(layout.coords_axes(), layout.coords_shape, strict=True))
  batch = layout.batch_axes
  each = batch + ''.join(c for c in layout.coords_axes() if c not in batch)
  return shape in (layout.coords_shape, tuple(sizes[c] for c in each))


def _no_change_of_rank(path: str, old: Any, new: Any) -> str:
  return (
    f'state holds an array of shape {tuple(old.shape)} at {path!r}, where tx '
    f'has {tuple(new.shape)}, which is no change of rank alone; parameters and '
    'the side that is projected must be those of the saved state, and the '
    'inner optimizer one that keeps no matrices of rank x rank.'
  )


def _resized_codes(
  path: str,
  old: _projected.QuantizedBasis,
  new: _projected.QuantizedBasis,
  leaves: dict[str, _Leaf],
) -> _projected.QuantizedBasis:
  """Returns a basis that keeps the codes of all old columns."""
  if old.dtype != new.dtype:
    raise ValueError(
      f'state holds {_kind(old)} at {path!r}, where tx has {_kind(new)}; give '
      'the spec the basis_dtype of the saved state.'
    )
  if old.shape[:-1] != new.shape[:-1]:
    raise ValueError(_no_change_of_rank(path, old, new))
  r, last = old.shape[-1], old.ndim - 1
  if r < new.shape[-1]:
    layout = next(x.layout for x in leaves.values() if x.basis == path)
    old, whole = _put(old, new, last), _put(new, new, last)
    # Without making columns orthonormal, so that each keeps its codes.
    decode = functools.partial(_quantized_basis.decode, orthonormal=False)
    wide = _extended(path, layout, decode(layout, old), decode(layout, whole))
    more = _quantized_basis.encode(layout, wide[..., r:], new.dtype)
    join = lambda one, other: jnp.concatenate([one, other], -1)
    return _put(jax.tree.map(join, old, more), new)
  return _put(jax.tree.map(lambda x: x[..., : new.shape[-1]], old), new)


def _rank_axis(
  path: str, old: tuple[int, ...], new: tuple[int, ...], leaf: _Leaf
) -> int | None:
  """Returns the only axis along which shapes differ, if it is the rank."""
  axes = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
  if len(old) != len(new) or len(axes) != 1:
    return None
  axis = axes[0]
  fits = new[axis] == leaf.layout.rank
  fits = fits and leaf.old_rank in (None, old[axis])
  fits = fits and (path != leaf.basis or axis == len(new) - 1)
  return axis if fits else None


def _put(old: Any, new: Any, whole: int | None = None) -> Any:
  """Returns old arrays with the dtypes and shardings of new ones.

  `whole` is an axis that must not be sharded.
  """

  def put(x: jax.Array, like: jax.Array) -> jax.Array:
    x = x if x.dtype == like.dtype else x.astype(like.dtype)
    if not like.committed:
      return jnp.asarray(x)
    sharding = like.sharding
    if whole is not None and isinstance(sharding, NamedSharding):
      spec = list(_sharding.pad(sharding.spec, like.ndim))
      spec[whole] = None
      sharding = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return jax.device_put(x, sharding)

  return jax.tree.map(put, old, new)


def _fit(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
  """Returns `old` cut to the size of `new`, or extended by its rest."""
  size, wanted = old.shape[axis], new.shape[axis]
  if size >= wanted:
    return lax.slice_in_dim(old, 0, wanted, axis=axis)
  rest = lax.slice_in_dim(new, size, wanted, axis=axis)
  return jnp.concatenate([old, rest], axis)


def _extended(
  path: str, layout: _layout.Layout, old: jax.Array, new: jax.Array
) -> jax.Array:
  """Extends a basis by the last columns of another; raises if not finite."""
  basis = _extend(layout, old, new)
  if not bool(jnp.all(jnp.isfinite(basis))):
    raise ValueError(
      f'the basis at {path!r} is not finite or not of full rank, so that it '
      'cannot be extended; start from `tx.init(params)`.'
    )
  return basis


@functools.partial(jax.jit, static_argnums=0)
def _extend(
  layout: _layout.Layout, old: jax.Array, new: jax.Array
) -> jax.Array:
  """Extends a basis by columns that are orthogonal to it and to each other."""
  q = _linalg.orthonormalize(layout, old)
  more = _linalg.widen(new[..., old.shape[-1] :])
  for _ in range(2):  # the second pass removes the rounding of the first
    more -= layout.mix_basis(q, layout.gram(q, more))
    more = _linalg.orthonormalize(layout, more)
  return jnp.concatenate([old, more.astype(old.dtype)], -1)
