# SPDX-License-Identifier: Apache-2.0
"""Updates as programs that can be run in parts.

A traced update shows which of its results need which part of the state, and
whether each number of a result depends only on numbers at the same position.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
from jax.interpreters import partial_eval
import jax.numpy as jnp
import numpy as np

from subspace_optax._matrix import _memories
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _sharding

# An elementwise update fetches at most this many bytes of state at a time.
_MOST_BYTES = 2**26

_ELEMENTWISE = frozenset(
  'abs add add_any and broadcast_in_dim cbrt clamp convert_element_type copy '
  'copy_p cos div eq erf exp exp2 expm1 ge gt integer_pow is_finite le log '
  'log1p logistic lt max min mul ne neg not or pow reduce_precision rsqrt '
  'select_n sign sin sqrt square stop_gradient sub tanh xor'.split()
)
_CALLS = frozenset(['jit', 'pjit', 'closed_call', 'custom_jvp_call'])


class Program(NamedTuple):
  """An update as a function of lists, with numbered inputs and outputs."""

  run: Callable[..., Any]
  inputs: list[Any]  # far arrays stay far
  kinds: list[Any]  # the inputs' types on the device
  jaxpr: Any
  treedef: Any  # of the outputs
  directions: int  # number of first inputs that the first outputs replace
  params: dict[int, int]  # from gradients to their parameters
  slots: dict[int, int]  # from far inputs to the outputs that replace them
  turns: Any  # one, unknown to the compiler


class Group(NamedTuple):
  """Outputs that need the same far inputs."""

  outputs: frozenset[int]
  far: frozenset[int]


def trace(
  update: Callable[..., Any],
  updates: Any,
  state: Any,
  params: Any,
  at: tuple[Any, ...],
) -> Program:
  """Returns the program of an update; `at` is the index of its far state."""
  inputs, treedef = jax.tree.flatten((updates, state, params))
  near = lambda x: fetch_whole(x, at) if _memories.is_far(x) else x
  kinds = [jax.eval_shape(near, x) for x in inputs]
  run = lambda *leaves: update(*treedef.unflatten(leaves))
  jaxpr, shapes = jax.make_jaxpr(run, return_shape=True)(*kinds)
  of_updates, of_state = shapes
  numbers = treedef.unflatten(range(len(inputs)))
  gradients, of_old, of_params = map(jax.tree.leaves, numbers)
  _check_same(jax.tree.map(lambda k: kinds[k], numbers[1]), of_state)
  first = len(jax.tree.leaves(of_updates))
  slots = {
    k: slot
    for slot, k in enumerate(of_old, first)
    if _memories.is_far(inputs[k])
  }
  # Parameters normally have the tree of the gradients.
  alike = len(gradients) == len(of_params)
  return Program(
    run,
    inputs,
    kinds,
    jaxpr,
    jax.tree.structure(shapes),
    directions=first if len(gradients) == first else 0,
    params=dict(zip(gradients, of_params, strict=True)) if alike else {},
    slots=slots,
    turns=_unknown_one(updates),
  )


def _check_same(old: Any, new: Any) -> None:
  """Raises if a new state can't replace the old one."""
  must = 'a state on the host must keep its structure, shapes and dtypes'
  pairs, one = jax.tree.flatten_with_path(old)
  leaves, other = jax.tree.flatten(new)
  if one != other:
    raise ValueError(f'{must}; an update changed {one} to {other}.')
  for (path, x), y in zip(pairs, leaves, strict=True):
    kinds = [f'{k.dtype}{list(k.shape)}' for k in (x, y)]
    if kinds[0] != kinds[1]:
      name = jax.tree_util.keystr(path)
      raise ValueError(
        f'{must}; an update changed {kinds[0]} to {kinds[1]} at state{name}.'
      )


def _unknown_one(updates: Any) -> jax.Array:
  """Returns the number one in a form that the compiler can't evaluate."""
  smallest = min(jax.tree.leaves(updates), key=lambda x: x.size)
  return 1 + jnp.any(smallest > jnp.inf).astype(jnp.int32)


def groups(program: Program) -> list[Group]:
  """Returns groups of outputs such that no two groups share a far input."""
  of_slot = {slot: k for k, slot in program.slots.items()}
  groups: list[Group] = []
  for output in range(program.treedef.num_leaves):
    _, used = only(program.jaxpr, [output])
    far = {k for k in program.slots if k in used}
    # An output belongs to the input that it replaces, even if it reads nothing
    # of that input.
    far |= {of_slot[output]} if output in of_slot else set()
    one = Group(frozenset([output]), frozenset(far))
    alike = [x for x in groups if x.far & one.far or x.far == one.far]
    groups = [x for x in groups if x not in alike]
    outputs, inputs = zip(one, *alike, strict=True)
    groups.append(
      Group(frozenset().union(*outputs), frozenset().union(*inputs))
    )
  return sorted(groups, key=lambda group: min(group.outputs))


