"""Trees, optimizers and measurements that the property tests share.

One tree holds every layout, so that one compilation covers them all, and each
optimizer is one point of the grid of projectors, transports, inner optimizers,
sides, ranks and dtypes.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

from flax import traverse_util
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_optax as so
from subspace_optax import _project
from subspace_optax import projectors

LEARNING_RATE = 0.02
STEPS = 6

jit = functools.partial(
  jax.jit,
  compiler_options={
    # Compiling takes nearly all of these tests' time; this halves it.
    'xla_backend_optimization_level': 0,
    # With more devices than cores, collectives that may run in any order can
    # wait for each other for ever.
    'xla_cpu_enable_concurrency_optimized_scheduler': False,
  },
)


class Leaf(NamedTuple):
  """A parameter and, if it is one, the matrix in it."""

  shape: tuple[int, ...]
  dtype: Any
  rows: tuple[int, ...] = ()
  cols: tuple[int, ...] = ()

  @property
  def batch(self) -> tuple[int, ...]:
    both = self.rows + self.cols
    return tuple(i for i in range(len(self.shape)) if i not in both)

  def size(self, axes: tuple[int, ...]) -> int:
    return math.prod(self.shape[i] for i in axes)


LEAVES = {
  'tall': Leaf((12, 8), jnp.float32, (0,), (1,)),
  # Two layers of two experts.
  'experts/up': Leaf((2, 2, 8, 12), jnp.bfloat16, (2,), (3,)),
  # The layers along axis 1, as MaxText stacks them, of (embed, heads, dim).
  'blocks/query': Leaf((8, 3, 2, 6), jnp.float32, (0,), (2, 3)),
  'attention/out': Leaf((2, 6, 8), jnp.float32, (0, 1), (2,)),
  # Its short side is below the rank.
  'thin': Leaf((2, 12), jnp.float32, (0,), (1,)),
  'bias': Leaf((12,), jnp.bfloat16),
  'embed': Leaf((10, 8), jnp.float32),
}

# The smaller tree, for properties that each need a compilation of their own.
SMALL = {
  'up': Leaf((3, 8, 12), jnp.float32, (1,), (2,)),
  'bias': Leaf((12,), jnp.float32),
}


def nest(flat: dict[str, Any]) -> dict[str, Any]:
  """Returns the nested tree of paths such as 'blocks/up'."""
  return traverse_util.unflatten_dict(flat, sep='/')


def flat(tree: Any) -> dict[str, Any]:
  """Returns the leaves of a nested tree by path."""
  return traverse_util.flatten_dict(tree, sep='/')


def tree(leaves: dict[str, Leaf], seed: int = 0, scale: float = 1.0) -> Any:
  """Returns random parameters or gradients of full rank."""
  rng = np.random.default_rng(seed)
  return nest(
    {
      path: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)
      for path, leaf in leaves.items()
    }
  )


def gradients(leaves: dict[str, Leaf], steps: int = STEPS) -> list[Any]:
  return [tree(leaves, 100 + t) for t in range(steps)]


def dimension_numbers(leaves: dict[str, Leaf]) -> Any:
  """Returns the tree that says which axes form matrices."""
  return nest(
    {
      path: so.DimensionNumbers(leaf.rows, leaf.cols) if leaf.rows else None
      for path, leaf in leaves.items()
    }
  )


class Case(NamedTuple):
  """An optimizer, and what is to be expected of it.

  Attributes:
    make: from the tree's leaves to the optimizer.
    inner: what plain leaves get, before the learning rate.
    side: the side that bases span.
    rank: the rank before clipping, an int or a fraction.
    only_if_smaller: whether leaves that would save nothing stay plain.
    moves: at which of the first six steps the state's basis changes.
    used: at each step, whether the update lies in the span of the basis in the
      'new' state or in the 'old' one.
    basis_dtype: of the basis.
    bases: how many arrays of the basis's shape the state holds.
    moments: how many of the coordinates' shape.
    flags: bytes per matrix beside seed and metrics.
    counters: bytes of counters, of the numbers of plain leaves and matrices.
    loss: what 300 steps on the small problem of rank 2 must reach.
  """

  make: Callable[[dict[str, Leaf]], Any]
  inner: Callable[[], Any] = optax.scale_by_adam
  side: str = 'short'
  rank: Any = 3
  only_if_smaller: bool = True
  moves: str = 'x.x.x.'
  used: tuple[Any, ...] = ('new',) * STEPS
  basis_dtype: Any = jnp.float32
  bases: int = 1
  moments: int = 2
  flags: int = 1
  counters: Callable[[int, int], int] = lambda plain, matrices: 8
  loss: float = 1e-3


def _spec(leaves: dict[str, Leaf], rank: Any = 3, **kwargs: Any):
  return so.SubspaceSpec(
    rank, weight_dimension_numbers=dimension_numbers(leaves), **kwargs
  )


def _pieces(projector, inner, *, rank=3, transport='keep', **spec):
  def make(leaves):
    return optax.chain(
      so.subspace(
        _spec(leaves, rank, **spec), projector, inner, transport=transport
      ),
      optax.scale_by_learning_rate(LEARNING_RATE),
    )

  return make


CASES = {
  'galore': Case(
    lambda leaves: so.galore(
      LEARNING_RATE,
      rank=3,
      update_proj_gap=2,
      weight_dimension_numbers=lambda params: dimension_numbers(leaves),
    ),
    side='long',
    only_if_smaller=False,
    loss=4e-3,
  ),
  'golore': Case(
    lambda leaves: so.golore(
      LEARNING_RATE, update_proj_gap=2, spec=_spec(leaves)
    ),
    loss=1e-2,
  ),
  'golore_late': Case(
    lambda leaves: so.golore(
      LEARNING_RATE,
      update_proj_gap=2,
      random_from=3,
      base_optimizer=optax.trace(0.9),
      spec=_spec(leaves),
    ),
    inner=lambda: optax.trace(0.9),
    moments=1,
    flags=2,
    counters=lambda plain, matrices: 4,
  ),
  'online': Case(
    lambda leaves: so.online_subspace_descent(
      LEARNING_RATE, spec=_spec(leaves)
    ),
    moves='xxxxxx',
    used=('old',) * STEPS,
    bases=3,
    flags=0,
    counters=lambda plain, matrices: 12,
  ),
  'online_lion_first': Case(
    _pieces(
      projectors.online_pca(optax.sgd(0.05), init='svd'),
      optax.scale_by_lion(),
      rank=0.4,
      transport='first',
    ),
    inner=optax.scale_by_lion,
    rank=0.4,
    moves='xxxxxx',
    # Bases start to learn one step after the SVD.
    used=('new', *('old',) * 5),
    moments=1,
  ),
  'gram_adam_reset': Case(
    _pieces(
      projectors.svd(2, 'gram'),
      optax.scale_by_adam(),
      rank=lambda path, leaf: 3,
      transport='reset',
    ),
    # Adam's, of each plain leaf and each matrix.
    counters=lambda plain, matrices: 4 + 4 * (plain + matrices),
  ),
  'randomized_rms_first': Case(
    _pieces(
      projectors.svd(2, 'randomized'),
      optax.scale_by_rms(),
      transport='first',
      side='out',
    ),
    inner=optax.scale_by_rms,
    side='out',
    moments=1,
    counters=lambda plain, matrices: 4,
  ),
  'stiefel_sgd': Case(
    _pieces(projectors.stiefel(2), optax.identity(), side='in'),
    inner=optax.identity,
    side='in',
    moments=0,
    counters=lambda plain, matrices: 4,
  ),
  'switch_trace_reset': Case(
    _pieces(
      projectors.switch(
        {0: projectors.svd(2), 3: projectors.online_pca(optax.adam(1e-2))}
      ),
      optax.trace(0.9),
      transport='reset',
      side='long',
      basis_dtype=jnp.bfloat16,
    ),
    inner=lambda: optax.trace(0.9),
    side='long',
    moves='x.xxxx',
    used=(*('new',) * 3, *('old',) * 3),
    basis_dtype=jnp.bfloat16,
    bases=3,
    moments=1,
    counters=lambda plain, matrices: 8,
  ),
}


class Expected(NamedTuple):
  """The shapes that an optimizer must give one leaf."""

  rank: int
  project_rows: bool
  m: int  # the projected side
  n: int
  matrices: int
  basis_shape: tuple[int, ...]


def expected(case: Case, leaf: Leaf) -> Expected | None:
  """Returns what the rules say of a leaf, None for plain ones."""
  if not leaf.rows:
    return None
  rows, cols = leaf.size(leaf.rows), leaf.size(leaf.cols)
  short = min(rows, cols)
  project_rows = {
    'short': rows <= cols,
    'long': rows >= cols,
    'in': True,
    'out': False,
  }[case.side]
  rank = case.rank
  if isinstance(rank, float):
    rank = max(1, round(rank * short))
  rank = min(rank, short)
  m, n = (rows, cols) if project_rows else (cols, rows)
  if case.only_if_smaller and m * rank + 2 * n * rank >= 2 * m * n:
    return None
  axes = sorted(leaf.batch + (leaf.rows if project_rows else leaf.cols))
  shape = (*(leaf.shape[i] for i in axes), rank)
  matrices = leaf.size(leaf.batch)
  return Expected(rank, project_rows, m, n, matrices, shape)


def projected(name: str, leaves: dict[str, Leaf]) -> dict[str, Expected]:
  """Returns the projected leaves of a case and what is expected of them."""
  found = {path: expected(CASES[name], leaf) for path, leaf in leaves.items()}
  return {path: e for path, e in found.items() if e is not None}


def state_bytes(name: str, leaves: dict[str, Leaf]) -> int:
  """Returns the bytes of an optimizer's state by the papers' formulas."""
  case, of = CASES[name], projected(name, leaves)
  matrices = sum(e.matrices for e in of.values())
  total = case.counters(len(leaves) - len(of), matrices)
  for path, leaf in leaves.items():
    size = jnp.dtype(leaf.dtype).itemsize
    if path not in of:
      total += case.moments * math.prod(leaf.shape) * size
      continue
    e = of[path]
    basis = case.bases * e.m * e.rank * jnp.dtype(case.basis_dtype).itemsize
    moments = case.moments * e.rank * e.n * size
    # A seed and three metrics for every matrix, four bytes each.
    total += e.matrices * (basis + moments + 16 + case.flags)
  return total


def as_matrices(leaf: Leaf, project_rows: bool, x: Any) -> np.ndarray:
  """Returns a leaf as (matrices, m, n), m the projected side."""
  x = np.asarray(x, np.float64)
  order = leaf.batch + leaf.rows + leaf.cols
  x = np.transpose(x, order)
  x = x.reshape(-1, leaf.size(leaf.rows), leaf.size(leaf.cols))
  return x if project_rows else np.swapaxes(x, -1, -2)


def as_bases(leaf: Leaf, project_rows: bool, x: Any) -> np.ndarray:
  """Returns a basis as (matrices, m, r)."""
  x = np.asarray(x, np.float64)
  axes = leaf.rows if project_rows else leaf.cols
  kept = sorted(leaf.batch + axes)
  order = [kept.index(i) for i in leaf.batch + axes]
  x = np.transpose(x, (*order, len(order)))
  return x.reshape(-1, leaf.size(axes), x.shape[-1])


def project_state(state: Any) -> Any:
  """Returns the one state of `project` in an optimizer's state."""
  is_it = lambda x: isinstance(x, _project.ProjectState)
  leaves = jax.tree.leaves(state, is_leaf=is_it)
  found = [leaf for leaf in leaves if is_it(leaf)]
  assert len(found) == 1, f'{len(found)} states of `project`'
  return found[0]


def bases(state: Any) -> dict[str, Any]:
  """Returns the bases in a state by path."""
  found = flat(project_state(state).subspaces.basis)
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
  case = CASES[name]
  tx = case.make(LEAVES)
  plain = optax.chain(case.inner(), optax.scale_by_learning_rate(LEARNING_RATE))
  of = projected(name, LEAVES)
  only_plain = lambda x: {p: leaf for p, leaf in flat(x).items() if p not in of}

  @functools.partial(jit, donate_argnums=(0, 1))
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
  params = tree(LEAVES)
  state, plain_state = tx.init(params), plain.init(only_plain(params))
  history = [(host(params), host(state), None, None)]
  first_state, donated = state, []
  all_gradients = gradients(LEAVES)
  for t in range(0, STEPS, 2):
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
  params = tree(LEAVES)
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
    params = tree(SMALL)
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
  return Small(tx, jit(lambda g, s, p: tx.update(g, s, p)))


@functools.cache
def small(name: str) -> Small:
  return compiled(CASES[name].make(SMALL))


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
