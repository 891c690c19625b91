# SPDX-License-Identifier: Apache-2.0
"""Suggestions for unknown names."""

from collections.abc import Iterable
import difflib
from typing import Any


def did_you_mean(value: Any, choices: Iterable[str]) -> str:
  """Returns " (did you mean '...'?)" for an error; '' if nothing is near."""
  near = difflib.get_close_matches(str(value).lower(), list(choices), 1)
  return f' (did you mean {near[0]!r}?)' if near else ''
