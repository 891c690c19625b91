# SPDX-License-Identifier: Apache-2.0
"""How a basis lives between steps."""
