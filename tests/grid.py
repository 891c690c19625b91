"""The grid of projectors, transports, inner optimizers, and a cover of it."""

from collections.abc import Callable, Collection, Iterable
import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
import pytest

import subspace_optax as so
from subspace_optax import projectors
from subspace_optax import residuals

GAP = 2

PROJECTORS: dict[str, Callable[[bool], projectors.Projector]] = {
  'svd': lambda stagger: projectors.svd(GAP, 'exact', stagger=stagger),
  'gram': lambda stagger: projectors.svd(GAP, 'gram', stagger=stagger),
  'randomized': lambda stagger: projectors.svd(
    GAP, 'randomized', stagger=stagger
  ),
  'warm': lambda stagger: projectors.svd(GAP, 'warm', stagger=stagger),
  'lazy': lambda stagger: projectors.svd(
    projectors.LazyGap(GAP, threshold=0.01, window=1), stagger=stagger
  ),
  'importance': lambda stagger: projectors.importance_svd(GAP, stagger=stagger),
  'power': lambda stagger: projectors.power_iteration(1, 0.9, stagger=stagger),
  'lagged_power': lambda stagger: projectors.lagged_power(1, stagger=stagger),
  'online_pca': lambda stagger: projectors.online_pca(optax.adam(0.02)),
  'online_pca_options': lambda stagger: projectors.online_pca(
    optax.sgd(0.5), init='svd', update_every=2, orthonormalize_every=4
  ),
  'tracking': lambda stagger: projectors.grassmann_tracking(
    GAP, stagger=stagger
  ),
  'walk': lambda stagger: projectors.grassmann_walk(GAP, stagger=stagger),
  'stiefel': lambda stagger: projectors.stiefel(GAP, stagger=stagger),
  'stiefel_regenerated': lambda stagger: projectors.stiefel(
    GAP, stagger=stagger, regenerate=True
  ),
  'gaussian': lambda stagger: projectors.gaussian(GAP, stagger=stagger),
  'dct': lambda stagger: projectors.dct(GAP, stagger=stagger),
  'dct_random': lambda stagger: projectors.dct(GAP, 'random', stagger=stagger),
  'switch': lambda stagger: projectors.switch(
    {
      0: projectors.gaussian(GAP, stagger=stagger),
      2: projectors.svd(GAP, 'gram', stagger=stagger),
      4: projectors.online_pca(optax.sgd(0.1)),
    }
  ),
}


class Inner(NamedTuple):
  """An inner optimizer and the arguments that it needs.

  Attributes:
    make: the optimizer.
    options: of `subspace`.
    transports: those that know its moments.
    waits: whether it takes a step only at the end of a window of two.
    rates: decay rates of its first and second moments, if it has both.
  """

  make: Callable[[], optax.GradientTransformation]
  options: Callable[[], dict[str, Any]] = dict
  transports: tuple[str, ...] = ('keep', 'first', 'both', 'reset')
  waits: bool = False
  rates: tuple[float, float] = (0.9, 0.999)


_UNKNOWN = ('keep', 'reset')

INNERS = {
  'adam': Inner(optax.scale_by_adam),
  'adam_injected': Inner(
    lambda: optax.inject_hyperparams(optax.scale_by_adam)(b1=0.8, b2=0.9),
    rates=(0.8, 0.9),
  ),
  'lion': Inner(optax.scale_by_lion),
  'momentum': Inner(
    lambda: optax.chain(
      optax.trace(0.9), optax.scale_by_schedule(lambda t: 1.0 / (1.0 + t))
    )
  ),
  'rms': Inner(optax.scale_by_rms),
  'adafactor': Inner(
    lambda: optax.adafactor(0.1, min_dim_size_to_factor=3),
    lambda: {'params': 'coordinates', 'per_matrix': True},
    _UNKNOWN,
  ),
  'lamb': Inner(
    lambda: optax.lamb(0.1),
    lambda: {'params': 'coordinates', 'per_matrix': True},
  ),
  'muon': Inner(
    optax.contrib.scale_by_muon,
    lambda: {'per_matrix': True, 'plain': optax.scale_by_adam()},
  ),
  'adamw': Inner(
    lambda: optax.adamw(0.1, weight_decay=0.1),
    lambda: {'params': 'coordinates'},
  ),
  'multi_steps': Inner(
    lambda: optax.MultiSteps(optax.scale_by_adam(), 2), waits=True
  ),
  'sgd': Inner(optax.identity),
}

