# SPDX-License-Identifier: Apache-2.0
"""Optimizers with a byte for each number of their moments.

Dettmers et al., `8-bit Optimizers via Block-wise Quantization
<https://arxiv.org/abs/2110.02861>`_, 2021; the code is that of `_codes`. The
arithmetic is the optimizer's own, between decoding to float32 and encoding, so
that what is rounded is the state and nothing else. Leaves that are not coded
keep moments in float32, or in their own dtype where that is wider or complex.
"""

from collections.abc import Callable
import functools
import math
import re
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np
import optax

from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _names
from subspace_optax._matrix import _noise
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _placement
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _sign
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.low_precision import _blocks
from subspace_optax.low_precision import _codes
from subspace_optax.transports import _moments

ROUNDING = ('stochastic', 'nearest')

# Smaller matrices stay float32: what they would save is nothing.
_LEAST_SIZE = 4096


class EightBitState(NamedTuple):
  """State of an optimizer whose moments take a byte each."""

  count: jax.Array  # shape=(), dtype=int32, updates so far
  # The optimizer's own state. For each moment a tree, leaf shape=the leaf's:
  # dtype=int8, uint8 for squares; of leaves that are not coded, float32, or the
  # leaf's if that is wider or complex.
  coded: Any
  # From the path of each moment to a tree, leaf shape=one value per block,
  # dtype=float32; a scalar for leaves that are not coded.
  scales: dict[str, Any]


def quantize_moments(
  inner: optax.GradientTransformation,
  bits: int = 8,
  *,
  rounding: str = 'stochastic',
  exclude: str | None = 'auto',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Keeps the moments of an optimizer in 8 bits.

  Moments are coded in blocks of 80 to 512 numbers, each with a float32 scale:
  1.03 bytes a number for the sizes of most models, and 1.05 at most. The
  relative error is the same in 15 octaves below a block's largest first moment
  and 25 below its largest second moment; smaller second moments are taken for
  the smallest of these. One gradient that is not finite, or whose square is
  not, spoils its block.

  While a leaf is updated its moments are float32: of a stack of layers, all of
  them, which may take more than the codes save. `layerwise` holds one layer's.

  Args:
    inner: an optimizer whose moments start at zero and are registered, see
      `register_moments`; or a chain of such.
    bits: 8.
    rounding: 'stochastic' is right in the mean, so that moments move by less
      than a code at a step; 'nearest' is not, and slower than half a code's
      4 % they don't move.
    exclude: regular expression; leaves whose path it finds are not coded. None
      for no path; 'auto' for norms and biases by their names. Complex leaves
      are not coded either, nor are those of fewer than two axes or with less
      than 4,096 numbers in the last two, such as an attention kernel of
      (768, 12, 64). Their moments are the optimizer's, float32 or wider.
    seed: of the rounding.

  Returns:
    A transformation, for whole leaves or inside `in_subspace`. Arithmetic on
    coded leaves is float32, also on those of float64. Updates have the
    gradients' dtypes and boxes.

  Raises:
    ValueError: other bits or an unknown rounding; at `init`, an optimizer
      without moments, with moments that do not start at zero or are coded
      already, or with arrays that no registered moment names; at `update`, the
      state of another optimizer.
    TypeError: `inner` is no optimizer; `bits` is traced.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021

  Example:
    >>> import jax.numpy as jnp, optax, subspace_optax as so
    >>> tx = so.quantize_moments(optax.trace(0.9))
    >>> state = tx.init({'w': jnp.ones((64, 512))})
    >>> print(state.coded.trace['w'].dtype, state.scales['trace']['w'].shape)
    int8 (64, 4)
  """
  if isinstance(bits, jax.Array):
    raise TypeError(
      f'bits must be static, got {bits!r}; with optax.inject_hyperparams, pass '
      "static_args=('bits', 'seed')."
    )
  if bits != 8:
    raise ValueError(f'bits must be 8, got {bits!r}.')
  if rounding not in ROUNDING:
    raise ValueError(f'rounding must be one of {ROUNDING}, got {rounding!r}.')
  _sign.require_optimizer(inner, 'inner')
  inner = optax.with_extra_args_support(inner)

  def init(params):
    _tree.flatten_params(params)
    return _boxes.box_state(first_state, params)

  def first_state(params):
    params = _tree.unbox(params)
    leaves = dict(_tree.flatten(params)[0])
    count, scales = jnp.zeros((), jnp.int32), {}

    def zeros(moments: _moments.MomentTree) -> Any:
      dtype = jnp.uint8 if moments.kind == 'square' else jnp.int8
      first = functools.partial(_first_codes, leaves, exclude, dtype)
      paths = jax.tree.map_with_path(
        lambda path, _: _tree.path_str(path), moments.tree
      )
      codes, scales[moments.path] = _tree.map_unzip(first, 2, paths)
      return codes

    coded = _moments.map_moments(zeros, _small_state(inner, params))
    state = EightBitState(count, coded, scales)
    return _sharding.on_mesh_of(jax.tree.leaves(params), state)

  def update(updates, state, params=None, **extra_args):
    if not isinstance(state, EightBitState):
      raise ValueError(
        f'the state is {type(state).__name__}, and not one with moments in 8 '
        'bits: call init of this optimizer, or train on with the one that made '
        'the state.'
      )
    params = None if params is None else _tree.unbox(params)
    bare, wide = _tree.unbox(updates), decoded(state)
    kinds = {
      path: x.dtype
      for moments in _moments.moments_in(wide)
      for path, x in _tree.flatten(moments.tree)[0]
      if not _tree.is_masked(x)
    }
    gradients = jax.tree.map_with_path(functools.partial(_widen, kinds), bare)
    directions, new = inner.update(gradients, wide, params, **extra_args)
    directions = jax.tree.map(_as_gradient, directions, bare)
    entries = [entry for _, entry in _tree.flatten(directions)[0]]
    count = jnp.asarray(optax.safe_increment(state.count))
    noise = (seed, count) if rounding == 'stochastic' else None
    new = encoded(new, state, noise)._replace(count=count)
    return _tree.replace_entries(updates, entries), new

  return optax.GradientTransformationExtraArgs(init, _boxes.bare(update))


def scale_by_adam8bit(
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  *,
  nesterov: bool = False,
  rounding: str = 'stochastic',
  exclude: str | None = 'auto',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam` with both moments in 8 bits.

  It is `quantize_moments` of Adam.

  Args:
    b1: decay of first moments.
    b2: decay of second moments.
    eps: added to the root of second moments.
    eps_root: added to second moments under the root.
    nesterov: whether to look ahead, as in NAdam.
    rounding: see `quantize_moments`.
    exclude: see `quantize_moments`.
    seed: of the rounding.

  Returns:
    See `quantize_moments`.

  Raises:
    ValueError: an unknown rounding.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> tx = so.scale_by_adam8bit()
    >>> state = tx.init({'w': jnp.ones((64, 512))})
    >>> print(state.coded.nu['w'].dtype, state.scales['nu']['w'].shape)
    uint8 (64, 4)
  """
  adam = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)
  tx = quantize_moments(adam, rounding=rounding, exclude=exclude, seed=seed)
  return _notices.warning_of_ones(tx, b1=b1, b2=b2)


