# SPDX-License-Identifier: Apache-2.0
"""Moments, bases and weights in few bits."""
