# SPDX-License-Identifier: Apache-2.0
"""Ready-made optimizers in optax's own form."""

from subspace_optax._optimizers._apollo_adamw import (
  apollo_adamw as apollo_adamw,
)
from subspace_optax._optimizers._fira_adamw import fira_adamw as fira_adamw
from subspace_optax._optimizers._galore import galore as galore
from subspace_optax._optimizers._golore import golore as golore
from subspace_optax._optimizers._ldadamw import ldadamw as ldadamw
from subspace_optax._optimizers._online_subspace_descent import (
  online_subspace_descent as online_subspace_descent,
)
from subspace_optax._optimizers._subspace_adamw import (
  subspace_adamw as subspace_adamw,
)
from subspace_optax._optimizers._subspace_muon import (
  subspace_muon as subspace_muon,
)
