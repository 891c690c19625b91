# SPDX-License-Identifier: Apache-2.0
"""What an optimizer holds: reports, placement, other ranks."""
