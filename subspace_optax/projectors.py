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
"""How the basis of every matrix is found and moved."""

from subspace_optax._projectors._base import Projector as Projector
from subspace_optax._projectors._gap import LazyGap as LazyGap
from subspace_optax._projectors._gaussian import gaussian as gaussian
from subspace_optax._projectors._grassmann import (
  grassmann_tracking as grassmann_tracking,
)
from subspace_optax._projectors._grassmann import (
  grassmann_walk as grassmann_walk,
)
from subspace_optax._projectors._importance import (
  importance_svd as importance_svd,
)
from subspace_optax._projectors._online_pca import online_pca as online_pca
from subspace_optax._projectors._power import power_iteration as power_iteration
from subspace_optax._projectors._stiefel import stiefel as stiefel
from subspace_optax._projectors._svd import svd as svd
from subspace_optax._projectors._switch import switch as switch
