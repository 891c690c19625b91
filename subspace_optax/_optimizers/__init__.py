# SPDX-License-Identifier: Apache-2.0
"""The ready-made optimizers, one a file."""
