# Copyright 2026 The subspace_optax Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the ready-made optimizers share."""

from collections.abc import Callable
from typing import Any

import optax

from subspace_optax import _spec

Mask = Any | Callable[[Any], Any] | None
Transformation = optax.GradientTransformationExtraArgs


def default_spec(rank: Any, seed: int) -> _spec.SubspaceSpec:
  """Returns the spec that takes a tree without matrices, too."""
  return _spec.SubspaceSpec(rank, allow_empty=True, seed=seed)


def adam_or(
  optimizer: optax.GradientTransformation | None,
) -> optax.GradientTransformation:
  """Returns the optimizer, Adam if there is none."""
  return optax.scale_by_adam() if optimizer is None else optimizer


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
