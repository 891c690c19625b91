# SPDX-License-Identifier: Apache-2.0
"""A training step's memory besides parameters and state, from its trace."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _notices
from subspace_optax._matrix import _tree
from subspace_optax.plan import _liveness
from subspace_optax.plan import _models
from subspace_optax.steps import _stacks
from subspace_optax.steps import _train_step


class Kept(NamedTuple):
  """Bytes of a forward and backward pass.

  Attributes:
    activations: bytes that the forward pass keeps for the backward pass.
    peak: the most bytes that both hold at once, gradients included.
    held: bytes besides gradients that remain while a layer is updated.
  """

  activations: int
  peak: int
  held: int = 0


def loss_of(model: _models.Model, remat: bool) -> Any:
  """Returns (params, inputs) -> loss, by a scan over the stack, if any."""
  if model.whole is not None:
    return model.whole

  def loss(params: Any, inputs: Any) -> Any:
    stack, rest = model.parts(params)
    step = lambda x, layer: (model.block(layer, x), None)
    step = jax.checkpoint(step) if remat else step
    x, _ = jax.lax.scan(step, model.embed(rest, inputs), stack)
    return model.head(rest, x, inputs)

  return loss


def _vjp_leaves(f: Any, *args: Any) -> Any:
  value, vjp = jax.vjp(f, *args)
  return value, jax.tree.leaves(vjp)


def _traced(f: Any, *args: Any) -> _liveness.Trace:
  return _liveness.flatten(jax.make_jaxpr(f)(*args))


def _with_gradients(trace: _liveness.Trace, sizes: Sequence[int]) -> Any:
  """Returns a trace whose last results have other sizes in bytes."""
  outputs = trace.outputs[len(trace.outputs) - len(sizes) :]
  new = dict(zip(outputs, sizes, strict=True))
  return trace._replace(sizes=trace.sizes | new)


def ordinary(
  model: _models.Model,
  params: Any,
  inputs: Any,
  remat: bool,
  sizes: Sequence[int],
) -> Kept:
  """Counts a step with all gradients at once, given their bytes."""
  loss = loss_of(model, remat)
  f = lambda p, x: _vjp_leaves(lambda p: loss(p, x), p)
  activations = _liveness.residuals(_traced(f, params, inputs), 1)
  gradients = jax.value_and_grad(loss)
  backward = _with_gradients(_traced(gradients, params, inputs), sizes)
  return Kept(activations, _liveness.peak(backward))


def layerwise(
  model: _models.Model, params: Any, inputs: Any, gradients: int, rest: int
) -> Kept:
  """Counts a step that has one layer's gradient at a time.

  Args:
    model: a model in pieces.
    params: shapes of a device's parameters.
    inputs: shapes of the inputs.
    gradients: bytes of the gradients of the stack.
    rest: bytes of all other gradients.
  """
  stacked, others = model.parts(params)
  layer, layers = (
    _stacks.layer_shapes(stacked),
    jax.tree.leaves(stacked)[0].shape[0],
  )
  x = jax.eval_shape(model.embed, others, inputs)

  def backward(layer, x, gradient):
    _, vjp = jax.vjp(model.block, layer, x)
    return vjp(gradient)

  # Checkpointed, so that it keeps no logits.
  top = jax.value_and_grad(jax.checkpoint(model.head), argnums=(0, 1))
  forward = _liveness.peak(_traced(model.block, layer, x))
  at_head = _liveness.peak(_traced(top, others, x, inputs))
  in_layer = _liveness.peak(_traced(backward, layer, x, x), count_outputs=False)
  in_layer += gradients // layers + _liveness.bytes_of(x) + rest
  kept = _traced(functools.partial(_vjp_leaves, model.block), layer, x)
  between = layers * _liveness.bytes_of(x)
  return Kept(
    between + _liveness.residuals(kept, 1),
    between + max(forward, at_head, in_layer),
    between + _liveness.bytes_of(x),
  )


def given_gradients(tx: Any) -> _train_step.TrainStep:
  """Returns an optimizer's step after the backward pass.

  Its batch is the gradients.
  """
  as_given = lambda loss: lambda params, gradients: (None, gradients)
  no_loss = lambda params, gradients: jnp.zeros(())
  return _train_step.train_step(no_loss, tx, value_and_grad=as_given)


def update_workspace(step: _train_step.TrainStep, params: Any) -> int:
  """Returns what an update holds besides gradients, one leaf after another."""
  found: dict[Any, int] = {}
  for path, x in jax.tree.flatten_with_path(params)[0]:
    keys = _tree.path_str(path).split('/')
    leaf = _stacks.nest(jax.ShapeDtypeStruct(x.shape, x.dtype), keys)
    with _notices.quiet(errors=True):
      state = jax.eval_shape(step.init, leaf)
    # Leaves of the same shape and the same state take the same memory.
    key = tuple((x.shape, x.dtype) for x in jax.tree.leaves((leaf, state)))
    if key not in found:
      trace = _traced(step.step, leaf, state, step.gradients(leaf, state))
      found[key] = _liveness.peak(trace, count_outputs=False)
  return max(found.values(), default=0)