def only(jaxpr: Any, outputs: Sequence[int]) -> tuple[Any, list[int]]:
  """Returns the program of some outputs, and the inputs that it takes."""
  wanted = [k in outputs for k in range(len(jaxpr.out_avals))]
  part, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, wanted)
  return jaxpr.replace(jaxpr=part), [
    k for k, is_used in enumerate(used) if is_used
  ]


# --- Rows --------------------------------------------------------------------


def in_rows(
  program: Program,
  group: Group,
  jaxpr: Any,
  used: list[int],
  at: tuple[Any, ...],
) -> tuple[int, Any]:
  """Returns the number of parts, and a program for the rows of one part.

  The update is traced again, with fewer rows in the group's arrays. Except for
  these shapes it must be the same program, including its constants, and two
  positions of an array may share only scalars.
  """
  shape = program.kinds[min(group.far)].shape
  parts = _count_parts(program, group, shape, at)
  if parts == 1 or not _is_elementwise(jaxpr.jaxpr, shape):
    return 1, jaxpr
  part = (shape[0] // parts, *shape[1:])
  again = {program.params.get(k, k) for k in used} | set(used)
  kinds = [
    _with_shape(kind, part) if k in again and kind.shape == shape else kind
    for k, kind in enumerate(program.kinds)
  ]
  try:
    with _notices.quiet():
      found = jax.make_jaxpr(program.run)(*kinds)
  except (TypeError, ValueError):  # the optimizer depends on its shapes
    return 1, jaxpr
  found, needed = only(found, sorted(group.outputs))
  same = needed == used and _same_consts(found, jaxpr)
  same = same and _text(found, part, 'rows') == _text(jaxpr, shape, 'rows')
  return (parts, found) if same else (1, jaxpr)


def _with_shape(kind: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, kind.dtype, sharding=kind.sharding)


def _same_consts(one: Any, other: Any) -> bool:
  """Whether two programs have captured the same scalars, and nothing else."""
  pairs = zip(one.consts, other.consts, strict=False)
  return len(one.consts) == len(other.consts) and all(
    np.shape(x) == () and (x is y or _equal(x, y)) for x, y in pairs
  )


def _equal(x: Any, y: Any) -> bool:
  return not isinstance(x, Tracer) and not isinstance(y, Tracer) and x == y


def _text(jaxpr: Any, shape: tuple[int, ...], name: str) -> str:
  """Returns a program as text, with a name in place of a shape."""
  text = str(jaxpr.jaxpr).replace(f'{shape}', name)
  return text.replace(f'[{",".join(map(str, shape))}]', name)


def _count_parts(
  program: Program,
  group: Group,
  shape: tuple[int, ...],
  at: tuple[Any, ...],
) -> int:
  """Returns into how many parts to cut the rows of a group's arrays."""
  far = [program.kinds[k] for k in group.far]
  size = sum(x.size * x.dtype.itemsize for x in far)
  cut = tuple(range(len(at) + 1))
  whole = all(_sharding.is_whole(program.inputs[k], cut) for k in group.far)
  if not shape or not shape[0] or not whole:
    return 1
  fits = (n for n in range(1, shape[0] + 1) if shape[0] % n == 0)
  return next((n for n in fits if size <= n * _MOST_BYTES), shape[0])


def _is_elementwise(jaxpr: Any, shape: tuple[int, ...]) -> bool:
  """Whether operations are elementwise, on this shape and on scalars."""

  def is_fine(eqn: Any) -> bool:
    shapes = {x.aval.shape for x in (*eqn.invars, *eqn.outvars)}
    if shapes <= {()}:
      return True
    name, inner = eqn.primitive.name, _inner(eqn)
    is_call = name in _CALLS and len(inner) == 1
    known = name in _ELEMENTWISE and not inner
    known |= is_call and _is_elementwise(inner[0], shape)
    return known and shapes <= {(), shape}

  return all(map(is_fine, jaxpr.eqns))


def _inner(eqn: Any) -> list[Any]:
  """Returns the programs that an operation calls."""
  found = [getattr(x, 'jaxpr', x) for x in eqn.params.values()]
  return [x for x in found if hasattr(x, 'eqns')]


def fetch_whole(x: jax.Array, at: tuple[Any, ...]) -> jax.Array:
  """Returns a far array, or its layer at an index, on the device."""
  return _memories.fetch(x, at, x.shape[len(at) :])
