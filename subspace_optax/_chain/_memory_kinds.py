# SPDX-License-Identifier: Apache-2.0
"""Which arrays of a state live in host memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from subspace_optax._matrix import _tree

# The only memory that types tell apart from device memory inside a program.
_HOST = 'pinned_host'

Kinds = str | Callable[[str], str | None]


def with_memory_kinds(tx: Any, state: Any, shardings: Any, kinds: Kinds) -> Any:
  """Returns shardings with memory kinds; see `state_sharding`."""

  def place(path: Any, x: Any, sharding: Any) -> NamedSharding:
    name, sharding = _tree.path_str(path), _on_mesh(sharding)
    return sharding.with_memory_kind(_kind_of(name, x, sharding, kinds))

  placed = jax.tree.map_with_path(place, state, shardings)
  used = {sharding.memory_kind for sharding in jax.tree.leaves(placed)}
  if _HOST in used and not getattr(tx, 'streams', not hasattr(tx, 'step')):
    raise ValueError(
      f'memory_kind={kinds!r}, but this step takes its state from devices '
      'alone; on the host it may be with so.train_step, so.layerwise or '
      'so.offload(tx).'
    )
  return placed


def _on_mesh(sharding: Any) -> NamedSharding:
  """Returns a sharding on a mesh; jit drops the memory kind of all others."""
  if isinstance(sharding, NamedSharding):
    return sharding
  devices = np.array(list(sharding.device_set))
  mesh = Mesh(devices, ('device',), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, PartitionSpec())


def _kind_of(name: str, x: Any, sharding: NamedSharding, kinds: Kinds) -> str:
  """Returns the memory kind of an array; raises if its devices lack it."""
  device = next(iter(sharding.device_set))
  own = device.default_memory().kind
  found = kinds if isinstance(kinds, str) else kinds(name) or own
  known = {memory.kind for memory in device.addressable_memories()}
  if found != own and found not in known & {_HOST}:
    raise ValueError(
      f'memory_kind of state {name!r} is {found!r}; state may be in '
      f'{sorted(known & {own, _HOST})} of a {device.platform} device, whose '
      f'memories are {sorted(known)}.'
    )
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.extended)
  stays = isinstance(kinds, str) and (x.ndim < 2 or is_key)
  return own if stays else found
