# SPDX-License-Identifier: Apache-2.0
"""Small steps for narrow weights, below half the spacing of their dtype.

`optax.apply_updates` rounds p + u to the nearest number of p's dtype: in
bfloat16, steps below 0.002 do not move a weight of 1. Here, u becomes the
difference of two numbers of that dtype, so that nothing is left to round.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _noise
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax.low_precision import _rounding

ROUNDING = ('stochastic', 'compensated')


class StochasticState(NamedTuple):
  """State of `round_updates('stochastic')`."""

  count: jax.Array  # shape=(), dtype=int32


class CompensatedState(NamedTuple):
  """State of `round_updates('compensated')`."""

  # What rounding removed: tree, leaf shape=the leaf's, dtype=int16;
  # `MaskedNode` for leaves that are not narrow.
  lost: Any


def round_updates(
  rounding: str = 'stochastic', *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
  """Makes updates that `optax.apply_updates` adds without loss.

  Put it last in a chain, after the learning rate. Leaves of float32 and wider
  pass unchanged.

  Args:
    rounding: how to round weights narrower than float32. 'stochastic' rounds
      bfloat16 to one of the two numbers around p + u, which is right on
      average; its state is a counter. (p + u is a float32: updates under 6e-8
      of a weight are lost.) 'compensated' rounds bfloat16 and float16 to the
      nearest, keeps the rounding error, and adds it to the next step; the error
      takes 2 bytes per parameter. For updates of float32, weights of bfloat16
      are then those of float32 training, rounded; for float16 weights below
      1e-5, steps under 3e-8 may be lost. Updates of bfloat16 hold 8 bits: a
      step larger than half of its weight may be off by 1/128 of itself.
    seed: seed of the stochastic rounding.

  Returns:
    A transformation that needs params. Updates keep their dtypes.

  Raises:
    ValueError: an unknown rounding; at `init`, a narrow dtype that it can't
      round; at `update`, no params, a parameter without an update, or updates
      that are still projected.

  References:
    Zamirai et al., `Revisiting BFloat16 Training
    <https://arxiv.org/abs/2010.06192>`_, 2020, for both in general

  Example:
    >>> import jax, jax.numpy as jnp, optax, subspace_optax as so
    >>> tx = optax.chain(optax.sgd(1e-3), so.round_updates('compensated'))
    >>> params = {'w': jnp.ones(2, jnp.bfloat16)}
    >>> state, update = tx.init(params), jax.jit(tx.update)
    >>> for _ in range(100):  # none of which would move a bfloat16 of 1
    ...   updates, state = update({'w': jnp.ones(2)}, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(params['w'])
    [0.898438 0.898438]
  """
  if rounding == 'stochastic':
    return _stochastic(seed)
  if rounding == 'compensated':
    return _compensated()
  raise ValueError(
    f'rounding must be one of {ROUNDING}, got {rounding!r}; '
    'optax.apply_updates by itself rounds to the nearest.'
  )


def _stochastic(seed: int) -> optax.GradientTransformationExtraArgs:
  def init(params):
    state = StochasticState(jnp.zeros((), jnp.int32))
    return _sharding.on_mesh_of(_leaves('stochastic', params), state)

  def update(updates, state, params=None, *, layer=None, **extra_args):
    del extra_args
    own_seed = _noise.seed_of_layer(seed, layer)

    def rounded(path, u, p):
      if _tree.is_masked(p) or not _rounding.is_narrow(p.dtype):
        return u
      wide, dtype = p.astype(jnp.float32), u.dtype
      u = _sharding.like(u, wide)
      noise = _noise.bits(_noise.salt(own_seed, path), state.count, wide)
      return _to(_rounding.at_random(wide + u, noise), wide).astype(dtype)

    entries = [rounded(*args) for args in _zip(updates, params)]
    count = jnp.asarray(optax.safe_increment(state.count))
    return _tree.replace_entries(updates, entries), StochasticState(count)

  return optax.GradientTransformationExtraArgs(init, update)


def _compensated() -> optax.GradientTransformationExtraArgs:
  def init(params):
    _leaves('compensated', params)
    return _boxes.box_state(first_state, params)

  def first_state(params):
    return CompensatedState(jax.tree.map(_nothing_lost, _tree.unbox(params)))

  def update(updates, state, params=None, **extra_args):
    del extra_args

    def rounded(u, p, lost):
      if _tree.is_masked(lost):
        return u, lost
      wide, dtype = p.astype(jnp.float32), u.dtype
      u = _sharding.like(u, wide)
      exact = _rounding.joined(wide, lost) + u
      u = _to(_rounding.nearest(exact, p.dtype), wide).astype(dtype)
      # The parameter after `optax.apply_updates`.
      near = _rounding.converted(wide + u.astype(jnp.float32), p.dtype)
      return u, _rounding.low_bits(exact, near)

    before, treedef = _tree.flatten(state.lost)
    pairs = [
      rounded(u, p, lost)
      for (_, u, p), (_, lost) in zip(
        _zip(updates, params), before, strict=True
      )
    ]
    entries, lost = zip(*pairs, strict=True) if pairs else ((), ())
    return (
      _tree.replace_entries(updates, entries),
      CompensatedState(treedef.unflatten(lost)),
    )

  return optax.GradientTransformationExtraArgs(init, _boxes.bare(update))


def _leaves(rounding: str, params: Any) -> list[Any]:
  """Returns the leaves, or raises if one of them can't be rounded this way."""
  pairs, _ = _tree.flatten_params(params)
  pairs = [(path, leaf) for path, leaf in pairs if not _tree.is_masked(leaf)]
  for path, leaf in pairs:
    _rounding.check(rounding, path, leaf.dtype)
  return [leaf for _, leaf in pairs]


def _nothing_lost(leaf: jax.Array) -> Any:
  if not _rounding.is_narrow(leaf.dtype):
    return optax.MaskedNode()
  return jnp.zeros_like(leaf, jnp.int16)


def _to(new: jax.Array, old: jax.Array) -> jax.Array:
  """Returns the update to a new weight, which may be infinite or NaN."""
  return jnp.where(jnp.isfinite(new), new - old, new)


def _zip(updates: Any, params: Any) -> list[tuple[str, Any, Any]]:
  """Returns the path, update and parameter of every leaf.

  Raises:
    ValueError: no params, updates that are projected, or paths that differ.
  """
  if params is None:
    raise ValueError(
      'round_updates needs to know what it rounds: call '
      'tx.update(updates, state, params).'
    )
  pairs, _ = _tree.flatten(updates)
  for path, u in pairs:
    if isinstance(u, _projected.Projected):
      raise ValueError(
        f'update {path!r} is projected; chain `round_updates` last, after '
        '`unproject` and the learning rate.'
      )
  ps, _ = _tree.flatten(params)
  known = dict(pairs)
  for path, _ in ps:
    if path not in known:
      raise ValueError(
        f'parameter {path!r} has no update; give it one of zeros, or hide it '
        'with optax.masked.'
      )
  return [(path, u, p) for (path, u), (_, p) in zip(pairs, ps, strict=True)]
