"""One training step as one program: loss, mean gradient, update, metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import subspace_optax as so


def make_loss(graphdef) -> Callable:
  """The mean cross-entropy of a (B, T + 1) batch, in nats a token.

  Kernels may be lifted.
  """

  def loss(params, batch_BxT1):
    logits_BxTxV = so.rso.nnx_merge(graphdef, params)(batch_BxT1[:, :-1])
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(
        logits_BxTxV.astype(jnp.float32), batch_BxT1[:, 1:]
      )
    )

  return loss


def placed_gradient(loss: Callable, shardings: Any) -> Callable:
  """(params, batch) -> (loss, gradient), sharded as the parameters are.

  Left alone, the compiler drops some axes, and so holds more than it need.
  """

  def value_and_grad(params, batch_BxT1):
    value, gradient = jax.value_and_grad(loss)(params, batch_BxT1)
    if shardings is not None:
      gradient = jax.lax.with_sharding_constraint(gradient, shardings)
    return value, gradient

  return value_and_grad


def mean_gradient(loss: Callable, params, batch_AxBxT1, shardings: Any = None):
  """(loss, gradient), averaged over the A microbatches one after another."""
  value_and_grad = placed_gradient(loss, shardings)
  if len(batch_AxBxT1) == 1:
    return value_and_grad(params, batch_AxBxT1[0])

  def add(total, batch_BxT1):
    new = value_and_grad(params, batch_BxT1)
    return jax.tree.map(jnp.add, total, new), None

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(value_and_grad, params, batch_AxBxT1[0]),
  )
  total, _ = jax.lax.scan(add, zeros, batch_AxBxT1)
  return jax.tree.map(lambda x: x / len(batch_AxBxT1), total)


def basis_metrics(opt_state) -> dict[str, jax.Array]:
  """Captured energy and the like, averaged over all matrices."""
  try:
    by_path = so.subspace_metrics(opt_state)
  except ValueError:  # an optimizer without subspaces
    return {}
  names = {name for metrics in by_path.values() for name in metrics}
  gather = lambda name: [
    jnp.ravel(m[name]) for m in by_path.values() if name in m
  ]
  return {
    name: jnp.mean(jnp.concatenate(gather(name))) for name in sorted(names)
  }


class Method(NamedTuple):
  """How the parameters of a run move, by an optax optimizer or by RSO."""

  init: Callable  # params -> opt_state
  step: Callable  # (loss, value_and_grad) -> (params, opt_state, batch) -> ...
  model: Callable  # (params, opt_state) -> what the loss takes
  merged: Callable  # (params, opt_state) -> plain parameters
  projects_gradients: bool  # of which a share is captured
  lifts: bool  # whether gradients have the shapes of coordinates


def method(tx: Any, compressed: bool = False, clip: float = 0.0) -> Method:
  """The method of an optimizer, or of `so.rso.subproblems`.

  `clip` is the global norm that gradients are clipped to, for subproblems;
  optimizers have that in their chain.
  """
  if isinstance(tx, so.rso.Subproblems):
    if compressed:
      raise ValueError('compressed=True: rso has no whole gradients anyway')
    return Method(
      tx.init,
      lambda loss, value_and_grad: tx.step(loss, clipped(value_and_grad, clip)),
      lambda params, opt_state: tx.lifted(params, opt_state),
      jax.jit(lambda params, opt_state: tx.merged(params, opt_state)),
      projects_gradients=False,
      lifts=True,
    )
  alone = lambda params, opt_state: params
  take = so.rso.compressed_step if compressed else whole_step
  step = lambda loss, value_and_grad: take(
    loss, tx, value_and_grad=value_and_grad
  )
  return Method(tx.init, step, alone, alone, not compressed, compressed)


def whole_step(loss: Callable, tx: Any, *, value_and_grad: Callable):
  def step(params, state, batch):
    value, gradient = value_and_grad(loss)(params, batch)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  return step


def clipped(value_and_grad: Callable, norm: float) -> Callable:
  clip = optax.clip_by_global_norm(norm) if norm else optax.identity()

  def of(loss):
    def run(params, batch):
      value, gradient = value_and_grad(loss)(params, batch)
      return value, clip.update(gradient, clip.init(params))[0]

    return run

  return of


def make_step(loss: Callable, how: Any, shardings: Any = None) -> Callable:
  """(state, batch) -> (state, metrics): the whole step as one program.

  `how` is a `Method`, or an optax optimizer; `shardings` are those of the
  parameters, on a mesh.
  """
  how = how if isinstance(how, Method) else method(how)
  placed = None if how.lifts else shardings

  def value_and_grad(f):
    def run(params, batch):
      value, gradient = mean_gradient(f, params, batch, placed)
      return (value, optax.tree.norm(gradient)), gradient

    return run

  take = how.step(loss, value_and_grad)

  def step(state, batch_AxBxT1):
    params, opt_state, (value, norm) = take(
      state['params'], state['opt_state'], batch_AxBxT1
    )
    metrics = {'loss': value, 'gradient_norm': norm}
    if how.projects_gradients:
      metrics |= basis_metrics(opt_state)
    return {'params': params, 'opt_state': opt_state}, metrics

  return step
