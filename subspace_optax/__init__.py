# SPDX-License-Identifier: Apache-2.0
"""Training in gradient subspaces: composable optax transformations."""

import importlib

from subspace_optax import projectors as projectors
from subspace_optax import residuals as residuals
from subspace_optax import rso as rso
from subspace_optax import transports as transports
from subspace_optax._chain._describe import describe as describe
from subspace_optax._chain._in_subspace import in_subspace as in_subspace
from subspace_optax._chain._project import project as project
from subspace_optax._chain._spec import DimensionNumbers as DimensionNumbers
from subspace_optax._chain._spec import SubspaceSpec as SubspaceSpec
from subspace_optax._chain._subspace import subspace as subspace
from subspace_optax._chain._unproject import unproject as unproject
from subspace_optax._matrix._boxes import register_box as register_box
from subspace_optax._matrix._projected import Projected as Projected
from subspace_optax._theory import TheoremParameters as TheoremParameters
from subspace_optax._theory import theorem_parameters as theorem_parameters
from subspace_optax.low_precision._quantize_moments import (
  quantize_moments as quantize_moments,
)
from subspace_optax.low_precision._quantize_moments import (
  scale_by_adam8bit as scale_by_adam8bit,
)
from subspace_optax.low_precision._quantize_moments import (
  scale_by_lion8bit as scale_by_lion8bit,
)
from subspace_optax.low_precision._round_updates import (
  round_updates as round_updates,
)
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
from subspace_optax.state._maxtext import (
  dimension_numbers_from_paths as dimension_numbers_from_paths,
)
from subspace_optax.state._memory import MemoryReport as MemoryReport
from subspace_optax.state._memory import memory_report as memory_report
from subspace_optax.state._metrics import subspace_metrics as subspace_metrics
from subspace_optax.state._resize import resize_rank as resize_rank
from subspace_optax.state._state_sharding import (
  state_sharding as state_sharding,
)
from subspace_optax.steps._data_parallel import (
  data_parallel_step as data_parallel_step,
)
from subspace_optax.steps._layerwise import Layerwise as Layerwise
from subspace_optax.steps._layerwise import (
  LayerwiseAuxMetrics as LayerwiseAuxMetrics,
)
from subspace_optax.steps._layerwise import LayerwiseMetrics as LayerwiseMetrics
from subspace_optax.steps._layerwise import LayerwiseState as LayerwiseState
from subspace_optax.steps._layerwise import layerwise as layerwise
from subspace_optax.transports._moments import (
  register_moments as register_moments,
)


def __getattr__(name: str):
  """Imports `plan` when it is asked for: run by -m, it must not be there."""
  if name != 'plan':
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return importlib.import_module('subspace_optax.plan')
