# SPDX-License-Identifier: Apache-2.0
"""Updates are rounded once, behind the last transformation of a chain.

A gradient of bfloat16 gets an update of bfloat16. If the update were rounded
where it leaves the subspace, the weight decay that is added next would be lost:
it is smaller than half the spacing of bfloat16 there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _spec
from subspace_optax._matrix import _tree

Transformation = optax.GradientTransformationExtraArgs


def widen(spec: _spec.SubspaceSpec, gradient: Any) -> Any:
  """Returns a plain leaf's gradient in the dtype of its moments, or wider."""
  if _tree.is_masked(gradient) or not _spec.is_real(gradient.dtype):
    return gradient
  moments = spec.dtype_of_moments(gradient.dtype)
  if not _spec.is_float(gradient.dtype):
    return gradient.astype(moments)
  return gradient.astype(jnp.promote_types(gradient.dtype, moments))


def round_last(tx: Transformation) -> Transformation:
  """Returns `tx`, with updates in the dtypes of the gradients."""

  def update(updates, state, params=None, **extra_args):
    new, state = tx.update(updates, state, params, **extra_args)
    as_given = lambda u, g: u.astype(jnp.result_type(g))
    return jax.tree.map(as_given, new, updates), state

  return Transformation(tx.init, update)
