# SPDX-License-Identifier: Apache-2.0
"""The few places that know about meshes.

Under explicit sharding every operand's spec is part of its type, so products
say where their result lives. Under automatic sharding the compiler decides,
and state is placed once, at `init`, from the shardings of the parameters.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
import contextlib
import contextvars
import functools
import math
from string import ascii_lowercase
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from subspace_optax._matrix import _varying

Spec = tuple[Any, ...]

# Subscripts of rank axes.
RANK = 'yz'


def _explicit_spec(x: jax.Array) -> Spec | None:
  """Returns the spec in the type of `x`, None outside explicit sharding."""
  sharding = jax.typeof(x).sharding
  if not sharding.mesh.explicit_axes:
    return None
  return _pad(sharding.spec, x.ndim)


def _pad(spec: Any, ndim: int) -> Spec:
  return tuple(spec) + (None,) * (ndim - len(spec))


def names(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes in one entry of a spec."""
  if entry is None:
    return ()
  return entry if isinstance(entry, tuple) else (entry,)


def entries_of(x: jax.Array, axes: Iterable[int]) -> list[tuple[str, ...]]:
  """Returns the explicit mesh axes that split each of some axes of `x`."""
  spec = _explicit_spec(x)
  return [() if spec is None else names(spec[i]) for i in axes]


def einsum(
  eq: str,
  a: jax.Array,
  b: jax.Array,
  *,
  precision: Any = None,
  preferred_element_type: Any = None,
  out_sharding: NamedSharding | None = None,
) -> jax.Array:
  """Einsum that keeps the larger operand's sharding of every axis it names.

  `out_sharding`, of explicit axes, goes before both operands' shardings.
  """
  kwargs = {
    'precision': precision,
    'preferred_element_type': preferred_element_type,
  }
  specs = [_explicit_spec(x) for x in (a, b)]
  if specs[0] is None and specs[1] is None:
    return jnp.einsum(eq, a, b, **kwargs)
  inputs, output = eq.split('->')
  letters = inputs.split(',')
  # The rank axis is split at rest only: products of r x r are for every device.
  placed: dict[str, Any] = dict.fromkeys(RANK)
  if out_sharding is not None:
    entries = _pad(out_sharding.spec, len(output))
    placed.update(zip(output, entries, strict=True))
  for i in (0, 1) if a.size >= b.size else (1, 0):
    for letter, entry in zip(letters[i], specs[i] or (), strict=False):
      used = {name for e in placed.values() for name in names(e)}
      if letter not in placed and not used & set(names(entry)):
        placed[letter] = entry

  mesh = jax.typeof(a if specs[0] is not None else b).sharding.mesh

  def target(axes: str) -> NamedSharding:
    spec = PartitionSpec(*[placed.get(letter) for letter in axes])
    return NamedSharding(mesh, spec)

  a = jax.reshard(a, target(letters[0]))
  b = jax.reshard(b, target(letters[1]))
  return jnp.einsum(eq, a, b, out_sharding=target(output), **kwargs)


def explicit(x: jax.Array) -> NamedSharding | None:
  """Returns the sharding in the type of `x`, None outside explicit sharding."""
  return None if _explicit_spec(x) is None else jax.typeof(x).sharding


def like(x: jax.Array, reference: jax.Array) -> jax.Array:
  """Returns `x` with `reference`'s dtype and, if explicit, its sharding."""
  x = x if x.dtype == reference.dtype else x.astype(reference.dtype)
  x = _varying.vary_as(x, reference)
  if _explicit_spec(reference) is None:
    return x
  return jax.reshard(x, jax.typeof(reference).sharding)


def regroup(
  x: jax.Array, whole: tuple[int, ...], split: tuple[int, ...]
) -> jax.Array:
  """Returns `x` with no axis of `whole` split, where explicit.

  Their mesh axes go to the first axis of `split` that they divide.
  """
  spec = _explicit_spec(x)
  if spec is None:
    return x
  mesh = jax.typeof(x).sharding.mesh
  used = list(map(names, spec))
  for axis in whole:
    moving, used[axis] = used[axis], ()
    for name in moving:
      fits = [
        i
        for i in split
        if x.shape[i] % math.prod(mesh.shape[k] for k in (*used[i], name)) == 0
      ]
      if fits:
        used[fits[0]] = (*used[fits[0]], name)
  spec = PartitionSpec(*map(_entry, used))
  return jax.reshard(x, NamedSharding(mesh, spec))


def result_types(f: Callable[..., Any], *args: Any) -> Any:
  """Returns the types of what `f` returns, explicit shardings included.

  `jax.eval_shape` drops these on a mesh that has automatic axes, too.
  """
  program, shapes = jax.make_jaxpr(f, return_shape=True)(*args)
  return jax.tree.unflatten(jax.tree.structure(shapes), program.out_avals)


def zeros(kind: Any) -> jax.Array:
  """Returns zeros of a type."""
  return move(jnp.zeros(kind.shape, kind.dtype), kind)


