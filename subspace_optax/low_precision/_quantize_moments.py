# SPDX-License-Identifier: Apache-2.0
"""Optimizers with a byte, or half a byte, per number of their moments.

Dettmers et al., `8-bit Optimizers via Block-wise Quantization
<https://arxiv.org/abs/2110.02861>`_, 2021, with the codes of `_codes`. The
moments are decoded to float32, the optimizer does its own arithmetic, and its
new moments are encoded, so that only the state is rounded. Leaves that are not
coded keep moments in float32, or in their own dtype if that is wider or
complex.
"""

from collections.abc import Sequence
import functools
import math
import re
from typing import Any

import jax
from jax.core import Tracer
import jax.numpy as jnp
import optax

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _names
from subspace_optax._matrix import _noise
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _placement
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax.low_precision import _blocks
from subspace_optax.low_precision import _by_layer
from subspace_optax.low_precision import _coded_state
from subspace_optax.low_precision import _codes
from subspace_optax.transports import _moments

ROUNDING = ('auto', 'stochastic', 'nearest')

# Regular expressions for paths; 'auto' may stand for one.
Patterns = tuple[str, ...]

# Smaller matrices stay float32, since they would save hardly anything.
_LEAST_SIZE = 512


def quantize_moments(
  inner: optax.GradientTransformation,
  bits: int = 8,
  *,
  rounding: str = 'auto',
  exclude: str | Sequence[str] | None = 'auto',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Keeps the moments of an optimizer in 8 bits, or first moments in 4.

  Moments are coded in blocks of 80 to 512 numbers, each with a float32 scale.
  That takes 1.03 bytes per number for the sizes of most models, and at most
  1.05. First moments are squares of evenly spaced codes: the error is at most
  1/64 of the block's largest number, and smaller for smaller numbers. For
  second moments, the error is 7 % in each of the 25 octaves below the block's
  largest; smaller numbers become the smallest of these. One gradient that is
  not finite, or whose square is not finite, spoils its block.

  With `bits=4`, means and sums of gradients take 4 bits: 0.53 bytes per number
  for the sizes of most models, at most 0.56. Their code has 7 magnitudes, so
  use it for momentum that decays by 5 % per step or faster, such as Muon's and
  Adam's. Second moments stay in 8 bits, since optimizers divide by them: Adam
  then takes 0.53 + 1.03 bytes.

  While a leaf is updated, its moments are float32. In a stack of layers (a leaf
  of three or more axes) this is only one layer at a time, or a few if there are
  more than 128 or they are small; in a matrix of 2^26 or more numbers, only
  some rows, if its blocks divide into equal parts. This requires an optimizer
  registered as elementwise, as Adam and Lion are, and a first axis that is
  known to lie on one device. On a mesh of automatic axes that is not known, and
  all of the leaf's moments are float32.

  Args:
    inner: an optimizer whose moments start at zero and are registered (see
      `register_moments`), or a chain of such optimizers.
    bits: 8 or 4.
    rounding: 'stochastic' is right on average, so moments can move by less than
      a code per step. 'nearest' is not, and moments that change by less than
      half a code don't move. 'auto' rounds 8-bit codes at random, and 4-bit
      codes to the nearest, which halves the variance there.
    exclude: a regular expression or several; leaves whose path matches one of
      them are not coded. 'auto' stands for norms and biases, found by name;
      None excludes no path. Leaves that are complex, have fewer than two axes,
      or have fewer than 512 numbers in the last two axes are not coded either.
      Moments that are not coded are the optimizer's, float32 or wider.
    seed: seed of the stochastic rounding.

  Returns:
    A transformation, for whole leaves or inside `in_subspace`. Arithmetic on
    coded leaves is float32, even if they are float64. Updates have the
    gradients' dtypes and boxes.

  Raises:
    ValueError: bits other than 8 or 4, or an unknown rounding; at `init`, an
      optimizer without moments, with moments that do not start at zero or are
      coded already, or with arrays that are not registered as moments; at
      `update`, the state of another optimizer.
    TypeError: `inner` is not an optimizer; `bits` is traced.

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
  if bits not in _codes.BITS:
    known = ' or '.join(map(str, _codes.BITS))
    raise ValueError(f'bits must be {known}, got {bits!r}.')
  if rounding not in ROUNDING:
    raise ValueError(f'rounding must be one of {ROUNDING}, got {rounding!r}.')
  patterns = _as_patterns(exclude)
  _arguments.require_optimizer(inner, 'inner')
  inner = optax.with_extra_args_support(inner)

  def init(params):
    _tree.flatten_params(params)
    return _boxes.box_state(first_state, params)

  def first_state(params):
    params = _tree.unbox(params)
    leaves = dict(_tree.flatten(params)[0])
    whole = _check_inner(inner, params)
    state = _small_state(inner, params)
    count, scales = jnp.zeros((), jnp.int32), {}
    types = {m.path: m.tree for m in _moments.moments_in(whole)}

    def zeros(moments: _moments.MomentTree) -> Any:
      dtype = _codes.dtype_of(bits, moments.kind)
      first = functools.partial(_first_codes, leaves, patterns, dtype)
      own = types[moments.path]
      codes, scales[moments.path] = _tree.map_unzip(
        first, 2, _coded_state.paths_in(own), own
      )
      return codes

    coded = _moments.map_moments(zeros, state)
    state = _coded_state.CodedState(count, coded, scales)
    return _sharding.on_mesh_of(jax.tree.leaves(params), state)

  def update(updates, state, params=None, **extra_args):
    if not isinstance(state, _coded_state.CodedState):
      raise ValueError(
        f'the state is {type(state).__name__}, and not one with moments in '
        f'{bits} bits: call init of this optimizer, or train on with the one '
        'that made the state.'
      )
    params = None if params is None else _tree.unbox(params)
    count = jnp.asarray(optax.safe_increment(state.count))
    own_seed = _noise.seed_of_layer(seed, extra_args.get('layer'))

    def step(bare, state, params, start=0):
      wide = _coded_state.decoded(state)
      gradients = _widen(bare, wide)
      directions, new = inner.update(gradients, wide, params, **extra_args)
      directions = jax.tree.map(_as_gradient, directions, bare)
      noise = own_seed, count, start
      return directions, _coded_state.encoded(new, state, rounding, noise)

    bare = _tree.unbox(updates)
    directions, new = _by_layer.update(step, bare, state, params)
    entries = [entry for _, entry in _tree.flatten(directions)[0]]
    new = new._replace(count=count)
    return _tree.replace_entries(updates, entries), new

  return optax.GradientTransformationExtraArgs(init, _boxes.bare(update))


def _check_inner(inner: optax.GradientTransformation, params: Any) -> Any:
  """Returns the types of an optimizer's first state, or raises."""
  whole = jax.eval_shape(inner.init, params)
  if _moments.holds_codes(whole):
    raise ValueError('inner has moments in codes already; pass it as it is.')
  _moments.check_registered(whole, 'quantize_moments')
  if not _moments.moments_in(whole):
    raise ValueError(
      f'quantize_moments finds no moments in {type(whole).__name__}; pass an '
      'optimizer without any as it is, or name them with '
      '`subspace_optax.register_moments`.'
    )
  rest = _moments.map_moments(lambda moments: None, whole)
  leaves = _tree.flatten(params)[0]
  for path, x in _tree.flatten(rest)[0]:
    if any(_is_of(leaf, own, path, x) for own, leaf in leaves):
      raise ValueError(
        f"inner keeps an array of its parameter's shape, {path!r}, that no "
        'registered moment names; name it with '
        '`subspace_optax.register_moments` if it is one.'
      )
  return whole


def _is_of(leaf: Any, own: str, path: str, x: Any) -> bool:
  """Whether an array in a state has the path and the shape of a parameter."""
  return (
    not _tree.is_masked(leaf)
    and len(leaf.shape) > 0
    and x.shape == leaf.shape
    and f'/{path}'.endswith(f'/{own}' if own else '')
  )


def _small_state(inner: optax.GradientTransformation, params: Any) -> Any:
  """Returns the first state of an optimizer, with moments replaced by zeros.

  The optimizer sees the leaves' own shapes, which may tell it what is a matrix,
  in a program that never holds whole moments in float32.
  """

  def start(params: Any) -> tuple[dict[str, jax.Array], Any]:
    # Ones, so that moments that start as a copy do not start at zero.
    state = inner.init(jax.tree.map(jnp.ones_like, params))
    zeros = lambda moments: jax.tree.map(lambda _: jnp.zeros(()), moments.tree)
    return _are_zero(state), _moments.map_moments(zeros, state)

  with _notices.quiet(), _sharding.mesh_of(params):
    zero, state = jax.jit(start)(params)
  _check_zero(zero)
  return state


def _are_zero(state: Any) -> dict[str, jax.Array]:
  """Returns whether moments are zero, by the paths of their fields."""

  def is_zero(tree: Any) -> jax.Array:
    each = [jnp.all(x == 0) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.asarray(each))

  return {m.path: is_zero(m.tree) for m in _moments.moments_in(state)}


def _check_zero(zero: dict[str, jax.Array]) -> None:
  """Raises for moments that are known not to start at zero."""
  for path, is_zero in zero.items():
    if not isinstance(is_zero, Tracer) and not is_zero:
      raise ValueError(f'the moments {path!r} must start at zero to be coded.')


def _first_codes(
  leaves: dict[str, Any], exclude: Patterns, dtype: Any, path: str, own: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns the codes of zeros for the moment of a leaf, and their scales."""
  if path not in leaves:
    raise ValueError(
      f'quantize_moments finds no parameter {path!r} for a moment; inner must '
      'keep the tree of the parameters.'
    )
  leaf = leaves[path]
  if own.shape != leaf.shape:  # one number for many, as in NorMuon
    small = _placement.zeros_along(leaf, own.shape)
    return small.astype(own.dtype), jnp.zeros((), jnp.float32)
  if not _is_large(leaf) or _is_excluded(exclude, path):
    wide = jnp.zeros_like(leaf, _wide(leaf.dtype))
    return wide, jnp.zeros((), jnp.float32)
  scales = _placement.zeros_along(leaf, _blocks.counts(leaf.shape))
  return jnp.zeros_like(leaf, dtype), scales


def _widen(gradients: Any, state: Any) -> Any:
  """Returns each gradient in the dtype of its moments, if it has any."""
  dtypes = {
    path: x.dtype
    for moments in _moments.moments_in(state)
    for path, x in _tree.flatten(moments.tree)[0]
    if not _tree.is_masked(x)
  }
  return jax.tree.map_with_path(
    lambda path, x: x.astype(dtypes.get(_tree.path_str(path), x.dtype)),
    gradients,
  )


def _is_large(leaf: Any) -> bool:
  return (
    len(leaf.shape) >= 2
    and 0 not in leaf.shape
    and math.prod(leaf.shape[-2:]) >= _LEAST_SIZE
    and jnp.issubdtype(leaf.dtype, jnp.floating)
  )


def _as_patterns(exclude: str | Sequence[str] | None) -> Patterns:
  """Returns the patterns in `exclude`; raises for anything else."""
  if exclude is None:
    return ()
  patterns = (exclude,) if isinstance(exclude, str) else exclude
  if not isinstance(patterns, (list, tuple)) or None in patterns:
    raise TypeError(
      f'exclude must be regular expressions or None, got {exclude!r}.'
    )
  for pattern in patterns:
    _arguments.check_pattern('exclude', pattern)
  return tuple(patterns)


def _is_excluded(patterns: Patterns, name: str) -> bool:
  vector = _names.is_norm(name) or _names.is_bias(name)
  return any(vector if x == 'auto' else re.search(x, name) for x in patterns)


def _wide(dtype: Any) -> Any:
  """Returns float32, or the dtype if it is float64 or complex."""
  wider = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 4
  return dtype if wider else jnp.float32


def _as_gradient(direction: jax.Array, gradient: jax.Array) -> jax.Array:
  """Returns a direction in the gradient's dtype, unless that is an integer."""
  if not jnp.issubdtype(gradient.dtype, jnp.inexact):
    return direction
  return direction.astype(gradient.dtype)
