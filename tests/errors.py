"""What tests of errors share."""

import re

import pytest


def raises(error, *words):
  """Expects an error whose message holds all the words."""
  everything = ''.join(f'(?=.*{re.escape(str(word))})' for word in words)
  return pytest.raises(error, match=f'(?s){everything}')
