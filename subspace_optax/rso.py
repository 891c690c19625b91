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
"""Randomized subspace optimization: gradients that never exist whole."""

from subspace_optax._rso._compressed import compressed_step as compressed_step
from subspace_optax._rso._lifted import LINEAR_OUT as LINEAR_OUT
from subspace_optax._rso._lifted import PROJECTED_INPUT as PROJECTED_INPUT
from subspace_optax._rso._lifted import Lifted as Lifted
from subspace_optax._rso._lifted import dot as dot
from subspace_optax._rso._linen import linen_apply as linen_apply
from subspace_optax._rso._nnx import nnx_merge as nnx_merge
from subspace_optax._rso._subproblems import Subproblems as Subproblems
from subspace_optax._rso._subproblems import SubproblemState as SubproblemState
from subspace_optax._rso._subproblems import subproblems as subproblems
from subspace_optax._rso._theory import TheoremParameters as TheoremParameters
from subspace_optax._rso._theory import theorem_parameters as theorem_parameters
from subspace_optax._rso._trees import lift as lift
from subspace_optax._rso._trees import value_and_grad as value_and_grad