def scale_by_lion8bit(
  b1: Any = 0.9,
  b2: Any = 0.99,
  *,
  rounding: str = 'stochastic',
  exclude: str | None = 'auto',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_lion` with its moment in 8 bits.

  Args:
    b1: weight of the moment in the update's sign.
    b2: decay of the moment.
    rounding: see `quantize_moments`.
    exclude: see `quantize_moments`.
    seed: of the rounding.

  Returns:
    See `quantize_moments`.

  Raises:
    ValueError: an unknown rounding.

  References:
    Chen et al., `Symbolic Discovery of Optimization Algorithms
    <https://arxiv.org/abs/2302.06675>`_, 2023

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> state = so.scale_by_lion8bit().init({'w': jnp.ones((64, 512))})
    >>> state.coded.mu['w'].dtype
    dtype('int8')
  """
  lion = optax.scale_by_lion(b1, b2)
  return quantize_moments(lion, rounding=rounding, exclude=exclude, seed=seed)


def _small_state(inner: optax.GradientTransformation, params: Any) -> Any:
  """Returns the first state of an optimizer, with one number for each moment.

  Whole moments in float32 are never in memory, only their types are traced.
  """
  shape = lambda x: (1,) * len(x.shape)
  # Ones, so that moments which start as a copy are none that start at zero.
  small = jax.tree.map(lambda x: jnp.ones(shape(x), x.dtype), params)
  whole, state = jax.eval_shape(inner.init, params), inner.init(small)
  if _moments.holds_codes(whole):
    raise ValueError('inner has moments in 8 bits already; pass it as it is.')
  _moments.check_registered(whole, 'quantize_moments')
  found = _moments.moments_in(state)
  if not found:
    raise ValueError(
      f'quantize_moments finds no moments in {type(whole).__name__}; pass an '
      'optimizer without any as it is, or name them with '
      '`subspace_optax.register_moments`.'
    )
  for moments in found:
    if any(map(_is_not_zero, jax.tree.leaves(moments.tree))):
      raise ValueError(
        f'the moments {moments.path!r} must start at zero to be coded.'
      )
  nothing = lambda moments: None
  rest = [
    jax.tree.leaves(_moments.map_moments(nothing, x)) for x in (whole, state)
  ]
  # A Python number has no shape in the one, and none in the other.
  shapes = [[getattr(x, 'shape', ()) for x in leaves] for leaves in rest]
  if shapes[0] != shapes[1]:
    raise ValueError(
      "inner keeps arrays of the parameters' shapes that no registered moment "
      'names, and quantize_moments knows no others.'
    )
  return state


def _is_not_zero(x: jax.Array) -> bool:
  return not isinstance(x, Tracer) and bool(np.any(np.asarray(x) != 0))


def _first_codes(
  leaves: dict[str, Any], exclude: str | None, dtype: Any, path: str
) -> tuple[jax.Array, jax.Array]:
  """Returns codes of zeros for the moment of a leaf, and their scales."""
  if path not in leaves:
    raise ValueError(
      f'quantize_moments finds no parameter {path!r} for a moment; inner must '
      'keep the tree of the parameters.'
    )
  leaf = leaves[path]
  coded = _is_large(leaf) and not _is_excluded(exclude, path)
  return _zeros(leaf, coded, dtype), _zero_scales(leaf, coded)


def _widen(kinds: dict[str, Any], path: Any, gradient: jax.Array) -> jax.Array:
  """Returns a gradient in the dtype of its moments, if it has any."""
  return gradient.astype(kinds.get(_tree.path_str(path), gradient.dtype))


def decoded(state: EightBitState) -> Any:
  """Returns the optimizer's own state, moments in float32."""
  return _moments.map_moments(
    lambda moments: jax.tree.map(
      _decode, moments.tree, state.scales[moments.path]
    ),
    state.coded,
  )


def encoded(new: Any, state: EightBitState, noise: Any) -> EightBitState:
  """Returns the optimizer's own new state, coded like `state`.

  Args:
    new: of the optimizer, moments in float32.
    state: as it was.
    noise: the seed of the rounding and the number of the step; None rounds to
      the nearest.
  """
  codes = {m.path: m.tree for m in _moments.moments_in(state.coded)}
  scales = {}

  def encode(moments: _moments.MomentTree) -> Any:
    def one(path: str, *args: Any) -> Any:
      salt = noise and (
        _noise.salt(noise[0], f'{moments.path} {path}'),
        noise[1],
      )
      x, codes, scales = args
      return _encode(x, codes, scales, salt)

    old = codes[moments.path]
    paths = jax.tree.map_with_path(lambda path, _: _tree.path_str(path), old)
    args = paths, moments.tree, old, state.scales[moments.path]
    tree, scales[moments.path] = _tree.map_unzip(one, 2, *args)
    return tree

  coded = _moments.map_moments(encode, new)
  return EightBitState(state.count, coded, scales)


def all_decoded(state: Any) -> Any:
  """Returns any state, with float32 moments in place of codes and scales."""
  return jax.tree.map(
    lambda x: EightBitState(x.count, decoded(x), {}) if _is_state(x) else x,
    state,
    is_leaf=_is_state,
  )


def all_encoded(wide: Any, like: Any) -> Any:
  """Returns what `all_decoded` made, coded like the state `like`."""
  return jax.tree.map(
    lambda x, y: (
      encoded(x.coded, y._replace(count=x.count), None) if _is_state(x) else x
    ),
    wide,
    like,
    is_leaf=_is_state,
  )


def _change(
  f: Callable[[Any], Any], state: EightBitState, wanted: Any
) -> EightBitState:
  """Returns the state with `f` of the optimizer's own, if that is wanted.

  Rounded to the nearest: this is rare, and no mean is to be kept.
  """
  return _varying.cond(
    wanted, lambda: encoded(f(decoded(state)), state, None), lambda: state
  )


_moments.register_codec(EightBitState, decoded, _change)


def _is_state(x: Any) -> bool:
  return isinstance(x, EightBitState)


def _is_large(leaf: Any) -> bool:
  return (
    len(leaf.shape) >= 2
    and 0 not in leaf.shape
    and math.prod(leaf.shape[-2:]) >= _LEAST_SIZE
    and jnp.issubdtype(leaf.dtype, jnp.floating)
  )


def _is_excluded(exclude: str | None, name: str) -> bool:
  if exclude == 'auto':
    return _names.is_norm(name) or _names.is_bias(name)
  return exclude is not None and bool(re.search(exclude, name))


def _zeros(leaf: Any, coded: bool, dtype: Any) -> jax.Array:
  return jnp.zeros_like(leaf, dtype if coded else _wide(leaf.dtype))


def _wide(dtype: Any) -> Any:
  """Returns float32, or the dtype if it is float64 or complex."""
  wider = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 4
  return dtype if wider else jnp.float32


def _as_gradient(direction: jax.Array, gradient: jax.Array) -> jax.Array:
  """Returns a direction in the gradient's dtype, unless that is integer."""
  if not jnp.issubdtype(gradient.dtype, jnp.inexact):
    return direction
  return direction.astype(gradient.dtype)


def _zero_scales(leaf: Any, coded: bool) -> jax.Array:
  """Returns a zero for each block."""
  if not coded:
    return jnp.zeros((), jnp.float32)
  return _placement.zeros_along(leaf, _blocks.counts(leaf.shape))


def _decode(codes: jax.Array, scales: jax.Array) -> jax.Array:
  return _codes.decode(codes, scales) if _codes.is_coded(codes) else codes


def _encode(x: jax.Array, codes: jax.Array, scales: jax.Array, noise: Any):
  if _codes.is_coded(codes):
    return _codes.encode(x, codes, scales, noise)
  return _sharding.like(x, codes), scales
