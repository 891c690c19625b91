# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments. Errors give the name, the value and what to do."""

import numbers
import re
from typing import Any

import jax
import numpy as np

# Steps are counted in int32.
MOST_STEPS = 2**31 - 1


def check_decay(rate: Any, name: str) -> None:
  """Raises unless a decay rate lies in [0, 1); accepts any array."""
  if isinstance(rate, jax.Array | np.ndarray):
    return
  if not isinstance(rate, numbers.Real):
    raise TypeError(f'{name} must be a number in [0, 1), got {rate!r}.')
  if not 0 <= float(rate) < 1:
    raise ValueError(f'{name} must lie in [0, 1), got {rate!r}.')


def check_static(steps: Any, name: str) -> None:
  """Raises unless a number is a positive int that is not traced."""
  if isinstance(steps, jax.Array):
    raise TypeError(
      f'{name} must be static, got {steps!r}; under optax.inject_hyperparams, '
      f"pass static_args=('{name}',)."
    )
  check_int(steps, name)


def check_int(
  value: Any, name: str, *, least: int = 1, most: int = MOST_STEPS
) -> None:
  """Raises unless a number is an int from `least` to `most`."""
  if isinstance(value, bool) or not hasattr(value, '__index__'):
    raise TypeError(f'{name} must be an int, got {value!r}.')
  if value < least:
    raise ValueError(f'{name} must be at least {least}, got {value}.')
  if value > most:
    raise ValueError(
      f'{name} must be at most {most}, got {value}; steps are counted in int32.'
    )


def check_pattern(name: str, pattern: Any) -> None:
  """Raises unless an argument is a regular expression or None."""
  if pattern is None:
    return
  if not isinstance(pattern, str):
    raise TypeError(
      f'{name} must be a regular expression or None, got {pattern!r}.'
    )
  try:
    re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f'{name} must be a regular expression, got {pattern!r}: {error}; write '
      're.escape(...) around a path that is meant literally.'
    ) from None


def require_optimizer(optimizer: Any, name: str) -> None:
  """Raises unless an argument is an optimizer; `optax.adam` itself is not."""
  if not hasattr(optimizer, 'init') or not hasattr(optimizer, 'update'):
    raise TypeError(f'{name} must be an optax optimizer, got {optimizer!r}.')
