# SPDX-License-Identifier: Apache-2.0
"""Updates whose state lives on the host.

An update is traced, and what it returns is put into groups, none of which needs
another's part of the state: as a rule, a group is a parameter. Groups come in
one after the other. Each is a loop of one turn whose length the compiler can't
know; otherwise it would begin a program by fetching all of the state.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr
from jax.extend.core import jaxpr_as_fun
from jax.interpreters import partial_eval
import jax.numpy as jnp
import optax

from subspace_optax._matrix import _memories
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _varying

# An update that is elementwise comes in by so many bytes of state at a time.
_MOST_BYTES = 2**26

_ELEMENTWISE = frozenset(
  'abs add add_any and broadcast_in_dim cbrt clamp convert_element_type copy '
  'copy_p cos div eq erf exp exp2 expm1 ge gt integer_pow is_finite le log '
  'log1p logistic lt max min mul ne neg not or pow reduce_precision rsqrt '
  'select_n sign sin sqrt square stop_gradient sub tanh xor'.split()
)
_CALLS = frozenset(['jit', 'pjit', 'closed_call', 'custom_jvp_call'])


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
      f'tx must be an optax.GradientTransformation, got {tx!r}, whose state '
      'cannot be on the host.'
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
  program = _trace(update, updates, state, params, at)
  found: dict[int, Any] = {}
  for group in _groups(program):
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
  near = lambda x: _fetch_whole(x, at) if _memories.is_far(x) else x
  updates, new = update(updates, jax.tree.map(near, state), params)
  back = lambda old, x: (
    _memories.send(x, old, at) if _memories.is_far(old) else x
  )
  return updates, jax.tree.map(back, state, new)


def _fetch_whole(x: jax.Array, at: tuple[Any, ...]) -> jax.Array:
  return _memories.fetch(x, at, x.shape[len(at) :])


class _Program(NamedTuple):
  """An update as a function of lists; inputs and outputs have numbers."""

  run: Callable[..., Any]
  inputs: list[Any]  # far where they are
  kinds: list[Any]  # the inputs' types on the device
  jaxpr: Any
  treedef: Any  # of the outputs
  directions: int  # of how many inputs the first outputs take the place
  slots: dict[int, int]  # from far inputs to the outputs that replace them
  turns: Any  # one, which no compiler knows


class _Group(NamedTuple):
  """Outputs that need the same far inputs."""

  outputs: frozenset[int]
  far: frozenset[int]


# --- Tracing -----------------------------------------------------------------


def _trace(
  update: Callable[..., Any],
  updates: Any,
  state: Any,
  params: Any,
  at: tuple[Any, ...],
) -> _Program:
  inputs, treedef = jax.tree.flatten((updates, state, params))
  near = lambda x: _fetch_whole(x, at) if _memories.is_far(x) else x
  kinds = [jax.eval_shape(near, x) for x in inputs]
  run = lambda *leaves: update(*treedef.unflatten(leaves))
  jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)(*kinds)
  of_updates, of_state = shapes
  numbers = treedef.unflatten(range(len(inputs)))[1]
  _check_same(jax.tree.map(lambda k: kinds[k], numbers), of_state)
  first = len(jax.tree.leaves(of_updates))
  slots = dict(
    (k, slot)
    for slot, k in enumerate(jax.tree.leaves(numbers), first)
    if _memories.is_far(inputs[k])
  )
  turns = _unknown_one(updates)
  structure = jax.tree.structure(shapes)
  # Directions are a tree like the gradients, unless an optimizer is odd.
  same = jax.tree.structure(updates) == jax.tree.structure(of_updates)
  directions = first if same else 0
  return _Program(
    run, inputs, kinds, jaxpr, structure, directions, slots, turns
  )


def _check_same(old: Any, new: Any) -> None:
  """Raises if a new state does not fit into the place of the old one."""
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  if shapes(old) != shapes(new):
    raise ValueError(
      'a state on the host must keep its structure, shapes and dtypes in an '
      f'update; it had {shapes(old)}, and the new one has {shapes(new)}.'
    )


def _unknown_one(updates: Any) -> jax.Array:
  """Returns the number one, of which no compiler can know that it is."""
  smallest = min(jax.tree.leaves(updates), key=lambda x: x.size)
  return 1 + jnp.any(smallest > jnp.inf).astype(jnp.int32)


def _groups(program: _Program) -> list[_Group]:
  """Returns outputs in groups that need no far input of one another's."""
  of_slot = {slot: k for k, slot in program.slots.items()}
  groups: list[_Group] = []
  for output in range(program.treedef.num_leaves):
    _, used = _only(program.jaxpr, [output])
    far = {k for k in program.slots if k in used}
    # What is replaced is at hand, even if nothing is read of it.
    far |= {of_slot[output]} if output in of_slot else set()
    one = _Group(frozenset([output]), frozenset(far))
    alike = [x for x in groups if x.far & one.far or x.far == one.far]
    groups = [x for x in groups if x not in alike]
    outputs, inputs = zip(one, *alike, strict=True)
    groups.append(
      _Group(frozenset().union(*outputs), frozenset().union(*inputs))
    )
  return sorted(groups, key=lambda group: min(group.outputs))


