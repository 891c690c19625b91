# SPDX-License-Identifier: Apache-2.0
"""How many bytes a compiled function would hold at once, from its trace.

A compiler computes elementwise results where they are used, so they take no
memory. Only the inputs and outputs of products, loops and other opaque
operations take memory, and the function's results. Operations run in the order
of the trace. Each array lives until its last use, including uses of values that
were computed from it without taking memory.
"""

from collections.abc import Iterator
import math
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp

# The same numbers in another shape, order or dtype.
_VIEWS = frozenset(
  'reshape transpose squeeze expand_dims convert_element_type copy copy_p '
  'broadcast_in_dim rev optimization_barrier name stop_gradient '
  'sharding_constraint reshard layout_constraint'.split()
)
# Each number depends on few others, so it can be computed inside the operation
# that uses it.
_ELEMENTWISE = frozenset(
  'abs acos acosh add add_any and asin asinh atan atan2 atanh '
  'bitcast_convert_type cbrt ceil clamp concatenate cos cosh div '
  'dynamic_slice eq erf erf_inv erfc exp exp2 expm1 floor ge gt '
  'integer_pow iota is_finite le log log1p '
  'logistic lt max min mul ne neg nextafter not or pad pow '
  'real reduce_precision rem round rsqrt select_n shift_left '
  'shift_right_arithmetic shift_right_logical sign sin sinh slice split sqrt '
  'square sub tan tanh threefry2x32 xor random_wrap random_unwrap '
  'random_fold_in random_seed clz population_count'.split()
)
# They read numbers without storing them, but their results are stored arrays.
_REDUCTIONS = frozenset(
  'reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax '
  'argmin'.split()
)
_LOOPS = frozenset(['scan', 'while', 'cond'])


class Op(NamedTuple):
  """An operation of a flat trace; values are identified by numbers."""

  name: str
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  inside: int  # bytes that it holds in addition to them while it runs


class Trace(NamedTuple):
  """A function without nested calls."""

  ops: list[Op]
  sizes: dict[int, int]  # bytes
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


