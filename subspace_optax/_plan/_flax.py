# Copyright 2026 The subspace_optax Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Models of others for `plan`: nnx and linen modules, by import path too."""

import importlib
from typing import Any

from flax import linen
from flax import nnx
import jax
import jax.numpy as jnp

from subspace_optax import _tree
from subspace_optax._plan import _models


def resolve(
  model: Any, param_dtype: Any, dtype: Any, seq: int, attention_chunk: int
) -> Any:
  """Returns the `Model` that a name, a path or a callable stands for."""
  if isinstance(model, _models.Model):
    return model
  if isinstance(model, str) and ':' not in model:
    return _models.named(model, param_dtype, dtype, attention_chunk)
  name, make = (
    (model, imported(model))
    if isinstance(model, str)
    else (getattr(model, '__name__', 'model'), model)
  )
  made = _made(name, make)
  if isinstance(made, _models.Model):
    return made
  if isinstance(made, linen.Module):
    return _of_linen(name, made, seq, param_dtype)
  if isinstance(made, tuple):
    graph, params, rest = made
    return _of_nnx(name, graph, params, rest, param_dtype)
  raise ValueError(
    f'model={name!r} gave {type(made).__name__}; expected a callable without '
    'arguments that returns an nnx module, a linen module or a plan.Model.'
  )


def imported(path: str) -> Any:
  """Returns what 'package.module:name' names."""
  module, _, name = path.partition(':')
  try:
    found: Any = importlib.import_module(module)
    for part in name.split('.'):
      found = getattr(found, part)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
      f'model={path!r} can not be imported: {error}. Give '
      f'package.module:callable, or choose from {sorted(_models.NAMED)}.'
    ) from error
  return found


def _made(name: str, make: Any) -> Any:
  """Returns a linen module, a `Model`, or the graph and shapes of nnx."""
  if isinstance(make, linen.Module):
    return make
  if isinstance(make, nnx.Module):
    return nnx.split(make, nnx.Param, ...)
  if not callable(make):
    return make
  plain: list[Any] = []

  def call() -> Any:
    made = make()
    if isinstance(made, nnx.Module):
      return made
    plain.append(made)
    return None

  try:
    made = nnx.eval_shape(call)
  except TypeError as error:
    raise ValueError(
      f'model={name!r} can not be called without arguments: {error}'
    ) from error
  return plain[0] if plain else nnx.split(made, nnx.Param, ...)


def _cast(params: Any, dtype: Any) -> Any:
  """Returns shapes, those of floating-point numbers in a dtype."""

  def shape(x: Any) -> jax.ShapeDtypeStruct:
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(
      x.shape, jnp.dtype(dtype) if floats else x.dtype
    )

  return jax.tree.map(shape, params)


def _of_nnx(name: str, graph: Any, params: Any, rest: Any, dtype: Any) -> Any:
  params = _cast(nnx.to_pure_dict(params), dtype)
  rest = _zeros_like(rest)

  def whole(params: Any, tokens: Any) -> Any:
    made = nnx.merge(graph, nnx.State(params), rest())
    return _models.cross_entropy(made(tokens), tokens)

  return _models.Model(name, params, _models.tokens, whole=whole)


def _zeros_like(state: Any) -> Any:
  """Returns a maker of arrays in place of shapes, when it is traced."""

  def zeros(x: Any) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return (
        jax.random.key(0)
        if not x.shape
        else jax.random.split(jax.random.key(0), x.shape)
      )
    return jnp.zeros(x.shape, x.dtype)

  return lambda: jax.tree.map(zeros, state)


def _of_linen(name: str, made: Any, seq: int, dtype: Any) -> Any:
  shape = _models.tokens(1, seq)
  init = lambda x: made.init(jax.random.key(0), x)
  variables = dict(jax.eval_shape(init, shape))
  params = _cast(_tree.unbox(variables.pop('params')), dtype)
  others = {k: _zeros_like(_tree.unbox(v)) for k, v in variables.items()}

  def whole(params: Any, tokens: Any) -> Any:
    rest = {k: v() for k, v in others.items()}
    logits = made.apply({'params': params, **rest}, tokens)
    return _models.cross_entropy(logits, tokens)

  return _models.Model(name, params, _models.tokens, whole=whole)
