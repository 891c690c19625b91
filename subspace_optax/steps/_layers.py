# SPDX-License-Identifier: Apache-2.0
"""Passes over a stack of layers, forward and backward."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from subspace_optax._matrix import _memories
from subspace_optax.steps import _data_parallel
from subspace_optax.steps import _stacks

CLIPS = ('layer', 'previous', 'two_pass')


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """The functions of `layerwise` for one batch.

  They take the trained leaves and join them with the others, which are `fixed`
  for the stack and `fixed_rest` for everything else. A layer's input is a pair
  of such trees, too.
  """

  embed: Callable[[Any, Any], Any]
  block: Callable[..., Any]
  head: Callable[[Any, Any, Any], Any]
  batch: Any
  fixed: Any
  fixed_rest: Any
  with_index: bool
  has_aux: bool
  devices: _data_parallel.Devices

  def below(self, rest: Any) -> tuple[Any, Any]:
    """Returns the input of the first layer."""
    rest = _stacks.join(rest, self.fixed_rest)
    return self._input(self.embed(rest, self.batch))

  def run(self, i: Any, layer: Any, x: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns the output of layer i."""
    layer = _stacks.join(layer, _stacks.layer(self.fixed, i))
    whole = _stacks.join(*x)
    number = (i,) if self.with_index else ()
    new = self.block(layer, whole, self.batch, *number)
    return self._input(_same_shapes(new, whole))

  def _input(self, x: Any) -> tuple[Any, Any]:
    """Returns a layer's input, whose constants may differ between devices."""
    x, fixed = _stacks.split(x)
    return self.devices.own(x), fixed

  def loss(self, rest: Any, x: Any, fixed_x: Any) -> tuple[Any, Any]:
    """Returns the loss and the auxiliary output of `head`."""
    rest, x = _stacks.join(rest, self.fixed_rest), _stacks.join(x, fixed_x)
    return _loss_and_aux(self.head(rest, x, self.batch), self.has_aux)


class Top(NamedTuple):
  """Results at the top of the stack."""

  loss: jax.Array
  aux: Any
  of_rest: Any  # gradient of all other parameters, through the head alone
  gx: Any  # gradient of the last layer's output


def run_forward(
  model: Model, blocks: Any, rest: Any
) -> tuple[Callable[[Any], Any], Any, Top]:
  """Returns the pullback of `embed`, the input of every layer, and the top."""
  blocks, rest = model.devices.own((blocks, rest))
  below, bottom, fixed_below = jax.vjp(model.below, rest, has_aux=True)
  (x, fixed_x), inputs = lax.scan(
    lambda x, of: (model.run(*of, x), x),
    (below, fixed_below),
    (jnp.arange(_stacks.count(blocks)), blocks),
  )
  of_loss = lambda rest, x: model.loss(rest, x, fixed_x)
  loss, back, aux = jax.vjp(of_loss, rest, x, has_aux=True)
  return bottom, inputs, Top(loss, aux, *back(jnp.ones_like(loss)))


def run_backward(
  model: Model,
  step: Callable[..., Any],
  blocks: Any,
  states: Any,
  inputs: Any,
  gx: Any,
) -> tuple[Any, Any, jax.Array, Any]:
  """Updates the layers from last to first.

  Args:
    model: the model.
    step: (layer, its state, gradient, i) -> (updates, its state, squared norm),
      where state on the host is that of all layers.
    blocks: the layers.
    states: states of the layers.
    inputs: inputs of the layers.
    gx: gradient of the last layer's output.

  Returns:
    The blocks, their states, the gradient's squared norm, and dL/dx below.
  """
  last = _stacks.count(blocks) - 1
  near, far = _part(states)

  def body(k, carry):
    stacks, far, new, squares, gx = carry
    i = last - k
    # Write the results of the last turn at the start of this one. Every read of
    # the stacks then comes after the write, so that nothing has to be copied.
    stacks = _stacks.put_layer(stacks, jnp.minimum(i + 1, last), new)
    stacks = _stacks.row_major(stacks)
    layer, own = _stacks.layer(stacks, i)
    gradient, gx = _pull(model, i, layer, _stacks.layer(inputs, i), gx)
    own = _stacks.join(own, far)
    updates, own, more = step(layer, own, gradient, i)
    own, far = _part(own)
    new = optax.apply_updates(layer, updates), own
    return stacks, far, new, squares + more, gx

  stacks = blocks, near
  first = _stacks.layer(stacks, last)
  start = stacks, far, first, jnp.zeros((), jnp.float32), gx
  stacks, far, new, squares, gx = lax.fori_loop(0, last + 1, body, start)
  blocks, near = _stacks.put_layer(stacks, 0, new)
  return blocks, _stacks.join(near, far), squares, gx


def _part(states: Any) -> tuple[Any, Any]:
  """Returns the arrays on the device and those on the host; None elsewhere."""
  return _stacks.partition(lambda x: not _memories.is_far(x), states)


def _pull(model: Model, i: Any, layer: Any, x: Any, gx: Any) -> tuple[Any, Any]:
  """Returns the gradients of layer i and of its input."""
  x, fixed = x
  run = lambda layer, x: model.run(i, layer, (x, fixed))
  _, back, _ = jax.vjp(run, model.devices.own(layer), x, has_aux=True)
  return back(gx)


def squares_of_stack(
  model: Model, blocks: Any, inputs: Any, gx: Any
) -> tuple[jax.Array, Any]:
  """Returns the squared norm of all layers' gradients, and dL/dx below."""

  def body(carry, of_layer):
    squares, gx = carry
    i, layer, x = of_layer
    gradient, gx = _pull(model, i, layer, x, gx)
    return (squares + sum_squares(gradient), gx), None

  start = (jnp.zeros((), jnp.float32), gx)
  numbers = jnp.arange(_stacks.count(blocks))
  return lax.scan(body, start, (numbers, blocks, inputs), reverse=True)[0]


def clipping(
  max_norm: float | None,
  clip: str,
  previous: jax.Array,
  first_pass: Callable[[], jax.Array],
) -> Callable[[Any], tuple[Any, jax.Array]]:
  """Returns a function that clips a gradient and returns its squared norm.

  Args:
    max_norm: see `layerwise`.
    clip: see `layerwise`.
    previous: norm of the last step's gradient.
    first_pass: returns the norm of this step's gradient.
  """
  if max_norm is None:
    return lambda gradient: (gradient, sum_squares(gradient))
  norm_of = lambda own: own
  if clip == 'two_pass':
    whole = first_pass()
    norm_of = lambda own: whole
  elif clip == 'previous':
    # It is not known in the first step, nor after one that was not finite.
    known = (previous > 0) & jnp.isfinite(previous)
    norm_of = lambda own: jnp.where(known, previous, own)

  def clipped(gradient: Any) -> tuple[Any, jax.Array]:
    squares = sum_squares(gradient)
    norm = norm_of(jnp.sqrt(squares))
    by = jnp.where(norm < max_norm, 1.0, max_norm / norm)
    return jax.tree.map(lambda x: (x * by).astype(x.dtype), gradient), squares

  return clipped


def sum_squares(tree: Any) -> jax.Array:
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


def _loss_and_aux(found: Any, has_aux: bool) -> tuple[Any, Any]:
  """Splits the result of `head` into the loss and the rest."""
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
