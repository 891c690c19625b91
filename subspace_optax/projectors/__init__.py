# SPDX-License-Identifier: Apache-2.0
"""Projectors: rules that find and move the basis of every matrix."""

from subspace_optax.projectors._base import Projector as Projector
from subspace_optax.projectors._dct import dct as dct
from subspace_optax.projectors._gap import LazyGap as LazyGap
from subspace_optax.projectors._grassmann import (
  grassmann_tracking as grassmann_tracking,
)
from subspace_optax.projectors._grassmann import (
  grassmann_walk as grassmann_walk,
)
from subspace_optax.projectors._importance import (
  importance_svd as importance_svd,
)
from subspace_optax.projectors._lagged_power import lagged_power as lagged_power
from subspace_optax.projectors._one_matrix import Matrix as Matrix
from subspace_optax.projectors._one_matrix import periodic as periodic
from subspace_optax.projectors._online_pca import online_pca as online_pca
from subspace_optax.projectors._power import power_iteration as power_iteration
from subspace_optax.projectors._random import gaussian as gaussian
from subspace_optax.projectors._random import stiefel as stiefel
from subspace_optax.projectors._svd import svd as svd
from subspace_optax.projectors._switch import switch as switch
