# SPDX-License-Identifier: Apache-2.0
"""Lifted kernels in the layers of an unmodified linen model."""

from typing import Any

from flax import linen as nn
from flax.core import meta
from jax import lax

from subspace_optax.lifted import _lifted
from subspace_optax.lifted import _trees

_LINEAR = (nn.Dense, nn.DenseGeneral)


def linen_apply(model: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
  """Applies a linen model with lifted kernels.

  Use it instead of `model.apply`. Kernels of `nn.Dense` and `nn.DenseGeneral`
  may be lifted, also in attention, stacked by `nn.scan` and under `nn.remat`.

  Args:
    model: a linen module, or its `apply`.
    variables: the model's variables, with params from `rso.lift`.
    *args: arguments of `apply`.
    **kwargs: keyword arguments of `apply`.

  Returns:
    The result of `apply`.

  Raises:
    ValueError: a parameter of any other module is lifted.

  Example:
    >>> import jax, jax.numpy as jnp, optax, subspace_optax as so
    >>> from flax import linen as nn
    >>> from subspace_optax import rso
    >>> model, x = nn.Dense(32, use_bias=False), jnp.ones((4, 16))
    >>> lifted = rso.lift(
    ...   model.init(jax.random.key(0), x)['params'],
    ...   {'kernel': jnp.ones((16, 2))},
    ...   {'kernel': jnp.zeros((2, 32))},
    ...   so.SubspaceSpec(rank=2),
    ... )
    >>> rso.linen_apply(model, {'params': lifted}, x).shape
    (4, 32)
  """
  apply = model.apply if isinstance(model, nn.Module) else model
  with nn.intercept_methods(_intercept):
    return apply(variables, *args, **kwargs)


def _intercept(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
  module = context.module
  params = {} if module.scope is None else module.variables.get('params', {})
  found = {name: _trees.lifted_in(x) for name, x in params.items()}
  found = {name: x for name, x in found.items() if x is not None}
  if not found:
    return method(*args, **kwargs)
  known = isinstance(module, _LINEAR) and context.method_name == '__call__'
  if not known or list(found) != ['kernel']:
    raise _trees.not_linear(next(iter(found.values())), module, _LINEAR)
  return _apply_layer(module, params, found['kernel'], args, kwargs)


def _apply_layer(module, params, w: _lifted.Lifted, args, kwargs) -> Any:
  """Applies a copy of a layer with a plain kernel and the lifted product."""
  made = module.dot_general_cls
  product = made() if made else module.dot_general or lax.dot_general

  def lifted_product(x, kernel, numbers, **kwargs):
    lifted = w.with_kernel(kernel)
    return _lifted.dot_general(product, x, lifted, numbers, **kwargs)

  copy = module.clone(
    parent=None, dot_general=lifted_product, dot_general_cls=None
  )
  box = params['kernel']
  is_box = isinstance(box, meta.AxisMetadata)
  kernel = box.replace_boxed(w.kernel) if is_box else w.kernel
  params = {**params, 'kernel': kernel}
  return copy.apply({'params': params}, *args, **kwargs)
