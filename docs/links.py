"""Links of docstrings, reStructuredText as optax's are, as Markdown."""

import re

import griffe

_LINK = re.compile(r'`([^`<]+?)\s*<(https?://[^>]+)>`_', re.DOTALL)


class Links(griffe.Extension):
  """Rewrites the docstring of every object."""

  def on_object(self, *, obj, **kwargs):
    """Is called by griffe for each of them."""
    del kwargs
    if obj.docstring:
      obj.docstring.value = _LINK.sub(_markdown, obj.docstring.value)


def _markdown(match):
  text, url = match.groups()
  return f'[{" ".join(text.split())}]({"".join(url.split())})'
