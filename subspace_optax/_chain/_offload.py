# SPDX-License-Identifier: Apache-2.0
"""Updates whose state lives on the host.

An update is traced, and what it returns is put into groups, none of which needs
another's part of the state: as a rule, a group is a parameter. Groups come in
one after the other. Each is a loop of one turn whose length the compiler can't
know; otherwise it would begin a program by fetching all of the state.
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
  """Makes an optimizer whose state may live in the memory of the host.

  Arrays of state that are on the host, as `so.state_sharding(...,
  memory_kind='pinned_host')` places them, come to the device for the update of
  their parameter, and go back after it. Parameters take turns, so that the
  device holds the state of one at a time, a stack of layers being one
  parameter; `so.layerwise` cuts stacks, too. What couples parameters, such as
  the trust in a norm of all updates, has their state there together. Without an
  array on the host, nothing is changed.

  `so.train_step` and `so.layerwise` do the same by themselves.

  Args:
    tx: the optimizer.

  Returns:
    The optimizer, whose state is that of `tx`.

  Raises:
    TypeError: `tx` is no optimizer, such as a `TrainStep` or `rso.subproblems`.
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
  """Returns `update(updates, state, params)`, of far state group by group.

  Args:
    update: the function; its state is on the device.
    updates: as it takes them.
    state: likewise, but that its arrays may be far.
    params: likewise.
    layer: if given, far arrays are stacks, and this one's state is wanted.
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
  """Returns what `update_in_turns` does; the compiler orders the transfers."""
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
  """Returns the outputs of a group, those that replace far inputs far."""
  outputs = sorted(group.outputs)
  jaxpr, used = _update_program.only(program.jaxpr, outputs)
  if not group.far:
    values = [program.inputs[k] for k in used]
    return dict(zip(outputs, jaxpr_as_fun(jaxpr)(*values), strict=True))
  slots = {program.slots[k]: k for k in group.far}
  whole = {k: x for k, x in zip(outputs, jaxpr.out_avals, strict=True)}
  parts, jaxpr = _update_program.in_rows(program, group, jaxpr, used, at)
  kinds = dict(zip(used, jaxpr.in_avals, strict=True))

  # Directions are written over gradients.
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
  """Returns the index of the j-th part, if it is one."""
  return () if whole == part else (j * part[0],)
