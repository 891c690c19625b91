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
"""Inner moments across a change of basis.

He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024: momentum
projection, m <- C m with C = P_n^T P_o. For bases that are not orthonormal,
C = P_n^T P_o (P_o^T P_o)^-1.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from subspace_optax import _projected
from subspace_optax import _sharding
from subspace_optax import _tree

POLICIES = ('keep', 'first', 'reset')

# Which fields of an inner optimizer's state hold first moments, that is, means
# of gradients. Fields not named are left as they are.
_FIRST_MOMENTS: dict[type, tuple[str, ...]] = {
  optax.ScaleByAdamState: ('mu',),
  optax.ScaleByLionState: ('mu',),
  optax.TraceState: ('trace',),
  optax.ScaleByRmsState: (),
}

Moves = Mapping[str, tuple[_projected.Projected, _projected.Move]]


def check_policy(transport: str) -> None:
  """Raises unless `transport` is known."""
  if transport not in POLICIES:
    raise ValueError(f'transport must be one of {POLICIES}, got {transport!r}.')


def check_known(state: Any, owner: type | None = None) -> None:
  """Raises if the state holds arrays that may be moments, but of what kind?"""
  if type(state) in _FIRST_MOMENTS:
    return
  owner = type(state) if hasattr(state, '_fields') else owner
  for child in _children(state):
    if not isinstance(child, jax.Array | jax.ShapeDtypeStruct):
      check_known(child, owner)
    elif child.ndim > 0:
      known = ', '.join(sorted(t.__name__ for t in _FIRST_MOMENTS))
      raise ValueError(
        f"transport='first' does not know the moments in {owner}, only in "
        f"{known}; use transport='keep' or 'reset'."
      )


def first(state: Any, moves: Moves) -> Any:
  """Returns the inner state with first moments mapped by each leaf's C."""
  if not moves:
    return state
  fields = _FIRST_MOMENTS.get(type(state))
  if fields is not None:
    moments = {name: _move(getattr(state, name), moves) for name in fields}
    return state._replace(**moments)
  return _map_children(lambda child: first(child, moves), state)


def _move(moments: Any, moves: Moves) -> Any:
  """Maps one tree of moments; leaves that are not projected stay."""
  pairs, treedef = _tree.flatten(moments)
  _check_paths([path for path, _ in pairs], moves)

  def one(path: str, moment: Any) -> Any:
    if path not in moves or _tree.is_masked(moment):
      return moment
    node, move = moves[path]
    return lax.cond(
      jnp.any(move.moved),
      lambda m: _sharding.like(node.layout.mix_coords(move.transition, m), m),
      lambda m: m,
      moment,
    )

  return treedef.unflatten([one(*pair) for pair in pairs])


def _check_paths(paths: list[str], moves: Moves) -> None:
  for path in moves:
    if not any(path == p or path.startswith(f'{p}/') for p in paths):
      raise ValueError(
        f"transport='first' finds no moments of leaf {path!r} among {paths}; "
        "use transport='keep' or 'reset'."
      )


def _children(state: Any) -> list[Any]:
  if state is None or isinstance(state, jax.Array | jax.ShapeDtypeStruct):
    return []
  leaves, _ = jax.tree.flatten(state, is_leaf=lambda x: x is not state)
  return leaves


def _map_children(f: Callable[[Any], Any], state: Any) -> Any:
  if state is None or isinstance(state, jax.Array):
    return state
  return jax.tree.map(f, state, is_leaf=lambda x: x is not state)
