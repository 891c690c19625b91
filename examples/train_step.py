"""One training step as one program: loss, mean gradient, update, metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import optax

import llama
import subspace_optax as so


def cross_entropy(logits_BxTxV, batch_BxT1):
  """The mean over tokens that follow, in nats."""
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(
      logits_BxTxV.astype(jnp.float32), batch_BxT1[:, 1:]
    )
  )


def make_loss(graphdef) -> Callable:
  """The mean cross-entropy of a (B, T + 1) batch, in nats a token.

  Kernels may be lifted.
  """

  def loss(params, batch_BxT1):
    model = so.rso.nnx_merge(graphdef, params)
    return cross_entropy(model(batch_BxT1[:, :-1]), batch_BxT1)

  return loss


def by_layer(
  model: llama.Llama, loss: Callable = cross_entropy
) -> tuple[Callable, Callable, Callable]:
  """The functions of a stacked LLaMA, or of its shapes, for `so.layerwise`.

  `loss` is of logits and a batch.
  """
  c = model.config
  blocks, _ = nnx.split(model.blocks)
  rest = nnx.clone(model)
  del rest.blocks
  rest, _ = nnx.split(rest)

  def embed(params, batch_BxT1):
    return nnx.merge(rest, params).look_up(batch_BxT1[:, :-1])

  def block(layer, x_BxTxD, batch_BxT1):
    del batch_BxT1
    return llama.place(nnx.merge(blocks, layer)(x_BxTxD), c.activations)

  @jax.checkpoint  # else logits stay in float32 until they are needed again
  def head(params, x_BxTxD, batch_BxT1):
    logits_BxTxV = nnx.merge(rest, params).logits(x_BxTxD)
    return loss(logits_BxTxV, batch_BxT1)

  return embed, block, head


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
  """How the parameters of a run move, whatever takes the steps."""

  init: Callable  # params -> opt_state
  step: Callable  # (loss, value_and_grad) -> so.TrainStep
  model: Callable  # (params, opt_state) -> what the loss takes
  merged: Callable  # (params, opt_state) -> plain parameters
  projects_gradients: bool = True  # of which a share is captured
  lifts: bool = False  # whether gradients have the shapes of coordinates
  each: bool = False  # whether every microbatch is a step; an optimizer adds up


def method(
  tx: Any,
  compressed: bool = False,
  clip: float = 0.0,
  accumulates: bool = False,
) -> Method:
  """The method of an optimizer, `so.rso.subproblems` or a `so.TrainStep`.

  `clip` is the global norm that gradients are clipped to, for subproblems;
  optimizers have that in their chain. With `accumulates`, the optimizer does.
  """
  alone = lambda params, opt_state: params
  if isinstance(tx, so.TrainStep):  # which takes its gradients itself
    return Method(tx.init, lambda *_: tx, alone, alone, each=True)
  if not isinstance(tx, optax.GradientTransformation):
    if compressed:
      raise ValueError('compressed=True: rso has no whole gradients anyway')
    step = lambda loss, value_and_grad: so.train_step(
      loss, tx, value_and_grad=clipped(value_and_grad, clip)
    )
    merged = jax.jit(lambda params, opt_state: tx.merged(params, opt_state))
    lifted = lambda params, opt_state: tx.lifted(params, opt_state)
    return Method(tx.init, step, lifted, merged, False, lifts=True)
  take = so.rso.compressed_step if compressed else so.train_step
  step = lambda loss, value_and_grad: take(
    loss, tx, value_and_grad=value_and_grad
  )
  return Method(
    tx.init, step, alone, alone, not compressed, compressed, accumulates
  )


def each_microbatch(step: Callable) -> Callable:
  """A step that runs for each of A microbatches; the optimizer accumulates."""

  def run(params, opt_state, batch_AxBxT1):
    def one(carry, batch_BxT1):
      params, opt_state, metrics = step(*carry, batch_BxT1)
      return (params, opt_state), metrics

    carry, metrics = jax.lax.scan(one, (params, opt_state), batch_AxBxT1)
    return *carry, jax.tree.map(jnp.mean, metrics)

  def run_one(params, opt_state, batch_AxBxT1):
    return step(params, opt_state, batch_AxBxT1[0])

  return lambda p, s, batch: (run if len(batch) > 1 else run_one)(p, s, batch)


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
      batch_AxBxT1 = batch[None] if how.each else batch
      value, gradient = mean_gradient(f, params, batch_AxBxT1, placed)
      return (value, optax.tree.norm(gradient)), gradient

    return run

  take = how.step(loss, value_and_grad).step
  take = each_microbatch(take) if how.each else take

  def step(state, batch_AxBxT1):
    params, opt_state, (value, norm) = take(
      state['params'], state['opt_state'], batch_AxBxT1
    )
    metrics = {'loss': value, 'gradient_norm': norm}
    if how.projects_gradients:
      metrics |= basis_metrics(opt_state)
    return {'params': params, 'opt_state': opt_state}, metrics

  return step