def bytes_of(aval: Any) -> int:
  """Returns the bytes of an array of this shape; 0 for a random key."""
  shape, dtype = getattr(aval, 'shape', ()), getattr(aval, 'dtype', None)
  bits = 4 if dtype == jnp.int4 else 8 * getattr(dtype, 'itemsize', 0)
  return -(-math.prod(shape) * bits // 8)


def flatten(closed: Any) -> Trace:
  """Returns the trace of a closed jaxpr, with calls replaced by their ops."""
  trace = Trace([], {}, (), ())
  jaxpr = closed.jaxpr
  env: dict[Any, int] = {}
  inputs = [_new(trace, env, v) for v in jaxpr.invars]
  _walk(jaxpr, env, trace)
  outputs = [_read(trace, env, v) for v in jaxpr.outvars]
  return trace._replace(inputs=tuple(inputs), outputs=tuple(outputs))


def _new(trace: Trace, env: dict[Any, int], var: Any) -> int:
  number = len(trace.sizes)
  trace.sizes[number] = bytes_of(var.aval)
  env[var] = number
  return number


def _read(trace: Trace, env: dict[Any, int], var: Any) -> int:
  """Returns the number of a variable; literals and constants take no memory."""
  if not isinstance(var, jax.extend.core.Literal) and var in env:
    return env[var]
  number = len(trace.sizes)
  trace.sizes[number] = 0
  return number


def _walk(jaxpr: Any, env: dict[Any, int], trace: Trace) -> None:
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    inputs = tuple(_read(trace, env, v) for v in eqn.invars)
    bodies = [closed.jaxpr for closed in _closed(eqn)]
    inner = [body for body in bodies if len(body.invars) == len(inputs)]
    if name not in _LOOPS and len(inner) == 1:
      _call(inner[0], inputs, eqn, env, trace)
      continue
    outputs = tuple(_new(trace, env, v) for v in eqn.outvars)
    inside = max(map(_inside, _closed(eqn)), default=0)
    trace.ops.append(Op(name, inputs, outputs, inside))


def _call(jaxpr: Any, inputs: Any, eqn: Any, env: Any, trace: Trace) -> None:
  inner = dict(zip(jaxpr.invars, inputs, strict=True))
  _walk(jaxpr, inner, trace)
  for var, out in zip(eqn.outvars, jaxpr.outvars, strict=True):
    env[var] = _read(trace, inner, out)


def _closed(eqn: Any) -> Iterator[Any]:
  """Yields the closed jaxprs among an operation's parameters."""
  for value in eqn.params.values():
    for x in value if isinstance(value, tuple | list) else (value,):
      if isinstance(x, jax.extend.core.ClosedJaxpr):
        yield x
      elif isinstance(x, jax.extend.core.Jaxpr):
        yield jax.extend.core.ClosedJaxpr(x, ())


def _inside(closed: Any) -> int:
  """Returns the bytes that a loop's body holds, without its results."""
  return peak(flatten(closed), count_outputs=False)


def in_memory(trace: Trace) -> set[int]:
  """Returns the values that take memory."""
  maker = {v: op for op in trace.ops for v in op.outputs}
  kept: set[int] = set(trace.inputs)
  for op in trace.ops:
    if op.name not in _VIEWS and op.name not in _ELEMENTWISE:
      kept.update(op.outputs)
      if op.name not in _REDUCTIONS:
        kept.update(_stored(trace, maker, v) for v in op.inputs)
  kept.update(_stored(trace, maker, v) for v in trace.outputs)
  return kept


def _stored(trace: Trace, maker: dict[int, Op], value: int) -> int:
  """Returns the smallest value of which `value` is a view."""
  best = value
  while value in maker and maker[value].name in _VIEWS:
    value = maker[value].inputs[0]
    if trace.sizes[value] <= trace.sizes[best]:
      best = value
  opaque = value in maker and maker[value].name not in _ELEMENTWISE
  return value if opaque or value not in maker else best


def peak(trace: Trace, *, count_outputs: bool = True) -> int:
  """Returns the most bytes that are held at once in addition to the inputs.

  Args:
    trace: a trace from `flatten`.
    count_outputs: whether results take memory; they don't if they overwrite
      donated inputs.
  """
  kept = in_memory(trace)
  free = set(trace.inputs)
  if not count_outputs:
    free |= set(trace.outputs)
  roots = _roots(trace, kept)
  last = {
    r: i
    for i, op in enumerate(trace.ops)
    for v in op.inputs
    for r in roots.get(v, ())
  }
  last |= {r: len(trace.ops) for v in trace.outputs for r in roots.get(v, ())}
  size = lambda v: 0 if v in free else trace.sizes[v]
  dies: dict[int, list[int]] = {}
  for value, i in last.items():
    dies.setdefault(i, []).append(value)
  held = most = 0
  for i, op in enumerate(trace.ops):
    made = sum(size(v) for v in op.outputs if v in kept)
    unused = sum(size(v) for v in op.outputs if v in kept and v not in last)
    freed = sum(size(v) for v in dies.get(i, ()))
    # An elementwise result may overwrite its operand.
    fused = op.name in _ELEMENTWISE or op.name in _VIEWS
    most = max(most, held + made - (freed if fused else 0) + op.inside)
    held += made - freed - unused
    most = max(most, held)
  return most


def _roots(trace: Trace, kept: set[int]) -> dict[int, frozenset[int]]:
  """Returns the values in memory from which each value is computed."""
  roots = {v: frozenset([v]) for v in trace.inputs}
  for op in trace.ops:
    sources = frozenset().union(*(roots.get(v, ()) for v in op.inputs))
    for v in op.outputs:
      roots[v] = frozenset([v]) if v in kept else sources
  return roots


def residuals(trace: Trace, count: int) -> int:
  """Returns the bytes that a traced `jax.vjp` keeps besides its arguments.

  Args:
    trace: trace of a function that returns `count` values, then all residuals.
    count: the number of values.
  """
  kept = in_memory(trace._replace(outputs=trace.outputs[:count]))
  roots = _roots(trace, kept)
  found = {r for v in trace.outputs[count:] for r in roots.get(v, ())}
  return sum(trace.sizes[v] for v in found - set(trace.inputs))
