# SPDX-License-Identifier: Apache-2.0
"""Muon's orthogonalisation of whole matrices, with the leaf's own axes.

Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024. With
X the matrix, its m rows on the short side, and A = X X^T, each step is

  X <- a X + Z X,   Z = b A + c A^2.

Long matrices (n > 2m) are iterated on through their m x m Gram matrices alone.
After s steps, X is Q X with Q = q I + Y, where

  Y <- q Z + a Y + Y Z,   q <- a q,   A <- (a I + Z) A (a I + Z).

A step on X costs 4m^2 n + 2m^3 FLOPs. s steps on A, with the products for A and
Q X, cost 4m^2 n + (8s - 6) m^3: less for n > 1.5m. Rounding errors of A grow
with a^2 in every step, so X and A are recomputed after three steps.
"""

import math
import string
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _varying

# Triples (a, b, c), one for all steps or one per step: Muon's, and Dion's.
PRESETS: dict[str, Any] = {
  'standard': (3.4445, -4.7750, 2.0315),
  'dion': (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
  ),
}
PRECONDITIONING = ('frobenius', 'spectral', 'aol', 'schatten')

# Below this, Gram matrices save less than an eighth, and products with X keep
# more of its digits.
_LEAST_RATIO = 2.0
# With bfloat16 products, five steps in parts of 3 and 2 end up to 4 % from the
# exact ones; with whole products 1.6 %, and with iterates in bfloat16 35 %.
_MOST_IN_A_ROW = 3
# Rounds of power iteration, for the largest singular value to a few percent.
_ROUNDS = 32

Triple = tuple[float, float, float]


class Iteration(NamedTuple):
  """How to orthogonalise matrices.

  Attributes:
    coefficients: (a, b, c) of every step.
    preconditioning: one of `PRECONDITIONING`.
  """

  coefficients: tuple[Triple, ...]
  preconditioning: str


def iteration(ns_coeffs: Any, steps: int, preconditioning: str) -> Iteration:
  """Returns an `Iteration`; raises for invalid arguments.

  Args:
    ns_coeffs: the name of a preset, a triple for all steps, or a triple for
      each step.
    steps: number of steps, if `ns_coeffs` does not set it.
    preconditioning: one of `PRECONDITIONING`.
  """
  if preconditioning not in PRECONDITIONING:
    raise ValueError(
      f'preconditioning must be one of {PRECONDITIONING}, got '
      f'{preconditioning!r}.'
    )
  named = isinstance(ns_coeffs, str)
  given = PRESETS.get(ns_coeffs) if named else ns_coeffs
  table: Any = np.zeros(())
  try:
    table = np.asarray(given, np.float64)
  except (TypeError, ValueError):
    pass  # not a table, for which the next lines raise
  if table.ndim not in (1, 2) or table.shape[-1] != 3 or not table.size:
    raise ValueError(
      f'ns_coeffs must be one of {tuple(PRESETS)}, three numbers, or three for '
      f'each step, got {ns_coeffs!r}.'
    )
  if not np.isfinite(table).all():
    raise ValueError(f'ns_coeffs must be finite, got {ns_coeffs!r}.')
  rows = [table] * steps if table.ndim == 1 else table
  triples = tuple((float(a), float(b), float(c)) for a, b, c in rows)
  return Iteration(triples, preconditioning)


def newton_schulz(
  layout: _layout.Layout, x: jax.Array, how: Iteration
) -> jax.Array:
  """Returns matrices with the singular vectors of `x` and values near 1.

  Products run at the default precision, which the iteration tolerates. Zeros
  stay zeros.

  Args:
    layout: layout of the leaf; its rank and side do not matter.
    x: the leaf, float32 or wider.
    how: the coefficients and the preconditioning.

  References:
    Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024
  """
  original = x
  products = _Products(layout)
  # Every device has the whole short side, so that A is a sum over devices.
  x = _sharding.regroup(x, products.short, products.long)
  largest = layout.largest(x)  # divided by it, x has squares without overflow
  x = x / layout.along_leaf(jnp.where(largest > 0, largest, 1.0))
  x, gram = _precondition(products, x, how.preconditioning)
  iterate = _iterate_grams if products.are_long else _iterate
  return _sharding.like(iterate(products, x, gram, how.coefficients), original)


