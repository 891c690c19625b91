# SPDX-License-Identifier: Apache-2.0
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

from collections.abc import Callable, Iterator
import contextlib
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _sharding
from subspace_optax.steps import _stacks
from subspace_optax.steps import _train_step

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


class LayerwiseAuxMetrics(NamedTuple):
  """What a layer-wise step with `has_aux` returns besides."""

  loss: jax.Array  # shape=(), before the step
  norm: jax.Array  # shape=(), dtype=float32, of the whole gradient, not clipped
  aux: Any  # what `head` returned beside the loss


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
) -> _train_step.TrainStep:
  """Makes a training step whose backward pass updates layer by layer.

  The model is head(rest, block(... block(embed(rest)))), with one function for
  all blocks, whose parameters are stacked along their first axes.

  An optimizer sees one layer at a time, at the path of the stack and without
  the axis of layers, and all other parameters as one more tree. Masks and
  labels must be functions of such trees: of `{'blocks': {'w': ...}}`, and of
  the rest. What looks at the whole tree, such as `optax.clip_by_global_norm` or
  `optax.apply_if_finite`, looks at one layer here. Optimizers that take `value`
  and `grad`, such as `optax.contrib.reduce_on_plateau`, get the loss and the
  gradient of that layer; line searches, which need `value_fn`, can't work.
  Leaves of integers, booleans or random keys have no gradient: in `x` they may
  change from block to block; among the parameters they stay as they are, unseen
  by the optimizer. Schedules count steps, as ever; with `stagger`, matrices
  take turns among those of the stack. To accumulate gradients, call the step
  for every micro-batch with `so.subspace(..., every_k=k)`, which keeps them
  r-sized; `optax.MultiSteps` works, too, but its sums are whole gradients of
  all layers. Under automatic or explicit sharding, gradients are summed over
  replicas layer by layer; `data_parallel_step` does not apply.

  Args:
    tx: the optimizer, with learning rate and all.
    embed: (rest, batch) -> x, the first layer's input: an array or a tree.
    block: (one layer's parameters, x, batch) -> x, of the same shapes; with
      `with_index`, (one layer's parameters, x, batch, index) -> x.
    head: (rest, x, batch) -> the loss, a scalar; with `has_aux`, (loss, aux).
    stack: the path of the stacked blocks among the parameters, as
      `decoder/layers`, in nested mappings. `embed` and `head` get the mapping
      without the stack, as a dict if its type is immutable.
    rest: the optimizer of all other parameters; `tx` by default, whose
      `SubspaceSpec` then needs `allow_empty`.
    max_norm: what gradients' norms are clipped to; None for no clipping.
    clip: of which gradient `max_norm` is the norm. 'layer': each layer's own,
      and that of all else. 'previous': of the whole gradient one step before
      (each layer's own in the first step, and after one that was not finite).
      'two_pass': of the whole gradient, for which the backward pass runs twice.
    with_index: whether `block` takes the number of its layer, from 0, as a
      fourth argument. For dropout that differs by layer, put a random key into
      the batch and use `jax.random.fold_in(batch['key'], index)`: the backward
      pass computes the layer again with the same mask.
    has_aux: whether `head` returns (loss, aux); `metrics.aux` is that tree.

  Returns:
    The step. Parameters keep their treedef. Numbers of
    the state may be set for all layers at once by `optax.tree.set(state,
    learning_rate=0.01)`.

  Raises:
    ValueError: an unknown `clip`; at `init`, no mapping at `stack`, leaves that
      disagree on the number of layers, or a spec that takes the axis of layers
      for one of a matrix; at the step, a block that changes its input's shapes,
      or a head that returns no scalar.

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
  if clip not in CLIPS:
    raise ValueError(f'clip must be one of {CLIPS}, got {clip!r}.')
  if max_norm is not None and not max_norm > 0:
    raise ValueError(f'max_norm must be positive, got {max_norm}.')
  # One layer's boxes have other names than the stack's.
  bare = lambda tx: _boxes.without_boxes(optax.with_extra_args_support(tx))
  stack_tx, rest_tx = bare(tx), bare(tx if rest is None else rest)
  keys = stack.split('/')

  def parted(params):
    blocks, others = _stacks.take(params, keys)
    _stacks.count(blocks)
    return _stacks.split(blocks), _stacks.split(others)

  def init(params):
    (blocks, _), (others, _) = parted(params)
    with _note_of_trees(stack):
      own = _stacks.init(stack_tx, _stacks.nest(blocks, keys))
      with _notices.lenient():
        of_rest = rest_tx.init(others)
    state = LayerwiseState(own, of_rest, jnp.zeros((), jnp.float32))
    return _sharding.on_mesh_of(jax.tree.leaves(params), state)

  def update(params, state, batch):
    (blocks, fixed), (others, fixed_others) = parted(params)
    of_blocks = _stacks.nest(blocks, keys)
    states = _stacks.with_layers(stack_tx, of_blocks, state.blocks)
    _stacks.check_rest(rest_tx, others, state.rest)
    embedded = lambda r: _stacks.split(
      embed(_stacks.join(r, fixed_others), batch)
    )
    below, back_to_embed, fixed_below = jax.vjp(embedded, others, has_aux=True)

    def run(i, layer, x):
      layer = _stacks.join(layer, _stacks.layer(fixed, i))
      x = _stacks.join(*x)
      new = block(layer, x, batch, *((i,) if with_index else ()))
      return _stacks.split(_same_shapes(new, x))

    last = _stacks.count(blocks) - 1
    (top, fixed_top), inputs = lax.scan(
      lambda x, of: (run(*of, x), x),
      (below, fixed_below),
      (jnp.arange(last + 1), blocks),
    )

    def headed(r, x):
      r, x = _stacks.join(r, fixed_others), _stacks.join(x, fixed_top)
      return _loss_and_aux(head(r, x, batch), has_aux)

    loss, back, aux = jax.vjp(headed, others, top, has_aux=True)
    of_head, at_top = back(jnp.ones_like(loss))
    of_rest = lambda gx: optax.tree.add(of_head, back_to_embed(gx)[0])

    def first_pass():
      squares, gx = _squares_of_stack(run, blocks, inputs, at_top)
      return jnp.sqrt(squares + _squares(of_rest(gx)))

    clipped = _clipping(max_norm, clip, state.norm, first_pass)

    def step(layer, own, gradient):
      gradient, squares = clipped(gradient)
      gradient = _stacks.nest(gradient, keys)
      updates, own = stack_tx.update(
        gradient, own, _stacks.nest(layer, keys), value=loss, grad=gradient
      )
      return _stacks.take(updates, keys)[0], own, squares

    blocks, own, squares, gx = _backward(
      run, step, blocks, states, inputs, at_top
    )
    gradient, more = clipped(of_rest(gx))
    updates, rest = rest_tx.update(
      gradient, state.rest, others, value=loss, grad=gradient
    )
    others = optax.apply_updates(others, updates)
    params = _stacks.put(
      params,
      keys,
      _stacks.join(blocks, fixed),
      _stacks.join(others, fixed_others),
    )
    metrics = LayerwiseMetrics(loss, jnp.sqrt(squares + more))
    state = LayerwiseState(own, rest, metrics.norm)
    if has_aux:
      metrics = LayerwiseAuxMetrics(*metrics, aux)
    return params, state, metrics

  def gradients(params, state):
    del state
    (blocks, _), (others, _) = parted(params)
    return _stacks.layer_shapes(blocks), others

  return _train_step.TrainStep(init, update, gradients=gradients)


def _loss_and_aux(found: Any, has_aux: bool) -> tuple[Any, Any]:
  """Returns what `head` returned as a loss and all else."""
  if has_aux and not (isinstance(found, tuple) and len(found) == 2):
    raise ValueError(
      f'head must return (loss, aux), since has_aux=True, got {found!r}.'
    )
  loss: Any
  loss, aux = found if has_aux else (found, None)
  if not jax.tree_util.all_leaves([loss]) or jnp.shape(loss):
    more = '' if has_aux else '; (loss, aux) needs has_aux=True'
    raise ValueError(
      f'head must return the loss as a scalar{more}, got {loss}.'
    )
  if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
    raise ValueError(
      f'head must return a real loss, got {jnp.result_type(loss)}, through '
      'which no gradient flows.'
    )
  return loss, aux


@contextlib.contextmanager
def _note_of_trees(stack: str) -> Iterator[None]:
  """Adds to errors of an optimizer's `init` which trees it is given."""
  try:
    yield
  except Exception as error:
    error.add_note(
      f'`layerwise` gives the optimizer one layer at the path {stack!r}, and '
      'all other parameters apart: masks and labels must be functions of such '
      'trees.'
    )
    raise


