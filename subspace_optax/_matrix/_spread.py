# SPDX-License-Identifier: Apache-2.0
"""Gives every device its own matrices, in the middle of a computation.

An iteration on matrices that are sharded over D devices sends parts of them in
each of its steps. Here, the axis that counts matrices is sharded instead: each
device sends away its parts of all matrices but its own, iterates alone, and
gets back its parts of the results. It sends 2 (D - 1) / D^2 of each matrix,
which is less than one sum of Gram matrices takes.

If D does not divide the number of matrices, matrices of other leaves of the
same shape are added (under automatic sharding, only of leaves with as many
matrices), and zeros fill the rest; under automatic sharding, unless most would
be zeros. If D divides the number, a step may hand out gradients at its start.
Products with bases then need no other device; coordinates go home for the inner
optimizer, and come back.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _placement
from subspace_optax._matrix import _sharding

# The fraction of zeros up to which no more leaves are added.
_MOST_ZEROS = 1 / 8


class _Trip(NamedTuple):
  """The path of an array from its home to where its matrices are whole.

  One mesh axis moves at a time: the compiler uses an all-to-all for that, but
  would gather everything everywhere if two moved at once. For the same reason,
  among mesh axes that shard one axis, the last one, which cuts finest, moves
  first.

  Attributes:
    mesh: the mesh.
    explicit: whether types show where arrays are.
    specs: specs of all stations, home first.
  """

  mesh: Any
  explicit: bool
  specs: tuple[PartitionSpec, ...]

  def go(self, x: jax.Array) -> jax.Array:
    for spec in self.specs:
      x = self._place(x, spec)
    return x

  def back(self, x: jax.Array) -> jax.Array:
    for spec in reversed(self.specs):
      x = self._place(x, spec)
    return x

  def start(self, x: jax.Array) -> jax.Array:
    return self._place(x, self.specs[0])

  def _place(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
    move = jax.reshard if self.explicit else lax.with_sharding_constraint
    return move(x, NamedSharding(self.mesh, spec))


class _Stack(NamedTuple):
  """A leaf with an axis that counts matrices.

  Attributes:
    x: the leaf.
    layout: layout of `x`.
    axis: the axis that counts matrices.
    names: mesh axes that will shard this axis; empty if nothing moves.
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
  def trip(self) -> _Trip:
    if self.before is None:
      specs = _automatic_specs(self.names, self.axis, self.x.ndim)
    else:
      specs = _explicit_specs(self.names, self.axis, self.before)
    return _Trip(self.mesh, self.before is not None, specs)

  @property
  def kind(self) -> Any:
    """Properties that leaves must share to be grouped.

    If placements differ, the compiler gathers one of them. Automatic types do
    not show placements, but leaves with different numbers of matrices are
    likely to differ.
    """
    sizes = self.x.shape[: self.axis] + self.x.shape[self.axis + 1 :]
    axes = (self.axis, self.layout.rows, self.layout.cols)
    placement = self.count if self.before is None else self.before
    return (sizes, self.x.dtype, self.names, placement, *axes)


def spread(
  f: Callable[[_layout.Layout, jax.Array], jax.Array],
  layouts: Sequence[_layout.Layout],
  leaves: Sequence[jax.Array],
  homes: Sequence[Any] | None = None,
) -> list[jax.Array]:
  """Returns `f(layout, leaf)` of leaves, with each matrix whole on one device.

  Under explicit sharding, matrices move to devices that have parts of them. If
  the axis that counts matrices is sharded and can't be sharded further, nothing
  moves.

  Under automatic sharding, types do not show where parts are. Matrices are
  spread over all automatic axes of the mesh set by `jax.set_mesh`; without a
  mesh nothing moves. The axis that counts matrices is assumed to be whole.

  Args:
    f: maps every matrix separately, and zeros to zeros.
    layouts: layouts of the leaves; rank and side do not matter.
    leaves: the leaves, of floating point.
    homes: for leaves that `hand_out` returned, the leaf that was handed out;
      None for others.
  """
  results = list(leaves)
  for i, home in enumerate(homes or ()):
    if home is not None:
      stack = _stack(layouts[i], home)
      results[i] = _return(stack, stack.trip.back(f(layouts[i], leaves[i])))
  rest = [i for i in range(len(leaves)) if not homes or homes[i] is None]
  for group in _groups({i: _stack(layouts[i], leaves[i]) for i in rest}):
    found = _run(f, list(group.values()))
    for i, x in zip(group, found, strict=True):
      results[i] = x.reshape(leaves[i].shape)
  return results


def hand_out(layout: _layout.Layout, leaf: jax.Array) -> jax.Array | None:
  """Returns a leaf with each of its matrices whole on one device.

  It returns None if nothing has to move, if the devices do not divide the
  matrices, or if stacks are known to be sharded already, since per-matrix
  values would then be sharded, too.
  """
  if not layout.batch or any(_sharding.entries_of(leaf, layout.batch)):
    return None
  stack = _stack(layout, leaf)
  if not stack.names or stack.count % stack.devices:
    return None
  return stack.trip.go(leaf)


def go_along(
  layout: _layout.Layout, x: jax.Array, axes: str, home: jax.Array
) -> jax.Array:
  """Moves an array that belongs to a leaf to where the leaf was handed out.

  Args:
    layout: layout of the leaf.
    x: an array with `axes`, placed where state of the leaf lies.
    axes: its axes, by the names that `layout` has for them.
    home: the leaf that was handed out.
  """
  return _trip_along(layout, x, axes, home).go(x)


