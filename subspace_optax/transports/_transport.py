# SPDX-License-Identifier: Apache-2.0
"""Inner moments across a change of basis.

He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024: momentum
projection, m <- C m with C = P_n^T P_o, or for bases that are not orthonormal
C = P_n^T P_o (P_o^T P_o)^-1. Robert et al., `LDAdam
<https://arxiv.org/abs/2410.16103>`_, 2024: second moments, as if coordinates
had been independent with means m^ and variances v^ - m^^2,

  v^ <- |C^2 (v^ - m^^2) + (C m^)^2|,

where m^ and v^ are debiased and squares are taken element by element.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.low_precision import _eight_bit

POLICIES = ('keep', 'first', 'both', 'reset')


class _Moments(NamedTuple):
  """Fields of a state: trees with the parameters' structure."""

  first: tuple[str, ...]
  second: Mapping[str, str | None]


# At most so many calls of an inner optimizer's update make one step of it.
_MOST_MICRO_STEPS = 1024

_REGISTRY: dict[type, _Moments] = {}


def register_moments(
  state_type: type,
  first: Sequence[str] = (),
  second: Mapping[str, str | None] | None = None,
) -> None:
  """Tells what `transport` should do with an inner optimizer's state.

  Fields that are named neither way stay as they are; states in them are looked
  into.

  Args:
    state_type: the state's NamedTuple type.
    first: fields with sums or means of gradients.
    second: from each field with means of squared gradients to the field with
      the means of gradients that go with it, both debiased by 1 - b^count with
      the state's `count`; or to None if there is none, or none to take off.

  Raises:
    ValueError: a field that the type does not have.

  Example:
    >>> from typing import NamedTuple
    >>> import subspace_optax as so
    >>> class MyState(NamedTuple):
    ...   velocity: dict
    >>> so.register_moments(MyState, first=['velocity'])
  """
  second = dict(second or {})
  named = [*first, *second, *(name for name in second.values() if name)]
  named += ['count'] if any(second.values()) else []
  for name in named:
    if name not in getattr(state_type, '_fields', ()):
      raise ValueError(f'{state_type} has no field {name!r}.')
  _REGISTRY[state_type] = _Moments(tuple(first), second)


register_moments(optax.ScaleByAdamState, ['mu'], {'nu': 'mu'})
register_moments(optax.ScaleByBeliefState, ['mu'], {'nu': None})
register_moments(optax.ScaleByLionState, ['mu'])
register_moments(optax.TraceState, ['trace'])
register_moments(optax.EmaState, ['ema'])
register_moments(optax.ScaleByRmsState, [], {'nu': None})
register_moments(optax.MultiStepsState, ['acc_grads'])
register_moments(optax.contrib.MuonState, ['mu'])

# First moments that are sums, without a weight of 1 - b.
_SUMS = (optax.TraceState, optax.MultiStepsState)

Moves = Mapping[str, tuple[_projected.Projected, _projected.Move]]


def check_policy(transport: str) -> None:
  """Raises unless `transport` is known."""
  if transport not in POLICIES:
    raise ValueError(f'transport must be one of {POLICIES}, got {transport!r}.')


def check_known(state: Any, transport: str, owner: type | None = None) -> None:
  """Raises if the state holds arrays that may be moments, but of what kind?"""
  if isinstance(state, _eight_bit.EightBitState):
    state = state.coded
  registered = type(state) in _REGISTRY
  owner = type(state) if hasattr(state, '_fields') else owner
  for child in _unnamed(state):
    if isinstance(child, tuple) or (not registered and not _is_array(child)):
      check_known(child, transport, owner)
    elif not registered and child.ndim > 0 and _is_float(child):
      known = ', '.join(sorted(t.__name__ for t in _REGISTRY))
      raise ValueError(
        f'transport={transport!r} does not know the moments in {owner}, only '
        f"in {known}; use transport='keep' or 'reset', or name them with "
        '`subspace_optax.register_moments`.'
      )


