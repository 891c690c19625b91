# SPDX-License-Identifier: Apache-2.0
"""The orthonormal cosine transform, and columns of it made from their numbers.

Column k of D, m x m, is c_k cos(pi (2i + 1) k / 2m) in row i, with c_0 the root
of 1/m and all other c_k the root of 2/m (the DCT-II). A column costs m cosines,
so that a basis of D's columns needs no memory between two steps.
"""

import math

import jax
import jax.numpy as jnp

# Of a side, so that phases can be found in 32 bits.
MOST_ROWS = 2**20

_LOW_BITS = 10


def cosines(rows: jax.Array, numbers: jax.Array, m: int) -> jax.Array:
  """Returns entries of D, float32, with errors of one part in 10^7.

  Elementwise in arrays that broadcast, so that a shard makes its own rows.

  Args:
    rows: i, integers from 0 to m - 1.
    numbers: k, likewise.
    m: the transform's size, at most `MOST_ROWS`.
  """
  phase = _phase(2 * rows.astype(jnp.uint32) + 1, numbers.astype(jnp.uint32), m)
  # cos is even and turns its sign half way: fold 4m phases into 0 to m, where
  # float32 holds the angle best.
  phase = jnp.minimum(phase, 4 * m - phase)
  is_negative = phase > m
  phase = jnp.where(is_negative, 2 * m - phase, phase)
  x = jnp.cos(phase.astype(jnp.float32) * (math.pi / 2 / m))
  x = jnp.where(is_negative, -x, x)
  return x * jnp.where(numbers == 0, (1 / m) ** 0.5, (2 / m) ** 0.5)


def _phase(odd: jax.Array, number: jax.Array, m: int) -> jax.Array:
  """Returns (odd * number) mod 4m, exactly, for uint32 factors below 2m."""
  if 2 * m * m < 2**32:
    return (odd * number % (4 * m)).astype(jnp.int32)
  high = odd * (number >> _LOW_BITS) % (4 * m) << _LOW_BITS
  low = odd * (number & ((1 << _LOW_BITS) - 1))
  # Each below 2^32; their sum is not.
  return ((high % (4 * m) + low % (4 * m)) % (4 * m)).astype(jnp.int32)
