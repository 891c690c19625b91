# SPDX-License-Identifier: Apache-2.0
"""W + P B in the dtype of W, and what becomes of the rest.

A narrow W loses steps that are smaller than half its spacing, unless rounding
is right in the mean or what it takes is kept.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _noise
from subspace_optax._matrix import _sharding
from subspace_optax.low_precision import _rounding

ROUNDING = ('nearest', 'compensated', 'stochastic')


def check(rounding: str, matches: Sequence[Any]) -> None:
  """Raises for a dtype that can't be rounded like this."""
  for match in matches:
    _rounding.check(rounding, match.path, match.leaf.dtype)


def added(match: Any, w: jax.Array, p: jax.Array, b: jax.Array) -> jax.Array:
  """Returns W + P B, at least as wide as float32."""
  wide = _linalg.widen(w)
  product = match.layout.unproject(p, b, _sharding.explicit(w))
  return wide + product.astype(wide.dtype)


def merged(
  match: Any, w: jax.Array, p: jax.Array, b: jax.Array, lost: Any, key: Any
) -> tuple[jax.Array, Any]:
  """Returns W + P B rounded, and what that took, if it is kept."""
  exact = added(match, w, p, b)
  if isinstance(lost, jax.Array):
    exact += lost.astype(exact.dtype)
    new = _rounding.nearest(exact, w.dtype)
    return new.astype(w.dtype), (exact - new).astype(w.dtype)
  if key is None or w.dtype != jnp.bfloat16:
    return exact.astype(w.dtype), lost
  seed, count = key
  noise = _noise.bits(jnp.ravel(seed)[0], count, exact)
  return _rounding.at_random(exact, noise).astype(w.dtype), lost
