# SPDX-License-Identifier: Apache-2.0
"""Training in gradient subspaces: composable optax transformations.

The gradient of a matrix is projected onto a subspace of rank r, an optimizer
runs on its coordinates there, and its directions are mapped back to updates of
the matrix:

  project -> in_subspace -> unproject, or `subspace`, which chains them.

A subspace optimizer combines one of each of these:

  SubspaceSpec   which leaves to project, as which matrices, at which rank
  projectors     how to find and move bases
  an optax transformation, which runs on coordinates; `quantize_moments` keeps
                 its moments in 8 or 4 bits
  transports     what happens to the moments when a basis moves
  residuals      what happens to the rest of the gradient

Ready-made optimizers: `galore`, `golore`, `online_subspace_descent`,
`fira_adamw`, `apollo_adamw`, `ldadamw`, `subspace_adamw`, `subspace_muon`,
`dion`, `trion`; and without a subspace, `normuon` and `scale`. `from_hf` takes
the arguments of Hugging Face's trainer, `from_torch` a state of `galore-torch`.

For use before and during training: `describe`, `memory_report`,
`subspace_metrics`, `state_sharding`, `resize_rank`, `checkpoint`, and
`python -m subspace_optax.plan`; `offload` for states on the host. Training
steps that need more than gradients: `layerwise`, `data_parallel_step`, `rso`.
All of them are `TrainStep`s, as is the plain `train_step`.
"""

from importlib import metadata as _metadata

from subspace_optax import checkpoint
from subspace_optax import projectors
from subspace_optax import residuals
from subspace_optax import rso
from subspace_optax import testing
from subspace_optax import transports
from subspace_optax._chain._describe import describe
from subspace_optax._chain._in_subspace import in_subspace
from subspace_optax._chain._offload import offload
from subspace_optax._chain._project import project
from subspace_optax._chain._spec import DimensionNumbers
from subspace_optax._chain._spec import SubspaceSpec
from subspace_optax._chain._state_sharding import state_sharding
from subspace_optax._chain._subspace import subspace
from subspace_optax._chain._unproject import unproject
from subspace_optax._matrix._boxes import register_box
from subspace_optax._matrix._projected import Projected
from subspace_optax.galore_torch import from_torch
from subspace_optax.hf import from_hf
from subspace_optax.low_precision._eight_bit import scale_by_adam8bit
from subspace_optax.low_precision._eight_bit import scale_by_lion8bit
from subspace_optax.low_precision._quantize_moments import quantize_moments
from subspace_optax.low_precision._round_updates import round_updates
from subspace_optax.optimizers import apollo_adamw
from subspace_optax.optimizers import dion
from subspace_optax.optimizers import fira_adamw
from subspace_optax.optimizers import galore
from subspace_optax.optimizers import golore
from subspace_optax.optimizers import ldadamw
from subspace_optax.optimizers import normuon
from subspace_optax.optimizers import online_subspace_descent
from subspace_optax.optimizers import scale
from subspace_optax.optimizers import subspace_adamw
from subspace_optax.optimizers import subspace_muon
from subspace_optax.optimizers import trion
from subspace_optax.state._maxtext import dimension_numbers_from_paths
from subspace_optax.state._memory import MemoryReport
from subspace_optax.state._memory import memory_report
from subspace_optax.state._metrics import subspace_metrics
from subspace_optax.state._resize import resize_rank
from subspace_optax.steps._data_parallel import data_parallel_step
from subspace_optax.steps._golore_theory import TheoremParameters
from subspace_optax.steps._golore_theory import theorem_parameters
from subspace_optax.steps._layerwise import LayerwiseAuxMetrics
from subspace_optax.steps._layerwise import LayerwiseMetrics
from subspace_optax.steps._layerwise import LayerwiseState
from subspace_optax.steps._layerwise import layerwise
from subspace_optax.steps._train_step import TrainStep
from subspace_optax.steps._train_step import train_step
from subspace_optax.transports._moments import register_moments
from subspace_optax.whole import scale_by_muon8bit
from subspace_optax.whole import scale_by_normuon

try:
  __version__ = _metadata.version('subspace-optax')
except _metadata.PackageNotFoundError:  # a source tree that is not installed
  __version__ = '0.0.0+unknown'

__all__ = [
  'DimensionNumbers',
  'LayerwiseAuxMetrics',
  'LayerwiseMetrics',
  'LayerwiseState',
  'MemoryReport',
  'Projected',
  'SubspaceSpec',
  'TheoremParameters',
  'TrainStep',
  'apollo_adamw',
  'checkpoint',
  'data_parallel_step',
  'describe',
  'dimension_numbers_from_paths',
  'dion',
  'fira_adamw',
  'from_hf',
  'from_torch',
  'galore',
  'golore',
  'in_subspace',
  'layerwise',
  'ldadamw',
  'memory_report',
  'normuon',
  'offload',
  'online_subspace_descent',
  'project',
  'projectors',
  'quantize_moments',
  'register_box',
  'register_moments',
  'residuals',
  'resize_rank',
  'round_updates',
  'rso',
  'scale',
  'scale_by_adam8bit',
  'scale_by_lion8bit',
  'scale_by_muon8bit',
  'scale_by_normuon',
  'state_sharding',
  'subspace',
  'subspace_adamw',
  'subspace_metrics',
  'subspace_muon',
  'testing',
  'theorem_parameters',
  'train_step',
  'transports',
  'trion',
  'unproject',
]


def __getattr__(name: str):
  """Imports `plan` on first use, since nothing else here needs it."""
  if name != 'plan':
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  import importlib

  return importlib.import_module('subspace_optax.plan')
