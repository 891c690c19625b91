# SPDX-License-Identifier: Apache-2.0
"""Gradients as the matrices that projectors see, checked against `init`."""

from collections.abc import Callable
import dataclasses
import itertools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _spec
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax.projectors import _base


def per_matrix(
  matches: list[_spec.Match | None],
  treedef: Any,
  make: Callable[[str, Any, _layout.Layout], Any],
) -> Any:
  """Returns a tree of `make(path, leaf, layout)`; `MaskedNode` for the rest."""
  return treedef.unflatten(
    [
      make(match.path, match.leaf, match.layout)
      if match and match.layout
      else optax.MaskedNode()
      for match in matches
    ]
  )


def of_gradients(
  state: Any,  # a ProjectState
  matches: list[_spec.Match | None],
  axis_name: Any,
  keep_gradient: bool,
  gradients: Any,
) -> Any:
  """Returns the tree of the matrices of gradients."""
  seeds = dict(_tree.flatten(state.seed)[0])

  def matrix(path: str, leaf: jax.Array, layout: _layout.Layout):
    if axis_name is None:
      return _matrix(leaf, layout, seeds[path])
    if keep_gradient:
      return _matrix(lax.pmean(leaf, axis_name), layout, seeds[path])
    layout = dataclasses.replace(layout, axis_name=axis_name)
    return _matrix(leaf, layout, seeds[path])

  return per_matrix(matches, _tree.flatten(gradients)[1], matrix)


def without_gradients(
  state: Any,  # a ProjectState
  matches: list[_spec.Match | None],
  params: Any,
  axis_name: Any = None,
) -> Any:
  """Returns the tree of matrices whose gradients nobody looks at."""
  seeds = dict(_tree.flatten(state.seed)[0])

  def matrix(path: str, leaf: jax.Array, layout: _layout.Layout):
    layout = dataclasses.replace(layout, axis_name=axis_name)
    seed = seeds[path]
    one = jnp.ones_like(seed, jnp.float32)
    ok = jnp.ones_like(seed, jnp.bool_)
    return _base.Matrix(leaf, None, layout, seed, one, ok)

  return per_matrix(matches, _tree.flatten(params)[1], matrix)


def _check_placed(
  path: str,
  gradient: jax.Array,
  layout: _layout.Layout,
  seed: jax.Array,
  basis: Any,
) -> None:
  """Raises if a stack and its state are cut differently on explicit axes."""
  wanted = _sharding.entries_of(gradient, layout.batch)
  found = [_sharding.entries_of(seed, range(seed.ndim))]
  if isinstance(basis, jax.Array):  # neither codes nor drawn again
    axes = map(layout.basis_axes().index, layout.batch_axes)
    found.append(_sharding.entries_of(basis, axes))
  for axis, of_gradient, *of_state in zip(
    layout.batch, wanted, *found, strict=True
  ):
    if any(x != of_gradient for x in of_state):
      raise ValueError(
        f'the stack {path!r} is split along axis {axis} over the mesh axes '
        f'{of_gradient}, and its state over {of_state[-1]}; explicit axes must '
        'be the same. Place the state with subspace_optax.state_sharding(tx, '
        'params), and gradients as their parameters. (Before 0.12 jax drops '
        'explicit axes from what leaves a partly manual shard_map; there make '
        'all axes of the mesh Auto.)'
      )


def _matrix(
  gradient: jax.Array, layout: _layout.Layout, seed: jax.Array
) -> _base.Matrix:
  energy = layout.mean(layout.energy(gradient))
  # A sum of squares is finite only if all elements are.
  ok = jnp.isfinite(energy) & (energy > 0)
  energy = jnp.where(ok, energy, 1.0)  # a divisor, whatever the gradient
  return _base.Matrix(gradient, gradient, layout, seed, energy, ok)


