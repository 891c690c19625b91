# SPDX-License-Identifier: Apache-2.0
"""States as `init` makes them: placed and boxed as the parameters are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree


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
