# SPDX-License-Identifier: Apache-2.0
"""Combines an optimizer for matrices with another one for the other leaves."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import optax

from subspace_optax._chain import _beside
from subspace_optax._chain import _dtypes
from subspace_optax._chain import _first_states
from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _tree


def whole_spec(spec: _spec.SubspaceSpec) -> _spec.SubspaceSpec:
  """Returns the spec for matrices that are not projected, of any size."""
  _spec.check_spec(spec)
  return dataclasses.replace(spec, rank=1, only_if_smaller=False)


def run_with_plain(
  spec: _spec.SubspaceSpec,
  matrices: optax.GradientTransformation,
  plain: optax.GradientTransformation,
  after: optax.GradientTransformation,
  matrices_in: Callable[[Any], Any],
) -> optax.GradientTransformationExtraArgs:
  """Returns an optimizer whose updates are float32 or wider until `after`.

  Args:
    spec: which leaves are matrices.
    matrices: optimizer for matrices. It sees the whole tree, so that it reads
      axes as `spec` reads those of parameters; its updates of other leaves are
      not used.
    plain: optimizer for the other leaves, which sees only them.
    after: runs on all updates, such as weight decay and learning rate.
    matrices_in: maps the state of `matrices` to a tree in it whose entries show
      which leaves `init` took for matrices.
  """
  spec = whole_spec(spec)
  own, rest = map(optax.with_extra_args_support, (matrices, plain))

  def first_state(params, matches, treedef):
    del treedef
    paths = {m.path for m in matches if m and m.layout}
    cast = lambda x: x.astype(spec.dtype_of_moments(x.dtype))
    others = jax.tree.map(cast, _beside.split(params, paths)[1])
    return _beside.BesideState(own.init(params), rest.init(others))

  def init(params):
    return _first_states.make_state(spec, first_state, params)

  def update(updates, state, params=None, **extra_args):
    widen = lambda _, g: _dtypes.widen(spec, g)
    bare = _tree.map_entries(widen, _tree.unbox(updates))
    entries, _ = _tree.flatten(matrices_in(state.projected))
    paths = {path for path, x in entries if not _tree.is_masked(x)}
    mine, a = own.update(bare, state.projected, params, **extra_args)
    hidden = _beside.split(bare, paths)[1]
    weights = None if params is None else _beside.split(params, paths)[1]
    others, b = rest.update(hidden, state.plain, weights, **extra_args)
    merge = lambda _, x, y: x if _tree.is_masked(y) else y
    merged = _tree.map_entries(merge, mine, others)
    entries = [entry for _, entry in _tree.flatten(merged)[0]]
    new = _beside.BesideState(a, b)
    return _tree.replace_entries(updates, entries), new

  tx = optax.GradientTransformationExtraArgs(init, _boxes.bare(update))
  return _dtypes.round_last(optax.chain(tx, after))