def given_coords(updates: Any, matrices: Any) -> tuple[Any, Any]:
  """Returns coordinates that were given as gradients, and their matrices."""
  given = dict(_tree.flatten(updates)[0])
  pairs, treedef = _tree.flatten(matrices)
  coords = [
    x if _tree.is_masked(x) else _given(path, given[path], x)
    for path, x in pairs
  ]
  taken = [
    x if _tree.is_masked(x) else dataclasses.replace(x, ok=_is_good(x, r))
    for (_, x), r in zip(pairs, coords, strict=True)
  ]
  return treedef.unflatten(coords), treedef.unflatten(taken)


def _given(path: str, coords: Any, matrix: _base.Matrix) -> jax.Array:
  layout = matrix.layout
  if coords.shape != layout.coords_shape:
    raise ValueError(
      f'gradient {path!r} has shape {coords.shape}; in a compressed step '
      f'it must be that of its coordinates, {layout.coords_shape}.'
    )
  coords = layout.mean(_linalg.widen(coords))
  return layout.settle_coords(coords, matrix.like)


def _is_good(matrix: _base.Matrix, coords: jax.Array) -> jax.Array:
  energy = matrix.layout.coords_energy(coords)
  return jnp.isfinite(energy) & (energy > 0)


def check_coordinates(
  params: Any, keep_gradient: bool, refresh_gradients: Any
) -> None:
  """Raises where coordinates alone are not enough."""
  if params is None:
    raise ValueError(
      'a compressed step needs params, which tell the shapes of the gradients.'
    )
  if keep_gradient or refresh_gradients is not None:
    what = 'a residual rule' if keep_gradient else 'refresh_gradients'
    raise ValueError(
      f'a compressed step has no gradients, and {what} needs them.'
    )


def masked_like(updates: Any, refresh_gradients: Any) -> Any:
  """Returns refresh gradients without what a wrapper hid of the gradients.

  Wrappers such as `optax.masked` hand on extra arguments as they are.
  """
  pairs, treedef = _tree.flatten(updates)
  known = dict(_tree.flatten(refresh_gradients)[0])
  for path, _ in pairs:
    if path not in known:
      raise ValueError(
        f'refresh_gradients has no leaf {path!r}; give it the tree of the '
        'gradients.'
      )
  return treedef.unflatten(
    [x if _tree.is_masked(x) else known[path] for path, x in pairs]
  )


def matches_of(
  spec: _spec.SubspaceSpec, state: Any, updates: Any
) -> list[_spec.Match | None]:
  """Returns the matches of the gradients, which must be those of `init`."""
  matches = _match_as_at_init(spec, updates, state)
  seeds = dict(_tree.flatten(state.seed)[0])
  bases = dict(_tree.flatten(state.subspaces.basis)[0])
  for match in matches:
    if match and match.layout:
      path = match.path
      _check_placed(
        path, match.leaf, match.layout, seeds[path], bases.get(path)
      )
  return matches


def _match_as_at_init(
  spec: _spec.SubspaceSpec, updates: Any, state: Any
) -> list[_spec.Match | None]:
  pairs, _ = _tree.flatten(updates)
  for path, entry in pairs:
    if isinstance(entry, _projected.Projected):
      raise ValueError(
        f'gradient {path!r} is projected already; chain `project` once, first.'
      )
  known, _ = _tree.flatten(state.seed)
  for new, old in itertools.zip_longest(pairs, known, fillvalue=(None, None)):
    if new[0] != old[0]:
      raise ValueError(
        'gradients must have the tree of the parameters at init, where leaf '
        f'{old[0]!r} stands at the place of gradient {new[0]!r}.'
      )
  known = _named(updates)
  fits = _fitting(spec, updates, state, known)
  if not fits and {} not in known:
    fits = _fitting(spec, updates, state, [{}])
  if not fits:
    raise ValueError(_misfit(spec.match(updates, known[0]), state))
  _check_alike(fits)
  return fits[0]


def _fitting(
  spec: _spec.SubspaceSpec,
  updates: Any,
  state: Any,
  known: list[_tree.AxisNames],
) -> list[list[_spec.Match | None]]:
  """Returns what names of axes make of a tree, where `init` made it so."""
  readings = (spec.match(updates, names) for names in known)
  return [x for x in readings if _misfit(x, state) is None]


