# SPDX-License-Identifier: Apache-2.0
"""Directions of whole matrices by Muon and NorMuon.

Muon's is sqrt(max(1, out / in)) O, where O is X orthogonalised. Li et al.,
`NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025, Algorithm 1, divides each
output neuron's part of O by the square root of its own mean square,

  v <- b2 v + (1 - b2) mean_in(O^2),   O' = O / (sqrt(v) + eps),

and scales O' to the norm of O, as the authors' code does: the paper's
0.2 sqrt(mn) / ||O'||_F is a learning rate that matches Adam's.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _newton_schulz
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _spread


class Rule(NamedTuple):
  """How to compute directions from matrices.

  Attributes:
    how: the iteration.
    b2: decay rate of the mean squares, None for Muon.
    eps: added to the square roots of the mean squares.
  """

  how: _newton_schulz.Iteration
  b2: Any = None
  eps: Any = 1e-8


def make_rule(
  ns_coeffs: Any, steps: int, preconditioning: str, b2: Any, eps: Any
) -> Rule:
  """Returns a `Rule`; raises for invalid arguments."""
  how = _newton_schulz.iteration(ns_coeffs, steps, preconditioning)
  return Rule(how, b2, eps)


def first_squares(layout: _layout.Layout, leaf: Any) -> jax.Array:
  """Returns zeros as the first mean squares, one per output.

  They have the leaf's shape, with 1 for the inputs' axes.
  """
  dtype = jnp.promote_types(leaf.dtype, jnp.float32)
  static = (squares_shape(layout), dtype)
  return layout.place_leaf(jnp.zeros, static, (), leaf)


def squares_shape(layout: _layout.Layout) -> tuple[int, ...]:
  """Returns the shape of an array with one number per output."""
  sizes = enumerate(layout.shape)
  return tuple(1 if i in layout.rows else size for i, size in sizes)


def orthogonalize(
  rule: Rule,
  layouts: Sequence[_layout.Layout],
  leaves: Sequence[jax.Array],
  squares: Sequence[Any],
  homes: Sequence[Any] | None = None,
) -> tuple[list[jax.Array], list[Any]]:
  """Returns the directions of leaves, and their new mean squares.

  It takes all leaves at once, since leaves of one shape may share devices.

  Args:
    rule: how to compute directions.
    layouts: layouts of the leaves; their blocks are separate matrices.
    leaves: the leaves, float32 or wider.
    squares: mean squares like those of `first_squares`; any values for a rule
      without b2.
    homes: for leaves that were handed out, arrays placed where the directions
      must be; None for other leaves, and for all by default.
  """
  if not leaves:
    return [], []
  homes = [None] * len(leaves) if homes is None else homes
  cut = [_cut(*three) for three in zip(layouts, leaves, homes, strict=True)]
  parts = [part for parts in cut for part in parts]
  iterate = lambda layout, x: _newton_schulz.newton_schulz(layout, x, rule.how)
  whole = iter(_spread.spread(iterate, *zip(*parts, strict=True)))
  results = []
  for layout, x, home, old, parts in zip(
    layouts, leaves, homes, squares, cut, strict=True
  ):
    narrow = [layout for layout, *_ in parts]
    found = [next(whole) for _ in parts]
    direction, new = _finish(rule, layout, narrow, found, old)
    place = x if home is None else home
    results.append((_sharding.place_like(direction, place), new))
  directions, news = zip(*results, strict=True)
  return list(directions), list(news)


def _cut(
  layout: _layout.Layout, x: jax.Array, home: Any
) -> list[tuple[_layout.Layout, jax.Array, Any]]:
  """Returns the matrices that lie side by side in a leaf, and their homes."""
  if not layout.blocks:
    return [(layout, x, home)]

  def split(x: Any) -> Sequence[Any]:
    if x is None:
      return [None] * len(layout.blocks)
    whole = _sharding.regroup(x, layout.cols, layout.rows)
    return lax.split(whole, layout.blocks, layout.cols[0])

  narrow = [_with_width(layout, width) for width in layout.blocks]
  return list(zip(narrow, split(x), split(home), strict=True))


def _finish(
  rule: Rule,
  layout: _layout.Layout,
  narrow: Sequence[_layout.Layout],
  parts: Sequence[jax.Array],
  squares: Any,
) -> tuple[jax.Array, Any]:
  """Returns the direction of a leaf with blocks, and its mean squares."""
  if len(parts) == 1:
    return _scale(rule, narrow[0], parts[0], squares)
  axis, olds = layout.cols[0], [squares] * len(parts)
  if rule.b2 is not None:
    whole = _sharding.regroup(squares, layout.cols, ())
    olds = lax.split(whole, layout.blocks, axis)
  found = [_scale(rule, *x) for x in zip(narrow, parts, olds, strict=True)]
  directions, news = zip(*found, strict=True)
  direction = jnp.concatenate(directions, axis)
  if rule.b2 is None:
    return direction, squares
  return direction, _sharding.like(jnp.concatenate(news, axis), squares)


def _with_width(layout: _layout.Layout, width: int) -> _layout.Layout:
  """Returns the layout of one block."""
  sizes = list(layout.shape)
  sizes[layout.cols[0]] = width
  return dataclasses.replace(layout, shape=tuple(sizes), blocks=())


def _scale(
  rule: Rule, layout: _layout.Layout, x: jax.Array, squares: Any
) -> tuple[jax.Array, Any]:
  """Returns the direction of an orthogonalised leaf, and mean squares."""
  if rule.b2 is not None:
    x, squares = _equalize_neurons(rule, layout, x, squares)
  return max(1.0, layout.outputs / layout.inputs) ** 0.5 * x, squares


def _equalize_neurons(
  rule: Rule, layout: _layout.Layout, x: jax.Array, squares: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns O' with the norm of O, and mean squares, unchanged for NaN."""
  mean = jnp.mean(x * x, axis=layout.rows, keepdims=True)
  new = rule.b2 * squares + (1.0 - rule.b2) * mean
  scaled = x / (_linalg.safe_sqrt(new) + rule.eps)
  before, after = layout.energy(x), layout.energy(scaled)
  factor = _linalg.safe_sqrt(before / jnp.where(after > 0, after, 1.0))
  kept = jnp.where(jnp.isfinite(new), new, squares)
  return scaled * layout.along_leaf(factor), _sharding.like(kept, squares)
