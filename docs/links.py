"""Docstrings and signatures as the site shows them.

Links are reStructuredText, as optax's are, and become Markdown. Blocks of
"Example:" get the plural, by which griffe knows doctests. Defaults that the
library marks, to see whether they were passed, are shown as they are.
"""

import re

import griffe

_LINK = re.compile(r'`([^`<]+?)\s*<(https?://[^>]+)>`_', re.DOTALL)
_EXAMPLE = re.compile(r'^Example:$', re.MULTILINE)
_MARKED = re.compile(r'_default\((.+)\)')


class Shown(griffe.Extension):
  """Rewrites the docstring of every object, and the defaults of functions."""

  def on_object(self, *, obj, **kwargs):
    """Is called by griffe for each of them."""
    del kwargs
    if obj.docstring:
      text = _LINK.sub(_markdown, obj.docstring.value)
      obj.docstring.value = _EXAMPLE.sub('Examples:', text)
    for parameter in obj.parameters if obj.is_function else ():
      marked = _MARKED.fullmatch(str(parameter.default))
      if marked:
        parameter.default = marked[1]


def _markdown(match):
  text, url = match.groups()
  return f'[{" ".join(text.split())}]({"".join(url.split())})'
