# SPDX-License-Identifier: Apache-2.0
"""Arrays in the memory of the host, in the middle of a computation.

The type of an array says in which memory it lies: *far* is on the host. No
arithmetic takes far arrays, so they are fetched first and sent back after.
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
  """Returns a far array's part of a shape, at an index, on the device."""
  return jax.device_put(take(x, at, shape), jax.memory.Space.Device)


def send(x: jax.Array, far: jax.Array, at: Sequence[Any]) -> jax.Array:
  """Returns a far array with a part replaced that is on the device."""
  return put(far, jax.device_put(x, jax.memory.Space.Host), at)


def take(x: jax.Array, at: Sequence[Any], shape: Sequence[int]) -> jax.Array:
  """Returns the part of a shape, at an index of an array's first axes."""
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
  """Returns an array whose first axis holds all of an index, and a start there.

  Copies from a host's memory can't cut two axes at once.
  """
  first = 0
  for size, i in zip(x.shape, at, strict=False):
    first = size * first + i
  flat = x if len(at) == 1 else x.reshape((-1, *x.shape[len(at) :]))
  return flat, [first, *(0 for _ in flat.shape[1:])]
