# SPDX-License-Identifier: Apache-2.0
"""Coordinates, r x n, as matrices of their own, in the leaf's own axes."""

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _layout

# Rows whose share of the norm is less are rounding of products with a basis.
_LEAST = 1e-5


def as_leaf(layout: _layout.Layout) -> _layout.Layout:
  """Returns the layout of coordinates as a leaf, the rank its short side."""
  axes, at = layout.coords_axes(), layout.rank_axis
  matrix = [i for i, c in enumerate(axes) if c not in layout.batch_axes]
  cols = tuple(i for i in matrix if i != at)
  return _layout.Layout(layout.coords_shape, (at,), cols, True, layout.rank)


def unit_rows(layout: _layout.Layout, coords: jax.Array) -> jax.Array:
  """Returns coordinates with rows of length 1, or 0 for those of rounding.

  Args:
    layout: of the leaf.
    coords: float32 or wider.
  """
  energy = coords * coords
  of_row = jnp.sum(energy, axis=as_leaf(layout).cols, keepdims=True)
  of_all = layout.along_coords(layout.coords_energy(coords))
  # False of NaN and of infinities, which show.
  is_noise = (of_row < _LEAST**2 * of_all) | (of_row == 0)
  return jnp.where(
    is_noise, 0, coords / jnp.sqrt(jnp.where(is_noise, 1, of_row))
  )
