# SPDX-License-Identifier: Apache-2.0
"""Matches the trees that `update` gets as `init` matched the parameters."""

from collections.abc import Callable, Sequence
import itertools
from typing import Any

import jax

from subspace_optax._chain import _describe
from subspace_optax._chain import _spec
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree


def match_as_at_init(
  spec: _spec.SubspaceSpec, state: Any, updates: Any
) -> list[_spec.Match | None]:
  """Returns the matches of the gradients, which must be those of `init`."""
  _check_whole(updates)
  matches = match_to_state(
    spec,
    updates,
    ('seeds', state.seed, lambda layout: layout.batch_shape),
    ('a basis', state.subspaces.basis, lambda layout: layout.basis_shape),
  )
  seeds = dict(_tree.flatten(state.seed)[0])
  bases = dict(_tree.flatten(state.subspaces.basis)[0])
  for match in matches:
    if match and match.layout:
      path = match.path
      _check_placed(
        path, match.leaf, match.layout, seeds[path], bases.get(path)
      )
  return matches


def _check_placed(
  path: str,
  gradient: jax.Array,
  layout: _layout.Layout,
  seed: jax.Array,
  basis: Any,
) -> None:
  """Raises if a stack and its state differ in sharding over explicit axes."""
  wanted = _sharding.entries_of(gradient, layout.batch)
  found = [_sharding.entries_of(seed, range(seed.ndim))]
  if isinstance(basis, jax.Array):  # neither codes nor recomputed
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


# State that `init` makes for each matrix: its name, its tree in the state, and
# a function from layout to shape.
Made = tuple[str, Any, Callable[[_layout.Layout], tuple[int, ...]]]


def match_to_state(
  spec: _spec.SubspaceSpec, updates: Any, *made: Made
) -> list[_spec.Match | None]:
  """Returns the matches of the gradients for which `init` made a state.

  Args:
    spec: the spec that matches them.
    updates: the gradients.
    *made: parts of the state; the first must cover all leaves of the tree.

  Raises:
    ValueError: the gradients have another tree or other shapes; they have no
      names of axes, and names from different inits fit.
  """
  _check_tree(updates, made[0][1])
  known = _find_names(updates)
  fits = _find_fits(spec, updates, made, known)
  if not fits and {} not in known:
    fits = _find_fits(spec, updates, made, [{}])
  if not fits:
    raise ValueError(_find_misfit(spec.match(updates, known[0]), made))
  layouts = [[match and match.layout for match in x] for x in fits]
  check_alike([path for path, _ in _tree.flatten(updates)[0]], layouts)
  return fits[0]


def _check_whole(updates: Any) -> None:
  """Raises for gradients that are projected already."""
  for path, entry in _tree.flatten(updates)[0]:
    if isinstance(entry, _projected.Projected):
      raise ValueError(
        f'gradient {path!r} is projected already; chain `project` once, first.'
      )


def _check_tree(updates: Any, known: Any) -> None:
  """Raises unless gradients have the tree of the parameters at `init`."""
  pairs = (_tree.flatten(tree)[0] for tree in (updates, known))
  for new, old in itertools.zip_longest(*pairs, fillvalue=(None, None)):
    if new[0] != old[0]:
      raise ValueError(
        'gradients must have the tree of the parameters at init, which has '
        f'leaf {old[0]!r} in place of gradient {new[0]!r}.'
      )


def find_readings(
  spec: _spec.SubspaceSpec, updates: Any
) -> list[tuple[_tree.AxisNames, list[_spec.Match | None]]]:
  """Returns the names that a tree's axes may have, each with its matches."""
  return [(x, spec.match(updates, x)) for x in _find_names(updates)]


def _find_fits(
  spec: _spec.SubspaceSpec,
  updates: Any,
  made: Sequence[Made],
  known: list[_tree.AxisNames],
) -> list[list[_spec.Match | None]]:
  """Returns the matches by names of axes that fit the state from `init`."""
  readings = (spec.match(updates, names) for names in known)
  return [x for x in readings if _find_misfit(x, made) is None]


def check_alike(paths: list[str], readings: list[list[Any]]) -> None:
  """Raises if boxes of different inits make different matrices of a leaf.

  Args:
    paths: paths of the leaves.
    readings: for each possible reading, how it treats these leaves.
  """
  for path, *found in zip(paths, *readings, strict=True):
    if any(x != found[0] for x in found):
      raise ValueError(
        f'gradient {path!r} came without a box that names its axes, and trees '
        'like this one had different names at init, or some had none; say '
        'which axes it has in `weight_dimension_numbers` of SubspaceSpec.'
      )


# The names of axes at the inits of a tree, the latest first, by its paths and
# shapes. `nnx.Optimizer` passes boxes to `init` and bare arrays to `update`,
# which must form the same matrices, and a state can't hold names.
_names_at_init: dict[Any, list[_tree.AxisNames]] = {}
_MOST_TREES = 256
# Hashes of the paths and shapes of trees that came without names.
_without_names: set[int] = set()
_MOST_HASHES = 1 << 16


def remember_names(params: Any) -> None:
  """Keeps, for `update`, the names of axes that `init` sees."""
  if _describe.is_asked():
    return
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


def _find_names(updates: Any) -> list[_tree.AxisNames]:
  """Returns the names of axes in boxes, or all names that the tree had."""
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


def _find_misfit(
  matches: list[_spec.Match | None], made: Sequence[Made]
) -> str | None:
  """Returns an error for the first leaf whose state has another shape."""
  trees = [
    (what, dict(_tree.flatten(tree)[0]), shape) for what, tree, shape in made
  ]
  for match, path in zip(matches, trees[0][1], strict=True):
    for what, arrays, shape in trees:
      if path not in arrays:  # such as bases that are recomputed at every step
        continue
      array = arrays[path]
      expected = shape(match.layout) if match and match.layout else None
      found = None if _tree.is_masked(array) else array.shape
      if expected != found:
        return _explain_misfit(match, path, what, expected, found)
  return None


def _explain_misfit(
  match: _spec.Match | None, path: str, what: str, expected: Any, found: Any
) -> str:
  shape = tuple(match.leaf.shape) if match else 'masked'
  message = (
    f'gradient {path!r} of shape {shape} needs {what} of shape {expected}, but '
    f'init made {found}; give update the tree that init was given, in the same '
    'boxes, or call init once in this process.'
  )
  if what != 'a basis':
    return message
  return (
    f'{message} Convert a state of another rank with '
    'subspace_optax.resize_rank.'
  )


def check_shapes(updates: Any, others: Any, name: str) -> None:
  """Raises unless gradients have the shapes of another tree, if it is given.

  Bases can't detect a mismatch in the side that they do not span.
  """
  known = {} if others is None else dict(_tree.flatten(others)[0])
  for path, gradient in _tree.flatten(updates)[0]:
    shapes = [getattr(x, 'shape', None) for x in (gradient, known.get(path))]
    if None not in shapes and shapes[0] != shapes[1]:
      raise ValueError(
        f'gradient {path!r} has shape {shapes[0]}, {name} {shapes[1]}.'
      )


def mask_like(updates: Any, refresh_gradients: Any) -> Any:
  """Returns refresh gradients, masked like the gradients.

  Wrappers such as `optax.masked` pass extra arguments on unchanged.
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
