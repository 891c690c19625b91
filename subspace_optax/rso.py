# SPDX-License-Identifier: Apache-2.0
"""Randomized subspace optimization, which never computes whole gradients."""

from subspace_optax.lifted._lifted import LINEAR_OUT as LINEAR_OUT
from subspace_optax.lifted._lifted import PROJECTED_INPUT as PROJECTED_INPUT
from subspace_optax.lifted._lifted import Lifted as Lifted
from subspace_optax.lifted._lifted import dot as dot
from subspace_optax.lifted._linen import linen_apply as linen_apply
from subspace_optax.lifted._nnx import nnx_merge as nnx_merge
from subspace_optax.lifted._trees import lift as lift
from subspace_optax.lifted._trees import value_and_grad as value_and_grad
from subspace_optax.steps._compressed import compressed_step as compressed_step
from subspace_optax.steps._rso_theory import (
  TheoremParameters as TheoremParameters,
)
from subspace_optax.steps._rso_theory import (
  theorem_parameters as theorem_parameters,
)
from subspace_optax.steps._subproblems import Subproblems as Subproblems
from subspace_optax.steps._subproblems import SubproblemState as SubproblemState
from subspace_optax.steps._subproblems import subproblems as subproblems
