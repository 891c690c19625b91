# SPDX-License-Identifier: Apache-2.0
"""The three pieces of a subspace optimizer, and functions that chain them."""
