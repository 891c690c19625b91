# SPDX-License-Identifier: Apache-2.0
"""Random bits for rounding and choosing, the same under any sharding.

The bits are a hash of each number's position in its array, of a seed and of the
step. This takes a few integer operations that fuse with the rounding, while a
counter-based generator would cost more than the optimizer. The bits are only
good enough to round, and to choose columns and signs.
"""

from typing import Any
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from subspace_optax._matrix import _sharding

_ODD = 0x9E3779B9


def salt(seed: Any, name: str) -> Any:
  """Returns a number for a seed and a name, the same in every process."""
  crc = zlib.crc32(name.encode())
  if isinstance(seed, jax.Array):  # under `inject_hyperparams`
    return seed.astype(jnp.uint32) * jnp.uint32(_ODD) + jnp.uint32(crc)
  return np.uint32((int(seed) * _ODD + crc) % 2**32)


def seed_of_layer(seed: Any, layer: Any) -> Any:
  """Returns another seed for each matrix that is updated by itself.

  Args:
    seed: a number.
    layer: the matrix's index in its stack; None for leaves that are updated
      whole, which keep `seed`.
  """
  if layer is None:
    return seed
  if not isinstance(seed, jax.Array):
    seed = np.uint32(int(seed) % 2**32)
  wide = lambda x: jnp.asarray(x).astype(jnp.uint32)
  return hashed(wide(seed), wide(layer))


def bits(
  salt: Any, count: jax.Array, like: jax.Array, start: Any = 0
) -> jax.Array:
  """Returns 32 random bits for each number of an array.

  Args:
    salt: uint32, the salt of the array.
    count: the number of the step.
    like: the array, with the shape and, if explicit, sharding of the bits.
    start: for a part of an array, the index of its first entry.
  """
  index = jnp.zeros(like.shape, jnp.uint32)
  for axis in range(like.ndim):
    along = lax.broadcasted_iota(jnp.uint32, like.shape, axis)
    index = index * jnp.uint32(like.shape[axis]) + along
  index = index + jnp.asarray(start, jnp.uint32)
  index = _sharding.like(index, like.astype(jnp.uint32))
  step = _mixed(jnp.asarray(salt, jnp.uint32) + count.astype(jnp.uint32))
  return _mixed(index ^ step)


def uniform(
  salt: jax.Array, count: jax.Array, like: jax.Array, start: Any = 0
) -> jax.Array:
  """Returns float32 in [0, 1) for each number of an array; see `bits`."""
  return (bits(salt, count, like, start) >> 8).astype(jnp.float32) * 2.0**-24


def hashed(seed: jax.Array, number: jax.Array) -> jax.Array:
  """Returns 32 random bits for every pair of a seed and a number, uint32.

  It is elementwise in arrays that broadcast, so that each shard computes its
  own bits.
  """
  return _mixed(number ^ _mixed(seed))


def _mixed(x: jax.Array) -> jax.Array:
  """Returns a hash of each number, with the factors of MurmurHash3's end."""
  for factor in (0x85EBCA6B, 0xC2B2AE35):
    x = (x ^ (x >> 16)) * jnp.uint32(factor)
  return x ^ (x >> 15)
