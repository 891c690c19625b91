# SPDX-License-Identifier: Apache-2.0
"""Muon's orthogonalisation of whole matrices, in the leaf's own axes."""

import string
from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _varying

# Of Muon's quintic iteration.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(
  layout: _layout.Layout, x: jax.Array, steps: int
) -> jax.Array:
  """Returns matrices with the singular vectors of `x` and values near 1.

  By X <- a X + (b A + c A^2) X, A = X X^T, from X over its norm. At the default
  precision of products, which five steps forgive. Zeros stay zeros.

  References:
    Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024
  """
  a, b, c = _QUINTIC
  original = x
  short, long = layout.projected, layout.free
  if layout.m > layout.n:
    short, long = long, short
  # Every device has the short side, so that A is a sum of the devices' own.
  x = _sharding.regroup(x, short, long)
  largest = layout.largest(x)  # the squares of what is left can't overflow
  x = x / layout.along_leaf(jnp.where(largest > 0, largest, 1.0))
  norm = jnp.maximum(_linalg.safe_sqrt(layout.energy(x)), 1.0)
  to_gram, to_square, to_leaf = _equations(layout, short)

  def step(_: Any, x: jax.Array) -> jax.Array:
    gram = _sharding.einsum(to_gram, x, x)
    poly = b * gram + c * _sharding.einsum(to_square, gram, gram)
    return _sharding.like(a * x + _sharding.einsum(to_leaf, poly, x), x)

  x = _varying.fori_loop(0, steps, step, x / layout.along_leaf(norm))
  return _sharding.like(x, original)


def _equations(
  layout: _layout.Layout, short: tuple[int, ...]
) -> tuple[str, str, str]:
  """Returns the subscripts of X X^T, of A A and of A X."""
  leaf, batch = layout.leaf_axes, layout.batch_axes
  i = ''.join(leaf[axis] for axis in short)
  j = string.ascii_uppercase[: len(i)]
  k = string.ascii_uppercase[len(i) : 2 * len(i)]
  other = leaf.translate(str.maketrans(i, j))
  return (
    f'{leaf},{other}->{batch}{i}{j}',
    f'{batch}{i}{j},{batch}{j}{k}->{batch}{i}{k}',
    f'{batch}{i}{j},{other}->{leaf}',
  )
