# SPDX-License-Identifier: Apache-2.0
"""The three pieces of a subspace optimizer, and what chains them."""
