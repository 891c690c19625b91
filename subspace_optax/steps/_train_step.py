# SPDX-License-Identifier: Apache-2.0
"""One interface for training steps of every kind."""

from collections.abc import Callable
import contextlib
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
import optax

from subspace_optax._chain import _memory_kinds
from subspace_optax._chain import _offload
from subspace_optax._chain import _state_sharding

Differentiate = Callable[[Callable[..., Any]], Callable[..., tuple[Any, Any]]]


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """A training step, however it computes gradients.

  `train_step`, `layerwise`, `data_parallel_step`, `rso.compressed_step` and
  `rso.Subproblems.step` return one. Calling it calls `step`.

  Attributes:
    init: params -> state.
    step: (params, state, *batch) -> (params, state, metrics). Jit it with
      params and state donated. Metrics are the loss, or a NamedTuple with it.
    params: (params, state) -> the parameters to evaluate and to save.
    gradients: (params, state) -> the gradients that are in memory at one time,
      or their shapes.
    replicated: mesh axes along which all state is the same.
    mesh: mesh on which the step runs, if it has its own.
    bases: (params, state) -> bases that the step draws before its forward pass
      and holds until its end.
    streams: whether the state may be in host memory.
  """

  init: Callable[[Any], Any]
  step: Callable[..., tuple[Any, Any, Any]]
  params: Callable[[Any, Any], Any] = lambda params, state: params
  gradients: Callable[[Any, Any], Any] = lambda params, state: params
  replicated: tuple[str, ...] = ()
  mesh: Mesh | None = None
  bases: Callable[[Any, Any], Any] = lambda params, state: ()
  streams: bool = False

  def __call__(
    self, params: Any, state: Any, *batch: Any
  ) -> tuple[Any, Any, Any]:
    """Takes a step; see `step`."""
    return self.step(params, state, *batch)

  def state_sharding(
    self, params: Any, *, memory_kind: _memory_kinds.Kinds | None = None
  ) -> Any:
    """Returns the sharding of every array of the state; see `state_sharding`.

    Args:
      params: arrays or shapes, with shardings unless the step has its own mesh.
      memory_kind: 'pinned_host' or a function of paths, as there.
    """
    none = contextlib.nullcontext()
    with none if self.mesh is None else jax.set_mesh(self.mesh):
      return _state_sharding.state_sharding(
        self, params, replicated=self.replicated, memory_kind=memory_kind
      )


def train_step(
  loss: Callable[..., jax.Array],
  tx: Any,
  *,
  value_and_grad: Differentiate = jax.value_and_grad,
) -> TrainStep:
  """Makes the plain training step: gradients, updates, new parameters.

  Args:
    loss: (params, *batch) -> the mean loss, a scalar.
    tx: any optax optimizer; or an object that makes its own step by
      `step(loss, value_and_grad)`, such as `rso.subproblems`.
    value_and_grad: differentiates a function by its first argument; pass one,
      for example, that accumulates over microbatches.

  Returns:
    A `TrainStep`, whose metrics are the loss before the step.

  Raises:
    TypeError: `tx` is a `TrainStep` instead of an optimizer.

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> loss = lambda params, x: jnp.mean((x @ params['w']) ** 2)
    >>> train = so.train_step(loss, so.golore(1e-3, rank=2))
    >>> params = {'w': jnp.ones((8, 16))}
    >>> state = train.init(params)
    >>> step = jax.jit(train.step, donate_argnums=(0, 1))
    >>> params, state, value = step(params, state, jnp.ones((4, 8)))
    >>> print(value)
    64.0
  """
  if isinstance(tx, TrainStep):
    raise TypeError(
      'tx is a training step already; give the optimizer that it was made of.'
    )
  if hasattr(tx, 'step'):
    return tx.step(loss, value_and_grad)

  def step(params: Any, state: Any, *batch: Any) -> tuple[Any, Any, Any]:
    value, gradients = value_and_grad(loss)(params, *batch)
    updates, state = _offload.update_in_turns(
      tx.update, gradients, state, params
    )
    return optax.apply_updates(params, updates), state, value

  return TrainStep(tx.init, step, streams=True)