class _Products:
  """The products of X and of m x m matrices, by the subscripts of a leaf."""

  def __init__(self, layout: _layout.Layout):
    self.layout = layout
    self.short, self.long = layout.projected, layout.free
    if layout.m > layout.n:
      self.short, self.long = self.long, self.short
    leaf, self._batch = layout.leaf_axes, layout.batch_axes
    self._i = ''.join(leaf[axis] for axis in self.short)
    self._j = string.ascii_uppercase[: len(self._i)]
    self._k = string.ascii_uppercase[len(self._i) : 2 * len(self._i)]
    self._leaf = leaf
    self._other = leaf.translate(str.maketrans(self._i, self._j))

  @property
  def are_long(self) -> bool:
    """Whether iterating on Gram matrices is sufficiently cheaper."""
    short, long = sorted((self.layout.m, self.layout.n))
    return long > _LEAST_RATIO * short

  def gram(self, x: jax.Array) -> jax.Array:
    """Returns X X^T, (*batch, *short, *short)."""
    eq = f'{self._leaf},{self._other}->{self._batch}{self._i}{self._j}'
    return _sharding.einsum(eq, x, x)

  def square(self, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns A B."""
    b_axes = f'{self._batch}{self._j}{self._k}'
    eq = f'{self._batch}{self._i}{self._j},{b_axes}->'
    return _sharding.einsum(f'{eq}{self._batch}{self._i}{self._k}', a, b)

  def apply(self, a: jax.Array, x: jax.Array) -> jax.Array:
    """Returns A X."""
    eq = f'{self._batch}{self._i}{self._j},{self._other}->{self._leaf}'
    return _sharding.like(_sharding.einsum(eq, a, x), x)

  def times(self, a: jax.Array, v: jax.Array) -> jax.Array:
    """Returns A v, for one number per row, (*batch, *short)."""
    eq = f'{self._batch}{self._i}{self._j},{self._batch}{self._j}->'
    eq = f'{eq}{self._batch}{self._i}'
    return _sharding.einsum(eq, a, v, precision=lax.Precision.HIGHEST)

  def scale_rows(self, x: jax.Array, s: jax.Array) -> jax.Array:
    """Returns diag(s) X for s of (*batch, *short)."""
    order = self.layout.batch + self.short
    s = jnp.transpose(s, sorted(range(len(order)), key=order.__getitem__))
    return x * jnp.expand_dims(s, self.long)

  def scale_sides(self, a: jax.Array, s: jax.Array) -> jax.Array:
    """Returns diag(s) A diag(s)."""
    first, sides = len(self._batch), len(self._i)
    middle = tuple(range(first, first + sides))
    last = tuple(range(first + sides, first + 2 * sides))
    return a * jnp.expand_dims(s, last) * jnp.expand_dims(s, middle)

  def sum_short(self, x: jax.Array) -> jax.Array:
    """Returns sums over the last short side, of rows of A or of such sums."""
    return jnp.sum(x, axis=tuple(range(-len(self._i), 0)))


def _precondition(
  products: _Products, x: jax.Array, name: str
) -> tuple[jax.Array, Any]:
  """Returns X with singular values of at most about 1, and X X^T if known."""
  layout = products.layout
  if name == 'frobenius':
    norm = jnp.maximum(_linalg.safe_sqrt(layout.energy(x)), 1.0)
    return x / layout.along_leaf(norm), None
  gram = products.gram(x)
  if name == 'aol':
    sums = products.sum_short(jnp.abs(gram))
    s = lax.rsqrt(jnp.where(sums > 0, sums, 1.0))
  else:
    square = _schatten if name == 'schatten' else _largest_eigenvalue
    # The largest element is 1, and no singular value of X is below it.
    norm = jnp.maximum(square(products, gram), 1.0)
    s = jnp.ones_like(products.sum_short(gram))
    s = s * jnp.expand_dims(lax.rsqrt(norm), tuple(range(norm.ndim, s.ndim)))
  return products.scale_rows(x, s), products.scale_sides(gram, s)


def _schatten(products: _Products, gram: jax.Array) -> jax.Array:
  """Returns ||A||_F, the square of X's Schatten norm of order 4."""
  squares = products.sum_short(jnp.square(gram))
  return _linalg.safe_sqrt(products.sum_short(squares))


def _largest_eigenvalue(products: _Products, gram: jax.Array) -> jax.Array:
  """Returns a lower bound of A's largest eigenvalue, by power iteration."""
  # A start without a pattern is not orthogonal to any singular vector.
  row = products.sum_short(gram)
  one = row.shape[len(products.layout.batch) :]
  start = jnp.cos(jnp.arange(1.0, 1.0 + math.prod(one)) ** 2).reshape(one)
  start = jnp.expand_dims(start, tuple(range(len(products.layout.batch))))
  v = products.times(gram, jnp.ones_like(row) * start.astype(row.dtype))

  def turn(_: Any, v: jax.Array) -> jax.Array:
    norm = _linalg.safe_sqrt(products.sum_short(v * v))
    norm = jnp.where(norm > 0, norm, 1.0)
    v = v / jnp.expand_dims(norm, tuple(range(norm.ndim, v.ndim)))
    return _sharding.like(products.times(gram, v), v)

  v = _varying.fori_loop(0, _ROUNDS, turn, v)
  energy = products.sum_short(v * v)
  found = products.sum_short(v * products.times(gram, v))
  return found / jnp.where(energy > 0, energy, 1.0)


def _iterate(
  products: _Products,
  x: jax.Array,
  gram: Any,
  coefficients: tuple[Triple, ...],
) -> jax.Array:
  """Returns X after all steps, each on X itself."""
  first = 0
  if gram is not None:
    x, first = _take_steps(products, x, gram, coefficients[:1]), 1
  if len(set(coefficients[first:])) > 1:
    table = jnp.asarray(coefficients, x.dtype)
    triple_of = lambda i: tuple(table[i])
  else:
    triple_of = lambda i: coefficients[-1]

  def step(i: Any, x: jax.Array) -> jax.Array:
    return _take_steps(products, x, products.gram(x), [triple_of(i)])

  return _varying.fori_loop(first, len(coefficients), step, x)


def _iterate_grams(
  products: _Products,
  x: jax.Array,
  gram: Any,
  coefficients: tuple[Triple, ...],
) -> jax.Array:
  """Returns X after all steps, at most three in a row on Gram matrices."""
  for part in _cut_evenly(coefficients):
    gram = products.gram(x) if gram is None else gram
    x, gram = _take_steps(products, x, gram, part), None
  return x


def _cut_evenly(coefficients: tuple[Triple, ...]) -> list[tuple[Triple, ...]]:
  """Returns parts of at most three steps, longer parts first."""
  count = math.ceil(len(coefficients) / _MOST_IN_A_ROW)
  parts, rest = [], coefficients
  for left in range(count, 0, -1):
    size = math.ceil(len(rest) / left)
    parts.append(rest[:size])
    rest = rest[size:]
  return parts


def _take_steps(
  products: _Products, x: jax.Array, gram: jax.Array, coefficients: Any
) -> jax.Array:
  """Returns Q X after some steps, given A = X X^T."""
  # q I is kept out of Q, since products round everything in Q.
  (q, b, c), *more = coefficients
  y = z = b * gram + c * products.square(gram, gram)
  last = q
  for a, b, c in more:
    u = last * gram + products.square(z, gram)
    gram = last * u + products.square(u, z)
    z = b * gram + c * products.square(gram, gram)
    y = q * z + a * y + products.square(y, z)
    q, last = q * a, a
  return q * x + products.apply(y, x)
