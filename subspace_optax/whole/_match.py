# SPDX-License-Identifier: Apache-2.0
"""Which leaves are matrices, where there is no subspace."""

import dataclasses
from typing import Any

from subspace_optax._chain import _describe
from subspace_optax._chain import _match_updates
from subspace_optax._chain import _spec
from subspace_optax._matrix import _orthogonalize
from subspace_optax._matrix import _tree


def whole_spec(spec: _spec.SubspaceSpec | None) -> _spec.SubspaceSpec:
  """Returns a spec for which no matrix is too small for its rank."""
  if spec is None:
    spec = _spec.SubspaceSpec(1)
  _spec.check_spec(spec)
  return dataclasses.replace(spec, rank=1, only_if_smaller=False)


def remember_names(params: Any) -> None:
  """Keeps the names of axes that `init` sees for `update`."""
  if not _describe.is_asked():
    _match_updates.remember_names(params)


def match_to_squares(
  spec: _spec.SubspaceSpec, updates: Any, squares: Any
) -> list[_spec.Match | None]:
  """Returns matches of the gradients with which `init` made `squares`.

  Args:
    spec: of `whole_spec`.
    updates: the gradients.
    squares: the tree of `_orthogonalize.first_squares`.

  Raises:
    ValueError: the gradients have another tree, or other shapes.
  """
  known = _tree.flatten(squares)[0]
  if [path for path, _ in known] != [k for k, _ in _tree.flatten(updates)[0]]:
    raise ValueError('gradients must have the tree of the parameters at init.')
  for matches in _match_updates.find_readings(spec, updates):
    if all(_fits(m, x) for m, (_, x) in zip(matches, known, strict=True)):
      return matches
  raise ValueError(
    f'no way to read the gradients {[path for path, _ in known]} as matrices '
    'fits the state; give update the tree that init was given, in the same '
    'boxes, or call init once in this process.'
  )


def _fits(match: _spec.Match | None, squares: Any) -> bool:
  """Whether `init` may have made the state of a leaf for a match."""
  if match is None or match.layout is None:
    return _tree.is_masked(squares)
  shape = _orthogonalize.squares_shape(match.layout)
  return not _tree.is_masked(squares) and squares.shape == shape
