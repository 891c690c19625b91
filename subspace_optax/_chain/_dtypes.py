# SPDX-License-Identifier: Apache-2.0
"""The dtypes of gradients, bases and moments, and where updates are rounded.

A bfloat16 gradient gets a bfloat16 update. If the update were rounded where it
leaves the subspace, the weight decay that is added next would be lost, since it
is smaller than half the spacing of bfloat16 there. So updates are rounded once,
after the last transformation of a chain.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from subspace_optax._matrix import _tree

FLOATS = ('float16', 'bfloat16', 'float32', 'float64')
BASIS_DTYPES = (*FLOATS, 'int8', 'int4')
Transformation = optax.GradientTransformationExtraArgs


def is_float(dtype: Any) -> bool:
  """Whether arrays of a dtype are projected and widened."""
  return _dtype_name(dtype) in FLOATS


def is_real(dtype: Any) -> bool:
  """Whether a dtype is a float of any width, 8 bits included."""
  return jnp.issubdtype(dtype, jnp.floating)


def bits(dtype: Any) -> int:
  """Returns the bits of an element in XLA's memory, where int4 is packed."""
  return 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize


def check_dtype(
  argument: str, dtype: Any, allowed: tuple[str, ...], hint: str = ''
) -> None:
  """Raises unless the dtype is allowed."""
  name = _dtype_name(dtype)
  if name not in allowed:
    raise ValueError(f'{argument} must be one of {allowed}, got {name}{hint}.')


def _dtype_name(dtype: Any) -> str:
  try:
    return repr(dtype) if dtype is None else jnp.dtype(dtype).name
  except TypeError:
    return repr(dtype)


def widen(spec: Any, gradient: Any) -> Any:
  """Returns a plain leaf's gradient in the dtype of its moments, or wider."""
  if _tree.is_masked(gradient) or not is_real(gradient.dtype):
    return gradient
  moments = spec.dtype_of_moments(gradient.dtype)
  if not is_float(gradient.dtype):
    return gradient.astype(moments)
  return gradient.astype(jnp.promote_types(gradient.dtype, moments))


def round_last(tx: Transformation) -> Transformation:
  """Returns `tx`, with updates in the dtypes of the gradients."""

  def update(updates, state, params=None, **extra_args):
    new, state = tx.update(updates, state, params, **extra_args)
    as_given = lambda u, g: u.astype(jnp.result_type(g))
    return jax.tree.map(as_given, new, updates), state

  return Transformation(tx.init, update)
