# SPDX-License-Identifier: Apache-2.0
"""Trees of parameters in which some kernels are lifted."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._chain import _first_states
from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _tree
from subspace_optax.lifted import _lifted

Spec = _spec.SubspaceSpec | Sequence[_spec.Match | None]


def lift(params: Any, bases: Any, coords: Any, spec: Spec) -> Any:
  """Replaces every leaf W that has a basis P by W + P B.

  Args:
    params: the parameters, boxed or not.
    bases: a tree with the structure of `params`, with or without boxes, that
      holds P of each leaf, and `optax.MaskedNode` for leaves that stay plain.
    coords: a tree like `bases`, with B of each leaf. None if all B are 0 and
      only their gradients matter, which saves the products with B.
    spec: which axes are a kernel's inputs; its `side` is taken to be 'in'. Or
      the matches of the parameters by a spec with any side.

  Returns:
    The parameters, with a `Lifted` for every such leaf, for `nnx_merge`,
    `linen_apply` or `dot`.

  Raises:
    ValueError: the trees' leaves differ; a basis or coordinates of the wrong
      shape, or for a leaf that the spec leaves plain.

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> from subspace_optax import rso
    >>> params = {'up': jnp.ones((16, 32))}
    >>> bases, coords = {'up': jnp.ones((16, 2))}, {'up': jnp.zeros((2, 32))}
    >>> lifted = rso.lift(params, bases, coords, so.SubspaceSpec(rank=2))
    >>> rso.dot(jnp.ones((4, 16)), lifted['up']).shape
    (4, 32)
  """
  join, at = _split(spec, params, bases, coords)
  return join(at)


def zeros(params: Any, bases: Any, matches: Sequence[Any]) -> Any:
  """Returns B = 0 for every leaf with a basis, float32 or wider."""
  pairs, treedef = _tree.flatten(params)
  entries = [
    basis
    if _tree.is_masked(basis)
    else zero_coords(path, leaf, _layout_of(found))
    for found, (path, leaf), basis in zip(
      matches, pairs, _entries(pairs, bases, 'bases'), strict=True
    )
  ]
  return treedef.unflatten(entries)


def zero_coords(path: str, leaf: Any, layout: _layout.Layout) -> jax.Array:
  """Returns B = 0 of one leaf, for `per_matrix`."""
  del path
  wide = jnp.promote_types(leaf.dtype, jnp.float32)
  return _first_states.zero_coords(layout, leaf, wide)


def trained(params: Any, coords: Any) -> Any:
  """Returns a tree of the coordinates of lifted leaves and all other leaves."""
  pairs = _tree.flatten(params)[0]
  entries = [
    leaf if _tree.is_masked(b) else b
    for (_, leaf), b in zip(
      pairs, _entries(pairs, coords, 'coords'), strict=True
    )
  ]
  return _tree.replace_entries(params, entries)


def value_and_grad(
  loss: Callable[..., Any], spec: Spec, has_aux: bool = False
) -> Callable[..., Any]:
  """Differentiates a loss by coordinates, and by leaves that are not lifted.

  Args:
    loss: (lifted parameters, *args) -> a scalar, or with `has_aux` a pair of
      the scalar and auxiliary values.
    spec: see `lift`.
    has_aux: whether the loss returns such a pair.

  Returns:
    (params, bases, coords, *args) -> (the loss, its gradient). The gradient has
    the structure of the parameters, with the shapes of coordinates for lifted
    leaves. For coords, see `lift`.

  Raises:
    ValueError: see `lift`; raised when called.

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> from subspace_optax import rso
    >>> loss = lambda p, x: jnp.sum(rso.dot(x, p['up']))
    >>> params = {'up': jnp.ones((16, 32))}
    >>> bases, coords = {'up': jnp.ones((16, 2))}, {'up': jnp.zeros((2, 32))}
    >>> f = rso.value_and_grad(loss, so.SubspaceSpec(rank=2))
    >>> f(params, bases, coords, jnp.ones((4, 16)))[1]['up'].shape
    (2, 32)
  """

  def compute(params: Any, bases: Any, coords: Any, *args: Any) -> Any:
    of_trained, at = split(loss, spec, params, bases, coords)
    return jax.value_and_grad(of_trained, has_aux=has_aux)(at, *args)

  return compute


def split(
  loss: Callable[..., Any], spec: Spec, params: Any, bases: Any, coords: Any
) -> tuple[Callable[..., Any], Any]:
  """Returns the loss as a function of the trained arrays, and these arrays."""
  join, at = _split(spec, params, bases, coords)
  return lambda at, *args: loss(join(at), *args), at


def _split(
  spec: Spec, params: Any, bases: Any, coords: Any
) -> tuple[Callable[[Any], Any], Any]:
  """Returns a function from trained arrays to lifted params, and the arrays."""
  matches, at_zero = _matches(params, spec), coords is None
  if at_zero:
    coords = zeros(params, bases, matches)
  join = lambda at: _join(params, bases, at, matches, at_zero)
  return join, trained(params, coords)


def _matches(params: Any, spec: Spec) -> Sequence[_spec.Match | None]:
  """Returns the matches, or those of a spec if the inputs are projected."""
  if isinstance(spec, Sequence):
    return spec
  _spec.check_spec(spec)
  return dataclasses.replace(spec, side='in').match(params)


def _join(
  params: Any,
  bases: Any,
  trained: Any,
  matches: Sequence[_spec.Match | None],
  at_zero: bool,
) -> Any:
  """Returns `params` with its trained arrays: coordinates and plain leaves."""
  pairs = _tree.flatten(params)[0]
  bases, trained = (
    _entries(pairs, tree, name)
    for tree, name in ((bases, 'bases'), (trained, 'coords'))
  )
  entries = [
    x if _tree.is_masked(basis) else _lift_leaf(found, leaf, basis, x, at_zero)
    for found, (_, leaf), basis, x in zip(
      matches, pairs, bases, trained, strict=True
    )
  ]
  return _tree.replace_entries(params, entries)


def _entries(pairs: Any, tree: Any, name: str) -> list[Any]:
  found = _tree.flatten(tree)[0]
  paths, others = ([path for path, _ in x] for x in (pairs, found))
  if paths != others:
    odd = sorted(set(paths) ^ set(others))
    raise ValueError(
      f'{name} must have an entry for every leaf of params, MaskedNode where '
      f'it is not lifted; only one of them has {odd[0] if odd else others!r}.'
    )
  return [entry for _, entry in found]


def _layout_of(found: Any) -> _layout.Layout:
  if found is None or found.layout is None:
    path = '' if found is None else found.path
    why = 'is masked' if found is None else found.reason
    raise ValueError(
      f'leaf {path!r} has a basis, but the spec leaves it plain: {why}. Put '
      'optax.MaskedNode() instead of its basis, or change the spec.'
    )
  return found.layout


def _lift_leaf(
  found: Any, leaf: Any, basis: Any, coords: Any, at_zero: bool
) -> _lifted.Lifted:
  layout = _layout_of(found)
  for name, x, shape in (
    ('bases', basis, layout.basis_shape),
    ('coords', coords, layout.coords_shape),
  ):
    if x.shape != shape:
      raise ValueError(
        f'{name} of leaf {found.path!r} has shape {x.shape}; the spec makes it '
        f'{shape}.'
      )
  return _lifted.Lifted(leaf, basis, coords, layout, at_zero, found.path)


def lifted_in(x: Any) -> _lifted.Lifted | None:
  """Returns `x` if it is a lifted leaf, or the lifted leaf in its box."""
  x = _boxes.content(x) if _boxes.is_box(x) else x
  return x if isinstance(x, _lifted.Lifted) else None


def not_linear(lifted: Any, module: Any, known: Sequence[type]) -> ValueError:
  """Returns the error for a lifted leaf in a module that can't use it."""
  names = ' or '.join(
    f'{x.__module__.split(".")[1]}.{x.__name__}' for x in known
  )
  return ValueError(
    f'the lifted leaf {lifted.path!r} belongs to a {type(module).__name__}, '
    f'which is no {names}; name it in the `exclude` of the spec.'
  )
