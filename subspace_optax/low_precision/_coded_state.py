# SPDX-License-Identifier: Apache-2.0
"""A state whose moments are codes, and how to read, write and change it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from subspace_optax._matrix import _noise
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.low_precision import _codes
from subspace_optax.transports import _moments


class CodedState(NamedTuple):
  """State of an optimizer whose moments take a byte or half a byte each."""

  count: jax.Array  # shape=(), dtype=int32, updates so far
  # The optimizer's own state. Each moment is a tree, leaf shape=the leaf's,
  # dtype=int8 or int4, uint8 for squares. For leaves that are not coded the
  # dtype is float32, or the leaf's if that is wider or complex.
  coded: Any
  # From the path of each moment to a tree, leaf shape=one value per block,
  # dtype=float32; a scalar for leaves that are not coded.
  scales: dict[str, Any]


def moments_of(state: CodedState) -> dict[str, tuple[Any, Any]]:
  """Returns the trees of codes and of scales, by path of the moment."""
  moments = _moments.moments_in(state.coded)
  return {m.path: (m.tree, state.scales[m.path]) for m in moments}


def with_moments(
  state: CodedState, moments: dict[str, tuple[Any, Any]]
) -> CodedState:
  """Returns a state with other trees of codes and scales; see `moments_of`."""
  coded = _moments.map_moments(lambda m: moments[m.path][0], state.coded)
  scales = {path: scales for path, (_, scales) in moments.items()}
  return CodedState(state.count, coded, scales)


def decoded(state: CodedState) -> Any:
  """Returns the optimizer's own state, with moments in float32."""
  return _moments.map_moments(
    lambda moments: jax.tree.map(
      _codes.decode, moments.tree, state.scales[moments.path]
    ),
    state.coded,
  )


def encoded(
  new: Any, state: CodedState, rounding: str = 'nearest', noise: Any = ()
) -> CodedState:
  """Returns the optimizer's own new state, coded like `state`.

  Args:
    new: the optimizer's new state, with moments in float32.
    state: the old coded state.
    rounding: see `_codes.is_random`.
    noise: for rounding at random, the seed, the number of the step and, for a
      part of an array, the index of its first entry.
  """
  before, scales = moments_of(state), {}

  def encode(moments: _moments.MomentTree) -> Any:
    def one(path: str, x: Any, old: Any, scale: Any) -> Any:
      if not _codes.is_random(rounding, old.dtype):
        return _codes.encode(x, old, scale)
      seed, *place = noise
      salt = _noise.salt(seed, f'{moments.path} {path}')
      return _codes.encode(x, old, scale, (salt, *place))

    old = before[moments.path]
    tree, scales[moments.path] = _tree.map_unzip(
      one, 2, paths_in(old[0]), moments.tree, *old
    )
    return tree

  coded = _moments.map_moments(encode, new)
  return CodedState(state.count, coded, scales)


def all_decoded(state: Any) -> Any:
  """Returns any state without boxes, its moments decoded to float32.

  Boxes go first, since those of codes and scales name different axes.
  """
  return jax.tree.map(
    lambda x: CodedState(x.count, decoded(x), {}) if _is_state(x) else x,
    _tree.unbox(state),
    is_leaf=_is_state,
  )


def all_encoded(wide: Any, like: Any) -> Any:
  """Undoes `all_decoded`: returns its result, coded and boxed like `like`."""
  coded = jax.tree.map(
    lambda x, y: (
      encoded(x.coded, y._replace(count=x.count)) if _is_state(x) else x
    ),
    wide,
    _tree.unbox(like),
    is_leaf=_is_state,
  )
  return jax.tree.structure(like).unflatten(jax.tree.leaves(coded))


def _change(
  f: Callable[[Any], Any], state: CodedState, wanted: Any
) -> CodedState:
  """Returns the state with `f` applied to the optimizer's own, if wanted.

  It rounds to the nearest, since it runs rarely and has no mean to preserve.
  """
  return _varying.cond(
    wanted, lambda: encoded(f(decoded(state)), state), lambda: state
  )


_moments.register_codec(CodedState, decoded, _change)


def _is_state(x: Any) -> bool:
  return isinstance(x, CodedState)


def paths_in(tree: Any) -> Any:
  """Returns a tree with each leaf replaced by its path."""
  return jax.tree.map_with_path(lambda path, _: _tree.path_str(path), tree)