def carry(
  state: Any,
  moves: Moves,
  *,
  both: bool,
  decayed: Any,
  per_matrix: bool,
) -> Any:
  """Returns the inner state with its moments mapped by each leaf's C.

  Args:
    state: the inner optimizer's.
    moves: from path to the leaf's `Projected` node and its `Move`.
    both: whether second moments move, too.
    decayed: from `decay_rates`, if there are second moments about means.
    per_matrix: whether each matrix has a state of its own, whose arrays are
      stacked along their first axes.
  """
  if not moves or state is None or _is_array(state) or _is_array(decayed):
    return state
  more = functools.partial(carry, moves=moves, both=both, per_matrix=per_matrix)
  if isinstance(state, _eight_bit.EightBitState):
    inside = None if decayed is None else decayed.coded
    return _eight_bit.through(
      functools.partial(more, decayed=inside),
      state,
      jnp.any(jnp.stack([jnp.any(move.moved) for _, move in moves.values()])),
    )
  moments = _REGISTRY.get(type(state))
  if moments is None:
    return jax.tree.map(
      lambda s, d: more(s, decayed=d),
      state,
      state if decayed is None else decayed,
      is_leaf=lambda x: x is not state,
    )
  map_moments = functools.partial(_map, moves, per_matrix)
  new = {
    name: map_moments(_first, getattr(state, name)) for name in moments.first
  }
  for name, mean in moments.second.items() if both else ():
    square = getattr(state, name)
    if mean is None:
      new[name] = map_moments(_second, square)
      continue
    weights = [
      _debias(getattr(decayed, field), state.count) for field in (mean, name)
    ]
    new[name] = map_moments(
      _second_about_mean, square, getattr(state, mean), *weights
    )
  for name in _unnamed_fields(state):
    inside = None if decayed is None else getattr(decayed, name)
    new[name] = more(getattr(state, name), decayed=inside)
  return state._replace(**new)


def check_means(inner: Any, coords: Any) -> None:
  """Raises unless paired moments are decaying means of G and of G^2.

  States of one type may hold other things, such as Yogi's or AdaMax's.
  """
  with jax.ensure_compile_time_eval(), _sharding.no_mesh():
    one = jax.tree.map(lambda x: jnp.ones((1,) * len(x.shape)), coords)
    state = inner.init(jax.tree.map(jnp.zeros_like, one))
    if not _paired(state):
      return
    values = lambda s: [
      float(jnp.ravel(jax.tree.leaves(x)[0])[0]) for x in _paired(s)
    ]
    try:
      rates = values(decay_rates(inner, state, one, {}))
      _, state = inner.update(one, state, one)
      found = list(zip(rates, values(state), strict=True))
    except TypeError:  # rates are traced, or arguments are not here yet
      return
  means = [
    (rate, value / (1 - rate) if rate < 1 else 0) for rate, value in found
  ]
  for (b2, square), (b1, mean) in zip(means[::2], means[1::2], strict=True):
    if (
      not (0 <= b1 < 1 and 0 <= b2 < 1) or abs(square - mean**2) > 0.05 * square
    ):
      raise ValueError(
        "transport='both' needs first and second moments that are decaying "
        f'means of gradients and their squares; of gradients of 1 these are '
        f'{mean:.3g} and {square:.3g} at decay rates of {b1:.3g} and {b2:.3g}. '
        "Use transport='first' or 'keep'."
      )


def pairs_moments(state: Any) -> bool:
  """Whether a state holds second moments about first ones."""
  moments = _REGISTRY.get(type(state))
  if moments and any(moments.second.values()):
    return True
  children = [] if _is_array(state) or state is None else _unnamed(state)
  return any(pairs_moments(child) for child in children)


