# SPDX-License-Identifier: Apache-2.0
"""Arrays on meshes, in the middle of a computation.

Under explicit sharding, every operand's spec is part of its type, so products
must set the sharding of their result. Under automatic sharding, the compiler
decides.
"""

from collections.abc import Callable, Iterable
import contextlib
import math
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from subspace_optax._matrix import _varying

Spec = tuple[Any, ...]

# Subscripts of rank axes.
RANK = 'yz'


def explicit(x: Any) -> NamedSharding | None:
  """Returns the sharding in the type of `x`, None outside explicit sharding."""
  sharding = _varying.type_of(x).sharding
  is_known = isinstance(sharding, NamedSharding)
  return sharding if is_known and sharding.mesh.explicit_axes else None


def mesh_of(tree: Any) -> contextlib.AbstractContextManager:
  """Sets the mesh of arrays on explicit axes, as their tracers require.

  It sets none within a trace, where jax does not allow it.
  """
  for x in jax.tree.leaves(tree):
    if not isinstance(x, jax.Array) or isinstance(x, Tracer):
      continue
    mesh = getattr(x.sharding, 'mesh', None)
    if explicit(x) and isinstance(mesh, Mesh):
      try:
        return jax.set_mesh(mesh)
      except ValueError:  # within a trace
        break
  return contextlib.nullcontext()


def _explicit_spec(x: jax.Array) -> Spec | None:
  sharding = explicit(x)
  return None if sharding is None else pad(sharding.spec, x.ndim)


def pad(spec: Any, ndim: int) -> Spec:
  """Returns a spec with an entry for every axis."""
  return tuple(spec) + (None,) * (ndim - len(spec))


