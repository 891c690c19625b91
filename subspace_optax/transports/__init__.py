# SPDX-License-Identifier: Apache-2.0
"""Transports: what happens to inner moments when a basis moves."""

from subspace_optax.transports._base import Moment as Moment
from subspace_optax.transports._base import Transport as Transport
from subspace_optax.transports._rules import both as both
from subspace_optax.transports._rules import first as first
from subspace_optax.transports._rules import keep as keep
from subspace_optax.transports._rules import reset as reset
