# SPDX-License-Identifier: Apache-2.0
"""One leaf in a subproblem: its P, its optimizer's input, and W + P B.

A narrow W loses steps that are smaller than half the spacing of its dtype,
unless rounding is right on average or the rounding error is kept.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _cosines
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _noise
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _varying
from subspace_optax.low_precision import _rounding
from subspace_optax.transports import _base as _transport

SAMPLES = ('dct', 'haar', 'gaussian')
ROUNDING = ('nearest', 'compensated', 'stochastic')


@dataclasses.dataclass(frozen=True)
class Rule:
  """Settings that all leaves and steps share; see `subproblems`."""

  gap: int
  sample: str
  eta: Any
  transport: _transport.Transport
  rounding: str
  basis_dtype: Any

  def check(self, match: Any) -> None:
    """Raises for a leaf that can't be rounded or lifted this way."""
    _rounding.check(self.rounding, match.path, match.leaf.dtype)
    if self.sample == 'dct' and match.layout.m > _cosines.MOST_ROWS:
      raise ValueError(
        f"sample='dct' takes up to {_cosines.MOST_ROWS} inputs, and "
        f'{match.path!r}, of shape {match.leaf.shape}, has {match.layout.m}; '
        'take another sample, or name the leaf in `exclude`.'
      )

  def settings(self, match: Any, group: str) -> dict[str, Any]:
    """Returns what decides P of a leaf but for its seed, fit for JSON."""
    return {
      'rank': match.layout.rank,
      'rows': list(match.layout.rows),
      'columns': list(match.layout.cols),
      'update_proj_gap': int(self.gap),  # JSON takes no integers of numpy
      'sample': self.sample,
      'basis_dtype': jnp.dtype(self.basis_dtype).name,
      'key_group': group,
    }

  def draw(
    self, layout: _layout.Layout, leaf: jax.Array, seeds: jax.Array, k: Any
  ) -> jax.Array:
    """Returns P of a leaf in the k-th subproblem."""
    if self.sample == 'gaussian':
      p = _linalg.gaussian(layout, seeds, k) * layout.rank**-0.5
    elif self.sample == 'haar':
      p = _linalg.haar(layout, seeds, k) * (layout.m / layout.rank) ** 0.5
    else:
      p = _cosines.draw_basis(layout, leaf, seeds, k)
      p = p * (layout.m / layout.rank) ** 0.5
    return layout.settle_basis(p.astype(self.basis_dtype), leaf)

  def node(
    self,
    match: Any,
    count: jax.Array,
    gradient: jax.Array,
    seeds: jax.Array,
    coords: jax.Array,
  ) -> _projected.Projected:
    """Returns the node for a lifted leaf that `in_subspace` takes."""
    _check_gradient(match, gradient)
    layout, leaf, k = match.layout, match.leaf, count // self.gap
    p = self.draw(layout, leaf, seeds, k)
    g = _linalg.widen(gradient)
    if self.eta is not None:
      eta: Any = self.eta(k) if callable(self.eta) else self.eta
      g += coords / eta
    return _projected.Projected(
      coords=layout.settle_coords(g, leaf),
      basis=p,
      before=self._move(match, count, seeds, p),
      layout=layout,
      orthonormal=False,
      dtype=leaf.dtype,
      update_dtype=leaf.dtype,
      sharding=_sharding.explicit(leaf),
    )

  def _move(self, match, count, seeds, p) -> _projected.Move:
    """Returns the move to a new subproblem's P, if this step begins one."""
    layout, k = match.layout, count // self.gap
    first = (count % self.gap == 0) & (count > 0)
    p = _linalg.widen(p)
    same = _linalg.identity_like(layout.gram(p, p))

    def transition() -> jax.Array:
      old = _linalg.widen(self.draw(layout, match.leaf, seeds, k - 1))
      return _sharding.like(_linalg.transition(layout, p, old), same)

    if self.transport.move is not None:
      same = _varying.cond(first, transition, lambda: same)
    return _projected.Move(jnp.broadcast_to(first, layout.batch_shape), same)

  def merge(
    self,
    match: Any,
    w: jax.Array,
    p: jax.Array,
    b: jax.Array,
    lost: Any,
    seeds: jax.Array,
    count: jax.Array,
  ) -> tuple[jax.Array, Any]:
    """Returns W + P B, rounded, and the rounding error, if it is kept."""
    exact = add_step(match, w, p, b)
    if isinstance(lost, jax.Array):
      exact += lost.astype(exact.dtype)
      new = _rounding.nearest(exact, w.dtype)
      return new.astype(w.dtype), (exact - new).astype(w.dtype)
    if self.rounding == 'stochastic' and w.dtype == jnp.bfloat16:
      noise = _noise.bits(jnp.ravel(seeds)[0], count, exact)
      exact = _rounding.at_random(exact, noise)
    return exact.astype(w.dtype), lost


def add_step(match: Any, w: jax.Array, p: jax.Array, b: jax.Array) -> jax.Array:
  """Returns W + P B, at least as wide as float32."""
  wide = _linalg.widen(w)
  product = match.layout.unproject(p, b, _sharding.explicit(w))
  return wide + product.astype(wide.dtype)


def _check_gradient(match: Any, gradient: jax.Array) -> None:
  shape = match.layout.coords_shape
  if gradient.shape != shape:
    raise ValueError(
      f'gradient {match.path!r} has shape {gradient.shape}, but that of its '
      f'coordinates B has {shape}; differentiate with respect to B.'
    )
