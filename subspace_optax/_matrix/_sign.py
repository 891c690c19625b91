# SPDX-License-Identifier: Apache-2.0
"""Whether an optimizer steps along the gradient or against it.

`optax.scale_by_adam` returns directions along the gradient, for a learning rate
that is chained after it. `optax.adam` includes its learning rate and steps
against the gradient. If one replaces the other, the loss grows.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _sharding

# The first updates of a warm-up, or of `optax.MultiSteps`, are zero.
_MOST_STEPS = 32


def require_along(
  optimizer: Any, name: str, *, with_params: bool = True
) -> Any:
  """Returns an optimizer whose `init` raises if it steps against gradients.

  Args:
    optimizer: an optax transformation that returns directions.
    name: name of the argument.
    with_params: whether the optimizer gets params when it runs.
  """
  return _checked(
    {name: optimizer},
    lambda: _sign(optimizer, with_params) >= 0,
    f'{name} steps against the gradient, but must return directions along it: '
    'learning rate and sign are applied behind it. Pass optax.scale_by_adam() '
    'instead of optax.adam(...), or chain optax.scale(-1.0) behind it.',
  )


def require_against(optimizer: Any, name: str) -> Any:
  """Returns an optimizer whose `init` raises if it steps along gradients."""
  return _checked(
    {name: optimizer},
    lambda: _sign(optimizer) <= 0,
    f'{name} steps along the gradient, so that the loss would grow, but must '
    'bring learning rate and sign. Pass optax.adam(1e-3) instead of '
    'optax.scale_by_adam(), or chain optax.scale_by_learning_rate(1e-3) behind '
    'it.',
  )


def require_same_side(plain: Any, inner: Any, *, with_params: bool) -> Any:
  """Returns `plain`; its `init` raises if the two step in opposite senses."""
  return _checked(
    {'plain': plain, 'inner': inner},
    lambda: _sign(plain) * _sign(inner, with_params) >= 0,
    'inner and plain step to different sides of the gradient, so that one of '
    'them climbs. Pass optax.scale_by_adam() and the like for both, or '
    'optax.adam(...) and the like.',
  )


def require_one_turn(inner: Any, after: Any, *, with_params: bool) -> Any:
  """Returns `inner`; its `init` raises if `after` turns its steps uphill."""
  return _checked(
    {'inner': inner, 'after': after},
    lambda: _sign(inner, with_params) >= 0 or _sign(after) >= 0,
    'inner and `after` both turn steps against the gradient, so that the loss '
    'would grow. Pass optax.scale_by_adam() instead of optax.adam(...), '
    'or leave the learning rate out of `after`.',
  )


def _checked(
  optimizers: dict[str, Any], is_right: Callable[[], bool], error: str
) -> Any:
  """Returns the first optimizer, with the check at `init`.

  It does not check earlier, since arrays start the backend.
  """
  for name, optimizer in optimizers.items():
    _arguments.require_optimizer(optimizer, name)
  first = next(iter(optimizers.values()))
  is_right = functools.cache(is_right)  # since `init` is traced in every update

  def init(params):
    if not is_right():
      raise ValueError(error)
    return first.init(params)

  return optax.with_extra_args_support(first)._replace(init=init)


def _sign(optimizer: Any, with_params: bool = True) -> int:
  """Returns 1 for steps along the gradient, -1 against it, 0 if unknown.

  It is unknown if hyperparameters are traced or `update` takes more arguments.
  """
  try:
    with jax.ensure_compile_time_eval(), _sharding.no_mesh():
      return _first_sign(optimizer, with_params)
  except Exception:  # an optimizer may raise anything for these inputs
    return 0


def _first_sign(optimizer: Any, with_params: bool) -> int:
  """Returns the sign of the first update that depends on a constant gradient.

  It is the sign of the difference between the updates for 1 and for -1, so that
  noise does not decide.
  """
  zeros = {'x': jnp.zeros((1, 1))}
  params = zeros if with_params else None
  gradients = [{'x': jnp.full((1, 1), g)} for g in (1.0, -1.0)]
  states = [optimizer.init(zeros)] * 2
  for _ in range(_MOST_STEPS):
    steps = map(optimizer.update, gradients, states, [params] * 2)
    (up, down), states = zip(*steps, strict=True)
    sign = int(jnp.sign(up['x'] - down['x'])[0, 0])
    if sign:
      return sign
  return 0
