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
import jax.numpy as jnp
import numpy as np
import optax

import references
import subspace_optax as so
from subspace_optax import projectors

READY_MADE = tuple(so.optimizers.READY_MADE)
LEARNING_RATE = 0.02


def ready_made(name: str, rank: Any) -> Callable[..., Any]:
  """Returns a ready-made optimizer of some rank, if it has a rank."""
  return so.optimizers.with_rank(so.optimizers.READY_MADE[name], rank)


def inner_of(name: str) -> str:
  """Returns what a ready-made optimizer calls its inner optimizer."""
  return 'base_optimizer' if name == 'galore' else 'inner'


STEPS = 6

jit = functools.partial(
  jax.jit,
  compiler_options={
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

  def view(self, left: bool) -> references.View:
    """Returns its axes, with bases of the rows or, if not `left`, columns."""
    return references.View(self.shape, self.rows, self.cols, left)


LEAVES = {
  # Two layers of two experts.
  'experts/up': Leaf((2, 2, 8, 12), jnp.bfloat16, (2,), (3,)),
  # The layers along axis 1, as MaxText stacks them, of (embed, heads, dim).
  'blocks/query': Leaf((8, 3, 2, 6), jnp.float32, (0,), (2, 3)),
  # Tall, and in no stack.
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
      inner=optax.trace(0.9),
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
  """The rank of a leaf's bases, and the matrices that they belong to."""

  rank: int
  view: references.View


def expected(case: Case, leaf: Leaf) -> Expected | None:
  """Returns what the rules say of a leaf, None for plain ones."""
  if not leaf.rows:
    return None
  rows, cols = leaf.view(True).m, leaf.view(True).n
  left = {
    'short': rows <= cols,
    'long': rows >= cols,
    'in': True,
    'out': False,
  }[case.side]
  short, rank = min(rows, cols), case.rank
  if isinstance(rank, float):
    rank = max(1, round(rank * short))
  rank, view = min(rank, short), leaf.view(left)
  m, n = view.m, view.n
  if case.only_if_smaller and m * rank + 2 * n * rank >= 2 * m * n:
    return None
  return Expected(rank, view)


def projected(name: str, leaves: dict[str, Leaf]) -> dict[str, Expected]:
  """Returns the projected leaves of a case and what is expected of them."""
  found = {path: expected(CASES[name], leaf) for path, leaf in leaves.items()}
  return {path: e for path, e in found.items() if e is not None}


def state_bytes(name: str, leaves: dict[str, Leaf]) -> int:
  """Returns the bytes of an optimizer's state by the papers' formulas."""
  case, of = CASES[name], projected(name, leaves)
  matrices = sum(e.view.count for e in of.values())
  total = case.counters(len(leaves) - len(of), matrices)
  for path, leaf in leaves.items():
    size = max(jnp.dtype(leaf.dtype).itemsize, 4)  # float32 or wider
    if path not in of:
      total += case.moments * math.prod(leaf.shape) * size
      continue
    rank, view = of[path]
    basis = case.bases * view.m * rank * jnp.dtype(case.basis_dtype).itemsize
    moments = case.moments * rank * view.n * size
    # A seed and three metrics for every matrix, four bytes each.
    total += view.count * (basis + moments + 16 + case.flags)
  return total
