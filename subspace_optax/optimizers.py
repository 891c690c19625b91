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
