# SPDX-License-Identifier: Apache-2.0
"""Residual rules, for the part of the gradient outside the subspace."""

from subspace_optax.residuals._apollo import apollo as apollo
from subspace_optax.residuals._base import Residual as Residual
from subspace_optax.residuals._error_feedback import (
  error_feedback as error_feedback,
)
from subspace_optax.residuals._fira import fira as fira
from subspace_optax.residuals._momentum_feedback import (
  momentum_feedback as momentum_feedback,
)
from subspace_optax.residuals._orthogonal import orthogonal as orthogonal
from subspace_optax.residuals._sign import sign as sign
