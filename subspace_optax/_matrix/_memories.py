# SPDX-License-Identifier: Apache-2.0
"""Arrays in host memory, in the middle of a computation.

The type of an array says in which memory it lies; *far* arrays are on the host.
No arithmetic accepts far arrays, so they are fetched first and sent back
afterwards.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax


def is_far(x: Any) -> bool:
  """Whether an array lies on the host."""
  host = jax.memory.Space.Host
  return hasattr(x, 'dtype') and jax.typeof(x).memory_space == host


def fetch(x: jax.Array, at: Sequence[Any], shape: Sequence[int]) -> jax.Array:
  """Returns the part of this shape that begins at `at`, on the device."""
  return jax.device_put(take(x, at, shape), jax.memory.Space.Device)


def send(x: jax.Array, far: jax.Array, at: Sequence[Any]) -> jax.Array:
  """Returns a far array with one part replaced by an array on the device."""
  return put(far, jax.device_put(x, jax.memory.Space.Host), at)


def take(x: jax.Array, at: Sequence[Any], shape: Sequence[int]) -> jax.Array:
  """Returns the part of this shape that begins at `at` of the first axes."""
  if not at:
    return x
  flat, start = _flat(x, at)
  rows = (shape[0] if len(at) > x.ndim - len(shape) else 1,)
  sizes = (*rows, *flat.shape[1:])
  return lax.dynamic_slice(flat, start, sizes).reshape(shape)


def put(x: jax.Array, part: jax.Array, at: Sequence[Any]) -> jax.Array:
  """Returns an array with its part at an index replaced."""
  if not at:
    return part
  flat, start = _flat(x, at)
  part = part.reshape((-1, *flat.shape[1:]))
  return lax.dynamic_update_slice(flat, part, start).reshape(x.shape)


def _flat(x: jax.Array, at: Sequence[Any]) -> tuple[jax.Array, list[Any]]:
  """Merges the indexed axes of an array; also returns the new index.

  Copies from host memory can't cut two axes at once.
  """
  first = 0
  for size, i in zip(x.shape, at, strict=False):
    first = size * first + i
  flat = x if len(at) == 1 else x.reshape((-1, *x.shape[len(at) :]))
  return flat, [first, *(0 for _ in flat.shape[1:])]
