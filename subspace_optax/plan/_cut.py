# SPDX-License-Identifier: Apache-2.0
"""Which parts of parameters and state a device holds, given a mesh's sizes."""

from collections.abc import Mapping
import contextlib
import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from subspace_optax._matrix import _names
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax.plan import _nearest
from subspace_optax.state import _memory

AXES = ('data', 'fsdp', 'tensor')

# Kernels whose rows are sharded over 'tensor' and columns over 'fsdp', as in
# the example trainer. For all other kernels, it is the other way round.
_ROWS_BY_TENSOR = re.compile(r'(^|/)(embedding|(wo|down)/kernel)$')


def sizes(mesh: str | Mapping[str, int]) -> dict[str, int]:
  """Returns the sizes of axes, also from text such as 'fsdp=4,tensor=2'."""
  if isinstance(mesh, str):
    parts = [part.partition('=') for part in mesh.split(',') if part.strip()]
    mesh = {
      k.strip(): int(v) if v.strip().isdigit() else 0 for k, _, v in parts
    }
  if any(k not in AXES or v < 1 for k, v in mesh.items()):
    unknown = (k for k in mesh if k not in AXES)
    near = ''.join(_nearest.did_you_mean(k, AXES) for k in unknown)
    raise ValueError(
      f'mesh={dict(mesh)!r}{near}: expected positive sizes of some of {AXES}, '
      "such as 'fsdp=4,tensor=2'."
    )
  return {name: mesh.get(name, 1) for name in AXES}


def rows(mesh: Mapping[str, int], batch: int) -> int:
  """Returns the number of rows of the batch on a device."""
  parts = mesh['data'] * mesh['fsdp']
  if batch < 1 or batch % parts:
    raise ValueError(
      f'batch={batch}: expected a positive multiple of {parts}, the parts that '
      f'mesh={dict(mesh)} cuts it into.'
    )
  return batch // parts


def _spec(path: str, x: Any, mesh: Mapping[str, int]) -> PartitionSpec:
  if x.ndim < 2 or _names.is_norm(path) or _names.is_bias(path):
    return PartitionSpec()
  names = ('fsdp', 'tensor')
  if _ROWS_BY_TENSOR.search(path):
    names = names[::-1]
  cut = [
    name if mesh[name] > 1 and size % mesh[name] == 0 else None
    for name, size in zip(names, x.shape[-2:], strict=True)
  ]
  return PartitionSpec(*[None] * (x.ndim - 2), *cut)


def placed(params: Any, mesh: Mapping[str, int]) -> tuple[Any, Any]:
  """Returns shapes with shardings, and the mesh; None for one device."""
  if math.prod(mesh.values()) == 1:
    return params, None
  explicit = (AxisType.Explicit,) * len(AXES)
  on = AbstractMesh(tuple(mesh[a] for a in AXES), AXES, axis_types=explicit)

  def place(path, x):
    spec = _spec(_tree.path_str(path), x, mesh)
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(on, spec)
    )

  return jax.tree.map_with_path(place, params), on


def state_of(tx: Any, params: Any, on: Any) -> Any:
  """Returns the shapes of an optimizer's state, with shardings on a mesh."""
  none = contextlib.nullcontext()
  with none if on is None else jax.sharding.use_abstract_mesh(on):
    return jax.eval_shape(tx.init, params)


def local(x: Any, only: str | None = None) -> tuple[int, ...]:
  """Returns the shape of a device's part, or of its cut along one mesh axis."""
  sharding = getattr(x, 'sharding', None)
  if not isinstance(sharding, NamedSharding):
    return x.shape
  entries = _sharding.pad(sharding.spec, len(x.shape))

  def cuts(entry: Any) -> int:
    used = [a for a in _sharding.names(entry) if only in (None, a)]
    return _sharding.parts(sharding.mesh, used)

  return tuple(
    -(-size // cuts(entry))
    for size, entry in zip(x.shape, entries, strict=True)
  )


def local_bytes(tree: Any) -> int:
  """Returns the bytes of a device's parts of all arrays in a tree."""
  shape = lambda x: jax.ShapeDtypeStruct(local(x), x.dtype)
  return _memory.tree_bytes(jax.tree.map(shape, tree))
