# SPDX-License-Identifier: Apache-2.0
"""Optimizers of whole matrices, without a subspace."""