def move(x: jax.Array, kind: Any) -> jax.Array:
  """Returns `x` with the sharding of a type, if that is explicit."""
  if not kind.sharding.mesh.explicit_axes:
    return x
  return jax.reshard(x, kind.sharding)


def replicate(x: jax.Array) -> jax.Array:
  """Returns `x` on every device, where its type says that it is not."""
  if _explicit_spec(x) is None:
    return x
  return jax.reshard(
    x, NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec())
  )


def no_mesh() -> contextlib.AbstractContextManager:
  """A context for values that are computed while a program is traced."""
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def is_sharded(x: jax.Array) -> bool:
  """Whether a matrix may be spread over devices.

  On a mesh of automatic axes the type does not tell, so it may.
  """
  if _is_alone(x):
    return False
  spec = _explicit_spec(x)
  return spec is None or any(entry is not None for entry in spec)


def _is_alone(x: jax.Array) -> bool:
  """Whether one device is all there is, as far as the program can see."""
  mesh = jax.typeof(x).sharding.mesh
  return mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual


def is_whole(x: jax.Array, axes: tuple[int, ...]) -> bool:
  """Whether every device surely holds all of `x` along `axes`.

  Taking one element of an axis that is split gathers the whole array.
  """
  if _is_alone(x):
    return True
  mesh = jax.typeof(x).sharding.mesh
  spec = _explicit_spec(x)
  if spec is None or len(mesh.explicit_axes) < len(mesh.axis_names):
    return False
  return all(spec[i] is None for i in axes)


def cuts_fit(x: jax.Array, cuts: tuple[int, ...]) -> bool:
  """Whether each axis, by its type, is split into a divisor of its `cuts`."""
  spec = _explicit_spec(x)
  if spec is None:
    return True
  sizes = jax.typeof(x).sharding.mesh.shape
  shards = [math.prod(sizes[k] for k in names(entry)) for entry in spec]
  return all(n % k == 0 for n, k in zip(cuts, shards, strict=True))


def automatic(f: Callable[..., Any], like: Any, *args: Any) -> Any:
  """Returns `f(*args)`, whose inside the compiler shards, placed as `like`."""
  placed = jax.tree.map(lambda x: jax.typeof(x).sharding, like)
  return jax.sharding.auto_axes(f, out_sharding=placed)(*args)


def _leaf_sharding(leaf: Any) -> NamedSharding | None:
  """Returns where a leaf lives, if that is known at this point."""
  if isinstance(leaf, Tracer):
    spec = _explicit_spec(leaf)
    return None if spec is None else jax.typeof(leaf).sharding
  sharding = getattr(leaf, 'sharding', None)
  return sharding if isinstance(sharding, NamedSharding) else None


def place(
  make: Callable[..., jax.Array],
  static: tuple[Hashable, ...],
  args: tuple[Any, ...],
  leaf: Any,
  leaf_axes: str,
  axes: str,
) -> jax.Array:
  """Returns `make(*static, *args)`, of `axes`, sharded along with `leaf`.

  An axis that both name is sharded alike. All other mesh axes go to the rank
  axis where they divide it, so that bytes per device fall with the mesh.
  (Joined to an axis that is split already, they made the compiler pass the
  gradient around.)
  """
  sharding = _leaf_sharding(leaf)
  if sharding is None:
    return _varying.vary_as(make(*static, *args), leaf)
  shape = jax.eval_shape(functools.partial(make, *static), *args).shape
  spec = _derived_spec(sharding, leaf, leaf_axes, axes, shape)
  target = NamedSharding(sharding.mesh, spec)
  if isinstance(leaf, Tracer):
    return jax.reshard(make(*static, *args), target)
  return _compiled(make, static, target)(*args)


def zeros_along(leaf: Any, counts: tuple[int, ...]) -> jax.Array:
  """Returns float32 zeros, one for each block of a leaf, sharded as it is.

  An axis is not cut where that would cut blocks.
  """
  axes = ascii_lowercase[: len(counts)]
  sharding = _leaf_sharding(leaf)
  if sharding is None:
    return _varying.vary_as(jnp.zeros(counts, jnp.float32), leaf)
  sizes = sharding.mesh.shape
  entries = _pad(sharding.spec, len(counts))
  whole = ''.join(
    c if n % math.prod(sizes[k] for k in names(entry)) == 0 else c.upper()
    for c, n, entry in zip(axes, counts, entries, strict=True)
  )
  return place(
    jnp.zeros, (counts, jnp.dtype(jnp.float32)), (), leaf, axes, whole
  )


@functools.lru_cache(maxsize=1024)
def _compiled(
  make: Callable[..., jax.Array],
  static: tuple[Hashable, ...],
  target: NamedSharding,
) -> Callable[..., jax.Array]:
  """Returns `make` compiled once for all leaves of a shape and placement."""
  return jax.jit(functools.partial(make, *static), out_shardings=target)


