# SPDX-License-Identifier: Apache-2.0
"""The placement of arrays of state, given the placement of their leaf.

State is placed once, at `init`, from the shardings of the parameters. Axes that
it shares with its leaf have the same sharding, and the remaining mesh axes
shard the rank.
"""

from collections.abc import Callable, Hashable, Iterator
import contextlib
import contextvars
import functools
from string import ascii_lowercase
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _varying


def place(
  make: Callable[..., jax.Array],
  static: tuple[Hashable, ...],
  args: tuple[Any, ...],
  leaf: Any,
  leaf_axes: str,
  axes: str,
) -> jax.Array:
  """Returns `make(*static, *args)`, with `axes`, sharded along with `leaf`.

  An axis that both have is sharded alike. All other mesh axes shard the rank
  axis if they divide it, so that bytes per device fall with the size of the
  mesh. (When they were added to an axis that is sharded already, the compiler
  moved the gradient between devices.)
  """
  sharding = _sharding.of_leaf(leaf)
  if sharding is None:
    return _varying.vary_as(make(*static, *args), leaf)
  shape = jax.eval_shape(functools.partial(make, *static), *args).shape
  spec = spec_at_rest(sharding, leaf, leaf_axes, axes, shape)
  target = NamedSharding(sharding.mesh, spec)
  if isinstance(leaf, Tracer):
    return jax.reshard(make(*static, *args), target)
  return _compiled(make, static, target)(*args)


def zeros_along(leaf: Any, counts: tuple[int, ...]) -> jax.Array:
  """Returns float32 zeros, one per block of a leaf, sharded like it.

  An axis is not sharded if that would cut blocks.
  """
  axes = ascii_lowercase[: len(counts)]
  static = (counts, jnp.dtype(jnp.float32))
  return place(jnp.zeros, static, (), leaf, axes, axes)


@functools.lru_cache(maxsize=1024)
def _compiled(
  make: Callable[..., jax.Array],
  static: tuple[Hashable, ...],
  target: NamedSharding,
) -> Callable[..., jax.Array]:
  """Returns `make` compiled once for all leaves of a shape and placement."""
  return jax.jit(functools.partial(make, *static), out_shardings=target)


def settle(
  x: jax.Array, leaf: jax.Array, leaf_axes: str, axes: str
) -> jax.Array:
  """Returns `x` sharded along with `leaf` as by `place`, if explicit."""
  sharding = _sharding.explicit(leaf)
  if sharding is None:
    return x
  spec = spec_at_rest(sharding, leaf, leaf_axes, axes, x.shape)
  return jax.reshard(x, NamedSharding(sharding.mesh, spec))


def align(
  x: jax.Array, leaf: jax.Array, leaf_axes: str, axes: str
) -> jax.Array:
  """Returns `x` sharded along with `leaf`, with whole ranks, if explicit.

  Products with the leaf have this sharding.
  """
  sharding = _sharding.explicit(leaf)
  if sharding is None:
    return x
  of_leaf = _splits(sharding, leaf_axes)
  spec = _sharding.spec_of([of_leaf.get(axis, ()) for axis in axes])
  spec = as_jit_spells(spec, sharding.mesh)
  return jax.reshard(x, NamedSharding(sharding.mesh, spec))


def _splits(sharding: Any, leaf_axes: str) -> dict[str, tuple[str, ...]]:
  """Returns the mesh axes that shard each axis of a leaf."""
  entries = _sharding.pad(sharding.spec, len(leaf_axes))
  return dict(zip(leaf_axes, map(_sharding.names, entries), strict=True))


def spec_at_rest(
  sharding: Any,
  leaf: Any,
  leaf_axes: str,
  axes: str,
  shape: tuple[int, ...],
) -> PartitionSpec:
  """Returns the spec of state with a shape, with a sharded rank axis."""
  mesh, of_leaf = sharding.mesh, _splits(sharding, leaf_axes)
  whole = dict(zip(leaf_axes, leaf.shape, strict=True))
  splits = [
    _cuts(mesh, of_leaf[axis], size, whole[axis]) if axis in whole else ()
    for size, axis in zip(shape, axes, strict=True)
  ]
  if _sharding.RANK[0] in axes and _sharding.RANK[1] not in axes:
    i = axes.index(_sharding.RANK[0])
    kept = {name for split in splits for name in split}
    of_rest = [name for axis in leaf_axes for name in of_leaf[axis]]
    # Mesh axes of other axes of the leaf, then those that it does not use.
    usable = [name for name in _rank_axes(mesh) if name not in kept]
    left = dict.fromkeys([name for name in of_rest if name in usable] + usable)
    for name in left:
      more = (*splits[i], name)
      if shape[i] % _sharding.parts(mesh, more) == 0:
        splits[i] = more
  return as_jit_spells(_sharding.spec_of(splits), mesh)


def _cuts(
  mesh: Any, split: tuple[str, ...], size: int, of_leaf: int
) -> tuple[str, ...]:
  """Returns the mesh axes that shard an axis that state shares with its leaf.

  There may be fewer blocks of rows than devices. Then the first mesh axes shard
  them, as many as XLA allows. The meshes that boxes imply are not known; their
  axes have one device here.
  """
  while split:
    count = _sharding.parts(mesh, split)
    if size % count == 0 and (count > 1 or size == of_leaf):
      return split
    split = split[:-1]
  return ()


def _rank_axes(mesh: Any) -> tuple[str, ...]:
  """Returns the mesh axes that may shard a rank.

  On a mesh with both types of axes, the compiler decides about automatic axes.
  Its choice for an entry that mixes both would change the type of the state.
  """
  usable = mesh.explicit_axes or mesh.axis_names
  return tuple(name for name in usable if name not in _whole_along.get())


def axes_without_rank(mesh: Mesh) -> frozenset[str]:
  """Returns the axes of a mesh that shard no rank."""
  return frozenset(mesh.axis_names) - frozenset(_rank_axes(mesh))


_whole_along: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar(
  'whole_along', default=frozenset()
)


@contextlib.contextmanager
def whole_ranks_along(axes: frozenset[str]) -> Iterator[None]:
  """A context in which ranks are not sharded over some mesh axes."""
  token = _whole_along.set(axes)
  try:
    yield
  finally:
    _whole_along.reset(token)


def as_jit_spells(spec: PartitionSpec, mesh: Any) -> PartitionSpec:
  """Returns a spec in the form that jit gives its results.

  P('x') and P('x', None) are one placement, but two keys in jit's cache.
  """
  entries = list(spec)
  used = {name for entry in entries for name in _sharding.names(entry)}
  if mesh.explicit_axes and used <= set(mesh.explicit_axes):
    return spec
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)
