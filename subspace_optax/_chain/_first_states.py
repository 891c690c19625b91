# SPDX-License-Identifier: Apache-2.0
"""First states, placed and boxed as the parameters are.

The first bases are random samples, from one seed per matrix.
"""

from collections.abc import Callable
from typing import Any
import zlib

import jax
import numpy as np

from subspace_optax import bases
from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax.projectors import _base


def make_state(
  spec: _spec.SubspaceSpec, make: Callable[..., Any], params: Any
) -> Any:
  """Returns a first state on the parameters' mesh and in their boxes.

  Args:
    spec: the spec that matches the parameters.
    make: (params, matches, treedef) -> the state, with the treedef of the
      parameters without their boxes.
    params: the parameters.
  """

  def placed(params: Any) -> Any:
    matches = spec.match(params)
    state = make(params, matches, _tree.flatten(params)[1])
    return _sharding.on_mesh_of([m.leaf for m in matches if m], state)

  return _boxes.box_state(placed, params)


def plain_template(spec: _spec.SubspaceSpec, leaf: Any) -> Any:
  """Returns the stand-in for a plain leaf when its moments are made."""
  dtype = spec.dtype_of_moments(leaf.dtype)
  return leaf if leaf.dtype == dtype else leaf.astype(dtype)


def zero_coords(layout: _layout.Layout, leaf: Any, dtype: Any) -> jax.Array:
  """Returns zeros, placed like a leaf's coordinates."""
  return layout.zeros(layout.coords_axes(), leaf, dtype)


def make_seeds(
  spec: _spec.SubspaceSpec, path: str, leaf: Any, layout: _layout.Layout
) -> jax.Array:
  """Returns one seed per matrix, the same on every host and after a resume."""
  # crc32, since Python's hash of a string differs between processes.
  group = _spec.group_of(spec, path)
  path_hash = np.uint32(zlib.crc32(group.encode()))
  static = (spec.seed, layout.batch_shape)
  return layout.place_values(_linalg.seeds, static, (path_hash,), leaf)


def make_basis(
  spec: _spec.SubspaceSpec,
  sample: _base.Sample,
  storage: bases.Storage,
  path: str,
  leaf: Any,
  layout: _layout.Layout,
) -> Any:
  """Returns the first stored value for the bases of a leaf."""
  assert storage.first is not None  # only called for stored bases
  return storage.first(
    sample, make_seeds(spec, path, leaf, layout), layout, leaf
  )
