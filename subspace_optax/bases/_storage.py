# SPDX-License-Identifier: Apache-2.0
"""Chooses the storage for a spec's `basis_dtype` and a projector.

Bases are stored unchanged, as codes, or not at all. A projector with `rebuild`
recomputes them from its own state: a seed and a period, or the indices of
columns of a fixed transform.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax.bases import _base as _bases
from subspace_optax.bases import _quantized_basis
from subspace_optax.projectors import _base


def storage(basis_dtype: Any, projector: _base.Projector) -> _bases.Storage:
  """Returns how the bases of a projector are stored.

  Raises:
    ValueError: integers can't hold the bases of this projector.
  """
  dtype = jnp.dtype(basis_dtype)
  if _quantized_basis.is_quantized(dtype):
    return _quantized_basis.codes(dtype, projector)
  if projector.rebuild:
    return _drawn_again(dtype, projector.rebuild)
  return _arrays(dtype)


def _arrays(dtype: Any) -> _bases.Storage:
  def first(sample, seed, layout, leaf):
    static = (sample, layout, dtype)
    return layout.place_basis(_bases.draw_first, static, (seed,), leaf)

  return _bases.Storage(first, lambda matrices, stored, own: stored)


def _drawn_again(dtype: Any, rebuild: Callable[..., Any]) -> _bases.Storage:
  def read(matrices, stored, own):
    del stored
    place = lambda p, x: x.layout.settle_basis(p.astype(dtype), x.like)
    return jax.tree.map(place, rebuild(matrices, own), matrices)

  def write(matrices, stored, old, subspaces, moves):
    del matrices, old
    return stored, subspaces, moves

  return _bases.Storage(None, read, write)
