# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that may be continued with another mesh, rank or projector."""

from subspace_optax.state._checkpoint import Restored as Restored
from subspace_optax.state._checkpoint import restore as restore
from subspace_optax.state._checkpoint import save as save