def _check_alike(readings: list[list[_spec.Match | None]]) -> None:
  """Raises if a leaf may be two matrices, by the boxes of different inits."""
  for matches in zip(*readings, strict=True):
    layouts = {match.layout for match in matches if match}
    if len(layouts) > 1:
      raise ValueError(
        f'gradient {matches[0].path!r} came without a box that names its axes, '
        'and trees like this one had different names at init, or some had '
        'none; say which axes it has in `weight_dimension_numbers` of '
        'SubspaceSpec.'
      )


# By the paths and shapes of a tree, the names of axes at its inits, the latest
# first. `nnx.Optimizer` gives `init` boxes and `update` bare arrays, which must
# be the same matrices, and names are no arrays that a state could hold.
_names_at_init: dict[Any, list[_tree.AxisNames]] = {}
_MOST_TREES = 256
# Hashes of the paths and shapes of trees that came without names.
_without_names: set[int] = set()
_MOST_HASHES = 1 << 16


def remember_names(params: Any) -> None:
  """Keeps the names of axes that `init` sees for `update`."""
  names, shapes = _tree.axis_names(params), _shapes(params)
  if not names:
    if len(_without_names) >= _MOST_HASHES:
      _without_names.clear()
    _without_names.add(hash(shapes))
    return
  before = _names_at_init.pop(shapes, [])
  _names_at_init[shapes] = [names, *(x for x in before if x != names)]
  if len(_names_at_init) > _MOST_TREES:
    del _names_at_init[next(iter(_names_at_init))]


def _named(updates: Any) -> list[_tree.AxisNames]:
  """Returns the names of axes in boxes, or those that the tree may have had."""
  names = _tree.axis_names(updates)
  if names:
    return [names]
  shapes = _shapes(updates)
  known = _names_at_init.get(shapes, [])
  bare = not known or hash(shapes) in _without_names
  return [*known, names] if bare else known


def _shapes(tree: Any) -> tuple[tuple[str, Any], ...]:
  pairs, _ = _tree.flatten(tree)
  return tuple((path, getattr(x, 'shape', None)) for path, x in pairs)


def _misfit(matches: list[_spec.Match | None], state: Any) -> str | None:
  """Returns an error for the first leaf that `init` made other arrays for."""
  bases = dict(_tree.flatten(state.subspaces.basis)[0])
  for match, (path, seed) in zip(
    matches, _tree.flatten(state.seed)[0], strict=True
  ):
    layout = match.layout if match else None
    made = [('seeds', seed, layout and layout.batch_shape)]
    if path in bases:
      made.append(('a basis', bases[path], layout and layout.basis_shape))
    for what, array, expected in made:
      found = None if _tree.is_masked(array) else array.shape
      if expected != found:
        return _not_made(match, path, what, expected, found)
  return None


def check_shapes(updates: Any, others: Any, name: str) -> None:
  """Raises unless gradients have the shapes of another tree, if it is given.

  The bases know only one side of a matrix.
  """
  known = {} if others is None else dict(_tree.flatten(others)[0])
  for path, gradient in _tree.flatten(updates)[0]:
    shapes = [getattr(x, 'shape', None) for x in (gradient, known.get(path))]
    if None not in shapes and shapes[0] != shapes[1]:
      raise ValueError(
        f'gradient {path!r} has shape {shapes[0]}, {name} {shapes[1]}.'
      )


def _not_made(
  match: _spec.Match | None, path: str, what: str, expected: Any, found: Any
) -> str:
  shape = tuple(match.leaf.shape) if match else 'masked'
  return (
    f'gradient {path!r} of shape {shape} needs {what} of shape {expected}, but '
    f'init made {found}; give update the tree that init was given, in the same '
    'boxes, or call init once in this process. A state of another rank is '
    'taken over by subspace_optax.resize_rank.'
  )