def means_of(
  state: Any, nodes: Mapping[str, _projected.Projected], per_matrix: bool
) -> dict[str, jax.Array]:
  """Returns first moments by path, for leaves that carry their gradients.

  The first that are found, where a state holds several; none if none is known,
  or none is a mean.

  Args:
    state: the inner optimizer's.
    nodes: the `Projected` node of every path.
    per_matrix: whether each matrix has a state of its own, whose arrays are
      stacked along their first axes.
  """
  wanted = {p: x.layout for p, x in nodes.items() if x.gradient is not None}
  moments = next(_means(state), None) if wanted else None
  if moments is None:
    return {}

  def in_place(layout: _layout.Layout, x: jax.Array) -> jax.Array:
    batch = layout.coords_batch
    return jnp.moveaxis(x, range(len(batch)), batch) if per_matrix else x

  return {
    path: in_place(wanted[path], x)
    for path, x in _tree.flatten(moments)[0]
    if path in wanted and not _tree.is_masked(x)
  }


def _means(state: Any) -> Iterator[Any]:
  """Yields the trees of first moments in a state that are means."""
  if state is None or _is_array(state):
    return
  if isinstance(state, _eight_bit.EightBitState):
    state = _eight_bit.decoded(state)
  moments = _REGISTRY.get(type(state))
  if moments is not None and type(state) not in _SUMS:
    yield from (getattr(state, name) for name in moments.first)
  for child in _unnamed(state):
    yield from _means(child)


