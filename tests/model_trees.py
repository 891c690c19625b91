"""Parameter trees of the usual libraries, and what a spec makes of them."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

import cases
import subspace_optax as so


def _read() -> dict[str, dict[str, Any]]:
  """Returns by library and path a leaf's shape, and its matrices or None."""
  trees: dict[str, dict[str, Any]] = {}
  numbers = lambda words: tuple(map(int, words.split()))
  text = pathlib.Path(__file__).with_suffix('.txt').read_text()
  for line in text.splitlines():
    if line.startswith('['):
      tree = trees.setdefault(line.strip('[]'), {})
    elif line and not line.startswith('#'):
      path, sizes = line.split(maxsplit=1)
      shape, _, matrices = sizes.partition('=')
      tree[path] = numbers(shape), numbers(matrices) or None
  return trees


LIBRARIES = _read()


def matches_of(shapes: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
  """Returns what a spec of rank 1 makes of every leaf, by path."""
  params = cases.nest(
    {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}
  )
  spec = so.SubspaceSpec(1, only_if_smaller=False, allow_empty=True, **kwargs)
  return {match.path: match for match in spec.match(params)}


def matrices_of(match: Any) -> tuple[int, int, int] | None:
  """Returns the number of matrices, their rows and columns."""
  layout = match.layout
  if layout is None:
    return None
  return math.prod(layout.batch_shape), layout.inputs, layout.outputs
