# SPDX-License-Identifier: Apache-2.0
"""Users' models for `plan`: nnx and linen modules, also by import path."""

from collections.abc import Callable, Mapping
import importlib
from typing import Any, NamedTuple

from flax import linen
from flax import nnx
import jax
import jax.numpy as jnp

from subspace_optax._matrix import _tree
from subspace_optax.plan import _models

_REMEDY = (
  'It must take an integer array (batch, seq) and return logits (batch, seq, '
  'vocabulary), alone or first in a tuple; for other arguments or another loss '
  'give a plan.Model, with `inputs` and `whole`.'
)


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
  if isinstance(made, _Split):
    return _of_nnx(name, made, param_dtype)
  raise ValueError(
    f'model={name!r} gave {type(made).__name__}; expected a callable without '
    'arguments that returns an nnx module, a linen module or a plan.Model.'
  )


class _Split(NamedTuple):
  """An nnx module, as `nnx.split` returns it."""

  graph: Any
  params: Any
  rest: Any


def imported(path: str) -> Any:
  """Returns the object that 'package.module:name' names."""
  module, _, name = path.partition(':')
  try:
    found: Any = importlib.import_module(module)
    for part in name.split('.'):
      found = getattr(found, part)
  except (Exception, SystemExit) as error:  # the module may raise anything
    raise ValueError(
      f'model={path!r} cannot be imported: {_said(error)}. Give '
      f'package.module:callable, or choose from {sorted(_models.NAMED)}.'
    ) from error
  return found


def _said(error: BaseException) -> str:
  """Returns an error's type and first line."""
  first, *_ = [*str(error).splitlines(), '']
  return f'{type(error).__name__}: {first.rstrip(".")}'


def _theirs(name: str, call: Callable[..., Any], tokens: Any) -> Any:
  """Returns a model's output for tokens; raises with one sentence on errors."""
  try:
    return call(tokens)
  except Exception as error:  # in users' code
    raise ValueError(
      f'model={name!r} cannot be called with tokens of shape '
      f'{tuple(tokens.shape)} alone: {_said(error)}. {_REMEDY}'
    ) from error


def _made(name: str, make: Any) -> Any:
  """Returns a linen module, a `Model`, or the graph and shapes of nnx."""
  if isinstance(make, linen.Module):
    return make
  if isinstance(make, nnx.Module):
    return _Split(*nnx.split(make, nnx.Param, ...))
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
  except Exception as error:  # in users' code
    raise ValueError(
      f'model={name!r} cannot be called without arguments: {_said(error)}. '
      'Give a callable that makes the model.'
    ) from error
  return plain[0] if plain else _Split(*nnx.split(made, nnx.Param, ...))


def _cast(params: Any, dtype: Any) -> Any:
  """Returns shapes, with floating-point numbers in a dtype."""

  def shape(x: Any) -> jax.ShapeDtypeStruct:
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(
      x.shape, jnp.dtype(dtype) if floats else x.dtype
    )

  return jax.tree.map(shape, params)


def _of_nnx(name: str, split: _Split, dtype: Any) -> Any:
  params = _cast(nnx.to_pure_dict(split.params), dtype)
  rest = _zeros_like(split.rest)

  def whole(params: Any, tokens: Any) -> Any:
    made = nnx.merge(split.graph, nnx.State(params), rest())
    return _cross_entropy(name, _theirs(name, made, tokens), tokens)

  return _models.Model(name, params, _models.tokens, whole=whole)


def _zeros_like(state: Any) -> Any:
  """Returns a function that makes zeros of these shapes when traced."""

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
  """Returns the model of a training step, in which nothing is frozen.

  Other random streams of the model fall back on 'params'.
  """
  rngs = lambda: {'params': jax.random.key(0)}
  init = lambda x: made.init(rngs(), x)
  first = lambda x: jax.eval_shape(init, x)
  variables = dict(_theirs(name, first, _models.tokens(1, seq)))
  if 'params' not in variables:
    raise ValueError(
      f"model={name!r} has no collection 'params' to be trained, only "
      f'{sorted(variables)}.'
    )
  params = _cast(_tree.unbox(variables.pop('params')), dtype)
  others = {k: _zeros_like(_tree.unbox(v)) for k, v in variables.items()}

  def whole(params: Any, tokens: Any) -> Any:
    variables = {'params': params, **{k: v() for k, v in others.items()}}
    apply = lambda x: made.apply(variables, x, rngs=rngs(), mutable=[*others])
    found, _ = _theirs(name, apply, tokens)
    return _cross_entropy(name, found, tokens)

  return _models.Model(name, params, _models.tokens, whole=whole)


def _cross_entropy(name: str, found: Any, tokens: Any) -> Any:
  """Returns the loss for a model's output."""
  logits = _logits(found)
  shape = getattr(logits, 'shape', None)
  if shape is None or len(shape) != 3 or shape[:2] != tokens.shape:
    what = type(logits).__name__ if shape is None else f'shape {tuple(shape)}'
    raise ValueError(
      f'model={name!r} made {what} of tokens of shape {tuple(tokens.shape)}. '
      + _REMEDY
    )
  return _models.cross_entropy(logits, tokens)


def _logits(found: Any) -> Any:
  """Returns the logits from a model's output, in the forms of Flax's models."""
  if hasattr(found, 'logits'):
    return found.logits
  if isinstance(found, Mapping):
    return found.get('logits', found)
  return found[0] if isinstance(found, tuple | list) and found else found
