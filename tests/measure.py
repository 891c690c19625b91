"""What the property tests read off optimizers: runs, states and programs."""

from collections.abc import Callable
import functools
import itertools
from typing import Any, NamedTuple

from flax.core import meta
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import cases
import subspace_optax as so
from subspace_optax._chain import _projection
from subspace_optax._chain import _unproject
from subspace_optax._matrix import _tree


def project_state(state: Any) -> Any:
  """Returns the one state of `project` in an optimizer's state."""
  ((_, found),) = _tree.find(state, _projection.ProjectState)
  return found


def residual_state(state: Any) -> list[Any]:
  """Returns the states of `unproject` in an optimizer's state."""
  return [x for _, x in _tree.find(state, _unproject.ResidualState)]


def bases(state: Any) -> dict[str, Any]:
  """Returns the bases in a state by path."""
  found = cases.flat(meta.unbox(project_state(state).subspaces.basis))
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  return {path: x for path, x in found.items() if not is_masked(x)}


def values(state: Any) -> list[np.ndarray]:
  """Returns the arrays of any tree in order, as host copies."""
  return [np.array(x) for x in jax.tree.leaves(state)]


def assert_trees_close(a: Any, b: Any, **tolerance: Any) -> None:
  """Compares structure and values; equal to the bit without a tolerance."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(
    jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True
  ):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype, (path, x.dtype, y.dtype)
    if tolerance:
      wide = np.promote_types(x.dtype, np.float32)
      x, y = x.astype(wide), y.astype(wide)
      np.testing.assert_allclose(x, y, err_msg=str(path), **tolerance)
    else:
      np.testing.assert_array_equal(x, y, err_msg=str(path))


def types(tree: Any) -> Any:
  """Returns the structure and the type of every leaf, weak types included."""
  leaves = [jax.typeof(x) for x in jax.tree.leaves(tree)]
  return jax.tree.structure(tree), leaves, [x.weak_type for x in leaves]


def filled(tx: Any, params: Any) -> Any:
  """Returns a state of `tx` of random numbers; no two counters are alike."""
  rng, counters = np.random.default_rng(0), itertools.count(3)

  def draw(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return rng.uniform(0.1, 1.0, x.shape).astype(x.dtype)
    if x.dtype == bool:
      return rng.integers(0, 2, x.shape).astype(bool)
    if x.ndim:
      return rng.integers(1, 100, x.shape).astype(x.dtype)
    return np.full(x.shape, next(counters), x.dtype)

  shapes, treedef = jax.tree.flatten(jax.eval_shape(tx.init, params))
  shardings = jax.tree.leaves(so.state_sharding(tx, params))
  return treedef.unflatten(map(jax.device_put, map(draw, shapes), shardings))


class Run(NamedTuple):
  """Six steps of an optimizer; entry t of a list is after t steps."""

  params: list[Any]
  states: list[Any]
  updates: list[Any]  # entry t is that of step t
  plain_updates: list[Any]  # what the inner optimizer alone gives
  first_state: Any
  last_state: Any
  donated: list[bool]
  compilations: int


@functools.cache
def run(name: str) -> Run:
  """Takes six steps on the whole tree in three donated scans of two."""
  case = cases.CASES[name]
  tx = case.make(cases.LEAVES)
  plain = optax.chain(
    case.inner(), optax.scale_by_learning_rate(cases.LEARNING_RATE)
  )
  of = cases.projected(name, cases.LEAVES)
  # Moments are float32, and so is the arithmetic on plain leaves.
  only_plain = lambda x: {
    p: leaf.astype(jnp.float32)
    for p, leaf in cases.flat(x).items()
    if p not in of
  }

  @functools.partial(cases.jit, donate_argnums=(0, 1))
  def two_steps(params, state, plain_state, gradients):
    def step(carry, gradient):
      params, state, plain_state = carry
      # Arguments that no transformation here knows.
      extra = {'value': jnp.float16(1.0), 'unknown': 'anything'}
      updates, state = tx.update(gradient, state, params, **extra)
      alone, plain_state = plain.update(only_plain(gradient), plain_state)
      new = optax.apply_updates(params, updates)
      return (new, state, plain_state), (new, state, updates, alone)

    return lax.scan(step, (params, state, plain_state), gradients)

  host = lambda x: jax.tree.map(np.array, x)
  params = cases.tree(cases.LEAVES)
  state, plain_state = tx.init(params), plain.init(only_plain(params))
  history = [(host(params), host(state), None, None)]
  first_state, donated = state, []
  all_gradients = cases.gradients(cases.LEAVES)
  for t in range(0, cases.STEPS, 2):
    pair = jax.tree.map(lambda *x: jnp.stack(x), *all_gradients[t : t + 2])
    given = jax.tree.leaves((params, state))
    if t == 0:
      first_state = jax.tree.map(jnp.copy, state)
    (params, state, plain_state), stacked = two_steps(
      params, state, plain_state, pair
    )
    donated += [x.is_deleted() for x in given]
    stacked = host(stacked)
    for i in (0, 1):
      history.append(jax.tree.map(lambda x, i=i: x[i], stacked))
  # Once more, from a state made anew.
  params = cases.tree(cases.LEAVES)
  two_steps(params, tx.init(params), plain.init(only_plain(params)), pair)
  columns = [list(column) for column in zip(*history, strict=True)]
  return Run(
    columns[0],
    columns[1],
    columns[2][1:],
    columns[3][1:],
    first_state,
    state,
    donated,
    two_steps._cache_size(),
  )


class Small(NamedTuple):
  """An optimizer on the small tree, compiled once for all tests."""

  tx: Any
  update: Callable[..., Any]  # (gradient, state, params) -> updates, state

  def init(self) -> tuple[Any, Any]:
    params = cases.tree(cases.SMALL)
    return params, self.tx.init(params)

  def run(self, gradients: list[Any], start: Any = None) -> list[Any]:
    """Returns params, state and updates after every step."""
    params, state = start or self.init()
    history = []
    for gradient in gradients:
      updates, state = self.update(gradient, state, params)
      params = optax.apply_updates(params, updates)
      history.append((params, state, updates))
    return history


def compiled(tx: Any) -> Small:
  """Returns an optimizer whose update is one compiled function."""
  return Small(tx, cases.jit(lambda g, s, p: tx.update(g, s, p)))


@functools.cache
def small(name: str) -> Small:
  return compiled(cases.CASES[name].make(cases.SMALL))


def equations(jaxpr: Any, in_cond: bool = False):
  """Yields every equation of a jaxpr and whether it may be skipped.

  That is, whether a `cond` holds it or a loop of as many turns as the program
  finds work for. A choice by platform (`lax.platform_dependent`) is a `cond`
  of the compiler, not of the program, and does not count.
  """
  by_platform = set()
  for eqn in jaxpr.eqns:
    yield eqn, in_cond
    kind = eqn.primitive.name
    inputs = [v for v in eqn.invars if not hasattr(v, 'val')]
    if kind == 'platform_index' or (
      inputs and all(v in by_platform for v in inputs)
    ):
      by_platform.update(eqn.outvars)
    chosen = kind == 'cond' and eqn.invars[0] not in by_platform
    inside = in_cond or (chosen and not hasattr(eqn.invars[0], 'val'))
    inside = inside or kind == 'while'
    for value in eqn.params.values():
      for inner in _jaxprs(value):
        yield from equations(inner, inside)


def _jaxprs(value: Any) -> list[Any]:
  if hasattr(value, 'eqns'):
    return [value]
  if hasattr(value, 'jaxpr'):
    return _jaxprs(value.jaxpr)
  if isinstance(value, tuple | list):
    return [jaxpr for x in value for jaxpr in _jaxprs(x)]
  return []


# Of a matrix: those that a step between refreshes must do without.
FACTORISATIONS = (
  'svd',
  'eigh',
  'qr',
  'geqrf',
  'geqp3',
  'householder_product',
  'cholesky',
  'lu',
  'schur',
  'tridiagonal',
)
