# SPDX-License-Identifier: Apache-2.0
"""The memory of a training step on each device, before anything runs."""

from typing import Any

from subspace_optax.plan import _methods
from subspace_optax.plan._largest import Largest as Largest
from subspace_optax.plan._largest import largest as largest
from subspace_optax.plan._models import NAMED as NAMED
from subspace_optax.plan._models import Model as Model
from subspace_optax.plan._models import named as named
from subspace_optax.plan._planner import RESERVE as RESERVE
from subspace_optax.plan._planner import Plan as Plan
from subspace_optax.plan._planner import card_bytes as card_bytes
from subspace_optax.plan._planner import plan as plan


def optimizer(name: str, **settings: Any) -> Any:
  """Returns the optimizer that a plan uses under this name.

  Args:
    name: see `plan`.
    **settings: rank, moment_dtype, basis_dtype and regenerate; see `plan`.

  Raises:
    ValueError: an unknown name, or bases that can't be regenerated.

  Example:
    >>> import subspace_optax.plan
    >>> tx = subspace_optax.plan.optimizer('golore', rank=64)
  """
  return _methods.make(name, _methods.Settings(**settings))
