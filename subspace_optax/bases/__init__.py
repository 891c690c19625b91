# SPDX-License-Identifier: Apache-2.0
"""Storage of bases between steps: as arrays, as codes, or not at all."""

from subspace_optax.bases._base import Storage as Storage
from subspace_optax.bases._storage import storage as storage