def _backward(
  run: Callable[[Any, Any, Any], Any],
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
  last = _stacks.count(blocks) - 1

  def body(k, carry):
    stacks, new, squares, gx = carry
    i = last - k
    # What the last turn made is written at the start of this one: every read of
    # the stacks then comes after the write, so that nothing need be copied.
    stacks = _stacks.put_layer(stacks, jnp.minimum(i + 1, last), new)
    layer, own = _stacks.layer(stacks, i)
    gradient, gx = _pull(run, i, layer, _stacks.layer(inputs, i), gx)
    updates, own, more = step(layer, own, gradient)
    new = optax.apply_updates(layer, updates), own
    return stacks, new, squares + more, gx

  stacks = blocks, states
  start = stacks, _stacks.layer(stacks, last), jnp.zeros((), jnp.float32), gx
  stacks, new, squares, gx = lax.fori_loop(0, last + 1, body, start)
  return *_stacks.put_layer(stacks, 0, new), squares, gx


def _pull(
  run: Callable[[Any, Any, Any], Any], i: Any, layer: Any, x: Any, gx: Any
) -> tuple[Any, Any]:
  """Returns the gradients of layer i and of its input."""
  x, fixed = x
  run_x = lambda layer, x: run(i, layer, (x, fixed))
  _, back, _ = jax.vjp(run_x, layer, x, has_aux=True)
  return back(gx)


def _squares_of_stack(
  run: Callable[[Any, Any, Any], Any], blocks: Any, inputs: Any, gx: Any
) -> tuple[jax.Array, Any]:
  """Returns the squared norm of all layers' gradients, and dL/dx below."""

  def body(carry, of_layer):
    squares, gx = carry
    i, layer, x = of_layer
    gradient, gx = _pull(run, i, layer, x, gx)
    return (squares + _squares(gradient), gx), None

  start = (jnp.zeros((), jnp.float32), gx)
  numbers = jnp.arange(_stacks.count(blocks))
  return lax.scan(body, start, (numbers, blocks, inputs), reverse=True)[0]


def _clipping(
  max_norm: float | None,
  clip: str,
  previous: jax.Array,
  first_pass: Callable[[], jax.Array],
) -> Callable[[Any], tuple[Any, jax.Array]]:
  """Returns what clips one layer's gradient, and gives its squared norm.

  Args:
    max_norm: see `layerwise`.
    clip: likewise.
    previous: the norm of the last step's gradient.
    first_pass: returns the norm of this one's.
  """
  factor = lambda norm: jnp.where(norm < max_norm, 1.0, max_norm / norm)
  if max_norm is None:
    scale = None
  elif clip == 'two_pass':
    of_all = factor(first_pass())
    scale = lambda squares: of_all
  elif clip == 'previous':
    # There is none in the first step, nor after one that was not finite.
    known = (previous > 0) & jnp.isfinite(previous)
    scale = lambda squares: factor(
      jnp.where(known, previous, jnp.sqrt(squares))
    )
  else:
    scale = lambda squares: factor(jnp.sqrt(squares))

  def clipped(gradient: Any) -> tuple[Any, jax.Array]:
    squares = _squares(gradient)
    if scale is None:
      return gradient, squares
    by = scale(squares)
    return jax.tree.map(lambda x: (x * by).astype(x.dtype), gradient), squares

  return clipped


def _squares(tree: Any) -> jax.Array:
  """Returns the sum of squares in float32."""
  wide = lambda x: jnp.sum(jnp.square(jnp.abs(x).astype(jnp.float32)))
  return sum(map(wide, jax.tree.leaves(tree)), jnp.zeros((), jnp.float32))


def _same_shapes(new: Any, old: Any) -> Any:
  of = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  if of(new) != of(old):
    raise ValueError(
      f'block must return what it is given, {of(old)}, but returned {of(new)}.'
    )
  return new
