# SPDX-License-Identifier: Apache-2.0
"""Kernels with steps in a subspace, W + P B."""
