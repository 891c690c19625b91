# Copyright 2026 The subspace_optax Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""W + P B in the dtype of W, and what becomes of the rest.

A narrow W loses steps that are smaller than half its spacing, unless rounding
is right in the mean or what it takes is kept.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax import _linalg
from subspace_optax import _sharding

ROUNDING = ('nearest', 'compensated', 'stochastic')


def check(rounding: str, matches: Sequence[Any]) -> None:
  """Raises for a dtype that can't be rounded like this."""
  for match in matches:
    if rounding == 'stochastic' and match.leaf.dtype == jnp.float16:
      raise ValueError(
        f"rounding='stochastic' is for bfloat16, but {match.path!r} is "
        "float16; take 'compensated'."
      )


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
    new = exact.astype(w.dtype)
    return new, (exact - new.astype(exact.dtype)).astype(w.dtype)
  if key is None or w.dtype != jnp.bfloat16:
    return exact.astype(w.dtype), lost
  return _rounded_at_random(exact, *key), lost


def _rounded_at_random(x: jax.Array, seed: jax.Array, count: jax.Array):
  """Returns float32 as one of the two bfloat16 around it, right in the mean.

  Random bits are added below those that bfloat16 keeps, which are then cut.
  """
  key = jax.random.key(jnp.ravel(seed)[0], impl='threefry2x32')
  key = jax.random.fold_in(key, count)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
  up = lax.bitcast_convert_type(
    (bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32
  )
  # Neither the infinite nor NaN have neighbours.
  return jnp.where(jnp.isfinite(x), up, x).astype(jnp.bfloat16)