def names(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes in one entry of a spec."""
  if entry is None:
    return ()
  return entry if isinstance(entry, tuple) else (entry,)


def spec_of(axes: Iterable[tuple[str, ...]]) -> PartitionSpec:
  """Returns the spec that shards every axis over some mesh axes."""
  return PartitionSpec(*[k[0] if len(k) == 1 else k or None for k in axes])


def parts(mesh: Any, axes: Iterable[str]) -> int:
  """Returns into how many parts some mesh axes cut an array."""
  return math.prod(mesh.shape[name] for name in axes)


def entries_of(x: jax.Array, axes: Iterable[int]) -> list[tuple[str, ...]]:
  """Returns the explicit mesh axes that shard each of some axes of `x`."""
  spec = _explicit_spec(x)
  return [() if spec is None else names(spec[i]) for i in axes]


def einsum(
  eq: str,
  a: jax.Array,
  b: jax.Array,
  *,
  out_sharding: NamedSharding | None = None,
  **kwargs: Any,
) -> jax.Array:
  """Computes an einsum that keeps the larger operand's sharding of its axes.

  `out_sharding`, of explicit axes, has precedence over both operands.
  """
  mesh = next((s.mesh for s in map(explicit, (a, b)) if s is not None), None)
  if mesh is None:
    return jnp.einsum(eq, a, b, **kwargs)
  inputs, output = eq.split('->')
  operands = list(zip(inputs.split(','), (a, b), strict=True))
  # The rank axis is sharded only between steps; r x r products are replicated.
  placed: dict[str, Any] = dict.fromkeys(RANK)
  if out_sharding is not None:
    placed.update(zip(output, pad(out_sharding.spec, len(output)), strict=True))
  for letters, x in operands if a.size >= b.size else operands[::-1]:
    for letter, entry in zip(letters, _explicit_spec(x) or (), strict=False):
      used = {name for e in placed.values() for name in names(e)}
      if letter not in placed and not used & set(names(entry)):
        placed[letter] = entry

  def target(letters: str) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*map(placed.get, letters)))

  a, b = (jax.reshard(x, target(letters)) for letters, x in operands)
  return jnp.einsum(eq, a, b, out_sharding=target(output), **kwargs)


def like(x: jax.Array, reference: Any) -> jax.Array:
  """Returns `x` with the dtype and explicit sharding of an array or a type."""
  x = x if x.dtype == reference.dtype else x.astype(reference.dtype)
  return place_like(_varying.vary_as(x, reference), reference)


def place_like(x: jax.Array, reference: Any) -> jax.Array:
  """Returns `x` with the sharding of an array or type, if explicit."""
  sharding = explicit(reference)
  return x if sharding is None else jax.reshard(x, sharding)


def regroup(
  x: jax.Array, whole: tuple[int, ...], split: tuple[int, ...]
) -> jax.Array:
  """Returns `x` with no axis of `whole` sharded, if explicit.

  Their mesh axes move to the first axis of `split` that they divide.
  """
  sharding = explicit(x)
  if sharding is None:
    return x
  mesh, used = sharding.mesh, entries_of(x, range(x.ndim))
  for axis in whole:
    moving, used[axis] = used[axis], ()
    for name in moving:
      divides = lambda i, k=name: x.shape[i] % parts(mesh, (*used[i], k)) == 0
      first = next(filter(divides, split), None)
      if first is not None:
        used[first] = (*used[first], name)
  return jax.reshard(x, NamedSharding(mesh, spec_of(used)))


def replicate(x: jax.Array) -> jax.Array:
  """Returns `x` replicated on every device, if its type says that it is not."""
  sharding = explicit(x)
  if sharding is None:
    return x
  return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def result_types(f: Callable[..., Any], *args: Any) -> Any:
  """Returns the types of the results of `f`, with explicit shardings.

  `jax.eval_shape` drops these on a mesh that also has automatic axes.
  """
  program, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
  types = map(kind_of, program.out_avals)
  return jax.tree.unflatten(jax.tree.structure(shapes), types)


def kind_of(aval: Any) -> jax.ShapeDtypeStruct:
  """Returns the type of an array in a trace, explicit sharding included."""
  return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=aval.sharding)


def zeros(kind: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns zeros of a type."""
  return like(jnp.zeros(kind.shape, kind.dtype), kind)


def automatic(f: Callable[..., Any], like: Any, *args: Any) -> Any:
  """Returns `f(*args)` under automatic sharding, placed like `like`."""
  placed = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
  return jax.sharding.auto_axes(f, out_sharding=placed)(*args)


def no_mesh() -> contextlib.AbstractContextManager:
  """A context in which no mesh is set."""
  return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def is_sharded(x: jax.Array) -> bool:
  """Whether a matrix may be sharded over devices.

  On a mesh of automatic axes the type does not tell, so the answer is yes.
  """
  if _is_alone(x):
    return False
  spec = _explicit_spec(x)
  return spec is None or any(entry is not None for entry in spec)


def _is_alone(x: jax.Array) -> bool:
  """Whether there is only one device, as far as the program can see."""
  mesh = jax.typeof(x).sharding.mesh
  return mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual


def is_whole(x: jax.Array, axes: tuple[int, ...]) -> bool:
  """Whether every device surely holds all of `x` along `axes`.

  Taking one element along a sharded axis would gather the whole array.
  """
  if _is_alone(x):
    return True
  mesh = jax.typeof(x).sharding.mesh
  if set(mesh.explicit_axes) != set(mesh.axis_names):
    return False
  return not any(entries_of(x, axes))


def cuts_fit(x: jax.Array, cuts: tuple[int, ...]) -> bool:
  """Whether the type of `x` shards each axis into a divisor of its `cuts`."""
  mesh = jax.typeof(x).sharding.mesh
  splits = entries_of(x, range(x.ndim))
  return all(n % parts(mesh, k) == 0 for n, k in zip(cuts, splits, strict=True))


def with_whole_rank(x: jax.Array, axes: str) -> jax.Array:
  """Returns `x` with a rank axis that automatic sharding must not shard.

  Otherwise products with the gradient would adopt the sharding that moments or
  bases have between steps, for which the compiler may gather the gradient.
  """
  mesh = jax.typeof(x).sharding.mesh
  if _is_alone(x) or mesh.explicit_axes:
    return x
  any_ = PartitionSpec.UNCONSTRAINED
  spec = PartitionSpec(*(None if c in RANK else any_ for c in axes))
  return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def of_leaf(leaf: Any) -> NamedSharding | None:
  """Returns the sharding of a leaf, if it is known at this point."""
  if isinstance(leaf, Tracer):
    return explicit(leaf)
  sharding = getattr(leaf, 'sharding', None)
  return sharding if isinstance(sharding, NamedSharding) else None


def on_mesh_of(leaves: list[Any], tree: Any) -> Any:
  """Places arrays of state that follow no leaf on the leaves' mesh.

  A scalar made on one device would change its sharding in the first step, which
  would cost a second compilation.
  """
  known = [of_leaf(x) for x in leaves]
  meshes = {s.mesh for s in known if s is not None and isinstance(s.mesh, Mesh)}
  if len(meshes) != 1:
    return tree
  everywhere = NamedSharding(meshes.pop(), PartitionSpec())

  def put(x: Any) -> Any:
    alone = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    alone = alone and not isinstance(x.sharding, NamedSharding)
    return jax.device_put(x, everywhere) if alone else x

  return jax.tree.map(put, tree)
