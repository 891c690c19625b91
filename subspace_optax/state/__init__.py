# SPDX-License-Identifier: Apache-2.0
"""The state of optimizers: reports, checkpoints, other ranks."""
