# SPDX-License-Identifier: Apache-2.0
"""Where every array of an optimizer's state lives on a mesh.

Tracers know their shardings only if mesh axes are explicit. So `init` is traced
on shapes, over a twin of the mesh with explicit axes. This makes no array, and
gives each array of state the sharding that eager `init` would give it.
"""

from collections.abc import Callable
from typing import Any

from flax import linen
from flax import nnx
from flax.core import meta
from flax.linen import spmd
import jax
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from subspace_optax._chain import _memory_kinds
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _placement
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree


def state_sharding(
  tx: Any,
  params: Any,
  *,
  replicated: tuple[str, ...] = (),
  memory_kind: str | Callable[[str], str | None] | None = None,
) -> Any:
  """Returns the sharding of every array in an optimizer's state.

  Bases are sharded like the projected axes of their parameter, coordinates like
  its other axes, and both like its batch axes. Mesh axes that shard none of
  these shard the rank. All other state, including state inside `optax.chain`,
  `partition`, `masked` or `MultiSteps`, has the sharding that its `init` gives
  it: usually that of the parameter, or replicated if there is no such
  parameter.

  Pass the result to `jax.jit` as the `out_shardings` of `init`, so that no
  device ever holds all of the state. Pass it as the `out_shardings` of the step
  to keep the state in place.

  Args:
    tx: the optimizer, `rso.subproblems` or a `TrainStep`.
    params: arrays, or `jax.ShapeDtypeStruct`s with shardings, or either in
      flax's boxes. If an array has no sharding, the axis names of its box are
      used, by flax's rules if they are logical. The `optimizer_sharding` of an
      `nnx.Variable` has precedence over both. Arrays on one device are
      replicated if others have a mesh.
    replicated: mesh axes along which all state is replicated, such as the axis
      of `data_parallel_step` or an axis of slow links. No parameter may be
      sharded over them.
    memory_kind: 'pinned_host' for state in host memory, which `so.train_step`,
      `so.layerwise` and steps of `so.offload(tx)` support. Keys, scalars and
      vectors stay on the device. Or a function that gets the path of each array
      in the state, such as `0/mu/blocks/w`, and returns its memory kind, None
      for that of the device.

  Returns:
    A tree like `tx.init(params)`, without boxes, of
    `jax.sharding.NamedSharding`. If all arrays are on one device and no mesh is
    set, it holds their own sharding or, with a `memory_kind`, a sharding on a
    mesh of that device.

  Raises:
    ValueError: parameters on two meshes, or on none while no mesh is set; an
      axis in `replicated` that shards a parameter or is not an axis of the
      mesh; a memory kind that the devices do not have, or from which `tx` can't
      take its state.

  Example:
    >>> import jax, subspace_optax as so
    >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    >>> mesh = jax.make_mesh((1,), ('fsdp',), axis_types=(AxisType.Auto,))
    >>> w = jax.ShapeDtypeStruct(
    ...   (64, 256), 'float32', sharding=NamedSharding(mesh, P(None, 'fsdp'))
    ... )
    >>> tx = so.golore(1e-3, rank=8)
    >>> shardings = so.state_sharding(tx, {'w': w})
    >>> print(shardings[0][1].inner.mu['w'].spec)
    P(None, 'fsdp')
    >>> init = jax.jit(tx.init, out_shardings=shardings)

    Moments on the host, bases on the device:

    >>> far = lambda path: 'pinned_host' if '/inner/' in path else None
    >>> shardings = so.state_sharding(tx, {'w': w}, memory_kind=far)
    >>> print(shardings[0][1].inner.mu['w'].memory_kind)
    pinned_host
  """
  shardings, state = _on_device(tx, params, replicated)
  if memory_kind is None:
    return shardings
  return _memory_kinds.with_memory_kinds(tx, state, shardings, memory_kind)


def _on_device(
  tx: Any, params: Any, replicated: tuple[str, ...]
) -> tuple[Any, Any]:
  """Returns the shardings of a state on devices, and its shapes."""
  mesh = _mesh(params)
  if mesh is None:
    return _on_one_device(tx, params)
  twin = _twin(mesh, replicated)
  whole = _placement.whole_ranks_along(_placement.axes_without_rank(mesh))
  set_mesh = jax.sharding.use_abstract_mesh(twin.abstract_mesh)
  # Changing from one mesh to another requires going through no mesh.
  with _notices.quiet(), whole, _sharding.no_mesh(), set_mesh:
    state = jax.eval_shape(tx.init, _shapes(params, twin))

  def on_mesh(x: jax.ShapeDtypeStruct) -> NamedSharding:
    spec = getattr(x.sharding, 'spec', PartitionSpec())
    return NamedSharding(mesh, _placement.as_jit_spells(spec, mesh))

  state = _tree.unbox(state)
  return jax.tree.map(on_mesh, state), state


