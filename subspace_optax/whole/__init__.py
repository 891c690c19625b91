# SPDX-License-Identifier: Apache-2.0
"""Optimizers of whole matrices, without a subspace."""

from subspace_optax.whole._muon8bit import (
  scale_by_muon8bit as scale_by_muon8bit,
)
from subspace_optax.whole._normuon import NorMuonState as NorMuonState
from subspace_optax.whole._normuon import matrices_in as matrices_in
from subspace_optax.whole._normuon import scale_by_normuon as scale_by_normuon
from subspace_optax.whole._with_plain import run_with_plain as run_with_plain
