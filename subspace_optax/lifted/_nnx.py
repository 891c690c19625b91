# SPDX-License-Identifier: Apache-2.0
"""Lifted kernels in the layers of an unmodified nnx model.

`nnx.Linear` and `nnx.LinearGeneral` hold the functions by which they promote
dtypes and multiply. A lifted kernel only needs other functions in these layers.
"""

import dataclasses
from typing import Any

from flax import nnx
from jax import lax

from subspace_optax.lifted import _lifted
from subspace_optax.lifted import _trees

_LINEAR = (nnx.Linear, nnx.LinearGeneral)


@dataclasses.dataclass(frozen=True)
class _Promote:
  """A layer's dtype promotion, for a kernel that may be lifted."""

  promote: Any

  def __call__(self, arrays: Any, *, dtype: Any = None, **kwargs: Any) -> Any:
    x, w, *rest = arrays
    if not isinstance(w, _lifted.Lifted):
      return self.promote(arrays, dtype=dtype, **kwargs)
    x, kernel, *rest = self.promote((x, w.kernel, *rest), dtype=dtype, **kwargs)
    return x, w.with_kernel(kernel), *rest


@dataclasses.dataclass(frozen=True)
class _DotGeneral:
  """A layer's product, for a kernel that may be lifted."""

  product: Any

  def __call__(self, x: Any, w: Any, numbers: Any, **kwargs: Any) -> Any:
    if not isinstance(w, _lifted.Lifted):
      return self.product(x, w, numbers, **kwargs)
    return _lifted.dot_general(self.product, x, w, numbers, **kwargs)


def nnx_merge(graphdef: Any, params: Any, *states: Any) -> Any:
  """Merges an nnx model with lifted kernels.

  Use it instead of `nnx.merge`. Kernels of `nnx.Linear` and `nnx.LinearGeneral`
  may be lifted anywhere: in an `nnx.List`, in attention, stacked by `nnx.vmap`
  and run by a scan, under `jax.checkpoint`.

  Args:
    graphdef: the graphdef from `nnx.split`.
    params: params from `rso.lift`, an `nnx.State` or a pure dict.
    *states: the model's other states.

  Returns:
    The model, which computes with W + P B.

  Raises:
    ValueError: a parameter of any other module is lifted.

  Example:
    >>> import jax.numpy as jnp, optax, subspace_optax as so
    >>> from flax import nnx
    >>> from subspace_optax import rso
    >>> model = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
    >>> graphdef, params = nnx.split(model)
    >>> lifted = rso.lift(
    ...   nnx.to_pure_dict(params),
    ...   {'kernel': jnp.ones((16, 2)), 'bias': optax.MaskedNode()},
    ...   {'kernel': jnp.zeros((2, 32)), 'bias': optax.MaskedNode()},
    ...   so.SubspaceSpec(rank=2),
    ... )
    >>> rso.nnx_merge(graphdef, lifted)(jnp.ones((4, 16))).shape
    (4, 32)
  """
  model = nnx.merge(graphdef, params, *states)
  in_layers = set()
  for _, module in nnx.iter_modules(model):
    if isinstance(module, _LINEAR) and _trees.lifted_in(module.kernel):
      in_layers.add(id(module.kernel))
      _set_hooks(module)
  _check_all_in_layers(model, in_layers)
  return model


def _set_hooks(layer: Any) -> None:
  made = getattr(layer, 'dot_general_cls', None)
  product = made() if made else layer.dot_general or lax.dot_general
  layer.dot_general = _DotGeneral(product)
  if made:
    layer.dot_general_cls = None  # it would override `dot_general`
  layer.promote_dtype = _Promote(layer.promote_dtype)


def _check_all_in_layers(model: Any, in_layers: set[int]) -> None:
  nodes = dict(nnx.iter_graph(model))
  for path, node in nodes.items():
    if not isinstance(node, nnx.Variable) or id(node) in in_layers:
      continue
    lifted = _trees.lifted_in(node)
    if lifted is not None:
      raise _trees.not_linear(lifted, nodes.get(path[:-1]), _LINEAR)