def settle(
  x: jax.Array, leaf: jax.Array, leaf_axes: str, axes: str, rest: bool = False
) -> jax.Array:
  """Returns `x` sharded along with `leaf`, where explicit.

  With `rest` as `place` shards it; without, its rank axis is not split.
  """
  if _explicit_spec(leaf) is None:
    return x
  sharding = jax.typeof(leaf).sharding
  shape = x.shape if rest else None
  spec = _derived_spec(sharding, leaf, leaf_axes, axes, shape)
  return jax.reshard(x, NamedSharding(sharding.mesh, spec))


def with_whole_rank(x: jax.Array, axes: str) -> jax.Array:
  """Returns `x` with a rank axis that automatic sharding may not split.

  Products with the gradient would otherwise take over the split of moments or
  bases at rest, for which the compiler may gather the gradient.
  """
  mesh = jax.typeof(x).sharding.mesh
  if _is_alone(x) or mesh.explicit_axes:
    return x
  any_ = PartitionSpec.UNCONSTRAINED
  spec = PartitionSpec(*(None if c in RANK else any_ for c in axes))
  return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def on_mesh_of(leaves: list[Any], tree: Any) -> Any:
  """Returns state with arrays that no leaf places put on the leaves' mesh.

  A scalar made on one device would change its sharding in the first step, and
  so cost a second compilation.
  """
  known = [_leaf_sharding(x) for x in leaves]
  meshes = {s.mesh for s in known if s is not None and isinstance(s.mesh, Mesh)}
  if len(meshes) != 1:
    return tree
  everywhere = NamedSharding(meshes.pop(), PartitionSpec())

  def put(x: Any) -> Any:
    alone = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    alone = alone and not isinstance(x.sharding, NamedSharding)
    return jax.device_put(x, everywhere) if alone else x

  return jax.tree.map(put, tree)


def _derived_spec(
  sharding: Any, leaf: Any, leaf_axes: str, axes: str, shape: Spec | None
) -> PartitionSpec:
  """Returns the spec of state; its rank axis is split if `shape` is given."""
  entries = map(names, _pad(sharding.spec, len(leaf_axes)))
  of_leaf = dict(zip(leaf_axes, entries, strict=True))
  spec = [of_leaf.get(axis, ()) for axis in axes]
  if shape is not None:
    whole = dict(zip(leaf_axes, leaf.shape, strict=True))
    spec = [
      names if _can_cut(sharding.mesh, names, size, whole.get(axis)) else ()
      for names, size, axis in zip(spec, shape, axes, strict=True)
    ]
  kept = {name for names in spec for name in names}
  of_rest = [k for axis in leaf_axes for k in of_leaf[axis]]
  # Those of the rest of the leaf, then those that the leaf does not use.
  usable = [k for k in _rank_axes(sharding.mesh) if k not in kept]
  left = dict.fromkeys([k for k in of_rest if k in usable] + usable)
  if shape is not None and RANK[0] in axes and RANK[1] not in axes:
    i, sizes = axes.index(RANK[0]), sharding.mesh.shape
    for name in left:
      if shape[i] % math.prod(sizes[k] for k in (*spec[i], name)) == 0:
        spec[i] = (*spec[i], name)
  entries = [_entry(names) for names in spec]
  return as_jit_spells(PartitionSpec(*entries), sharding.mesh)


def _can_cut(
  mesh: Any, names: tuple[str, ...], size: int, of_leaf: int | None
) -> bool:
  """Whether a mesh cuts an axis of a state that is one of its leaf.

  Blocks of rows may be fewer than devices; of the meshes that boxes stand for,
  whose axes are of one device here, nothing is known.
  """
  parts = math.prod(mesh.shape[k] for k in names)
  return size % parts == 0 and (parts > 1 or size == of_leaf)


def _rank_axes(mesh: Any) -> tuple[str, ...]:
  """Returns the mesh axes that may split a rank.

  On a mesh of both types the compiler decides about automatic axes: what it
  makes of an entry that mixes both would change the type of the state.
  """
  usable = mesh.explicit_axes or mesh.axis_names
  return tuple(k for k in usable if k not in _whole_along.get())


def axes_without_rank(mesh: Mesh) -> frozenset[str]:
  """Returns the axes of a mesh that split no rank."""
  return frozenset(mesh.axis_names) - frozenset(_rank_axes(mesh))


_whole_along: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
  'whole_along', default=frozenset()
)


@contextlib.contextmanager
def whole_ranks_along(axes: frozenset[str]) -> Iterator[None]:
  """A context in which ranks are not split along some axes of meshes."""
  token = _whole_along.set(axes)
  try:
    yield
  finally:
    _whole_along.reset(token)


def as_jit_spells(spec: PartitionSpec, mesh: Any) -> PartitionSpec:
  """Returns a spec in the form that jit gives its results.

  P('x') and P('x', None) are one placement, but two keys of jit's cache.
  """
  entries = list(spec)
  used = {name for entry in entries for name in names(entry)}
  if mesh.explicit_axes and used <= set(mesh.explicit_axes):
    return spec
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def _entry(names: tuple[str, ...]) -> Any:
  return names[0] if len(names) == 1 else (names or None)
