# SPDX-License-Identifier: Apache-2.0
"""Two optimizers that share a tree: one for matrices, one for the rest."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import optax

from subspace_optax._matrix import _tree


class BesideState(NamedTuple):
  """State of two optimizers that share a tree."""

  projected: Any  # state of `inner`; `MaskedNode` for plain leaves
  plain: Any  # state of `plain`; `MaskedNode` for projected leaves


def run_beside(
  plain: optax.GradientTransformation,
  inner: optax.GradientTransformationExtraArgs,
  projected: Iterable[str],
  takes_params: bool,
) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` on leaves with paths in `projected`, `plain` on the rest.

  Only `plain` gets the parameters, unless `takes_params`.
  """
  plain = optax.with_extra_args_support(plain)

  def init(params):
    mine, rest = split(params, projected)
    return BesideState(inner.init(mine), plain.init(rest))

  def update(updates, state, params=None, **extra_args):
    mine, rest = split(updates, projected)
    params = (None, None) if params is None else split(params, projected)
    weights = params[0] if takes_params else None
    mine, a = inner.update(mine, state.projected, weights, **extra_args)
    rest, b = plain.update(rest, state.plain, params[1], **extra_args)
    merge = lambda x, y: y if _tree.is_masked(x) else x
    both = jax.tree.map(merge, mine, rest, is_leaf=_tree.is_masked)
    return both, BesideState(a, b)

  return optax.GradientTransformationExtraArgs(init, update)


def split(tree: Any, projected: Iterable[str]) -> tuple[Any, Any]:
  """Splits a tree: one without plain leaves, one without projected leaves."""
  tree, hide = _tree.unbox(tree), optax.MaskedNode()
  mine = lambda path, x: x if path in projected else hide
  rest = lambda path, x: hide if path in projected else x
  return _tree.map_entries(mine, tree), _tree.map_entries(rest, tree)
