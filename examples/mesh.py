"""Meshes of devices, of one process or many, and what of a LLaMA goes where.

The axes are those that `--mesh` names: rows of the batch are cut over 'data'
and 'fsdp'; parameters over 'fsdp' along their inputs and over 'tensor' along
heads, MLP and vocabulary, as in Megatron; stacked layers are never cut.
"""

from collections.abc import Callable
import math
import os
import re
from typing import Any
import zlib

import jax
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

AXES = ('data', 'fsdp', 'tensor')
_ROWS = ('data', 'fsdp')

# The mesh axes of the last two axes of each kernel.
_KERNELS = {
  'embedding': ('tensor', 'fsdp'),
  '(wq|wk|wv|gate|up|lm_head)/kernel': ('fsdp', 'tensor'),
  '(wo|down)/kernel': ('tensor', 'fsdp'),
}


# --- Processes ---------------------------------------------------------------


def _launched() -> bool:
  """Whether a launcher says that it started several processes."""
  tasks = ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '')
  return ',' in hosts or any(int(os.environ.get(k) or 1) > 1 for k in tasks)


def join(coordinator: str, processes: int, process: int):
  """Joins the other processes of this run, before any device is touched."""
  if processes < 1 or not 0 <= process < processes:
    raise ValueError(
      f'process={process}, processes={processes}: expected a process from 0 '
      'to processes - 1'
    )
  by_flags = coordinator not in ('', 'auto')
  if by_flags != (processes > 1):
    raise ValueError(
      f'coordinator={coordinator!r}, processes={processes}: give both, as '
      'host:port of process 0 and a number above 1, or neither'
    )
  if jax.distributed.is_initialized():
    return
  if by_flags:
    jax.distributed.initialize(coordinator, processes, process)
  elif coordinator == 'auto' or _launched():
    jax.distributed.initialize()


def is_first() -> bool:
  return jax.process_index() == 0


def greatest(number: int) -> int:
  """The greatest of the numbers that all processes give."""
  return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def wait():
  """Returns when all processes are here."""
  multihost_utils.sync_global_devices('wait')


def check_agree(what: str):
  """Raises, in every process, if not all of them give the same text."""
  crc = np.uint32(zlib.crc32(what.encode()))
  crcs = np.ravel(multihost_utils.process_allgather(crc))
  if (crcs != crcs[0]).any():
    odd = np.flatnonzero(crcs != crcs[0]).tolist()
    raise ValueError(
      f'process={odd}: other flags, texts or checkpoints than those of process '
      '0; start all processes with the same ones, but --process'
    )


# --- Meshes ------------------------------------------------------------------


def _sizes(text: str, devices: int) -> dict[str, int]:
  """'data=2,fsdp=-1' as sizes of axes; -1 is what the others leave."""
  sizes: dict[str, int] = {}
  for part in text.split(','):
    name, _, size = (word.strip() for word in part.partition('='))
    if name not in AXES or name in sizes or not re.fullmatch(r'-1|\d+', size):
      raise ValueError(
        f'mesh={text!r}: expected sizes of some of {AXES}, as fsdp=4,tensor=2'
      )
    sizes[name] = int(size)
  known = math.prod(size for size in sizes.values() if size != -1)
  rest = [name for name, size in sizes.items() if size == -1]
  if len(rest) > 1 or known < 1 or (rest and devices % known):
    raise ValueError(
      f'mesh={text!r}: one size may be -1, and the others must divide the '
      f'{devices} devices'
    )
  return sizes | {name: devices // known for name in rest}


def make(text: str = '') -> Mesh:
  """The mesh that `text` describes.

  By default one device, or with several processes all of them along 'fsdp'.
  """
  found, many = jax.device_count(), jax.process_count() > 1
  sizes = _sizes(text or ('fsdp=-1' if many else 'fsdp=1'), found)
  size = math.prod(sizes.values())
  if size > found or (many and size != found):
    raise ValueError(
      f'mesh={text!r} has {size} devices, but {found} are here'
      + (', and several processes must use all of theirs' if many else '')
    )
  names = [name for name in AXES if name in sizes]
  return jax.make_mesh(
    [sizes[name] for name in names],
    names,
    axis_types=(AxisType.Auto,) * len(names),
    devices=jax.devices()[:size],
  )


def _rows(mesh: Mesh) -> tuple[str, ...]:
  return tuple(name for name in _ROWS if mesh.shape.get(name, 1) > 1)


def check_rows(mesh: Mesh, batch: int, accumulation: int):
  """Raises if the rows of a microbatch can't be cut evenly."""
  parts = math.prod(mesh.shape[name] for name in _rows(mesh))
  if batch // accumulation % parts:
    raise ValueError(
      f'batch={batch}: its {accumulation} microbatches of '
      f'{batch // accumulation} rows do not divide by the {parts} parts that '
      f'mesh={dict(mesh.shape)} cuts them into along {_rows(mesh)}'
    )


# --- Placements --------------------------------------------------------------


def constraints(mesh: Mesh) -> dict[str, PartitionSpec]:
  """The fields of `llama.LlamaConfig` that say where values live."""
  if mesh.size == 1:
    return {}
  vocabulary = 'tensor' if 'tensor' in mesh.shape else None
  return {
    'activations': PartitionSpec(_rows(mesh)),
    # Cut along its width as well, it would draw the activations after it.
    'looked_up': PartitionSpec(vocabulary),
  }


def _wanted(name: str, x: Any) -> tuple[str | None, ...]:
  """The mesh axis of each axis of a parameter."""
  for pattern, names in _KERNELS.items():
    if re.search(f'(^|/){pattern}$', name):
      return (None,) * (x.ndim - 2) + names
  return ()


def parameters(
  mesh: Mesh, shapes: Any, say: Callable[[str], None] = print
) -> Any:
  """`shapes` with their shardings; says which axes can't be cut evenly."""
  uneven: list[str] = []

  def place(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    entries: list[str | None] = []
    for size, axis in zip(x.shape, _wanted(name, x), strict=False):
      cut = mesh.shape.get(axis, 1) if axis else 1
      if size % cut:
        uneven.append(f'{name} ({axis}={cut} of {size})')
      entries.append(axis if cut > 1 and size % cut == 0 else None)
    while entries and entries[-1] is None:  # as jit spells its results
      entries.pop()
    sharding = NamedSharding(mesh, PartitionSpec(*entries))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  placed = jax.tree.map_with_path(place, shapes)
  if uneven:
    say('not divisible, so not cut: ' + ', '.join(uneven))
  return placed


def shardings(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.sharding, tree)


def batch(
  mesh: Mesh, shape: tuple[int, ...], axis: int, read: Callable
) -> jax.Array:
  """The array of which `read(index)` gives parts, cut along `axis`.

  Only the parts of this process's devices are read.
  """
  spec = PartitionSpec(*[None] * axis, _rows(mesh))
  return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), read)


def whole(x: jax.Array) -> np.ndarray:
  """All of an array, on every process."""
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def compiler_options() -> dict[str, Any]:
  """For programs with collectives.

  On a CPU with more devices than cores, collectives that may run in any order
  can wait for each other for ever.
  """
  if jax.default_backend() != 'cpu':
    return {}
  return {'xla_cpu_enable_concurrency_optimized_scheduler': False}
