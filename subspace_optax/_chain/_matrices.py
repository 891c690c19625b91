# SPDX-License-Identifier: Apache-2.0
"""Gradients, or their coordinates, as the matrices that projectors see."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _spec
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _spread
from subspace_optax._matrix import _tree
from subspace_optax.projectors import _base


def per_matrix(
  matches: list[_spec.Match | None],
  treedef: Any,
  make: Callable[[str, Any, _layout.Layout], Any],
) -> Any:
  """Returns a tree of `make(path, leaf, layout)`; `MaskedNode` for the rest."""
  return treedef.unflatten(
    [
      make(match.path, match.leaf, match.layout)
      if match and match.layout
      else optax.MaskedNode()
      for match in matches
    ]
  )


def wrap_gradients(
  state: Any,  # a ProjectState
  matches: list[_spec.Match | None],
  axis_name: Any,
  keep_gradient: bool,
  hand_out: bool,
  gradients: Any,
) -> Any:
  """Returns the tree of the matrices of gradients.

  Args:
    state: the state of `project`.
    matches: matches of the gradients.
    axis_name: a mapped axis along which they are averaged.
    keep_gradient: whether to average whole gradients now.
    hand_out: whether each device gets its own matrices, if their number divides
      equally.
    gradients: the tree of gradients.
  """
  seeds = dict(_tree.flatten(state.seed)[0])
  average_now = keep_gradient and axis_name is not None

  def matrix(path: str, leaf: jax.Array, layout: _layout.Layout):
    leaf = lax.pmean(leaf, axis_name) if average_now else leaf
    later = None if average_now else axis_name
    layout = dataclasses.replace(layout, axis_name=later)
    matrix = _measure(leaf, layout, seeds[path])
    own = _spread.hand_out(layout, leaf) if hand_out else None
    if own is None:
      return matrix
    matrix = dataclasses.replace(matrix, like=own, gradient=own, home=leaf)
    # Otherwise the compiler would place the gradient like these values.
    energy, ok = (value_at_home(matrix, x) for x in (matrix.energy, matrix.ok))
    return dataclasses.replace(matrix, energy=energy, ok=ok)

  return per_matrix(matches, _tree.flatten(gradients)[1], matrix)


def _measure(
  gradient: jax.Array, layout: _layout.Layout, seed: jax.Array
) -> _base.Matrix:
  energy = layout.mean(layout.energy(gradient))
  # A sum of squares is finite only if all elements are.
  ok = jnp.isfinite(energy) & (energy > 0)
  energy = jnp.where(ok, energy, 1.0)  # a valid divisor for any gradient
  return _base.Matrix(gradient, gradient, layout, seed, energy, ok)


def wrap_parameters(
  seed: Any,
  matches: list[_spec.Match | None],
  params: Any,
  axis_name: Any = None,
) -> Any:
  """Returns the tree of matrices for a step that looks at no gradients.

  Args:
    seed: the tree of the seeds in a `ProjectState`.
    matches: matches of the parameters.
    params: the parameters, or gradients instead.
    axis_name: a mapped axis along which coordinates are averaged.
  """
  seeds = dict(_tree.flatten(seed)[0])

  def matrix(path: str, leaf: jax.Array, layout: _layout.Layout):
    layout = dataclasses.replace(layout, axis_name=axis_name)
    seed = seeds[path]
    one = jnp.ones_like(seed, jnp.float32)
    ok = jnp.ones_like(seed, jnp.bool_)
    return _base.Matrix(leaf, None, layout, seed, one, ok)

  return per_matrix(matches, _tree.flatten(params)[1], matrix)


def take_coordinates(updates: Any, matrices: Any) -> tuple[Any, Any]:
  """Returns coordinates that were passed as gradients, and their matrices.

  Args:
    updates: the tree with coordinates instead of gradients.
    matrices: the matrices from `wrap_parameters`.
  """
  given = dict(_tree.flatten(updates)[0])

  def take(path: str, matrix: Any) -> Any:
    if _tree.is_masked(matrix):
      return matrix
    layout, coords = matrix.layout, given[path]
    if coords.shape != layout.coords_shape:
      raise ValueError(
        f'gradient {path!r} has shape {coords.shape}; in a compressed step '
        f'it must be that of its coordinates, {layout.coords_shape}.'
      )
    coords = layout.mean(_linalg.widen(coords))
    return layout.settle_coords(coords, matrix.like)

  coords = _tree.map_entries(take, matrices)
  return coords, jax.tree.map(_check_energy, matrices, coords)


def _check_energy(matrix: _base.Matrix, coords: jax.Array) -> _base.Matrix:
  """Returns a matrix whose `ok` says whether its coordinates are good."""
  energy = matrix.layout.coords_energy(coords)
  ok = jnp.isfinite(energy) & (energy > 0)
  return dataclasses.replace(matrix, ok=ok)


def project(matrix: _base.Matrix, basis: jax.Array) -> jax.Array:
  """Returns P^T G, or its mean along a mapped axis."""
  layout = matrix.layout
  coords = layout.project(matrix.gradient, basis)
  if matrix.home is not None:
    axes = layout.coords_axes()
    return _spread.back_along(layout, coords, axes, matrix.home)
  return layout.settle_coords(coords, matrix.gradient)


def captured_energy(
  matrix: _base.Matrix, coords: jax.Array, basis: jax.Array, last: jax.Array
) -> jax.Array:
  """Returns ||P^T G||^2 / ||G||^2, or the last value if G is not good.

  P is first scaled so that its columns have length 1 on average.
  """
  layout = matrix.layout
  scale = layout.basis_energy(_linalg.widen(basis)) / layout.rank
  scale = matrix.at_home(scale, layout.batch_axes)
  ratio = layout.coords_energy(coords) / (matrix.energy * scale)
  return jnp.where(matrix.ok, ratio.astype(last.dtype), last)


def value_at_home(matrix: _base.Matrix, x: jax.Array) -> jax.Array:
  """Returns one value per matrix, placed where the state of its leaf lies."""
  return matrix.at_home(x, matrix.layout.batch_axes)
