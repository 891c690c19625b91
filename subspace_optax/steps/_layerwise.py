# SPDX-License-Identifier: Apache-2.0
"""Training steps that hold at most one layer's gradient in memory.

Lv et al., `LOMO <https://arxiv.org/abs/2306.09782>`_, 2023, and the per-layer
updates of Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024: the
backward pass updates a layer as soon as its gradient is known, and then drops
the gradient. Layers are stacked, and the pass is a loop over the stack that
changes parameters and optimizer states in place:

  forward: keep the input of every layer
  for the layers from last to first:
    compute the layer again, take its gradient, update it, pass on dL/dx

Recomputing the layers costs one more forward pass.
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import optax

from subspace_optax._chain import _offload
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _sharding
from subspace_optax.steps import _data_parallel
from subspace_optax.steps import _layers
from subspace_optax.steps import _stacked_states
from subspace_optax.steps import _stacks
from subspace_optax.steps import _train_step

_FETCHES = ('layer', 'leaf')


class LayerwiseState(NamedTuple):
  """State of a layer-wise step."""

  # The optimizer's state for the stack. The first axis of every leaf, counters
  # included, is the layer: each layer has its own optimizer.
  blocks: Any
  rest: Any  # the optimizer's state for all other parameters
  norm: jax.Array  # shape=(), dtype=float32, of the last step's gradient


class LayerwiseMetrics(NamedTuple):
  """Metrics of a layer-wise step."""

  loss: jax.Array  # shape=(), before the step
  norm: jax.Array  # shape=(), dtype=float32, of the whole unclipped gradient


class LayerwiseAuxMetrics(NamedTuple):
  """Metrics of a layer-wise step with `has_aux`."""

  loss: jax.Array  # shape=(), before the step
  norm: jax.Array  # shape=(), dtype=float32, of the whole unclipped gradient
  aux: Any  # auxiliary output of `head`


def layerwise(
  tx: optax.GradientTransformation,
  embed: Callable[[Any, Any], Any],
  block: Callable[..., Any],
  head: Callable[[Any, Any, Any], Any],
  *,
  stack: str = 'blocks',
  rest: optax.GradientTransformation | None = None,
  max_norm: float | None = None,
  clip: str = 'layer',
  with_index: bool = False,
  has_aux: bool = False,
  fetch: str = 'layer',
  mesh: Mesh | None = None,
  axis_name: str | tuple[str, ...] = 'data',
  check_vma: bool = True,
) -> _train_step.TrainStep:
  """Makes a training step whose backward pass updates layer by layer.

  The model is head(rest, block(... block(embed(rest)))), with one function for
  all blocks, whose parameters are stacked along their first axes.

  The optimizer sees one layer at a time, at the path of the stack and without
  the axis of layers, and all other parameters as one more tree. Masks and
  labels must be functions of such trees: of `{'blocks': {'w': ...}}`, and of
  the rest. Transformations of whole trees, such as `optax.clip_by_global_norm`
  or `optax.apply_if_finite`, see one layer here. Optimizers with extra
  arguments get `value`, the loss; `grad`, the gradient of that layer; and
  `layer`, its index, None for all other parameters, so that random rounding
  differs between layers (for states per matrix, a number for each matrix). Line
  searches, which need `value_fn`, can't work.

  Leaves of integers, booleans or random keys have no gradient. In `x` they may
  change from block to block; among the parameters they do not change, and the
  optimizer does not see them. Schedules count steps, as usual; with `stagger`,
  matrices of the stack take turns. To accumulate gradients, call the step for
  every micro-batch with `so.subspace(..., every_k=k)`, which accumulates
  coordinates; `optax.MultiSteps` works, too, but its sums are whole gradients
  of all layers. Under automatic or explicit sharding, gradients are summed over
  replicas layer by layer; `data_parallel_step` does not apply.

  Args:
    tx: the complete optimizer, learning rate included.
    embed: (rest, batch) -> x, the first layer's input: an array or a tree.
    block: (one layer's parameters, x, batch) -> x, of the same shapes; with
      `with_index`, (one layer's parameters, x, batch, index) -> x.
    head: (rest, x, batch) -> the loss, a scalar; with `has_aux`, (loss, aux).
    stack: path of the stacked blocks in the parameters, such as
      `decoder/layers`, in nested mappings. `embed` and `head` get the mapping
      without the stack, as a dict if its type is immutable.
    rest: optimizer for all other parameters, `tx` by default, which then need
      not find anything to project there.
    max_norm: the norm to which gradients are clipped; None for no clipping.
    clip: the norm that `max_norm` limits. 'layer' is the norm of each layer's
      gradient, and of the gradient of all other parameters. 'previous' is the
      norm of the whole gradient one step before; in the first step, and after a
      norm that was not finite, it is that of each layer. 'two_pass' is the norm
      of the whole gradient; the backward pass then runs twice.
    with_index: whether `block` takes the index of its layer, from 0, as a
      fourth argument. For dropout that differs by layer, put a random key into
      the batch and use `jax.random.fold_in(batch['key'], index)`: the backward
      pass recomputes the layer with the same mask.
    has_aux: whether `head` returns (loss, aux); `metrics.aux` is that tree.
    fetch: how state on the host (see `state_sharding`) moves to the device.
      'layer' moves a layer's state at once; the compiler overlaps the transfers
      with the layer's computation, as far as memory allows. 'leaf' moves it
      parameter by parameter after the layer's gradient, and large parameters of
      elementwise optimizers in rows, so that hardly any state is on the device
      at a time. The state of all other parameters moves by leaf.
    mesh: if given, the step works as in `data_parallel_step`: devices along
      `axis_name` project the gradients of their own parts of the batch, and
      average the coordinates layer by layer. For arrays of the batch the same
      rules hold: a random key is the same everywhere. The norm of the mean
      gradient is not known; `metrics.norm` is the square root of the mean of
      the devices' squared norms.
    axis_name: one or several mesh axes along which devices have different parts
      of a batch.
    check_vma: see `data_parallel_step`.

  Returns:
    The step. Parameters keep their treedef. To set numbers of the state for all
    layers at once, use `optax.tree.set(state, learning_rate=0.01)`.

  Raises:
    ValueError: an unknown `clip` or `fetch`; an axis without a mesh; a mesh
      that lacks the axis, has explicit axes, or is used with `max_norm` or
      `has_aux`; at `init`, no mapping at `stack`, leaves that disagree on the
      number of layers, or a spec that takes the axis of layers for an axis of a
      matrix; at the step, a block that changes the shapes of its input, or a
      head that does not return a scalar.

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
    >>> update = jax.jit(step.step, donate_argnums=(0, 1))
    >>> params, state, metrics = update(params, state, jnp.ones((8, 16)))
    >>> metrics.loss.shape
    ()
  """
  if clip not in _layers.CLIPS:
    raise ValueError(f'clip must be one of {_layers.CLIPS}, got {clip!r}.')
  if fetch not in _FETCHES:
    raise ValueError(f'fetch must be one of {_FETCHES}, got {fetch!r}.')
  if max_norm is not None and not max_norm > 0:
    raise ValueError(f'max_norm must be positive, got {max_norm}.')
  devices = _data_parallel.Devices()
  if mesh is None and axis_name != 'data':
    raise ValueError(f'axis_name={axis_name!r} without a mesh: give mesh=.')
  if mesh is not None:
    devices = _data_parallel.Devices.along(mesh, axis_name)
    _check_parallel(max_norm, has_aux)
  # The boxes of one layer have other axis names than those of the stack.
  bare = lambda tx: _boxes.without_boxes(optax.with_extra_args_support(tx))
  stack_tx, rest_tx = bare(tx), bare(tx if rest is None else rest)
  keys = stack.split('/')
  # `tx` was made for the whole tree, so it may find nothing to project in the
  # rest. An optimizer passed as `rest` must.
  leniently = _notices.lenient if rest is None else contextlib.nullcontext

  def parted(params):
    blocks, others = _stacks.take(params, keys)
    _stacks.count(blocks)
    return _stacks.split(blocks), _stacks.split(others)

  def init(params):
    (blocks, _), (others, _) = parted(params)
    with _note_of_trees(stack):
      own = _stacked_states.init(stack_tx, _stacks.nest(blocks, keys))
      with leniently():
        of_rest = rest_tx.init(others)
    state = LayerwiseState(own, of_rest, jnp.zeros((), jnp.float32))
    return _sharding.on_mesh_of(jax.tree.leaves(params), state)

  def update(params, state, batch):
    (blocks, fixed), (others, fixed_others) = parted(params)
    states = _stacked_states.with_layers(
      stack_tx, _stacks.nest(blocks, keys), state.blocks
    )
    with leniently():
      _stacked_states.check_rest(rest_tx, others, state.rest)
    model = _layers.Model(
      embed,
      block,
      head,
      batch,
      fixed,
      fixed_others,
      with_index,
      has_aux,
      devices,
    )
    bottom, inputs, top = _layers.run_forward(model, blocks, others)

    def first_pass():
      squares, gx = _layers.squares_of_stack(model, blocks, inputs, top.gx)
      return jnp.sqrt(squares + _layers.sum_squares(of_rest(gx)))

    of_rest = lambda gx: optax.tree.add(top.of_rest, bottom(gx)[0])
    clipped = _layers.clipping(max_norm, clip, state.norm, first_pass)

    loss = devices.mean(top.loss)

    def update_with(tx, gradient, own, params, i=None):
      # Rounding at random asks which layer it is, or all would round alike.
      extra = dict(value=loss, grad=gradient, layer=i)
      run = functools.partial(devices.update, tx, **extra)
      by_leaf = i is None or fetch == 'leaf'
      way = _offload.update_in_turns if by_leaf else _offload.update_at_once
      return way(run, gradient, own, params, i)

    def step(layer, own, gradient, i):
      gradient, squares = clipped(gradient)
      gradient, layer = (_stacks.nest(x, keys) for x in (gradient, layer))
      updates, own = update_with(stack_tx, gradient, own, layer, i)
      return _stacks.take(updates, keys)[0], own, devices.mean(squares)

    blocks, own, squares, gx = _layers.run_backward(
      model, step, blocks, states, inputs, top.gx
    )
    gradient, more = clipped(of_rest(gx))
    with leniently():
      updates, rest = update_with(rest_tx, gradient, state.rest, others)
    others = optax.apply_updates(others, updates)
    params = _stacks.put(
      params,
      keys,
      _stacks.join(blocks, fixed),
      _stacks.join(others, fixed_others),
    )
    metrics = LayerwiseMetrics(loss, jnp.sqrt(squares + devices.mean(more)))
    state = LayerwiseState(own, rest, metrics.norm)
    if has_aux:
      metrics = LayerwiseAuxMetrics(*metrics, top.aux)
    return params, state, metrics

  def gradients(params, state):
    del state
    (blocks, _), (others, _) = parted(params)
    return _stacks.layer_shapes(blocks), others

  return _train_step.TrainStep(
    init,
    devices.map(update, check_vma),
    gradients=gradients,
    replicated=devices.names,
    mesh=mesh,
    streams=mesh is None,
  )


def _check_parallel(max_norm: float | None, has_aux: bool) -> None:
  """Raises for options that devices with their own gradients can't support."""
  if max_norm is not None:
    raise ValueError(
      f'max_norm={max_norm} with a mesh: no device knows the norm of the mean '
      'gradient; clip coordinates in the inner optimizer.'
    )
  if has_aux:
    raise ValueError(
      'has_aux=True with a mesh: every device has auxiliary results of its own.'
    )


@contextlib.contextmanager
def _note_of_trees(stack: str) -> Iterator[None]:
  """Adds to errors of an optimizer's `init` which trees it gets."""
  try:
    yield
  except Exception as error:
    error.add_note(
      f'`layerwise` gives the optimizer one layer at the path {stack!r}, and '
      'all other parameters apart: masks and labels must be functions of such '
      'trees.'
    )
    raise
