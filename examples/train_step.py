"""One training step as one program: loss, mean gradient, update, metrics."""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

import subspace_optax as so


def make_loss(graphdef) -> Callable:
  """The mean cross-entropy of a (B, T + 1) batch, in nats a token."""

  def loss(params, batch_BxT1):
    logits_BxTxV = nnx.merge(graphdef, params)(batch_BxT1[:, :-1])
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


def make_step(
  loss: Callable, tx: optax.GradientTransformation, shardings: Any = None
) -> Callable:
  """(state, batch) -> (state, metrics): the whole step as one program.

  `shardings` are those of the parameters, on a mesh.
  """

  def step(state, batch_AxBxT1):
    params, opt_state = state['params'], state['opt_state']
    value, gradient = mean_gradient(loss, params, batch_AxBxT1, shardings)
    updates, opt_state = tx.update(gradient, opt_state, params)
    params = optax.apply_updates(params, updates)
    metrics = {'loss': value, 'gradient_norm': optax.tree.norm(gradient)}
    metrics |= basis_metrics(opt_state)
    return {'params': params, 'opt_state': opt_state}, metrics

  return step
