# SPDX-License-Identifier: Apache-2.0
"""What an optimizer holds, counted from the pytrees themselves."""

import math
from typing import Any, NamedTuple

import jax
import optax

from subspace_optax._chain import _dtypes
from subspace_optax._matrix import _notices


class MemoryReport(NamedTuple):
  """Bytes that stay between steps, and the gradients.

  Attributes:
    params: bytes of the parameters.
    gradients: bytes of a gradient in the parameters' dtypes.
    state: bytes of the optimizer's state.
    adam: bytes of `optax.adam`'s state on the same parameters.
  """

  params: int
  gradients: int
  state: int
  adam: int

  def __str__(self) -> str:
    rows = [(name, _readable(size)) for name, size in self._asdict().items()]
    rows[-1] = ('adam instead', rows[-1][1])
    lines = [f'{name:<14}{size:>12}' for name, size in rows]
    ratio = self.state / self.adam if self.adam else math.nan
    return '\n'.join([*lines, f'{"state / adam":<14}{ratio:>12.3f}'])


def memory_report(tx: Any, params: Any) -> MemoryReport:
  """Counts the bytes of an optimizer's state beside Adam's.

  Args:
    tx: any optax optimizer, a `TrainStep` or `rso.subproblems`. For
      `layerwise`, counts one layer's gradient plus the gradients outside of the
      stack; for `rso.compressed_step`, those of coordinates.
    params: the parameters, or their shapes (`jax.eval_shape`); nothing is
      allocated.

  Returns:
    Exact bytes over all devices, as if nothing were replicated.

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> params = {'w': jax.ShapeDtypeStruct((4096, 11008), jnp.float32)}
    >>> print(so.memory_report(so.golore(1e-3, rank=128), params))
    params          172.00 MiB
    gradients       172.00 MiB
    state            12.75 MiB
    adam instead    344.00 MiB
    state / adam         0.037
  """
  with _notices.quiet():
    state = jax.eval_shape(tx.init, params)
  adam = jax.eval_shape(optax.adam(1.0).init, params)
  alive = getattr(tx, 'gradients', None)
  gradients = params if alive is None else alive(params, state)
  return MemoryReport(*map(tree_bytes, (params, gradients, state, adam)))


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