# Like others but for a line: every pair is covered but those with projectors,
# and those of an inner optimizer and a residual.
ALIKE_INNERS = ('adam_injected', 'rms', 'lamb', 'adamw')
ALIKE_RESIDUALS = ('apollo_mini', 'normuon')

# Projectors whose bases move as another's do: before the step, as `svd`'s or
# `stiefel`'s; after it, as `online_pca`'s; or as one of several, in turn. Inner
# optimizers, residuals, transports, windows and the names of sides see nothing
# of a projector but its basis, so that their pairs with these are not covered.
ALIKE_PROJECTORS = (
  'power',
  'tracking',
  'dct',
  'lazy',
  'lagged_power',
  'stiefel_regenerated',
  'gram',
  'randomized',
  'warm',
  'importance',
  'walk',
  'dct_random',
  'online_pca_options',
  'switch',
)

# These see no more of an inner optimizer than its direction, as `fira` does.
OF_DIRECTIONS = ('apollo', 'sign', 'orthogonal', 'momentum_feedback')

RESIDUALS = {
  'fira': residuals.fira(),
  'apollo': residuals.apollo(),
  'apollo_mini': residuals.apollo('tensor'),
  'sign': residuals.sign(),
  'error_feedback': residuals.error_feedback(b1=0.0),
  'momentum_feedback': residuals.momentum_feedback(),
  'orthogonal': residuals.orthogonal(),
  'normuon': residuals.orthogonal(
    ns_coeffs='dion', preconditioning='aol', b2=0.9
  ),
}

FACTORS: dict[str, tuple] = {
  'projector': tuple(PROJECTORS),
  'inner': tuple(INNERS),
  'transport': ('keep', 'first', 'both', 'reset'),
  'side': ('short', 'long', 'in', 'out'),
  'stagger': (False, True),
  'basis_dtype': (jnp.float32, jnp.bfloat16),
  'every_k': (1, 2),
  'residual': (None, *RESIDUALS),
  'leaf': ('stack', 'plain'),
}


class Point(NamedTuple):
  """One optimizer of the grid."""

  projector: str
  inner: str
  transport: str
  side: str
  stagger: bool
  basis_dtype: Any
  every_k: int
  residual: str | None
  leaf: str

  def __str__(self) -> str:
    flags = ['stagger'] * self.stagger + [f'every_{self.every_k}']
    dtype = jnp.dtype(self.basis_dtype).name
    return '-'.join([*self[:4], *flags, dtype, str(self.residual), self.leaf])


def but(points: Iterable[Any], left_out: Collection[Any]) -> list[Any]:
  """Returns points for `parametrize`; some of them only run with `--full`."""
  points = list(points)
  assert set(left_out) <= set(points), 'a point that is not there'
  return only(points, [x for x in points if x not in left_out])


