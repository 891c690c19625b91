# SPDX-License-Identifier: Apache-2.0
"""What happens to moments when a basis moves."""
