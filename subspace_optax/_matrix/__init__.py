# SPDX-License-Identifier: Apache-2.0
"""A leaf as matrices: axes, products, factorisations, shardings."""
