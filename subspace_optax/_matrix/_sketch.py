# SPDX-License-Identifier: Apache-2.0
"""A sketch of a matrix's range at the cost of reading the matrix."""

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _varying


def sketch(
  layout: _layout.Layout,
  leaf: jax.Array,
  seeds: jax.Array,
  period: jax.Array | int,
) -> jax.Array:
  """Returns G S for a random sign matrix S with one entry per row.

  Each of the r columns sums every r-th column of G with random signs
  (CountSketch; Clarkson and Woodruff, `Low rank approximation
  <https://arxiv.org/abs/1207.6365>`_, 2013). It is computed as a sum if a
  device has all of the free axes, else as a product.

  Args:
    layout: layout of the leaf.
    leaf: G.
    seeds: (*batch), uint32, one per matrix.
    period: int32, a scalar or (*batch), folded into every key.

  Returns:
    (*batch and projected axes, r), float32 or wider.
  """
  draw = lambda key: jax.random.rademacher(key, (layout.n,), jnp.float32)
  signs = _linalg.draw_each(draw, seeds, period)
  signs = signs.reshape(*layout.batch_shape, layout.n)
  if _sharding.is_whole(leaf, layout.free):
    return layout.mean(_sum_blocks(layout, leaf, signs))
  return _multiply(layout, leaf, signs)


def _sum_blocks(
  layout: _layout.Layout, leaf: jax.Array, signs: jax.Array
) -> jax.Array:
  """Returns the sum of G's blocks of r columns, with their signs."""
  r, n, axes = layout.rank, layout.n, layout.basis_axes(r='')
  g = jnp.transpose(leaf, (*map(layout.leaf_axes.index, axes), *layout.free))
  g = _linalg.widen(g).reshape(*g.shape[: len(axes)], n)
  signs = layout.along(signs, axes)
  # A sum over an axis of blocks would be about ten times slower on a CPU.
  block = lambda x, k: lax.dynamic_slice_in_dim(x, k * r, r, axis=-1)
  even = n - n % r
  y = g[..., even:] * signs[..., even:]
  y = jnp.pad(y, [(0, 0)] * (g.ndim - 1) + [(0, even + r - n)])
  add = lambda k, y: y + block(g, k) * block(signs, k)
  return _varying.fori_loop(0, n // r, add, y)


def _multiply(
  layout: _layout.Layout, leaf: jax.Array, signs: jax.Array
) -> jax.Array:
  """Returns G S, where S_ij is the i-th sign if i = j mod r, else 0."""
  r, n = layout.rank, layout.n
  rows = jnp.arange(n)[:, None] % r == jnp.arange(r)[None, :]
  s = jnp.where(rows, signs[..., None], 0.0)
  s = s.reshape(*layout.batch_shape, *(layout.shape[i] for i in layout.free), r)
  free = ''.join(layout.leaf_axes[i] for i in layout.free)
  axes = layout.batch_axes + free + 'y'
  return layout.multiply(leaf, s, axes, layout.basis_axes())
