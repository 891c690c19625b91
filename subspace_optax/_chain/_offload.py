# SPDX-License-Identifier: Apache-2.0
"""Updates whose state lives on the host.

An update is traced, and its results are split into groups such that no group
needs the state of another; usually, a group is a parameter. The state of groups
is fetched one after the other. Each group runs in a loop of one turn whose
length the compiler can't know; otherwise the compiler would fetch all of the
state at the start of the program.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun
import optax

from subspace_optax._chain import _update_program
from subspace_optax._matrix import _memories
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _varying


def offload(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Makes an optimizer whose state may live in host memory.

  Arrays of state on the host, placed there by `so.state_sharding(...,
  memory_kind='pinned_host')`, move to the device for the update of their
  parameter, and back afterwards. Parameters take turns, so that the device
  holds the state of one at a time. A stack of layers is one parameter;
  `so.layerwise` cuts stacks, too. If a transformation couples parameters, such
  as a trust ratio of the norm of all updates, their states are on the device
  together. Without arrays on the host, nothing changes.

  `so.train_step` and `so.layerwise` already do this.

  Args:
    tx: the optimizer.

  Returns:
    The optimizer, with the same state as `tx`.

  Raises:
    TypeError: `tx` is not an optimizer but, for example, a `TrainStep` or
      `rso.subproblems`.
    ValueError: at `update`, a new state that differs in structure, shapes or
      dtypes.

  References:
    Ren et al., `ZeRO-Offload <https://arxiv.org/abs/2101.06840>`_, 2021

  Example:
    >>> import functools, jax, jax.numpy as jnp, optax, subspace_optax as so
    >>> params = {'w': jnp.ones((64, 256))}
    >>> tx = so.offload(optax.adam(1e-3))
    >>> place = so.state_sharding(tx, params, memory_kind='pinned_host')
    >>> state = jax.jit(tx.init, out_shardings=place)(params)
    >>> print(state[0].mu['w'].sharding.memory_kind)
    pinned_host
    >>> update = jax.jit(tx.update, out_shardings=(None, place))
    >>> updates, state = update(params, state, params)
    >>> print(state[0].mu['w'].sharding.memory_kind)
    pinned_host
  """
  if not isinstance(tx, optax.GradientTransformation):
    raise TypeError(
      f'tx must be an optax.GradientTransformation, got {tx!r}; give '
      '`gradient_transformation()` of optax.MultiSteps, and `tx` itself to '
      'training steps, which fetch state from the host by themselves.'
    )
  tx = optax.with_extra_args_support(tx)

  def update(updates, state, params=None, **extra_args):
    run = lambda *args: tx.update(*args, **extra_args)
    return update_in_turns(run, updates, state, params)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def update_in_turns(
  update: Callable[..., tuple[Any, Any]],
  updates: Any,
  state: Any,
  params: Any,
  layer: Any = None,
) -> tuple[Any, Any]:
  """Returns `update(updates, state, params)`, with far state group by group.

  Args:
    update: the function, which gets its state on the device.
    updates: its first argument.
    state: its state, whose arrays may be far, that is, on the host.
    params: its last argument.
    layer: if given, far arrays are stacks, and only this layer's state is used.
  """
  if not any(map(_memories.is_far, jax.tree.leaves(state))):
    return update(updates, state, params)
  at = () if layer is None else (layer,)
  program = _update_program.trace(update, updates, state, params, at)
  found: dict[int, Any] = {}
  for group in _update_program.groups(program):
    found |= _run_group(program, group, at)
  return program.treedef.unflatten([found[k] for k in sorted(found)])


def update_at_once(
  update: Callable[..., tuple[Any, Any]],
  updates: Any,
  state: Any,
  params: Any,
  layer: Any = None,
) -> tuple[Any, Any]:
  """Like `update_in_turns`, but lets the compiler order the transfers."""
  at = () if layer is None else (layer,)
  near = lambda x: (
    _update_program.fetch_whole(x, at) if _memories.is_far(x) else x
  )
  updates, new = update(updates, jax.tree.map(near, state), params)
  back = lambda old, x: (
    _memories.send(x, old, at) if _memories.is_far(old) else x
  )
  return updates, jax.tree.map(back, state, new)


def _run_group(
  program: _update_program.Program,
  group: _update_program.Group,
  at: tuple[Any, ...],
) -> dict[int, Any]:
  """Returns the outputs of a group; those that replace far inputs are far."""
  outputs = sorted(group.outputs)
  jaxpr, used = _update_program.only(program.jaxpr, outputs)
  if not group.far:
    values = [program.inputs[k] for k in used]
    return dict(zip(outputs, jaxpr_as_fun(jaxpr)(*values), strict=True))
  slots = {program.slots[k]: k for k in group.far}
  whole = {k: x for k, x in zip(outputs, jaxpr.out_avals, strict=True)}
  parts, jaxpr = _update_program.in_rows(program, group, jaxpr, used, at)
  kinds = dict(zip(used, jaxpr.in_avals, strict=True))

  # Directions overwrite gradients.
  over = {
    k
    for k, x in whole.items()
    if k < program.directions and _alike(program.kinds[k], x)
  }

  def turn(j: jax.Array, carried: tuple[Any, Any]) -> tuple[Any, Any]:
    far, near = carried

    def part_of(k: int) -> jax.Array:
      shape = kinds[k].shape
      rows = _rows_at(j, program.kinds[k].shape, shape)
      if k in far:
        return _memories.fetch(far[k], (*at, *rows), shape)
      x = near[k] if k in over else program.inputs[k]
      return _memories.take(x, rows, shape)

    new = jaxpr_as_fun(jaxpr)(*map(part_of, used))
    far, near = dict(far), dict(near)
    for k, x in zip(outputs, new, strict=True):
      rows = _rows_at(j, whole[k].shape, x.shape)
      if k in slots:
        far[slots[k]] = _memories.send(x, far[slots[k]], (*at, *rows))
      else:
        near[k] = _memories.put(near[k], x, rows)
    return far, near

  near = {
    k: program.inputs[k] if k in over else _sharding.zeros(_sharding.kind_of(x))
    for k, x in whole.items()
    if k not in slots
  }
  start = {k: program.inputs[k] for k in group.far}, near
  turns = program.turns if parts == 1 else parts
  far, near = _varying.fori_loop(0, turns, turn, start)
  return near | {slot: far[k] for slot, k in slots.items()}


def _alike(x: Any, y: Any) -> bool:
  return (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)


def _rows_at(
  j: Any, whole: tuple[int, ...], part: tuple[int, ...]
) -> tuple[Any, ...]:
  """Returns the index of the j-th part, or () for the whole array."""
  return () if whole == part else (j * part[0],)