def _only(jaxpr: Any, outputs: Sequence[int]) -> tuple[Any, list[int]]:
  """Returns the program of some outputs, and the inputs that it takes."""
  wanted = [k in outputs for k in range(len(jaxpr.out_avals))]
  part, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, wanted)
  return jaxpr.replace(jaxpr=part), [
    k for k, is_used in enumerate(used) if is_used
  ]


# --- Running -----------------------------------------------------------------


def _run_group(
  program: _Program, group: _Group, at: tuple[Any, ...]
) -> dict[int, Any]:
  """Returns the outputs of a group, those that replace far inputs far."""
  outputs = sorted(group.outputs)
  jaxpr, used = _only(program.jaxpr, outputs)
  if not group.far:
    values = [program.inputs[k] for k in used]
    return dict(zip(outputs, jaxpr_as_fun(jaxpr)(*values), strict=True))
  slots = {program.slots[k]: k for k in group.far}
  whole = {k: x for k, x in zip(outputs, jaxpr.out_avals, strict=True)}
  parts, jaxpr = _in_rows(program, group, jaxpr, used, at)
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
  kinds = ((of.shape, of.dtype, of.sharding) for of in (x, y))
  return next(kinds) == next(kinds)


def _rows_at(
  j: Any, whole: tuple[int, ...], part: tuple[int, ...]
) -> tuple[Any, ...]:
  """Returns the index of the j-th part, if it is one."""
  return () if whole == part else (j * part[0],)


def _in_rows(
  program: _Program,
  group: _Group,
  jaxpr: Any,
  used: list[int],
  at: tuple[Any, ...],
) -> tuple[int, Any]:
  """Returns a program of some rows, and how many such parts there are.

  The update is traced again, on fewer rows of the group's arrays. It must then
  have the same operations, and each number must depend on those at its own
  place alone.
  """
  shape = program.kinds[min(group.far)].shape
  parts = _count_parts(program, group, shape, at)
  if parts == 1 or not _is_elementwise(jaxpr.jaxpr, shape):
    return 1, jaxpr
  part = (shape[0] // parts, *shape[1:])
  kinds = list(program.kinds)
  for k in used:
    if kinds[k].shape == shape:
      kinds[k] = jax.ShapeDtypeStruct(
        part, kinds[k].dtype, sharding=kinds[k].sharding
      )
  found, _ = _only(jax.make_jaxpr(program.run)(*kinds), sorted(group.outputs))
  same = _names(found.jaxpr) == _names(jaxpr.jaxpr)
  return (parts, found) if same else (1, jaxpr)


def _count_parts(
  program: _Program,
  group: _Group,
  shape: tuple[int, ...],
  at: tuple[Any, ...],
) -> int:
  """Returns into how many parts the rows of a group's arrays are cut."""
  far = [program.kinds[k] for k in group.far]
  size = sum(x.size * x.dtype.itemsize for x in far)
  cut = tuple(range(len(at) + 1))
  whole = all(_sharding.is_whole(program.inputs[k], cut) for k in group.far)
  if not shape or not whole:
    return 1
  fits = (n for n in range(1, shape[0] + 1) if shape[0] % n == 0)
  return next((n for n in fits if size <= n * _MOST_BYTES), shape[0])


def _is_elementwise(jaxpr: Any, shape: tuple[int, ...]) -> bool:
  """Whether arrays of a shape are all there is, and numbers meet at no time."""

  def is_fine(eqn: Any) -> bool:
    values = [x.aval.shape for x in (*eqn.invars, *eqn.outvars)]
    if not any(values):
      return True
    inner = [x for x in eqn.params.values() if isinstance(x, ClosedJaxpr)]
    known = eqn.primitive.name in _ELEMENTWISE or (
      eqn.primitive.name in _CALLS
      and all(_is_elementwise(x.jaxpr, shape) for x in inner)
    )
    return known and set(values) <= {(), shape}

  return all(map(is_fine, jaxpr.eqns))


def _names(jaxpr: Any) -> list[Any]:
  """Returns the names of all operations, those of calls in lists."""
  return [
    [eqn.primitive.name]
    + [
      _names(x.jaxpr) for x in eqn.params.values() if isinstance(x, ClosedJaxpr)
    ]
    for eqn in jaxpr.eqns
  ]
