# SPDX-License-Identifier: Apache-2.0
"""States as `init` makes them: placed and boxed as the parameters are.

The first bases are random samples, from a seed per matrix.
"""

from collections.abc import Callable
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax.bases import _quantized_basis
from subspace_optax.projectors import _base


def make_state(
  spec: _spec.SubspaceSpec, make: Callable[..., Any], params: Any
) -> Any:
  """Returns a first state on the mesh, and in boxes, of the parameters.

  Args:
    spec: what matches the parameters.
    make: (params, matches, treedef) -> the state, with the treedef of the
      parameters without their boxes.
    params: the parameters.
  """

  def placed(params: Any) -> Any:
    matches = spec.match(params)
    state = make(params, matches, _tree.flatten(params)[1])
    return _sharding.on_mesh_of([m.leaf for m in matches if m], state)

  return _boxes.box_state(placed, params)


def zero_coords(layout: _layout.Layout, leaf: Any, dtype: Any) -> jax.Array:
  """Returns zeros where a leaf's coordinates will be."""
  static = (layout.coords_shape, jnp.dtype(dtype))
  return layout.place_coords(jnp.zeros, static, (), leaf)


def make_seeds(
  spec: _spec.SubspaceSpec, path: str, leaf: Any, layout: _layout.Layout
) -> jax.Array:
  """Returns a seed per matrix: the same on every host and after a resume."""
  # crc32, since Python's hash of a string differs between processes.
  group = spec.key_group(path) if spec.key_group else path
  path_hash = np.uint32(zlib.crc32(group.encode()))
  static = (spec.seed, layout.batch_shape)
  return layout.place_values(_linalg.seeds, static, (path_hash,), leaf)


def sample_basis(
  spec: _spec.SubspaceSpec,
  sample: _base.Sample,
  path: str,
  leaf: Any,
  layout: _layout.Layout,
) -> Any:
  """Returns a leaf's first bases, or their codes."""
  seeds = (make_seeds(spec, path, leaf, layout),)
  if _quantized_basis.is_quantized(spec.basis_dtype):
    static = (sample, layout, jnp.dtype(jnp.float32))
    return _quantized_basis.first(
      spec.basis_dtype, _sample_at_init, static, seeds, layout, leaf
    )
  static = (sample, layout, jnp.dtype(spec.basis_dtype))
  return layout.place_basis(_sample_at_init, static, seeds, leaf)


def _sample_at_init(
  sample: _base.Sample, layout: _layout.Layout, dtype: Any, seeds: jax.Array
) -> jax.Array:
  return sample(layout, seeds, _base.AT_INIT).astype(dtype)
