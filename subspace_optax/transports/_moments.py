# SPDX-License-Identifier: Apache-2.0
"""Moments in the states of optimizers: where they are and how to change them.

`register_moments` names the moments of each type of state once. Transports,
residual rules and low precision then read and write moments by `map_moments`,
without knowing any optimizer by name.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

KINDS = ('mean', 'sum', 'square')


class MomentTree(NamedTuple):
  """One field of a state that holds moments of all leaves.

  Attributes:
    path: path of the field in the state, such as `0/mu`.
    kind: 'mean' of gradients, 'sum' of gradients or 'square', a mean of squared
      gradients.
    tree: the moments, with the parameters' structure.
    mean: for squares that go with means, the tree of these means; else None.
    count: for squares that go with means, the number of steps in both; else
      None.
  """

  path: str
  kind: str
  tree: Any
  mean: Any
  count: Any


class _Fields(NamedTuple):
  """Which fields of a type of state hold moments."""

  kinds: Mapping[str, str]
  means: Mapping[str, str | None]
  elementwise: bool = False


class _Codec(NamedTuple):
  """How to read and change a state that holds moments as codes."""

  decode: Callable[[Any], Any]
  change: Callable[[Callable[[Any], Any], Any, Any], Any]


_fields: dict[type, _Fields] = {}
_codecs: dict[type, _Codec] = {}


def register_moments(
  state_type: type,
  first: Sequence[str] = (),
  second: Mapping[str, str | None] | None = None,
  *,
  sums: Sequence[str] = (),
  elementwise: bool = False,
) -> None:
  """Names the moments in the state of an optimizer.

  Transports, residual rules and `quantize_moments` then find them. Fields that
  are not named do not change, but states inside them are searched for moments.

  Args:
    state_type: the state's NamedTuple type.
    first: fields with means of gradients.
    second: maps each field with means of squared gradients to the field with
      the corresponding means of gradients, or to None if there is no such
      field. Both are debiased by 1 - b^count with the state's `count`.
    sums: fields with sums of gradients, which have no factor of 1 - b.
    elementwise: whether the update of each number depends only on its own
      gradient and moments, and on counters. `quantize_moments` then updates
      stacks layer by layer, and passes no parameters.

  Raises:
    ValueError: a field that the type does not have.

  Example:
    >>> from typing import NamedTuple
    >>> import subspace_optax as so
    >>> class MyState(NamedTuple):
    ...   velocity: dict
    >>> so.register_moments(MyState, sums=['velocity'])
  """
  second = dict(second or {})
  kinds = dict.fromkeys(first, 'mean') | dict.fromkeys(sums, 'sum')
  kinds |= dict.fromkeys(second, 'square')
  named = [*kinds, *(name for name in second.values() if name)]
  named += ['count'] if any(second.values()) else []
  for name in named:
    if name not in getattr(state_type, '_fields', ()):
      raise ValueError(f'{state_type} has no field {name!r}.')
  _fields[state_type] = _Fields(kinds, second, elementwise)


_register_each = functools.partial(register_moments, elementwise=True)
_register_each(optax.ScaleByAdamState, ['mu'], {'nu': 'mu'})
_register_each(optax.ScaleByBeliefState, ['mu'], {'nu': None})
_register_each(optax.ScaleByLionState, ['mu'])
_register_each(optax.TraceState, sums=['trace'])
_register_each(optax.EmaState, ['ema'])
_register_each(optax.ScaleByRmsState, [], {'nu': None})
register_moments(optax.MultiStepsState, sums=['acc_grads'])
register_moments(optax.contrib.MuonState, ['mu'])


def register_codec(
  state_type: type,
  decode: Callable[[Any], Any],
  change: Callable[[Callable[[Any], Any], Any, Any], Any],
) -> None:
  """Says how to read and change the moments in a state that holds codes.

  Args:
    state_type: the type of the state.
    decode: state -> the state of the optimizer inside, with moments as floats.
    change: (f, state, wanted) -> the state with `f` applied to the state
      inside, or unchanged if the scalar `wanted` is False.
  """
  _codecs[state_type] = _Codec(decode, change)


def map_moments(
  f: Callable[[MomentTree], Any], state: Any, wanted: Any = True, path: str = ''
) -> Any:
  """Returns a state with each tree of moments replaced by `f(moments)`.

  Args:
    f: maps a field of moments to its new tree.
    state: the state of any optimizer, or of several in a chain.
    wanted: a boolean scalar. If it is False, `f` changes nothing, so that
      moments need not be decoded.
    path: path of the state, for `MomentTree.path`.
  """
  if _is_leaf(state):
    return state
  codec = _codecs.get(type(state))
  if codec is not None:
    inside = lambda x: map_moments(f, x, wanted, path)
    return codec.change(inside, state, wanted)
  children, rebuild = _children(state)
  fields = _fields.get(type(state), _Fields({}, {}))
  own = {name: f(_moments(state, fields, name, path)) for name in fields.kinds}
  return rebuild(
    [
      own[name] if name in own else map_moments(f, x, wanted, _join(path, name))
      for name, x in children
    ]
  )


def moments_in(state: Any) -> list[MomentTree]:
  """Returns all moments in a state, decoded."""
  found: list[MomentTree] = []

  def note(moments: MomentTree) -> Any:
    found.append(moments)
    return moments.tree

  map_moments(note, _decoded(state))
  return found


def holds_codes(state: Any) -> bool:
  """Whether a state holds moments as codes."""
  is_coded = lambda x: type(x) in _codecs
  return any(map(is_coded, jax.tree.leaves(state, is_leaf=is_coded)))


def are_elementwise(state: Any) -> bool:
  """Whether all optimizers that a state belongs to are elementwise."""
  if type(state) in _fields:
    return _fields[type(state)].elementwise
  return type(state) is tuple and all(map(are_elementwise, state))


def check_registered(state: Any, what: str) -> None:
  """Raises if a state holds float arrays that no registered moment names.

  Args:
    state: the state of any optimizer.
    what: the argument that needs to know the moments, for the message.
  """
  owner = _unknown(_decoded(state), type(state))
  if owner is not None:
    known = ', '.join(sorted(t.__name__ for t in _fields))
    raise ValueError(
      f'{what} does not know the moments in {owner}, only in {known}; name '
      'them with `subspace_optax.register_moments`, or do without: '
      "transport='keep' and 'reset' need not know them."
    )


def _unknown(state: Any, owner: type) -> type | None:
  """Returns the type of the first state with unregistered moments, or None."""
  if _is_leaf(state):
    is_moment = (
      _is_array(state)
      and state.ndim > 0
      and jnp.issubdtype(state.dtype, jnp.floating)
    )
    return owner if is_moment else None
  owner = type(state) if hasattr(state, '_fields') else owner
  children, _ = _children(state)
  if type(state) in _fields:
    # The other arrays of a registered type are not moments.
    kinds = _fields[type(state)].kinds
    children = [
      (name, x)
      for name, x in children
      if name not in kinds and isinstance(x, tuple)
    ]
  found = (_unknown(x, owner) for _, x in children)
  return next(filter(None, found), None)


def _decoded(state: Any) -> Any:
  """Returns a state with all codes in it decoded."""
  is_coded = lambda x: type(x) in _codecs
  return jax.tree.map(
    lambda x: _codecs[type(x)].decode(x) if is_coded(x) else x,
    state,
    is_leaf=is_coded,
  )


def _moments(state: Any, fields: _Fields, name: str, path: str) -> MomentTree:
  mean = fields.means.get(name)
  return MomentTree(
    _join(path, name),
    fields.kinds[name],
    getattr(state, name),
    getattr(state, mean) if mean else None,
    state.count if mean else None,
  )


def _children(
  state: Any,
) -> tuple[list[tuple[str, Any]], Callable[[list[Any]], Any]]:
  """Returns a tree node's children by key, and a function that rebuilds it."""
  pairs, treedef = jax.tree.flatten_with_path(
    state, is_leaf=lambda x: x is not state
  )
  key = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return [(key(path), x) for path, x in pairs], treedef.unflatten


def _join(path: str, name: str) -> str:
  return f'{path}/{name}' if path else name


def _is_leaf(x: Any) -> bool:
  """Whether a part of a state is None, an array or a number."""
  return x is None or _is_array(x) or jax.tree_util.all_leaves([x])


def _is_array(x: Any) -> bool:
  return hasattr(x, 'dtype')
