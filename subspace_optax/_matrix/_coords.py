# SPDX-License-Identifier: Apache-2.0
"""Coordinates, r x n, as separate matrices, with the leaf's own axes."""

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _layout

# Rows with a smaller fraction of the norm are rounding errors of products with
# a basis.
_LEAST = 1e-5


def as_leaf(layout: _layout.Layout) -> _layout.Layout:
  """Returns the layout of coordinates as a leaf, its short side the rank."""
  axes, at = layout.coords_axes(), layout.rank_axis
  matrix = [i for i, c in enumerate(axes) if c not in layout.batch_axes]
  cols = tuple(i for i in matrix if i != at)
  return _layout.Layout(layout.coords_shape, (at,), cols, True, layout.rank)


def unit_rows(layout: _layout.Layout, coords: jax.Array) -> jax.Array:
  """Scales rows of coordinates to length 1, and rows of rounding errors to 0.

  Args:
    layout: layout of the leaf.
    coords: the coordinates, float32 or wider.
  """
  energy = coords * coords
  of_row = jnp.sum(energy, axis=as_leaf(layout).cols, keepdims=True)
  of_all = layout.along_coords(layout.coords_energy(coords))
  # False for NaN and infinities, so that they remain visible.
  is_noise = (of_row < _LEAST**2 * of_all) | (of_row == 0)
  return jnp.where(
    is_noise, 0, coords / jnp.sqrt(jnp.where(is_noise, 1, of_row))
  )
