# SPDX-License-Identifier: Apache-2.0
"""The interface of residual rules, and code that they share.

With G the gradient, R = P^T G its coordinates and N the inner optimizer's
direction, a rule returns the update of a whole leaf: GaLore's scale P N, plus
a term for the part of G outside the subspace, E = G - P (P^T P)^-1 R.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg


class Residual(NamedTuple):
  """A rule for the part of the gradient outside the subspace.

  It sees one leaf at a time, with all matrices of a stack at once. `together`,
  if any, sees all leaves.

  Attributes:
    name: the name that errors show.
    update: (node, scale, count, state) -> (update, state) for one `Projected`
      node that carries its gradient. Returns the update of the whole leaf, in
      any dtype. `count` is the number of steps before this one.
    init: (layout, leaf, dtype) -> the array that is a leaf's state; None for a
      rule without state. `dtype` is that of the moments.
    feedback: (gradient, state) -> the array that `project` gets instead of the
      gradient; None to pass the gradient.
    together: (nodes, scale, updates, states) -> (updates, states), lists with
      one item per projected leaf. Changes the results of `update`; None to
      leave them unchanged.
  """

  name: str
  update: Callable[..., tuple[jax.Array, Any]]
  init: Callable[..., jax.Array] | None = None
  feedback: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  together: Callable[..., tuple[list[jax.Array], list[Any]]] | None = None


def norms_at_init(layout: _layout.Layout, leaf: Any, dtype: Any) -> jax.Array:
  """Returns one float32 zero per matrix, for norms that are not known yet."""
  del dtype
  return layout.zeros(layout.batch_axes, leaf)


def zeros_at_init(layout: _layout.Layout, leaf: Any, dtype: Any) -> jax.Array:
  """Returns zeros in the shape of a leaf."""
  return layout.zeros(layout.leaf_axes, leaf, dtype)


def ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
  """Returns |a| / (|b| + 1e-8), given the squares of both norms."""
  return _linalg.safe_sqrt(numerator) / (_linalg.safe_sqrt(denominator) + 1e-8)


def limit_growth(
  norm: jax.Array, last: jax.Array, limiter: Any
) -> tuple[jax.Array, jax.Array]:
  """Returns factors that keep norms below `limiter` times the last ones.

  A zero stands for a norm that is not known yet. Norms that are zero or not
  finite are not remembered.

  Args:
    norm: (*batch), norms of the arrays to be multiplied.
    last: (*batch), float32, norms of the arrays that were applied last.
    limiter: gamma, or None for no limit.

  Returns:
    The factors and the norms to remember, both (*batch).

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024, Eq. (7)
  """
  if limiter is None:
    return jnp.ones_like(norm), last
  most = limiter * last
  # An infinite norm must not scale by 0, which would give NaN.
  cut = (last > 0) & (norm > most) & jnp.isfinite(norm)
  factor = jnp.where(cut, most / jnp.where(cut, norm, 1.0), 1.0)
  known = jnp.isfinite(norm) & (norm > 0)
  kept = jnp.where(cut, most, norm).astype(last.dtype)
  return factor, jnp.where(known, kept, last)


def check_limiter(limiter: Any) -> None:
  """Raises unless a limiter is None, traced or at least 1."""
  if limiter is None or isinstance(limiter, jax.Array):
    return
  if not limiter >= 1:
    raise ValueError(
      f'limiter must be at least 1, or None for no limit, got {limiter}; norms '
      'that must shrink at every step end at zero.'
    )
