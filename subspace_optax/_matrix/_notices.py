# SPDX-License-Identifier: Apache-2.0
"""Warnings that an optimizer gives once, when a user initialises it."""

from collections.abc import Iterator
import contextlib
import contextvars
import inspect
import types
from typing import Any
import warnings

import jax
from jax.core import Tracer
import jax.numpy as jnp

_RAISED, _WARNED_OF, _IGNORED = range(3)
_INSIDE = ('subspace_optax.', 'optax.', 'jax.', 'flax.', 'contextlib.')


# What happens on a refusal, and whether warnings are suppressed.
_rules: contextvars.ContextVar[tuple[int, bool]] = contextvars.ContextVar(
  'rules', default=(_RAISED, False)
)


def lenient() -> contextlib.AbstractContextManager[None]:
  """A context for a part of a tree, in which nothing need be projected.

  An example is the parameters outside a stack. Small matrices still cause
  warnings.
  """
  return _loosened(_WARNED_OF)


def quiet(errors: bool = False) -> contextlib.AbstractContextManager[None]:
  """A context without warnings, for tracing `init` only for its types.

  With `errors`, even a tree with nothing to project is accepted.
  """
  return _loosened(_IGNORED if errors else _RAISED, silent=True)


@contextlib.contextmanager
def _loosened(refusals: int, silent: bool = False) -> Iterator[None]:
  """A context at least as loose as the one around it."""
  outer = _rules.get()
  token = _rules.set((max(refusals, outer[0]), silent or outer[1]))
  try:
    yield
  finally:
    _rules.reset(token)


def refuse(message: str) -> None:
  """Raises a ValueError or, for a part of a tree, warns."""
  refusals, _ = _rules.get()
  if refusals == _RAISED:
    raise ValueError(message)
  if refusals == _WARNED_OF:
    warn(message)


def takes_empty() -> bool:
  """Whether a tree may lack matrices to project, as a part of a tree may."""
  return _rules.get()[0] != _RAISED


def warn(message: str) -> None:
  """Warns at the line of user code that caused the warning."""
  _, silent = _rules.get()
  if not silent:
    warnings.warn(message, UserWarning, stacklevel=_levels_to_user())


def warning_of_ones(tx: Any, **rates: Any) -> Any:
  """Returns an optimizer whose `init` warns of decay rates rounded to 1.

  It warns at `init`, since `optax.inject_hyperparams` makes the optimizer again
  in every update. Traced rates can't be checked.
  """

  def init(params: Any) -> Any:
    for name, rate in rates.items():
      if _is_rounded_to_one(rate):
        warn(
          f'{name} is 1 in {rate.dtype.name}, and steps divide by 1 - {name}: '
          'optax.inject_hyperparams casts hyperparameters to the dtype of the '
          'parameters. Pass hyperparam_dtype=jnp.float32 to '
          'optax.inject_hyperparams.'
        )
    return tx.init(params)

  return tx._replace(init=init)


def _is_rounded_to_one(rate: Any) -> bool:
  if not isinstance(rate, jax.Array) or isinstance(rate, Tracer):
    return False
  return rate.dtype in (jnp.bfloat16, jnp.float16) and bool((rate == 1).any())


def _levels_to_user() -> int:
  """Returns the `stacklevel` of the nearest frame outside libraries."""
  level, frame = 0, inspect.currentframe()
  while frame and frame.f_back and _is_inside(frame):
    level, frame = level + 1, frame.f_back
  return level


def _is_inside(frame: types.FrameType) -> bool:
  return f'{frame.f_globals.get("__name__")}.'.startswith(_INSIDE)