def back_along(
  layout: _layout.Layout, x: jax.Array, axes: str, home: jax.Array
) -> jax.Array:
  """Moves an array that belongs to a handed-out leaf back to its state."""
  return _trip_along(layout, x, axes, home).back(x)


def keep_along(
  layout: _layout.Layout, x: jax.Array, axes: str, home: jax.Array
) -> jax.Array:
  """Returns state of a handed-out leaf, constrained to its placement.

  Under automatic sharding, only this constraint fixes the placement. Otherwise
  the compiler would gather everything for a few numbers per matrix.
  """
  return _trip_along(layout, x, axes, home).start(x)


def _trip_along(
  layout: _layout.Layout, x: jax.Array, axes: str, home: jax.Array
) -> _Trip:
  stack = _stack(layout, home)
  axis = axes.index(layout.leaf_axes[stack.axis])
  if stack.before is None:
    specs = _automatic_specs(stack.names, axis, len(axes))
    return _Trip(stack.mesh, False, specs)
  spec = _placement.spec_at_rest(
    _sharding.explicit(home), home, layout.leaf_axes, axes, x.shape
  )
  entries = map(_sharding.names, _sharding.pad(spec, len(axes)))
  return _Trip(stack.mesh, True, _explicit_specs(stack.names, axis, entries))


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
  names = (*counting, *(name for entry in cut for name in entry[::-1]))
  fits = x.shape[axis] % _sharding.parts(sharding.mesh, names) == 0
  if not any(cut) or (counting and not fits):
    return (), None
  return names, tuple(entries)


def _groups(stacks: dict[int, _Stack]) -> Iterator[dict[int, _Stack]]:
  """Yields groups of leaves that share devices."""
  waiting: dict[Any, dict[int, _Stack]] = {}
  for i, stack in stacks.items():
    if not stack.names:
      yield {i: stack}
      continue
    group = waiting.setdefault(stack.kind, {})
    group[i] = stack
    if _missing(group) <= _MOST_ZEROS * _count(group):
      yield waiting.pop(stack.kind)
  for group in waiting.values():
    first = next(iter(group.values()))
    if first.before is None and _missing(group) > _count(group):
      # Leaves that are replicated would be on every device, with more zeros
      # than their own numbers. Leave it to the compiler to share the work.
      yield from ({i: x._replace(names=())} for i, x in group.items())
    else:
      yield group


def _count(group: dict[int, _Stack]) -> int:
  return sum(stack.count for stack in group.values())


def _missing(group: dict[int, _Stack]) -> int:
  """Returns how many matrices of zeros fill up a group."""
  return -_count(group) % next(iter(group.values())).devices


def _run(
  f: Callable[[_layout.Layout, jax.Array], jax.Array], group: list[_Stack]
) -> list[jax.Array]:
  """Returns the results of leaves in one group."""
  first = group[0]
  if not first.names:
    return [f(first.layout, first.x)]
  axis, trip = first.axis, first.trip
  x = jnp.concatenate([trip.start(stack.x) for stack in group], axis)
  # Without the barrier, the compiler would shard the operands of `x`, gradient
  # and momentum, as `x` will be, and send both of them.
  x = trip.go(lax.optimization_barrier(_fill_up(first, x)))
  x = trip.back(f(dataclasses.replace(first.layout, shape=x.shape), x))
  counts = [stack.count for stack in group]
  x = lax.slice_in_dim(x, 0, sum(counts), axis=axis)
  parts = zip(group, lax.split(x, counts, axis), strict=True)
  return [_return(stack, part) for stack, part in parts]


def _return(stack: _Stack, x: jax.Array) -> jax.Array:
  """Returns results on the devices that have the leaf."""
  if stack.before is not None:
    return _sharding.place_like(x, stack.x)
  # The compiler places an elementwise result like its operands. This tells it
  # the placement of the leaf.
  return jnp.where(jnp.isfinite(stack.x), x, jnp.nan)


def _fill_up(stack: _Stack, x: jax.Array) -> jax.Array:
  """Returns `x` with zeros up to a multiple of the devices."""
  missing = -x.shape[stack.axis] % stack.devices
  if not missing:
    return x
  widths = [(0, missing if i == stack.axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths)


def _explicit_specs(
  names: tuple[str, ...], axis: int, before: Iterable[tuple[str, ...]]
) -> tuple[PartitionSpec, ...]:
  """Returns specs from an array's own to one in which `names` shard an axis."""
  entries = [list(entry) for entry in before]
  specs = [_sharding.spec_of(map(tuple, entries))]
  for name in names[len(entries[axis]) :]:
    for entry in entries:
      if name in entry:
        entry.remove(name)
    entries[axis].append(name)
    specs.append(_sharding.spec_of(map(tuple, entries)))
  return tuple(specs)


def _automatic_specs(
  names: tuple[str, ...], axis: int, ndim: int
) -> tuple[PartitionSpec, ...]:
  """Returns specs in which ever more mesh axes shard an axis, at first none.

  In the last spec no other axis is sharded; otherwise the compiler would shard
  incoming gradients by that spec.
  """
  specs = []
  for k in range(len(names) + 1):
    other = None if k == len(names) else PartitionSpec.UNCONSTRAINED
    entries: list[Any] = [other] * ndim
    entries[axis] = names[:k] or None
    specs.append(PartitionSpec(*entries))
  return tuple(specs)
