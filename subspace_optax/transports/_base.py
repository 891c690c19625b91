# SPDX-License-Identifier: Apache-2.0
"""The interface of transports, and how they act on an optimizer's state."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.transports import _moments

# From a leaf's path to its node and the move of its basis.
Moves = Mapping[str, tuple[_projected.Projected, _projected.Move]]


@dataclasses.dataclass(frozen=True)
class Moment:
  """A moment of one leaf whose basis moves from P_o to P_n.

  One array holds the matrices of a stack, so products with C go through `mix`;
  everything else is elementwise.

  Attributes:
    value: the moment, in the coordinates' shape.
    kind: 'mean' of gradients, 'sum' of gradients or 'square', a mean of squared
      gradients.
    mean: for squares that go with means of gradients, these means, of the same
      shape; else None.
    count: for squares that go with means, the number of steps in both, a scalar
      or one value per matrix that broadcasts against `value`; else None.
    change: C as the projector represents it; see `transition` and `carry`.
  """

  value: jax.Array
  kind: str
  mean: jax.Array | None
  count: jax.Array | None
  change: Any
  layout: _layout.Layout

  @property
  def transition(self) -> jax.Array:
    """C = P_n^T P_o (P_o^T P_o)^-1, (*batch, r, r), float32.

    It maps coordinates in the old basis to those in the new one.
    """
    is_selection = isinstance(self.change, _projected.Selection)
    return self.change.dense if is_selection else self.change

  def carry(self, x: jax.Array) -> jax.Array:
    """Returns C X for each matrix, for X shaped like `value`."""
    return _projected.carry(self.layout, self.change, x)

  def carry_squares(self, x: jax.Array) -> jax.Array:
    """Returns (C * C) X for each matrix, with C squared element by element."""
    is_selection = isinstance(self.change, _projected.Selection)
    squared = self.change if is_selection else jnp.square(self.change)
    return _projected.carry(self.layout, squared, x)

  def mix(self, c: jax.Array, x: jax.Array) -> jax.Array:
    """Returns C X per matrix, C shaped like `transition`, X like `value`."""
    return self.layout.mix_coords(c, x)


class Transport(NamedTuple):
  """What happens to the inner optimizer's moments when a basis moves.

  Attributes:
    name: the name that errors show.
    move: maps a `Moment` in the old basis to its value in the new one; None to
      leave all moments unchanged.
    kinds: kinds of moments to pass to `move`; the others do not change.
    resets: whether to reset the state of a matrix instead, counters included.
  """

  name: str
  move: Callable[[Moment], jax.Array] | None = None
  kinds: tuple[str, ...] = _moments.KINDS
  resets: bool = False


def carry(
  transport: Transport, state: Any, moves: Moves, *, per_matrix: bool
) -> Any:
  """Returns an inner state with its moments moved to the new bases.

  Args:
    transport: a transport with a `move`.
    state: the inner optimizer's state.
    moves: the moves of leaves whose bases may have moved.
    per_matrix: whether each matrix has its own state; the arrays of these
      states are stacked along their first axes.
  """
  moved = [jnp.any(move.moved) for _, move in moves.values()]

  def one(moments: _moments.MomentTree) -> Any:
    if moments.kind not in transport.kinds:
      return moments.tree
    return _move_tree(transport, moves, per_matrix, moments)

  return _moments.map_moments(one, state, jnp.any(jnp.stack(moved)))


def _move_tree(
  transport: Transport,
  moves: Moves,
  per_matrix: bool,
  moments: _moments.MomentTree,
) -> Any:
  pairs, treedef = _tree.flatten(moments.tree)
  paths = [path for path, _ in pairs]
  _check_paths(transport, paths, moves)
  means, counts = (
    _by_path(tree, paths) for tree in (moments.mean, moments.count)
  )

  def one(path: str, value: Any) -> Any:
    if path not in moves or _tree.is_masked(value):
      return value
    node, move = moves[path]
    arrays = value, means[path], counts[path]
    return _move_leaf(
      transport, per_matrix, path, node.layout, move, moments.kind, arrays
    )

  return treedef.unflatten([one(*pair) for pair in pairs])


def _by_path(tree: Any, paths: list[str]) -> dict[str, Any]:
  """Returns each leaf's entry of a tree; a single value belongs to all."""
  if tree is None or hasattr(tree, 'dtype'):
    return dict.fromkeys(paths, tree)
  return dict(_tree.flatten(tree)[0])


def _move_leaf(
  transport: Transport,
  per_matrix: bool,
  path: str,
  layout: _layout.Layout,
  move: _projected.Move,
  kind: str,
  arrays: tuple[jax.Array, Any, Any],
) -> jax.Array:
  """Returns a leaf's moment, moved for the matrices whose bases moved.

  `arrays` are the moment and, for squares that go with means, these means and
  their count.
  """
  value = arrays[0]
  batch = layout.coords_batch
  first = tuple(range(len(batch)))

  move_moment = transport.move
  assert move_moment is not None  # `carry` is for transports that have one

  def like_coords(x: Any) -> Any:
    if x is None or x.ndim == 0:
      return x
    if x.ndim == len(batch):
      return layout.along_coords(x)
    return jnp.moveaxis(x, first, batch) if per_matrix else x

  def moved() -> jax.Array:
    old, mean, count = map(like_coords, arrays)
    check_shape(path, old, layout.coords_shape)
    new = move_moment(Moment(old, kind, mean, count, move.transition, layout))
    new = jnp.where(layout.along_coords(move.moved), new, old)
    new = jnp.moveaxis(new, batch, first) if per_matrix else new
    return _sharding.like(new, value)

  return _varying.cond(jnp.any(move.moved), moved, lambda: value)


def check_shape(path: str, moment: Any, shape: tuple[int, ...]) -> None:
  """Raises unless a leaf's moment has the shape of its coordinates."""
  if moment.shape != shape:
    raise ValueError(
      f'gradient {path!r} has coordinates of shape {shape}, but init made '
      f'moments of shape {moment.shape}; give update the tree that init got, '
      'or convert a state of another rank with subspace_optax.resize_rank.'
    )


def _check_paths(transport: Transport, paths: list[str], moves: Moves) -> None:
  if paths == ['']:  # a label without leaves
    return
  for path in moves:
    if not any(path == p or path.startswith(f'{p}/') for p in paths):
      raise ValueError(
        f'transport {transport.name!r} finds no moments of leaf {path!r} among '
        f"{paths}; use transport='keep' or 'reset'."
      )
