# Copyright 2026 The subspace_optax Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""An inner optimizer with a state of its own for every leaf.

Counters that a tree-wide state shares among leaves can be restarted for one
leaf only if each leaf has its own, as `transport='reset'` needs: with Adam's
moments at zero but its count at T, bias correction would be off for 1/(1-b2)
steps.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from subspace_optax import _sharding
from subspace_optax import _tree


def per_leaf(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` run on each leaf alone; its state holds trees of leaves."""
  inner = optax.with_extra_args_support(inner)

  def init(params):
    structure = _structure(inner)
    columns = _tree.map_unzip(
      lambda p: tuple(jax.tree.leaves(inner.init(p))),
      structure.num_leaves,
      params,
    )
    return structure.unflatten(columns)

  def update(updates, state, params=None, **extra_args):
    structure = _structure(inner)
    fields = structure.flatten_up_to(state)
    if params is None:
      params = jax.tree.map(lambda _: None, updates)

    def one(u, p, *leaf_state):
      new, s = inner.update(u, structure.unflatten(leaf_state), p, **extra_args)
      return new, *jax.tree.leaves(s)

    updates, *fields = _tree.map_unzip(
      one, 1 + len(fields), updates, params, *fields
    )
    return updates, structure.unflatten(fields)

  return optax.GradientTransformationExtraArgs(init, update)


def restart(
  inner: optax.GradientTransformation, state: Any, moves: Mapping[str, Any]
) -> Any:
  """Returns the state of `per_leaf(inner)`, anew for the leaves that moved.

  Args:
    inner: what `per_leaf` wraps.
    state: of `per_leaf(inner)`.
    moves: from path to the leaf's `Projected` node and its `Move`.
  """
  structure = _structure(inner)
  fields, treedefs = zip(
    *map(_tree.flatten, structure.flatten_up_to(state)), strict=True
  )

  def one(path: str, leaf_state: list[Any]) -> list[Any]:
    if path not in moves:
      return leaf_state
    node, move = moves[path]
    fresh = jax.tree.leaves(inner.init(jnp.zeros_like(node.coords)))
    fresh = jax.tree.map(_sharding.like, fresh, leaf_state)
    return lax.cond(move.moved, lambda: fresh, lambda: leaf_state)

  rows = [
    one(row[0][0], [leaf for _, leaf in row])
    for row in zip(*fields, strict=True)
  ]
  columns = zip(*rows, strict=True) if rows else [()] * len(treedefs)
  return structure.unflatten(
    [d.unflatten(column) for d, column in zip(treedefs, columns, strict=True)]
  )


def _structure(inner: optax.GradientTransformation) -> Any:
  return jax.tree.structure(jax.eval_shape(inner.init, jnp.zeros(())))
