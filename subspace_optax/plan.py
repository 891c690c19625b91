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
"""What a training step takes of each device's memory, before anything runs.

  python -m subspace_optax.plan --model llama_7b --optimizer subspace_adamw \\
    --rank 1024 --batch 1 --seq 2048 --mesh fsdp=1 --card rtx4090

prints the bytes of weights, gradients, states, bases, activations and workspace,
whether they fit, and the largest rank and batch that would.
"""

import argparse
from collections.abc import Sequence
import sys
from typing import Any

from subspace_optax._plan import _methods
from subspace_optax._plan import _models
from subspace_optax._plan import _planner
from subspace_optax._plan._models import Model as Model
from subspace_optax._plan._planner import Largest as Largest
from subspace_optax._plan._planner import Plan as Plan
from subspace_optax._plan._planner import card_bytes as card_bytes
from subspace_optax._plan._planner import largest as largest
from subspace_optax._plan._planner import plan as plan


def optimizer(name: str, **settings: Any) -> Any:
  """Returns the optimizer that a plan's name stands for.

  Args:
    name: see `plan`.
    **settings: rank, moment_dtype, basis_dtype and regenerate, see `plan`.

  Raises:
    ValueError: an unknown name, or bases that can't be regenerated.

  Example:
    >>> import subspace_optax.plan
    >>> tx = subspace_optax.plan.optimizer('golore', rank=64)
  """
  return _methods.make(name, _methods.Settings(**settings))
