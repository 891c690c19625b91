# SPDX-License-Identifier: Apache-2.0
"""`unproject`: from directions back to updates of whole leaves."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _first_states
from subspace_optax._chain import _matrices
from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _tree
from subspace_optax.residuals import _base


class ResidualState(NamedTuple):
  """State of `unproject` with a residual rule that has state."""

  count: jax.Array  # shape=(), dtype=int32
  # tree, leaf shape=(*batch,) or the leaf's, as the rule says
  residual: Any


def unproject(
  *,
  scale: Any = 1.0,
  residual: _base.Residual | None = None,
  spec: _spec.SubspaceSpec | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Turns directions in subspaces into updates of whole leaves.

  Args:
    scale: multiplies the updates of projected leaves, alpha in GaLore.
    residual: rule for the part of the gradient outside the subspace, from
      `subspace_optax.residuals`; needs `project(..., keep_gradient=True)`.
    spec: the spec of `project`, which says for which leaves a residual rule has
      state. By default, these are all leaves of two or more axes, with the last
      two axes as the matrix.

  Returns:
    A transformation that turns `Projected` nodes into updates of the leaf's
    shape, in the gradient's dtype.

  Raises:
    ValueError: a residual rule that changes gradients, which needs
      `subspace_optax.subspace`; at `update`, if nothing is projected, if
      `in_subspace` has not run, or if a residual rule lacks the gradient or has
      state of another shape.
    TypeError: `residual` is not a residual rule.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Eq. (9)

  Example:
    >>> import subspace_optax as so
    >>> tx = so.unproject(scale=0.25, residual=so.residuals.fira())
  """
  if isinstance(residual, _base.Residual) and residual.feedback:
    raise ValueError(
      f'residual {residual.name!r} changes gradients before they are '
      'projected, which `unproject` cannot do; use `subspace_optax.subspace`.'
    )
  allow_empty = isinstance(spec, _spec.SubspaceSpec) and spec.allow_empty
  return unproject_any(scale, residual, spec, allow_empty=allow_empty)


def unproject_any(
  scale: Any,
  residual: _base.Residual | None,
  spec: _spec.SubspaceSpec | None,
  *,
  allow_empty: bool,
) -> optax.GradientTransformationExtraArgs:
  """Like `unproject`; `allow_empty` if pieces can't be in the wrong order."""
  if residual is not None and not isinstance(residual, _base.Residual):
    raise TypeError(
      f'residual must come from subspace_optax.residuals, got {residual!r}.'
    )
  if spec is None:
    spec = _spec.SubspaceSpec(
      1, exclude=None, only_if_smaller=False, allow_empty=True
    )
  _spec.check_spec(spec)
  rule = _DROP if residual is None else residual

  def init(params):
    if rule.init is None:
      return optax.EmptyState()
    make = functools.partial(_first_state, rule.init, spec)
    return _first_states.make_state(spec, make, params)

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    pairs, treedef = _tree.flatten(updates)
    _check_directed(pairs, residual is not None, allow_empty)
    count, own = 0, [(path, None) for path, _ in pairs]
    if rule.init is not None:
      count, own = state.count, _tree.flatten(state.residual)[0]
    entries = [
      (*pair, last) for pair, (_, last) in zip(pairs, own, strict=True)
    ]
    results = _update_leaves(rule, scale, count, entries)
    if rule.init is not None:
      new = treedef.unflatten([last for _, last in results])
      state = state._replace(
        count=optax.safe_increment(state.count), residual=new
      )
    return _tree.replace_entries(updates, [x for x, _ in results]), state

  return optax.GradientTransformationExtraArgs(init, _boxes.bare(update))


def _first_state(
  make: Callable[..., jax.Array],
  spec: _spec.SubspaceSpec,
  params: Any,
  matches: list[_spec.Match | None],
  treedef: Any,
) -> ResidualState:
  del params

  def of_leaf(path: str, leaf: Any, layout: _layout.Layout) -> jax.Array:
    del path
    return make(layout, leaf, spec.dtype_of_moments(leaf.dtype))

  states = _matrices.per_matrix(matches, treedef, of_leaf)
  return ResidualState(jnp.zeros((), jnp.int32), states)


def _update_leaves(
  rule: _base.Residual,
  scale: Any,
  count: Any,
  entries: list[tuple[str, Any, Any]],
) -> list[tuple[Any, Any]]:
  """Returns the updates of whole leaves, and the states of their residuals."""
  results = [(entry, last) for _, entry, last in entries]
  is_node = lambda entry: isinstance(entry, _projected.Projected)
  at = [i for i, (_, entry, _) in enumerate(entries) if is_node(entry)]
  if not at:
    return results
  for i in at:
    path, node, last = entries[i]
    _check_state(rule, path, node, last)
    results[i] = rule.update(node, scale, count, last)
  nodes = [entries[i][1] for i in at]
  updates, states = map(list, zip(*(results[i] for i in at), strict=True))
  if rule.together is not None:
    updates, states = rule.together(nodes, scale, updates, states)
  for i, node, update, last in zip(at, nodes, updates, states, strict=True):
    results[i] = (update.astype(node.update_dtype), last)
  return results


def _drop(
  node: _projected.Projected, scale: Any, count: Any, last: Any
) -> tuple[jax.Array, Any]:
  """Returns GaLore's update, which drops the part outside the subspace."""
  del count
  # Multiply in the gradient's dtype, like all products of the step, except for
  # float16, which may be too narrow for a direction. Scale before the product,
  # while the array is small.
  dtype = jnp.float32 if node.dtype == jnp.float16 else node.dtype
  direction = (scale * node.direction).astype(dtype)
  basis = node.basis.astype(dtype)
  return node.layout.unproject(basis, direction, node.sharding), last


_DROP = _base.Residual('drop', _drop)


def _check_state(
  residual: _base.Residual, path: str, node: _projected.Projected, state: Any
) -> None:
  """Raises unless `init` made the state that a leaf needs."""
  init = residual.init
  if init is None:
    return
  make = lambda leaf: init(node.layout, leaf, node.dtype)
  shape = jax.eval_shape(make, node.gradient).shape
  found = None if _tree.is_masked(state) else state.shape
  if shape != found:
    raise ValueError(
      f'update {path!r} needs residual state of shape {shape}, but init made '
      f'{found}; give `unproject` the spec that `project` has.'
    )


def _check_directed(
  pairs: list, needs_gradient: bool, allow_empty: bool
) -> None:
  """Raises if `project` or `in_subspace` did not run before."""
  nodes = [(p, e) for p, e in pairs if isinstance(e, _projected.Projected)]
  if pairs and not nodes and not allow_empty:
    raise ValueError(
      f'no update is projected (the first is {pairs[0][0]!r}); chain '
      '`project` and `in_subspace` before `unproject`.'
    )
  for path, node in nodes:
    if node.direction is None:
      raise ValueError(
        f'update {path!r} has no direction yet; chain `in_subspace` before '
        '`unproject`.'
      )
    if needs_gradient and node.gradient is None:
      raise ValueError(
        f'update {path!r} came without its gradient, which the residual '
        'needs; use `project(..., keep_gradient=True)`.'
      )