def _twin(mesh: Mesh, without: tuple[str, ...]) -> Mesh:
  """Returns the mesh with explicit axes, and one device along some of them."""
  unknown = set(without) - set(mesh.axis_names)
  if unknown:
    raise ValueError(
      f'replicated={tuple(without)}, but the mesh has axes {mesh.axis_names}.'
    )
  names = [name for name in mesh.axis_names if name not in without]
  first = tuple(0 if k in without else slice(None) for k in mesh.axis_names)
  explicit = (AxisType.Explicit,) * len(names)
  return Mesh(np.asarray(mesh.devices[first]), names, axis_types=explicit)


def _shapes(params: Any, mesh: Mesh) -> Any:
  """Returns the tree of shapes, in its boxes, with shardings on a mesh."""

  def entry(x: Any) -> Any:
    of_state, default = _spec_of_state(x), _spec_of_box(x)
    return jax.tree.map(lambda leaf: shape(leaf, of_state, default), x)

  def shape(leaf: Any, of_state: Any, default: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, 'sharding', None)
    known = isinstance(sharding, NamedSharding)
    spec = sharding.spec if known else default
    spec = spec if of_state is None else of_state
    _check_spec(spec, mesh)
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
    )

  return jax.tree.map(entry, params, is_leaf=_boxes.is_box)


def _check_spec(spec: PartitionSpec, mesh: Mesh) -> None:
  """Raises if a parameter is sharded over an axis that the mesh lacks."""
  used = {name for entry in spec for name in _sharding.names(entry)}
  if not used <= set(mesh.axis_names):
    raise ValueError(
      f'a parameter has {spec}, but state is to be placed along mesh axes '
      f'{mesh.axis_names} alone; see `replicated`, and apply '
      '`flax.linen.logical_to_mesh_sharding` to logical names first.'
    )


def _spec_of_state(x: Any) -> PartitionSpec | None:
  """Returns the spec that a flax variable names for optimizer states."""
  if not isinstance(x, nnx.Variable) or not _boxes.axes_for_state(x):
    return None
  names = _boxes.axes_for_state(x)
  return _spec_of_box(x.replace(x.get_value(), out_sharding=names))


def _spec_of_box(x: Any) -> PartitionSpec:
  """Returns the spec that a flax box names, or else a replicated one."""
  if isinstance(x, nnx.Variable):
    x = jax.tree.leaves(nnx.get_partition_spec(x))
    return x[0] if x else PartitionSpec()
  if isinstance(x, linen.LogicallyPartitioned):
    spec = spmd.logical_to_mesh_axes(x.names, x.rules)
    return PartitionSpec() if spec is None else spec
  if isinstance(x, meta.AxisMetadata):
    return linen.get_partition_spec(x)
  return PartitionSpec()


def _mesh(params: Any) -> Mesh | None:
  """Returns the mesh of the parameters, or the mesh that is set."""
  shardings = [getattr(x, 'sharding', None) for x in jax.tree.leaves(params)]
  named = [s.mesh for s in shardings if isinstance(s, NamedSharding)]
  meshes = {mesh for mesh in named if isinstance(mesh, Mesh)}
  if len(meshes) > 1:
    found = ', '.join(sorted(str(dict(mesh.shape)) for mesh in meshes))
    raise ValueError(
      f'params live on {len(meshes)} meshes ({found}); put all of them on one.'
    )
  current = jax.sharding.get_mesh()
  return next(iter(meshes), None if current.empty else current)


def _on_one_device(tx: Any, params: Any) -> tuple[Any, Any]:
  """Returns the parameters' own sharding for all of the state, and shapes."""
  found = [getattr(x, 'sharding', None) for x in jax.tree.leaves(params)]
  alone = {s for s in found if s is not None}
  if len(alone) != 1 or isinstance(next(iter(alone)), NamedSharding):
    raise ValueError(
      'params have no shardings on devices, and no mesh is set; give arrays or '
      'jax.ShapeDtypeStructs with a NamedSharding each, or call '
      'state_sharding under jax.set_mesh(mesh).'
    )
  sharding = alone.pop()
  with _notices.quiet():
    state = _tree.unbox(jax.eval_shape(tx.init, params))
  return jax.tree.map(lambda _: sharding, state), state
