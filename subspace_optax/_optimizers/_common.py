# SPDX-License-Identifier: Apache-2.0
"""What the ready-made optimizers share."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jax
import optax

from subspace_optax._chain import _spec
from subspace_optax._matrix import _sign

Mask = Any | Callable[[Any], Any] | None
Transformation = optax.GradientTransformationExtraArgs

_T = TypeVar('_T')


class _Default:
  """A default that can be told from an equal value that a caller passed.

  It is no number, so that `optax.inject_hyperparams` does not trace it.
  """

  def __init__(self, value: Any):
    self.value = value

  def __eq__(self, other: Any) -> bool:
    return self.value == value(other)

  def __hash__(self) -> int:
    return hash(self.value)

  def __repr__(self) -> str:
    return repr(self.value)


def default(value: _T) -> _T:
  """Returns a default of an argument that must be static."""
  return cast(_T, _Default(value))


def value(argument: Any) -> Any:
  """Returns what a caller passed, or the default."""
  return argument.value if isinstance(argument, _Default) else argument


def check_static(optimizer: str, **arguments: Any) -> None:
  """Raises if any of the optimizer's arguments is an array, traced maybe."""
  traced = {k: x for k, x in arguments.items() if isinstance(x, jax.Array)}
  if traced:
    names = tuple(k for k, x in arguments.items() if _is_passed(x))
    shown = ', '.join(f'{k}={x!r}' for k, x in traced.items())
    raise TypeError(
      f'{" and ".join(traced)} must be static, got {shown}; with '
      'optax.inject_hyperparams, write optax.inject_hyperparams('
      f'so.{optimizer}, static_args={names}).'
    )


def _is_passed(argument: Any) -> bool:
  return argument is not None and not isinstance(argument, _Default)


def spec_or(
  spec: _spec.SubspaceSpec | None, arguments: Mapping[str, Any], **rest: Any
) -> _spec.SubspaceSpec:
  """Returns the spec, or the one that the optimizer's arguments describe.

  The latter takes a tree without matrices, too.

  Args:
    spec: what the caller passed.
    arguments: of the optimizer, whose place the spec takes.
    rest: further fields of a spec made of the arguments.
  """
  if spec is None:
    fields = {name: value(x) for name, x in arguments.items()}
    return _spec.SubspaceSpec(**fields, allow_empty=True, **rest)
  _spec.check_spec(spec)
  passed = {k: x for k, x in arguments.items() if _is_passed(x)}
  if passed:
    shown = ', '.join(f'{name}={x!r}' for name, x in passed.items())
    has = ', '.join(f'{name}={getattr(spec, name)!r}' for name in passed)
    raise ValueError(
      f'{shown} was passed beside a spec with {has}, which takes its place; '
      f'leave it out, or write spec=so.SubspaceSpec({shown}, ...).'
    )
  return spec


def adam_or(
  optimizer: optax.GradientTransformation | None, name: str
) -> optax.GradientTransformation:
  """Returns the optimizer of directions called `name`, by default Adam."""
  if optimizer is None:
    return optax.scale_by_adam()
  return _sign.require_along(optimizer, name, with_params=name == 'plain')


def times(alpha: Any, learning_rate: Any) -> Any:
  """Returns alpha times a learning rate or schedule."""
  if callable(learning_rate):
    return lambda count: alpha * learning_rate(count)
  return alpha * learning_rate


def with_decay(
  make: Callable[..., Transformation],
  learning_rate: Any,
  weight_decay: Any,
  mask: Mask,
  *,
  every_k: int | None = None,
) -> Transformation:
  """Returns an optimizer with decoupled weight decay and a learning rate.

  Args:
    make: `subspace` without its arguments `every_k` and `after`.
    learning_rate: a float or a schedule.
    weight_decay: see `optax.add_decayed_weights`.
    mask: see `optax.add_decayed_weights`.
    every_k: micro-steps to a step. None for one, since `inject_hyperparams`
      would trace a number.
  """
  after = optax.chain(
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  return make(every_k=1 if every_k is None else every_k, after=after)
