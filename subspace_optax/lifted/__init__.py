# SPDX-License-Identifier: Apache-2.0
"""Kernels with their steps in a subspace, W + P B."""
