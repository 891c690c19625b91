# SPDX-License-Identifier: Apache-2.0
"""Errors of `in_subspace` for inner optimizers that it can't run.

The checks trace an optimizer on the types of its arguments, and never run it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _per_matrix
from subspace_optax._matrix import _tree
from subspace_optax.transports import _base
from subspace_optax.transports import _moments


def check_runs(
  inner: optax.GradientTransformation,
  templates: Any,
  matrices: Any,
  batch_axes: _per_matrix.BatchAxes,
  *,
  takes_params: bool,
  per_matrix: bool,
) -> None:
  """Raises if an optimizer needs params, copies them, or needs one matrix.

  Args:
    inner: the optimizer.
    templates: the tree that it will see.
    matrices: that tree without plain leaves.
    batch_axes: axes of each leaf that count matrices.
    takes_params: whether it gets params.
    per_matrix: whether it sees one matrix at a time.
  """
  if not jax.tree.leaves(templates):
    return
  alone = _per_matrix.per_matrix(inner, batch_axes)
  run = alone if per_matrix else inner
  if takes_params and _copies_params(run, templates):
    raise ValueError(
      'inner keeps a copy of the params in its state, which would go stale '
      'whenever a basis moves; wrap it around the whole optimizer instead.'
    )
  works = functools.partial(_works, run, templates)
  if works(templates if takes_params else None):
    return
  if not takes_params and works(templates):
    raise ValueError(
      "inner needs params: so.subspace(..., params='coordinates') gives it "
      'their coordinates in the subspace, which no ready-made optimizer does. '
      'For weight decay of the whole matrix, use `weight_decay` of the '
      'ready-made optimizers or chain `optax.add_decayed_weights` after '
      '`unproject`, with `optax.scale_by_adam` in place of `optax.adamw` here.'
    )
  has_matrices = bool(jax.tree.leaves(matrices))
  if not per_matrix and has_matrices and _works(alone, matrices, None):
    raise ValueError(
      'inner fails on a tree of coordinates and works on one matrix at a time, '
      'as Muon does: so.subspace(..., per_matrix=True, plain='
      'optax.scale_by_adam()) gives it one.'
    )


def _works(run: Any, tree: Any, params: Any) -> bool:
  """Whether an optimizer can step on a tree, judged by types alone."""
  return _is_traceable(lambda u, p: run.update(u, run.init(u), p), tree, params)


def _copies_params(run: Any, templates: Any) -> bool:
  """Whether the initial state depends on the values of the params."""
  if not _is_traceable(run.init, templates):
    return False

  def init_at(shift: jax.Array) -> Any:
    shifted = jax.tree.map(lambda x: x + shift.astype(x.dtype), templates)
    return run.init(shifted)

  # A value that depends on a mapped value leaves `vmap` with its axis.
  two = jax.ShapeDtypeStruct((2,), jnp.float32)
  return not _is_traceable(jax.vmap(init_at, out_axes=None), two)


def _is_traceable(f: Any, *args: Any) -> bool:
  try:
    jax.eval_shape(f, *args)
    return True
  except Exception:  # for any reason; an extra argument may be missing, too
    return False


def check_moments(run: Any, state: Any, coords: Any) -> None:
  """Raises for a leaf whose moments don't fit its coordinates, if any."""
  pairs, treedef = _tree.flatten(coords)
  paths = treedef.unflatten([path for path, _ in pairs])

  def check(moment: Any, coord: Any, path: str) -> None:
    if _tree.is_masked(moment) or _tree.is_masked(coord):
      return
    if moment.ndim != coord.ndim:
      return
    _base.check_shape(path, moment, coord.shape)

  if _moments.holds_codes(state):  # codes and scales have shapes of their own
    for moments in _moments.moments_in(state):
      args = (moments.tree, coords, paths)
      jax.tree.map(check, *args, is_leaf=_tree.is_masked)
    return
  optax.tree.map_params(
    run, check, state, coords, paths, is_leaf=_tree.is_masked
  )