def decay_rates(inner: Any, state: Any, coords: Any, extra_args: Any) -> Any:
  """Returns what a step on zero gradients makes of moments that are 1.

  That is their decay rates, wherever `inner` has them from: its arguments, a
  schedule, or hyperparameters in its state, from which scalars are taken.

  Args:
    inner: the optimizer.
    state: its state, None if each matrix has its own.
    coords: the tree of coordinates.
    extra_args: for its update.
  """
  zeros = jax.tree.map(lambda x: jnp.zeros((1,) * x.ndim, x.dtype), coords)
  if state is None:
    zeros = jax.tree.leaves(zeros)[0]
  fresh = inner.init(zeros)
  if state is not None:
    live = lambda new, old: old if new.shape == () == old.shape else new
    fresh = jax.tree.map(live, fresh, state)

  def waits(loop: tuple[jax.Array, Any]) -> jax.Array:
    values = [jnp.ravel(jax.tree.leaves(x)[0])[0] for x in _paired(loop[1])]
    return (loop[0] < _MOST_MICRO_STEPS) & jnp.any(jnp.stack(values) == 1)

  def step(loop: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
    _, new = inner.update(zeros, loop[1], zeros, **extra_args)
    return loop[0] + 1, jax.tree.map(_sharding.like, new, loop[1])

  # Once, but for an optimizer that accumulates.
  start = (jnp.zeros((), jnp.int32), _map_paired(jnp.ones_like, fresh))
  return lax.while_loop(waits, step, start)[1]


def _paired(state: Any) -> list[Any]:
  """Returns all second moments about means, and the means."""
  found = []
  _map_paired(lambda x: found.append(x) or x, state, whole=True)
  return [x for x in found if jax.tree.leaves(x)]  # a label may have no leaf


def _map_paired(
  f: Callable[[Any], Any], state: Any, whole: bool = False
) -> Any:
  """Returns a state with `f` of second moments about means, and of these."""
  if state is None or _is_array(state):
    return state
  more = functools.partial(_map_paired, f, whole=whole)
  moments = _REGISTRY.get(type(state))
  if moments is None:
    return jax.tree.map(more, state, is_leaf=lambda x: x is not state)
  pairs = [(name, mean) for name, mean in moments.second.items() if mean]
  names = [name for pair in pairs for name in pair]
  apply = f if whole else functools.partial(jax.tree.map, f)
  new: dict[str, Any] = {name: apply(getattr(state, name)) for name in names}
  for name in _unnamed_fields(state):
    new[name] = more(getattr(state, name))
  return state._replace(**new)


def _map(
  moves: Moves, per_matrix: bool, f: Callable[..., jax.Array], *trees: Any
) -> Any:
  """Maps trees of moments, and the trees or scalars that go with them."""
  pairs, treedef = _tree.flatten(trees[0])
  _check_paths([path for path, _ in pairs], moves)
  rest = [
    [x] * len(pairs)
    if _is_array(x)
    else [leaf for _, leaf in _tree.flatten(x)[0]]
    for x in trees[1:]
  ]

  def one(path: str, moment: Any, *others: Any) -> Any:
    if path not in moves or _tree.is_masked(moment):
      return moment
    node, move = moves[path]
    layout = node.layout
    batch = layout.coords_batch
    first = tuple(range(len(batch)))

    def like_coords(x: jax.Array) -> jax.Array:
      if x.ndim == 0:
        return x
      if x.ndim == len(batch):
        return layout.along_coords(x)
      return jnp.moveaxis(x, first, batch) if per_matrix else x

    def moved() -> jax.Array:
      old = like_coords(moment)
      new = f(layout, move.transition, old, *map(like_coords, others))
      new = jnp.where(layout.along_coords(move.moved), new, old)
      new = jnp.moveaxis(new, batch, first) if per_matrix else new
      return _sharding.like(new, moment)

    return _varying.cond(jnp.any(move.moved), moved, lambda: moment)

  leaves = [
    one(*pair, *others) for pair, *others in zip(pairs, *rest, strict=True)
  ]
  return treedef.unflatten(leaves)


def _first(layout: _layout.Layout, c: jax.Array, mean: jax.Array) -> jax.Array:
  return layout.mix_coords(c, mean)


def _second(
  layout: _layout.Layout, c: jax.Array, square: jax.Array
) -> jax.Array:
  return layout.mix_coords(jnp.square(c), square)


def _second_about_mean(
  layout: _layout.Layout,
  c: jax.Array,
  square: jax.Array,
  mean: jax.Array,
  weight_of_mean: jax.Array,
  weight: jax.Array,
) -> jax.Array:
  square, mean = _linalg.widen(square), _linalg.widen(mean)
  mean = mean / weight_of_mean
  variance = square / weight - jnp.square(mean)
  new = layout.mix_coords(jnp.square(c), variance)
  return weight * jnp.abs(new + jnp.square(layout.mix_coords(c, mean)))


def _debias(decayed: Any, count: Any) -> Any:
  """Returns 1 - b^t, or 1 where t = 0 and the moments are 0."""
  leaves = jax.tree.leaves(decayed) or [jnp.zeros(())]
  rate = jnp.ravel(leaves[0])[0].astype(jnp.float32)

  def weight(t: jax.Array) -> jax.Array:
    return jnp.where(t > 0, 1.0 - rate ** t.astype(jnp.float32), 1.0)

  return jax.tree.map(weight, count)


def _check_paths(paths: list[str], moves: Moves) -> None:
  if paths == ['']:  # a label without leaves
    return
  for path in moves:
    if not any(path == p or path.startswith(f'{p}/') for p in paths):
      raise ValueError(
        f'transport finds no moments of leaf {path!r} among {paths}; use '
        "transport='keep' or 'reset'."
      )


def _is_float(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jnp.floating)


def _is_array(x: Any) -> bool:
  return hasattr(x, 'dtype')


def _unnamed_fields(state: Any) -> list[str]:
  """Returns the fields of a registered state that hold no moments."""
  moments = _REGISTRY[type(state)]
  named = (*moments.first, *moments.second)
  return [name for name in state._fields if name not in named]


def _unnamed(state: Any) -> list[Any]:
  """Returns what is in a state, moments that are known apart."""
  if type(state) in _REGISTRY:
    return [getattr(state, name) for name in _unnamed_fields(state)]
  leaves, _ = jax.tree.flatten(state, is_leaf=lambda x: x is not state)
  return leaves
