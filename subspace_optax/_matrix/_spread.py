# SPDX-License-Identifier: Apache-2.0
"""Matrices of its own for every device, in the middle of a computation.

An iteration on matrices that are cut over D devices sends parts of them in each
of its steps. Here the axis that counts matrices is cut instead: a device hands
out its parts of all matrices but its own, iterates alone, and gets its parts of
the results back. It sends 2 (D - 1) / D^2 of each matrix, which is less than
one sum of Gram matrices takes.

Where D does not divide the number of matrices, those of other leaves of the
same shape are counted with them, and zeros fill up what is left.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _sharding

# The share of zeros that is taken rather than more leaves at once.
_MOST_ZEROS = 1 / 8


class _Stack(NamedTuple):
  """A leaf with an axis that counts matrices.

  Attributes:
    x: the leaf.
    layout: of `x`.
    axis: the one that counts.
    names: the mesh axes that are to cut it, none if nothing is to move.
    before: the spec of `x` under explicit sharding.
  """

  x: jax.Array
  layout: _layout.Layout
  axis: int
  names: tuple[str, ...]
  before: tuple[Any, ...] | None

  @property
  def mesh(self) -> Any:
    return jax.typeof(self.x).sharding.mesh

  @property
  def count(self) -> int:
    return self.x.shape[self.axis]

  @property
  def devices(self) -> int:
    return _sharding.parts(self.mesh, self.names)

  @property
  def kind(self) -> Any:
    """What leaves that are counted together have in common."""
    sizes = self.x.shape[: self.axis] + self.x.shape[self.axis + 1 :]
    axes = (self.axis, self.layout.rows, self.layout.cols)
    return (sizes, self.x.dtype, self.names, self.before, *axes)


def spread(
  f: Callable[[_layout.Layout, jax.Array], jax.Array],
  layouts: Sequence[_layout.Layout],
  leaves: Sequence[jax.Array],
) -> list[jax.Array]:
  """Returns `f(layout, leaf)` of leaves, each matrix whole on one device.

  Under explicit sharding matrices go to the devices that have parts of them.
  Where the axis that counts is cut and can't be cut further, nothing moves.

  Under automatic sharding no type tells where parts are. Matrices are spread
  over all automatic axes of the mesh that `jax.set_mesh` has set, without one
  nothing moves, and the axis that counts is taken to be whole.

  Args:
    f: maps every matrix by itself, and zeros to zeros.
    layouts: of the leaves; rank and side do not matter.
    leaves: of floating point.
  """
  stacks = [_stack(*pair) for pair in zip(layouts, leaves, strict=True)]
  results = list(leaves)
  for group in _groups(stacks):
    found = _run(f, [stacks[i] for i in group])
    for i, x in zip(group, found, strict=True):
      results[i] = x.reshape(leaves[i].shape)
  return results


def _stack(layout: _layout.Layout, x: jax.Array) -> _Stack:
  if not layout.batch:
    x = jnp.expand_dims(x, 0)
    rows, cols = (tuple(i + 1 for i in k) for k in (layout.rows, layout.cols))
    layout = dataclasses.replace(layout, shape=x.shape, rows=rows, cols=cols)
  axis = max(layout.batch, key=lambda i: x.shape[i])
  names, before = _mesh_axes(layout, x, axis)
  return _Stack(x, layout, axis, names, before)


def _mesh_axes(
  layout: _layout.Layout, x: jax.Array, axis: int
) -> tuple[tuple[str, ...], tuple[Any, ...] | None]:
  """Returns the mesh axes to spread over, and the explicit spec, if any."""
  if not _sharding.is_sharded(x):
    return (), None
  sharding = _sharding.explicit(x)
  if sharding is None:
    mesh = jax.typeof(x).sharding.mesh
    return tuple(k for k in mesh.auto_axes if mesh.shape[k] > 1), None
  entries = _sharding.entries_of(x, range(x.ndim))
  counting, cut = entries[axis], [entries[i] for i in layout.matrix]
  names = (*counting, *(name for entry in cut for name in entry))
  fits = x.shape[axis] % _sharding.parts(sharding.mesh, names) == 0
  if not any(cut) or (counting and not fits):
    return (), None
  return names, tuple(entries)


def _groups(stacks: Sequence[_Stack]) -> Iterator[list[int]]:
  """Yields which leaves are counted together."""
  waiting: dict[Any, list[int]] = {}
  for i, stack in enumerate(stacks):
    if not stack.names:
      yield [i]
      continue
    group = waiting.setdefault(stack.kind, [])
    group.append(i)
    count = sum(stacks[j].count for j in group)
    if -count % stack.devices <= _MOST_ZEROS * count:
      yield waiting.pop(stack.kind)
  yield from waiting.values()


def _run(
  f: Callable[[_layout.Layout, jax.Array], jax.Array], group: list[_Stack]
) -> list[jax.Array]:
  """Returns the results of leaves that are counted together."""
  first = group[0]
  if not first.names:
    return [f(first.layout, first.x)]
  axis, (start, *route) = first.axis, _route(first)
  x = jnp.concatenate([_place(stack, stack.x, start) for stack in group], axis)
  x = _fill_up(first, x)
  for spec in (start, *route):
    x = _place(first, x, spec)
  x = f(dataclasses.replace(first.layout, shape=x.shape), x)
  for spec in (*reversed(route), start):
    x = _place(first, x, spec)
  counts = [stack.count for stack in group]
  x = lax.slice_in_dim(x, 0, sum(counts), axis=axis)
  parts = zip(group, lax.split(x, counts, axis), strict=True)
  return [_return(stack, part) for stack, part in parts]


def _return(stack: _Stack, x: jax.Array) -> jax.Array:
  """Returns results on the devices that have the leaf."""
  if stack.before is not None:
    return _sharding.like(x, stack.x)
  # The compiler has an elementwise result lie as its operands do: that is how
  # it learns where this came from.
  return jnp.where(jnp.isfinite(stack.x), x, stack.x)


def _fill_up(stack: _Stack, x: jax.Array) -> jax.Array:
  """Returns `x` with zeros up to a multiple of the devices."""
  missing = -x.shape[stack.axis] % stack.devices
  if not missing:
    return x
  widths = [(0, missing if i == stack.axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths)


def _route(stack: _Stack) -> list[PartitionSpec]:
  """Returns specs from where matrices are cut to where they are whole.

  One mesh axis moves at a time: the compiler has an all-to-all for that, and
  gathers everything everywhere if two move at once.
  """
  axis, names = stack.axis, stack.names
  if stack.before is not None:
    entries = [list(entry) for entry in stack.before]
    route = [_sharding.spec_of(map(tuple, entries))]
    for name in names[len(entries[axis]) :]:
      next(entry for entry in entries if name in entry).remove(name)
      entries[axis].append(name)
      route.append(_sharding.spec_of(map(tuple, entries)))
    return route
  # First of all no other axis counts; the compiler would else cut gradients as
  # they come by the last of these specs.
  route = []
  for k in range(len(names) + 1):
    other = None if k == len(names) else PartitionSpec.UNCONSTRAINED
    entries = [other] * stack.x.ndim
    entries[axis] = names[:k] or None
    route.append(PartitionSpec(*entries))
  return route


def _place(stack: _Stack, x: jax.Array, spec: PartitionSpec) -> jax.Array:
  move = lax.with_sharding_constraint if stack.before is None else jax.reshard
  return move(x, NamedSharding(stack.mesh, spec))
