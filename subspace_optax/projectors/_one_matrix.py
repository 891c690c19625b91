# SPDX-License-Identifier: Apache-2.0
"""Rules that are written for one matrix, as papers write them.

This module extends all such rules to stacks, meshes, mapped axes and a leaf's
own axes.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _sharding
from subspace_optax.projectors import _base
from subspace_optax.projectors import _periodic

_HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Matrix:
  """The gradient G of one matrix, m x n, m the side that the basis spans.

  Along a mapped axis of data parallelism, every device has one of the gradients
  whose mean is G. `coordinates` and `image` average their products, which is
  cheaper than to average G as `gradient` does.

  Attributes:
    local: (m, n), float32 or wider, G or this device's part of the mean.
    seed: a uint32 scalar, for this matrix alone.
    rank: r.
    axis_name: the mapped axis, or None.
    is_seen: whether the rule may look at the gradient.
  """

  local: jax.Array
  seed: jax.Array
  rank: int
  axis_name: Any = None
  is_seen: bool = True

  @property
  def gradient(self) -> jax.Array:
    """G, (m, n)."""
    return self._mean(self._seen())

  @property
  def m(self) -> int:
    """Length of the side that the basis spans."""
    return self.local.shape[0]

  @property
  def n(self) -> int:
    """Length of the other side."""
    return self.local.shape[1]

  def coordinates(self, p: jax.Array) -> jax.Array:
    """Returns P^T G, (k, n), for P of (m, k)."""
    return self._mean(jnp.matmul(p.T, self._seen(), precision=_HIGHEST))

  def image(self, x: jax.Array) -> jax.Array:
    """Returns G X^T, (m, k), for X of (k, n)."""
    return self._mean(jnp.matmul(self._seen(), x.T, precision=_HIGHEST))

  def key(self, period: jax.Array) -> jax.Array:
    """Returns a random key, the same on every host and after a resume."""
    key = jax.random.key(self.seed, impl='threefry2x32')
    return jax.random.fold_in(key, period)

  def _seen(self) -> jax.Array:
    if not self.is_seen:
      raise ValueError(
        'draw looks at the gradient, which uses_gradient=False says it does '
        'not: in most steps there is none.'
      )
    return self.local

  def _mean(self, x: jax.Array) -> jax.Array:
    return x if self.axis_name is None else lax.pmean(x, self.axis_name)


# (matrix, its basis (m, r), period) -> its new basis (m, r).
Draw = Callable[[Matrix, jax.Array, jax.Array], jax.Array]


def periodic(
  name: str,
  draw: Draw,
  update_proj_gap: Any,
  *,
  stagger: bool = False,
  uses_gradient: bool = True,
  orthonormal: bool = True,
) -> _base.Projector:
  """Makes a projector from a rule for one matrix, called every T steps.

  It handles gaps, turns, stacks of matrices, gradients that are zero or not
  finite, and failed factorisations: in the last two cases the matrix keeps its
  basis and is refreshed at its next good gradient. On a mesh of explicit axes
  the rule runs under automatic sharding, and the compiler decides what crosses
  devices.

  Args:
    name: the name that `describe` shows.
    draw: (matrix, basis, period) -> the new basis, (m, r). `matrix` is a
      `Matrix`, `basis` the old basis, float32, and `period`, an int32 scalar,
      counts refreshes.
    update_proj_gap: T, an int, or a `LazyGap`.
    stagger: whether matrices take turns within each T steps.
    uses_gradient: whether `draw` looks at the gradient. If False, looking at it
      raises an error.
    orthonormal: whether all bases have P^T P = I. A basis that does not counts
      as a failed factorisation.

  Returns:
    A projector for `project` and `subspace`. Test it with
    `testing.check_projector`.

  Raises:
    ValueError: a gap below 1.
    TypeError: a gap that is not an int.

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> def draw(matrix, basis, period):
    ...   q, _ = jnp.linalg.qr(matrix.image(matrix.coordinates(basis)))
    ...   return q
    >>> rule = so.projectors.periodic('power', draw, update_proj_gap=10)
    >>> tx = so.project(so.SubspaceSpec(rank=1), rule)
    >>> gradients = {'w': jnp.outer(jnp.array([3.0, 4.0]), jnp.ones(8))}
    >>> projected, _ = jax.jit(tx.update)(gradients, tx.init(gradients))
    >>> print(abs(projected['w'].basis.ravel()).round(3))
    [0.6 0.8]
  """

  def draw_all(
    leaf: _base.Matrix, basis: jax.Array, period: jax.Array
  ) -> jax.Array:
    g = leaf.gradient
    # There is no gradient in steps in which no rule looks at it.
    g = jnp.zeros_like(leaf.like) if g is None else g
    args = g, leaf.seed, basis, period
    run = lambda *args: _over_stack(draw, leaf, uses_gradient, *args)
    if _sharding.explicit(leaf.like) is None:
      return run(*args)
    return _sharding.automatic(run, basis, *args)

  return _periodic.periodic(
    name,
    draw_all,
    update_proj_gap,
    stagger=stagger,
    uses_gradient=uses_gradient,
    orthonormal=orthonormal,
  )


def _over_stack(
  draw: Draw,
  leaf: _base.Matrix,
  is_seen: bool,
  gradient: jax.Array,
  seed: jax.Array,
  basis: jax.Array,
  period: jax.Array,
) -> jax.Array:
  """Returns new bases of all matrices of a leaf, with the leaf's own axes."""
  layout = leaf.layout
  g = layout.to_matrix(_linalg.widen(gradient))
  g = g if layout.project_rows else jnp.swapaxes(g, -1, -2)
  p = layout.basis_to_matrix(_linalg.widen(basis))

  def one(g: jax.Array, seed: jax.Array, p: jax.Array, period: jax.Array):
    matrix = Matrix(g, seed, layout.rank, layout.axis_name, is_seen)
    new = draw(matrix, p, period)
    shape = getattr(new, 'shape', None)
    if shape != p.shape:
      found = type(new).__name__ if shape is None else f'an array of {shape}'
      raise ValueError(
        f'draw(matrix, basis, period) returned {found}; for a matrix of '
        f'{g.shape} and rank {layout.rank} a basis has shape {p.shape}.'
      )
    return new

  for _ in layout.batch:
    one = jax.vmap(one)
  period = jnp.broadcast_to(period, layout.batch_shape)
  return layout.from_matrix(one(g, seed, p, period))
