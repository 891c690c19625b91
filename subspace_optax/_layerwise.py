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
"""Training steps in which no more than one layer's gradient is alive.

Lv et al., `LOMO <https://arxiv.org/abs/2306.09782>`_, 2023, and the per-layer
updates of Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024: the
backward pass updates a layer as soon as its gradient is known, and drops the
gradient. Layers are stacked, and the pass is a loop over the stack, whose
parameters and optimizer states are changed in place:

  forward: keep the input of every layer
  for the layers from last to first:
    compute the layer again, take its gradient, update it, pass on dL/dx

It costs what recomputing layers costs: one more forward pass.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from subspace_optax import _describe
from subspace_optax import _sharding
from subspace_optax import _tree

CLIPS = ('layer', 'previous', 'two_pass')


class LayerwiseState(NamedTuple):
  """State of a layer-wise step."""

  # The optimizer's state for the stack; every leaf's first axis counts layers,
  # counters included: each layer has an optimizer of its own.
  blocks: Any
  rest: Any  # its state for all other parameters
  norm: jax.Array  # shape=(), dtype=float32, of the last step's gradient


class LayerwiseMetrics(NamedTuple):
  """What a layer-wise step returns besides."""

  loss: jax.Array  # shape=(), before the step
  norm: jax.Array  # shape=(), dtype=float32, of the whole gradient, not clipped


@dataclasses.dataclass(frozen=True)
class Layerwise:
  """A layer-wise training step, made by `layerwise`.

  Attributes:
    init: params -> state.
    update: (params, state, batch) -> (params, state, metrics), to be jitted
      with params and state donated.
    gradients: params -> what is alive of their gradient at a time: that of one
      layer, and of all that is no layer.
  """

  init: Callable[[Any], LayerwiseState]
  update: Callable[[Any, LayerwiseState, Any], Any]
  gradients: Callable[[Any], Any]


def layerwise(
  tx: optax.GradientTransformation,
  embed: Callable[[Any, Any], Any],
  block: Callable[[Any, Any, Any], Any],
  head: Callable[[Any, Any, Any], jax.Array],
  *,
  stack: str = 'blocks',
  rest: optax.GradientTransformation | None = None,
  max_norm: float | None = None,
  clip: str = 'layer',
) -> Layerwise:
  """Makes a training step whose backward pass updates layer by layer.

  The model is head(rest, block(... block(embed(rest)))), with one function for
  all blocks, whose parameters are stacked along their first axes.

  An optimizer sees one layer at a time, and all other parameters as one more.
  What looks at the whole tree, such as `optax.clip_by_global_norm` or
  `optax.apply_if_finite`, looks at one layer here. Schedules count steps, as
  ever; with `stagger`, matrices take turns among those of the stack. To
  accumulate gradients, call the step for every micro-batch with
  `so.subspace(..., every_k=k)`, which keeps them r-sized; `optax.MultiSteps`
  works, too, but its sums are whole gradients of all layers. Under automatic or
  explicit sharding, gradients are summed over replicas layer by layer;
  `data_parallel_step` does not apply.

  Args:
    tx: the optimizer, with learning rate and all.
    embed: (rest, batch) -> x, the first layer's input: an array or a tree.
    block: (one layer's parameters, x, batch) -> x, of the same shapes.
    head: (rest, x, batch) -> the loss, a scalar.
    stack: the path of the stacked blocks among the parameters, as
      `decoder/layers`, in nested mappings.
    rest: the optimizer of all other parameters; `tx` by default, whose
      `SubspaceSpec` then needs `allow_empty`.
    max_norm: what gradients' norms are clipped to; None for no clipping.
    clip: of which gradient `max_norm` is the norm. 'layer': each layer's own,
      and that of all else. 'previous': of the whole gradient one step before
      (each layer's own in the first step). 'two_pass': of the whole gradient,
      for which the backward pass runs twice.

  Returns:
    The step, as `init` and `update`.

  Raises:
    ValueError: an unknown `clip`; at `init`, no mapping at `stack`, leaves that
      disagree on the number of layers, or an optimizer whose state for a stack
      is no stack of states; at `update`, a block that changes its input's
      shapes.

  References:
    Lv et al., `Full Parameter Fine-tuning for Large Language Models with
    Limited Resources <https://arxiv.org/abs/2306.09782>`_, 2023; Zhao et al.,
    `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Section 4.3

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> params = {
    ...   'blocks': {'w': jnp.ones((3, 16, 16)) / 16},
    ...   'head': jnp.ones((16, 1)),
    ... }
    >>> step = so.layerwise(
    ...   so.golore(1e-3, rank=4),
    ...   embed=lambda rest, batch: batch,
    ...   block=lambda layer, x, batch: x + jnp.tanh(x @ layer['w']),
    ...   head=lambda rest, x, batch: jnp.mean((x @ rest['head']) ** 2),
    ... )
    >>> state = step.init(params)
    >>> update = jax.jit(step.update, donate_argnums=(0, 1))
    >>> params, state, metrics = update(params, state, jnp.ones((8, 16)))
    >>> metrics.loss.shape
    ()
  """
  if clip not in CLIPS:
    raise ValueError(f'clip must be one of {CLIPS}, got {clip!r}.')
  if max_norm is not None and not max_norm > 0:
    raise ValueError(f'max_norm must be positive, got {max_norm}.')
  stack_tx = optax.with_extra_args_support(tx)
  rest_tx = optax.with_extra_args_support(tx if rest is None else rest)
  keys = stack.split('/')

  def init(params):
    blocks, others = _take(params, keys)
    state = LayerwiseState(
      _init_stack(stack_tx, _nest(blocks, keys)),
      rest_tx.init(others),
      jnp.zeros((), jnp.float32),
    )
    return _sharding.on_mesh_of(jax.tree.leaves(params), state)

  def update(params, state, batch):
    blocks, others = _take(params, keys)
    below, back_to_embed = jax.vjp(lambda r: embed(r, batch), others)
    run = lambda layer, x: _same_shapes(block(layer, x, batch), x)
    top, inputs = lax.scan(lambda x, layer: (run(layer, x), x), below, blocks)
    loss, back = jax.vjp(lambda r, x: head(r, x, batch), others, top)
    of_head, at_top = back(jnp.ones_like(loss))
    factor = functools.partial(_factor, max_norm)
    shared = None
    if max_norm is not None and clip == 'two_pass':
      norm, gx = _norm_of_stack(run, blocks, inputs, at_top)
      whole = optax.tree.add(of_head, back_to_embed(gx)[0])
      shared = factor(jnp.sqrt(norm + _squares(whole)))
    if max_norm is not None and clip == 'previous':
      shared = factor(state.norm)
    first = state.norm == 0  # there is no previous one yet

    def clipped(gradient):
      squares = _squares(gradient)
      if max_norm is None:
        return gradient, squares
      scale = shared
      if clip != 'two_pass':
        own = factor(jnp.sqrt(squares))
        scale = own if shared is None else jnp.where(first, own, shared)
      times = lambda x: (x * scale).astype(x.dtype)
      return jax.tree.map(times, gradient), squares

    def step(layer, own, gradient):
      gradient, squares = clipped(gradient)
      updates, own = stack_tx.update(
        _nest(gradient, keys), own, _nest(layer, keys)
      )
      return _take(updates, keys)[0], own, squares

    blocks, own, squares, gx = _backward(
      run, step, blocks, state.blocks, inputs, at_top
    )
    gradient = optax.tree.add(of_head, back_to_embed(gx)[0])
    gradient, more = clipped(gradient)
    updates, of_rest = rest_tx.update(gradient, state.rest, others)
    others = optax.apply_updates(others, updates)
    norm = jnp.sqrt(squares + more)
    params = _put(others, keys, blocks)
    return (
      params,
      LayerwiseState(own, of_rest, norm),
      LayerwiseMetrics(loss, norm),
    )

  def gradients(params):
    blocks, others = _take(params, keys)
    return jax.eval_shape(lambda x: _layer(x, 0), blocks), others

  return Layerwise(init, update, gradients)


def _backward(
  run: Callable[[Any, Any], Any],
  step: Callable[[Any, Any, Any], Any],
  blocks: Any,
  states: Any,
  inputs: Any,
  gx: Any,
) -> tuple[Any, Any, jax.Array, Any]:
  """Updates the layers from last to first.

  Returns:
    The blocks, their states, the gradient's squared norm, and dL/dx below.
  """
  last = _count(blocks) - 1

  def body(k, carry):
    stacks, new, squares, gx = carry
    i = last - k
    # What the last turn made is written at the start of this one: every read of
    # the stacks then comes after the write, so that nothing need be copied.
    stacks = _put_layer(stacks, jnp.minimum(i + 1, last), new)
    layer, own = _layer(stacks, i)
    _, back = jax.vjp(run, layer, _layer(inputs, i))
    gradient, gx = back(gx)
    updates, own, more = step(layer, own, gradient)
    new = optax.apply_updates(layer, updates), own
    return stacks, new, squares + more, gx

  stacks = blocks, states
  start = stacks, _layer(stacks, last), jnp.zeros((), jnp.float32), gx
  stacks, new, squares, gx = lax.fori_loop(0, last + 1, body, start)
  return *_put_layer(stacks, 0, new), squares, gx


def _norm_of_stack(
  run: Callable[[Any, Any], Any], blocks: Any, inputs: Any, gx: Any
) -> tuple[jax.Array, Any]:
  """Returns the squared norm of all layers' gradients, and dL/dx below."""

  def body(carry, of_layer):
    squares, gx = carry
    _, back = jax.vjp(run, *of_layer)
    gradient, gx = back(gx)
    return (squares + _squares(gradient), gx), None

  start = (jnp.zeros((), jnp.float32), gx)
  return lax.scan(body, start, (blocks, inputs), reverse=True)[0]


def _factor(max_norm: Any, norm: jax.Array) -> jax.Array:
  """Returns what a gradient of this norm is multiplied with."""
  return jnp.where(norm < max_norm, 1.0, max_norm / norm)


def _squares(tree: Any) -> jax.Array:
  """Returns the sum of squares in float32."""
  wide = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)))
  return sum(map(wide, jax.tree.leaves(tree)), jnp.zeros((), jnp.float32))


# Stacks.


def _layer(stack: Any, i: Any) -> Any:
  index = lambda x: lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
  return jax.tree.map(index, stack)


def _put_layer(stack: Any, i: Any, layer: Any) -> Any:
  put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)
  return jax.tree.map(put, stack, layer)


def _count(blocks: Any) -> int:
  """Returns the number of layers."""
  counts = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(blocks)}
  if len(counts) != 1 or 0 in counts:
    shapes = sorted({str(tuple(x.shape)) for x in jax.tree.leaves(blocks)})
    raise ValueError(
      'stacked blocks need one number of layers as the first size of every '
      f'leaf, got shapes {", ".join(shapes)}.'
    )
  return counts.pop()


def _init_stack(tx: optax.GradientTransformation, blocks: Any) -> Any:
  """Returns the state of a stack, every leaf with a first axis of layers."""
  count = _count(blocks)
  one = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), blocks
  )
  with _describe.unheard():
    one = jax.eval_shape(lambda x: tx.init(x), one)
  stack = tx.init(blocks)
  if jax.tree.structure(one) != jax.tree.structure(stack):
    raise ValueError(
      'the optimizer makes a state of another structure for one layer than for '
      f'the stack:\n{jax.tree.structure(one)}\n{jax.tree.structure(stack)}'
    )

  def stacked(path, of_one, x):
    if x.shape == (count, *of_one.shape):
      return x
    if x.shape == of_one.shape:  # a counter: each layer has its own
      return jnp.broadcast_to(x, (count, *x.shape))
    raise ValueError(
      f'state {_tree.path_str(path)!r} of a stack of {count} layers has shape '
      f'{x.shape}, that of one layer {of_one.shape}: not a stack of states. '
      "Projected kernels need the layers' axis apart from their matrix: see "
      '`weight_dimension_numbers` of SubspaceSpec.'
    )

  return jax.tree.map_with_path(stacked, one, stack)


def _same_shapes(new: Any, old: Any) -> Any:
  shape = lambda x: (x.shape, jnp.result_type(x))
  of = lambda tree: jax.tree.map(shape, tree)
  if of(new) != of(old):
    raise ValueError(
      f'block must return what it is given, {of(old)}, but returned {of(new)}.'
    )
  return new


# Parameters as nested mappings.


def _take(tree: Any, keys: Sequence[str]) -> tuple[Any, Any]:
  """Returns what is at a path, and the tree without it."""
  if not isinstance(tree, Mapping) or keys[0] not in tree:
    found = sorted(tree) if isinstance(tree, Mapping) else type(tree)
    raise ValueError(
      f'stack: no {keys[0]!r} among the parameters, only {found}.'
    )
  key, *more = keys
  rest = {k: v for k, v in tree.items() if k != key}
  if not more:
    return tree[key], _like(tree, rest)
  found, below = _take(tree[key], more)
  return found, _like(tree, rest | {key: below})


def _put(tree: Any, keys: Sequence[str], value: Any) -> Any:
  """Returns the tree with a value at a path."""
  key, *more = keys
  new = _put(tree[key], more, value) if more else value
  return _like(tree, {**tree, key: new})


def _like(tree: Any, items: dict[str, Any]) -> Any:
  """Returns a mapping of the same type."""
  return type(tree)(items)


def _nest(value: Any, keys: Sequence[str]) -> Any:
  """Returns the tree that holds a value alone, at a path."""
  for key in reversed(keys):
    value = {key: value}
  return value