def only(points: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
  """Returns points for `parametrize`; the others only run with `--full`."""
  points = list(points)
  assert set(chosen) <= set(points), 'a point that is not there'
  mark = lambda x: () if x in chosen else pytest.mark.full
  return [pytest.param(x, marks=mark(x)) for x in points]


def cover(*factors: Iterable[Any], of: int) -> list[Any]:
  """Returns the points of a product, for `parametrize`; `--full` has them all.

  Else only those run whose indices add up to a multiple of `of`: of three
  factors of at least `of` values each, every pair of values; of two factors,
  every value with its share of the other's.
  """
  values = [*map(list, factors)]
  together = 1 if len(values) < 3 else 2
  parts = lambda point: set(itertools.combinations(enumerate(point), together))
  points, kept, wanted = [], set(), set()
  for point in itertools.product(*map(enumerate, values)):
    indices, chosen = zip(*point, strict=True)
    runs = sum(indices) % of == 0
    wanted |= parts(indices)
    kept |= parts(indices) if runs else set()
    points.append(pytest.param(*chosen, marks=() if runs else pytest.mark.full))
  assert kept == wanted, 'no point that runs has what is missing'
  return points


def transport(name: str, rates: tuple[float, float]) -> Any:
  """Returns what stands for a transport's name here."""
  return so.transports.both(*rates) if name == 'both' else name


def allowed(point: Point) -> bool:
  """Whether the optimizer can be made; the rest raises, which is tested too."""
  return _fits(point._asdict())


def make(point: Point, **spec: Any) -> optax.GradientTransformation:
  """Returns the optimizer, with its learning rate."""
  inner = INNERS[point.inner]
  sign, tx = -0.1, inner.make()
  if point.inner in ('adafactor', 'lamb', 'adamw'):
    sign = 1.0  # they carry a learning rate themselves
    if point.residual:
      sign, tx = -1.0, optax.chain(tx, optax.scale(-1.0))
  return so.subspace(
    so.SubspaceSpec(3, side=point.side, basis_dtype=point.basis_dtype, **spec),
    PROJECTORS[point.projector](point.stagger),
    tx,
    transport=transport(point.transport, INNERS[point.inner].rates),
    every_k=point.every_k,
    residual=point.residual and RESIDUALS[point.residual],
    after=optax.scale(sign),
    **inner.options(),
  )


def product() -> list[Point]:
  """Returns all projectors, inner optimizers, transports; the rest in turn."""
  rest = itertools.cycle(itertools.product(*list(FACTORS.values())[3:]))
  points = (
    Point(*three, *next(rest))
    for three in itertools.product(*list(FACTORS.values())[:3])
  )
  return [point for point in points if allowed(point)]


def pairwise() -> list[Point]:
  """Returns few points that hold every allowed pair but those of what is alike.

  Greedily: each point starts from the first pair that is missing, and takes for
  each other factor the value that adds most of those that are.
  """
  names = list(FACTORS)
  missing = {
    ((a, x), (b, y))
    for a, b in itertools.combinations(names, 2)
    for x, y in itertools.product(FACTORS[a], FACTORS[b])
    if _fits({a: x, b: y}) and not alike((a, b), (x, y))
  }
  order = sorted(missing, key=str)
  points = []
  for first in order:
    if first not in missing:
      continue
    chosen = dict(first)
    for name in names:
      if name not in chosen:
        chosen[name] = _best_value(name, chosen, missing)
    items = [(name, chosen[name]) for name in names]
    missing -= set(itertools.combinations(items, 2))
    points.append(Point(**dict(items)))
  return points


def alike(factors: tuple[str, str], values: tuple) -> bool:
  """Whether a pair need not be covered, since another one is like it."""
  like = {
    'projector': ALIKE_PROJECTORS,
    'inner': ALIKE_INNERS,
    'residual': ALIKE_RESIDUALS,
  }
  chosen = dict(zip(factors, values, strict=True))
  if chosen.keys() <= like.keys() and any(
    value in like[name] for name, value in chosen.items()
  ):
    return True
  if chosen.get('projector') in ALIKE_PROJECTORS:
    unseen = chosen.get('side') in ('in', 'out')
    return unseen or bool({'transport', 'every_k'} & chosen.keys())
  return 'inner' in chosen and chosen.get('residual') in OF_DIRECTIONS


def _best_value(name: str, chosen: dict[str, Any], missing: set) -> Any:
  """Returns the value that makes most missing pairs with what is chosen."""

  def gain(value: Any) -> int:
    return sum(_pair((name, value), item) in missing for item in chosen.items())

  values = [v for v in FACTORS[name] if _fits(chosen | {name: v})]
  return max(values, key=gain)


def _fits(chosen: dict[str, Any]) -> bool:
  """Whether choices go together; a window keeps no gradients for a residual."""
  if chosen.get('every_k', 1) > 1 and chosen.get('residual'):
    return False
  if 'inner' not in chosen or 'transport' not in chosen:
    return True
  return chosen['transport'] in INNERS[chosen['inner']].transports


def _pair(one: tuple, other: tuple) -> tuple:
  names = list(FACTORS)
  return tuple(sorted((one, other), key=lambda item: names.index(item[0])))
