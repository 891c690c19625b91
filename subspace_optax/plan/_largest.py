# SPDX-License-Identifier: Apache-2.0
"""The largest rank and the largest batch that a card holds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_optax._chain import _spec
from subspace_optax._matrix import _notices
from subspace_optax.plan import _methods
from subspace_optax.plan import _planner


class Largest(NamedTuple):
  """The largest values that fit, one at a time; 0 if none does."""

  rank: int | None  # None for optimizers without one
  batch: int


def largest(
  model: Any,
  method: str,
  card: str | float,
  reserve: float = _planner.RESERVE,
  **settings,
) -> Largest:
  """Returns the largest rank and the largest batch that fit on a card.

  Each is found with the other taken from `settings`. The rank is at most the
  shortest side of the widest projected matrix.

  Args:
    model: see `plan`.
    method: the name of an optimizer.
    card: a name, or a number of GB.
    reserve: fraction of the card that is left to the runtime.
    **settings: see `plan`.

  Raises:
    ValueError: see `plan` and `Plan.fits`.

  Example:
    >>> import subspace_optax.plan
    >>> found = subspace_optax.plan.largest('llama_test', 'adamw', 1.0)
    >>> found.rank is None, found.batch > 0
    (True, True)
  """
  s, size = _planner.checked(settings), _planner.usable_bytes(card, reserve)
  made = _planner.resolved(model, s)
  ranked = isinstance(method, str) and _methods.named(method).ranked
  of = _planner.optimizer(made, method, s)
  parts = s.mesh['data'] * s.mesh['fsdp']

  def total(k: int) -> int:
    """Returns the bytes with k rows for each part of the mesh."""
    now = s._replace(batch=k * parts)
    return _planner.join(made, now, _planner.training(made, now), of).total

  fits = lambda k: total(k) <= size
  batch = parts * _most(fits, start=_guess(total, size))
  if not ranked:
    return Largest(None, batch)
  return Largest(_largest_rank(made, method, s, size), batch)


def _largest_rank(
  model: Any, method: str, s: _planner.Settings, size: float
) -> int:
  count = _planner.training(model, s)

  def fits(rank: int) -> bool:
    now = s._replace(rank=rank)
    try:
      of = _planner.optimizer(model, method, now)
    except ValueError:  # at this rank nothing is projected
      return False
    return _planner.join(model, now, count, of).total <= size

  limit = max(min(x.shape[-2:]) for x in matrices(model.params))
  with _notices.quiet():  # these ranks are only tried
    return _most(fits, limit)


def matrices(params: Any) -> list[Any]:
  """Returns the leaves that the default rules project."""
  spec = _spec.SubspaceSpec(1, allow_empty=True, only_if_smaller=False)
  found = [m.leaf for m in spec.match(params) if m and m.layout]
  return found or [jax.ShapeDtypeStruct((1, 1), jnp.float32)]


def _guess(total: Callable[[int], int], size: float) -> int:
  """Returns the number whose total is the size, if totals grow linearly."""
  few, more = total(8), total(16)
  slope = max((more - few) / 8, 1)
  return max(1, int(8 + (size - few) / slope))


def _most(
  fits: Callable[[int], bool], limit: int | None = None, start: int = 1
) -> int:
  """Returns the largest number that fits, at most `limit`; 0 if none does."""
  low, high, step = 0, start, 1
  if start > 1 and not fits(start):
    while (low := high - step) > 0 and not fits(low):
      high, step = low, 2 * step
    low = max(low, 0)
  else:
    while (limit is None or high <= limit) and fits(high):
      low, high, step = high, high + step, 2 * step
  if limit is not None and high > limit:
    high = limit + 1
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low
