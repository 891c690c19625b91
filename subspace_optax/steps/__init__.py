# SPDX-License-Identifier: Apache-2.0
"""Training steps that need more than gradients and updates."""
