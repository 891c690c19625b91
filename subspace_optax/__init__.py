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
"""Training in gradient subspaces: composable optax transformations."""

import importlib

from subspace_optax import projectors as projectors
from subspace_optax import residuals as residuals
from subspace_optax import rso as rso
from subspace_optax._boxes import register_box as register_box
from subspace_optax._data_parallel import (
  data_parallel_step as data_parallel_step,
)
from subspace_optax._describe import describe as describe
from subspace_optax._eight_bit import scale_by_adam8bit as scale_by_adam8bit
from subspace_optax._eight_bit import scale_by_lion8bit as scale_by_lion8bit
from subspace_optax._in_subspace import in_subspace as in_subspace
from subspace_optax._layerwise import Layerwise as Layerwise
from subspace_optax._layerwise import LayerwiseAuxMetrics as LayerwiseAuxMetrics
from subspace_optax._layerwise import LayerwiseMetrics as LayerwiseMetrics
from subspace_optax._layerwise import LayerwiseState as LayerwiseState
from subspace_optax._layerwise import layerwise as layerwise
from subspace_optax._maxtext import (
  dimension_numbers_from_paths as dimension_numbers_from_paths,
)
from subspace_optax._memory import MemoryReport as MemoryReport
from subspace_optax._memory import memory_report as memory_report
from subspace_optax._metrics import subspace_metrics as subspace_metrics
from subspace_optax._project import project as project
from subspace_optax._projected import Projected as Projected
from subspace_optax._resize import resize_rank as resize_rank
from subspace_optax._round_updates import round_updates as round_updates
from subspace_optax._spec import DimensionNumbers as DimensionNumbers
from subspace_optax._spec import SubspaceSpec as SubspaceSpec
from subspace_optax._state_sharding import state_sharding as state_sharding
from subspace_optax._subspace import subspace as subspace
from subspace_optax._theory import TheoremParameters as TheoremParameters
from subspace_optax._theory import theorem_parameters as theorem_parameters
from subspace_optax._transport import register_moments as register_moments
from subspace_optax._unproject import unproject as unproject
from subspace_optax.optimizers import apollo_adamw as apollo_adamw
from subspace_optax.optimizers import fira_adamw as fira_adamw
from subspace_optax.optimizers import galore as galore
from subspace_optax.optimizers import golore as golore
from subspace_optax.optimizers import ldadamw as ldadamw
from subspace_optax.optimizers import (
  online_subspace_descent as online_subspace_descent,
)
from subspace_optax.optimizers import subspace_adamw as subspace_adamw
from subspace_optax.optimizers import subspace_muon as subspace_muon


def __getattr__(name: str):
  """Imports `plan` when it is asked for: run by -m, it must not be there."""
  if name != 'plan':
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return importlib.import_module('subspace_optax.plan')
