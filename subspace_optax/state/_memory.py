# SPDX-License-Identifier: Apache-2.0
"""The memory of optimizers, counted from the pytrees themselves."""

from collections.abc import Iterator
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _dtypes
from subspace_optax._chain import _every_k
from subspace_optax._chain import _in_subspace
from subspace_optax._chain import _projection
from subspace_optax._chain import _unproject
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _tree
from subspace_optax.projectors import _base
from subspace_optax.steps import _subproblems

# The parts of a state, and their descriptions in tables.
_PARTS = {
  'bases': 'of the subspaces, and what moves them',
  'moments': 'of coordinates, inside the subspaces',
  'residual': 'what the residual rule keeps',
  'plain': 'moments of whole leaves, not projected',
  'counters': 'counters, seeds and metrics',
}

# Parts that hold states of any optimizer, whose counters `_FIELDS` can't name.
_OF_OPTIMIZERS = ('moments', 'plain')

# From fields of states to the part that they belong to.
_FIELDS: dict[type, dict[str, str]] = {
  _projection.ProjectState: {
    'count': 'counters',
    'seed': 'seeds',
    'subspaces': 'counters',
    'projector': 'bases',
  },
  _base.Subspaces: {'basis': 'bases'},
  _in_subspace.InSubspaceState: {'inner': 'moments'},
  _every_k.EveryKState: {'mean': 'moments'},
  _subproblems.SubproblemState: {
    'seed': 'seeds',
    'coords': 'moments',
    'inner': 'moments',
  },
  _unproject.ResidualState: {'count': 'counters', 'residual': 'residual'},
}


class MemoryReport(NamedTuple):
  """Bytes that stay between steps, and the gradients.

  Attributes:
    params: bytes of the parameters.
    gradients: bytes of a gradient in the parameters' dtypes.
    state: bytes of the optimizer's state, the sum of the last five.
    adam: bytes of `optax.adam`'s state on the same parameters.
    bases: bytes of stored bases, and of the state that their rule keeps to move
      them, such as the moments of `online_pca`'s optimizer.
    moments: bytes of the inner optimizer's state for coordinates, including the
      scales of quantized moments, and of sums of coordinates.
    residual: bytes of the residual rule's state.
    plain: bytes of moments and other state of whole leaves: of leaves that are
      not projected, and of optimizers without a subspace.
    counters: bytes of counters, seeds and metrics.
  """

  params: int
  gradients: int
  state: int
  adam: int
  bases: int = 0
  moments: int = 0
  residual: int = 0
  plain: int = 0
  counters: int = 0

  def __str__(self) -> str:
    row = lambda name, size: f'{name:<14}{_readable(size):>12}'
    parts = [(k, getattr(self, k), text) for k, text in _PARTS.items()]
    ratio = self.state / self.adam if self.adam else math.nan
    return '\n'.join(
      [
        row('params', self.params),
        row('gradients', self.gradients),
        row('state', self.state),
        *(f'{row(f"  {k}", size)}  {text}' for k, size, text in parts if size),
        row('adam instead', self.adam),
        f'{"state / adam":<14}{ratio:>12.3f}',
      ]
    )


def memory_report(tx: Any, params: Any) -> MemoryReport:
  """Counts the bytes of an optimizer's state, by kind, next to Adam's.

  Args:
    tx: any optax optimizer, a `TrainStep` or `rso.subproblems`. For
      `layerwise`, it counts one layer's gradient plus the gradients outside the
      stack; for `rso.compressed_step`, the gradients of coordinates.
    params: the parameters, or their shapes (`jax.eval_shape`); nothing is
      allocated.

  Returns:
    Exact bytes over all devices, as if nothing were replicated. It prints as a
    table without kinds that have no bytes.

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> params = {'w': jax.ShapeDtypeStruct((4096, 11008), jnp.float32)}
    >>> print(so.memory_report(so.golore(1e-3, rank=128), params))
    params          172.00 MiB
    gradients       172.00 MiB
    state            12.75 MiB
      bases           2.00 MiB  of the subspaces, and what moves them
      moments        10.75 MiB  of coordinates, inside the subspaces
      counters         24.00 B  counters, seeds and metrics
    adam instead    344.00 MiB
    state / adam         0.037
  """
  with _notices.quiet():
    state = jax.eval_shape(tx.init, params)
  adam = jax.eval_shape(optax.adam(1.0).init, params)
  alive = getattr(tx, 'gradients', None)
  gradients = params if alive is None else alive(params, state)
  totals = map(tree_bytes, (params, gradients, state, adam))
  return MemoryReport(*totals, **_parts_of(_tree.unbox(state), params))


def _parts_of(state: Any, params: Any) -> dict[str, int]:
  """Returns the bytes of each part of a state."""
  owners = _tree.owners(state, params)
  arrays = list(_sorted_arrays(state))
  projected = {owners.get(path) for path, kind, _ in arrays if kind == 'seeds'}
  sizes = dict.fromkeys(_PARTS, 0)
  for path, kind, x in arrays:
    owner = owners.get(path)
    counts = kind in _OF_OPTIMIZERS and _is_counter(x, owner)
    if counts or kind == 'seeds':
      kind = 'counters'
    elif kind == 'moments' and owner not in projected:
      kind = 'plain'
    sizes[kind] += tree_bytes(x)
  return sizes


def _sorted_arrays(
  node: Any, kind: str = 'plain', path: tuple[Any, ...] = ()
) -> Iterator[tuple[str, str, Any]]:
  """Yields the path of each array, the part of its field, and the array."""
  if jax.tree_util.all_leaves([node]):
    yield _tree.path_str(path), kind, node
    return
  fields = _FIELDS.get(type(node), {})
  for key, child in _tree.children(node)[0]:
    of_child = fields.get(_tree.path_str(key), kind)
    yield from _sorted_arrays(child, of_child, (*path, *key))


def _is_counter(x: Any, owner: str | None) -> bool:
  """Whether an array of an optimizer is neither a moment nor its codes."""
  wide = jnp.issubdtype(x.dtype, jnp.integer) and _dtypes.bits(x.dtype) >= 32
  return wide or (owner is None and x.ndim == 0)


def tree_bytes(tree: Any) -> int:
  """Returns the bytes of all arrays, or shapes of arrays, in a tree."""
  return sum(
    -(-math.prod(x.shape) * _dtypes.bits(x.dtype) // 8)
    for x in jax.tree.leaves(tree)
  )


def _readable(size: float) -> str:
  for unit in ('B', 'KiB', 'MiB'):
    if size < 1024:
      return f'{size:.2f} {unit}'
    size /= 1024
  return f'{size:.2f} GiB'
