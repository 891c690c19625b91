# SPDX-License-Identifier: Apache-2.0
"""Checks the ranks and axes of a `SubspaceSpec` for one leaf."""

import numbers
import operator
from typing import Any

import jax


def check_rank(rank: Any, path: str) -> int | float:
  """Returns a valid rank, which may be a fraction of the short side."""
  where = f' for leaf {path!r}' if path else ''
  if isinstance(rank, jax.Array):
    raise TypeError(
      f'rank{where} must be static, got {rank!r}; under '
      "optax.inject_hyperparams, pass static_args=('rank',)."
    )
  if isinstance(rank, numbers.Integral) and not isinstance(rank, bool):
    if rank <= 0:
      raise ValueError(f'rank{where} must be positive, got {rank}.')
    return operator.index(rank)
  if isinstance(rank, numbers.Real) and not isinstance(rank, bool):
    rank = float(rank)
    if not 0 < rank <= 1:
      raise ValueError(
        f'rank{where} as a fraction of the short side must lie in (0, 1], '
        f'got {rank}; a number of dimensions is an int.'
      )
    return rank
  raise TypeError(f'rank{where} must be an int or a fraction, got {rank!r}.')


def name_axes(
  path: str, leaf: Any, dims: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the axes of rows and columns that dimension numbers name."""
  rows = _normalize(path, leaf, 'reduction_axis', dims.reduction_axis)
  cols = _normalize(path, leaf, 'output_axis', dims.output_axis)
  both = rows + cols
  if len(set(both)) != len(both):
    raise ValueError(
      f'weight_dimension_numbers {tuple(dims)} of leaf {path!r} of shape '
      f'{tuple(leaf.shape)} overlap: rows {rows}, columns {cols}.'
    )
  return rows, cols


def name_blocks(
  path: str, leaf: Any, dims: Any, cols: tuple[int, ...]
) -> tuple[int, ...]:
  """Returns the widths of fused kernels, which optax's numbers lack."""
  blocks = getattr(dims, 'output_blocks', None)
  if blocks is None:
    return ()
  where = f'output_blocks={blocks!r} of leaf {path!r} of shape '
  where += f'{tuple(leaf.shape)}'
  if len(cols) != 1:
    raise ValueError(f'{where} cut one output axis, not {len(cols)}.')
  widths = tuple(map(operator.index, blocks))
  if not widths or min(widths) < 1 or sum(widths) != leaf.shape[cols[0]]:
    raise ValueError(
      f'{where} must be positive and add up to {leaf.shape[cols[0]]}, the '
      f'length of axis {cols[0]}.'
    )
  return widths


def _normalize(path: str, leaf: Any, name: str, axis: Any) -> tuple[int, ...]:
  axes = (axis,) if isinstance(axis, numbers.Integral) else tuple(axis)
  axes = tuple(operator.index(i) for i in axes)
  ndim = len(leaf.shape)
  if not axes or not all(-ndim <= i < ndim for i in axes):
    raise ValueError(
      f'{name}={axis!r} of leaf {path!r} names an axis that shape '
      f'{tuple(leaf.shape)} does not have.'
    )
  return tuple(i % ndim for i in axes)
