"""First moments in 4 bits: the code, and what it keeps."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import optax.contrib
from orbax.checkpoint import v1 as ocp
import pytest

import cases
import grid
import subspace_optax as so
from subspace_optax.low_precision import _blocks
from subspace_optax.low_precision import _codes

SHAPE = (128, 96)  # blocks of 128 rows and one column
LEVELS = (np.arange(8) / 7) ** 1.5


def normal(seed: int, *shape: int) -> jax.Array:
  x = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(np.float32(x))


@jax.jit
def encoded(x: Any, noise: Any = None) -> tuple[jax.Array, jax.Array]:
  counts = _blocks.counts(x.shape)
  zeros = jnp.zeros(x.shape, jnp.int4), jnp.zeros(counts, jnp.float32)
  return _codes.encode(jnp.asarray(x, jnp.float32), *zeros, noise)


def reference(x: Any) -> tuple[np.ndarray, np.ndarray]:
  """Nearest levels by search in float64, and how near a tie is."""
  x = np.asarray(x, np.float64)
  relative = np.abs(x) / np.abs(x).max(axis=0, keepdims=True)
  distance = np.abs(relative[..., None] - LEVELS)
  near = np.sort(distance, -1)
  return np.sign(x) * distance.argmin(-1), near[..., 1] - near[..., 0]


def test_codes_are_the_nearest_levels():
  x = normal(1, *SHAPE) ** 3
  codes, scales = encoded(x)
  assert codes.dtype == jnp.int4
  wanted, margin = reference(x)
  clear = margin > 1e-6
  found = np.asarray(codes.astype(jnp.int8))
  np.testing.assert_array_equal(found[clear], wanted[clear])
  assert clear.mean() > 0.99
  largest = np.abs(x).max(axis=0, keepdims=True)
  np.testing.assert_array_equal(scales, largest)
  values = np.sign(found) * LEVELS[np.abs(found)] * largest
  np.testing.assert_allclose(_codes.decode(codes, scales), values, rtol=1e-6)
  # What is kept is kept: decoding and coding again changes nothing.
  again, _ = encoded(_codes.decode(codes, scales))
  np.testing.assert_array_equal(again, codes)


def test_error_in_every_octave():
  """Half the distance of levels, or all of it at random."""
  x = np.sign(normal(0, *SHAPE)) * (
    0.5 + 0.5 * np.abs(np.sin(normal(1, *SHAPE)))
  )
  gaps = np.diff(LEVELS)
  for octave in range(5):
    y = np.array(x * 2.0**-octave, np.float32)
    y[0] = 1.0
    gap = gaps[np.searchsorted(LEVELS, np.abs(y), 'right').clip(1, 7) - 1]
    for noise, share in ((None, 0.5), ((np.uint32(1), jnp.int32(octave)), 1.0)):
      error = np.abs(_codes.decode(*encoded(y, noise)) - y)
      np.testing.assert_array_less(error, share * gap + 1e-6)


def test_rounding_at_random_is_right_in_the_mean():
  x = np.array(normal(2, *SHAPE))
  one = jax.jit(lambda t: _codes.decode(*encoded(x, (np.uint32(7), t))))
  n = 400
  got = np.stack([one(jnp.int32(t)) for t in range(n)]).astype(np.float64)
  # What is rounded another way once in a thousand times may not be in so many.
  unseen = np.abs(x).max(axis=0) * np.diff(LEVELS).max() / n
  deviation = got.std(axis=0) / n**0.5 + unseen
  error = np.abs(got.mean(axis=0) - x)
  np.testing.assert_array_less(error, 6 * deviation)
  assert 0.4 < np.mean(error / deviation) < 0.9


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_block(bad):
  x = np.array(normal(3, *SHAPE))
  x[5, 7] = bad
  got = np.asarray(_codes.decode(*encoded(x)))
  assert np.isnan(got[:, 7]).all()
  assert np.isfinite(np.delete(got, 7, axis=1)).all()


def muon_of() -> optax.GradientTransformation:
  axes = lambda p: jax.tree.map(lambda _: NUMBERS, p)
  return optax.contrib.scale_by_muon(weight_dimension_numbers=axes)


NUMBERS = optax.contrib.MuonDimensionNumbers(-2, -1)
INNERS = {
  'muon': muon_of(),
  'adam': optax.scale_by_adam(),
  'lion': optax.scale_by_lion(),
  'trace': optax.trace(0.9),
}


# Lion has Adam's first moment alone.
@pytest.mark.parametrize(
  'name',
  grid.but(INNERS, ('lion',)),
)
def test_states_keep_their_types(name):
  """In a scan with donated buffers, of stacks, transposed or not, and vmap."""
  tx = so.quantize_moments(INNERS[name], 4)
  params = {'up': normal(1, 3, 64, 128), 'down': normal(2, 3, 128, 64)}
  types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)

  def step(state, _):
    updates, state = tx.update(params, state, params)
    return state, (updates, state.scales)

  run = lambda state: jax.lax.scan(step, state, length=3)
  state = jax.jit(tx.init)(params)
  assert jnp.dtype('int4') in {x.dtype for x in jax.tree.leaves(state)}
  before = types(state)
  new, (updates, scales) = jax.jit(run, donate_argnums=0)(state)
  assert types(new) == before
  jax.tree.map(lambda x: np.testing.assert_(np.isfinite(x).all()), updates)
  one = lambda p: tx.update(p, tx.init(p))[1].scales
  mapped = jax.jit(jax.vmap(one))(params)
  for x, y in zip(*map(jax.tree.leaves, (mapped, scales)), strict=True):
    np.testing.assert_allclose(x, y[0], rtol=1e-6)


def test_bytes_of_a_moment():
  shapes = {
    'w': jax.ShapeDtypeStruct((24, 512, 1376), jnp.bfloat16),
    'odd': jax.ShapeDtypeStruct((10006, 64), jnp.bfloat16),
  }
  count = sum(x.size for x in shapes.values())
  for name, low, most in (('muon', 0.5, 0.56), ('adam', 1.5, 0.56 + 1.05)):
    tx = so.quantize_moments(INNERS[name], 4)
    size = so.memory_report(tx, shapes).state
    assert low * count < size < most * count


def test_second_moments_stay_in_8_bits():
  state = so.quantize_moments(optax.scale_by_adam(), 4).init(
    {'w': jnp.zeros(SHAPE)}
  )
  assert state.coded.mu['w'].dtype == jnp.int4
  assert state.coded.nu['w'].dtype == jnp.uint8


def steady_error(rounding: str, bits: int, b: float) -> float:
  """Relative error of momentum of noisy gradients, where it has settled."""
  tx = so.quantize_moments(optax.ema(b, debias=False), bits, rounding=rounding)
  x = jnp.zeros(SHAPE)

  def step(carried: Any, key: jax.Array) -> Any:
    state, exact = carried
    gradient = jax.random.normal(key, SHAPE)
    direction, state = tx.update(gradient, state)
    exact = b * exact + (1 - b) * gradient
    error = jnp.sum((direction - exact) ** 2) / jnp.sum(exact**2)
    return (state, exact), error

  @jax.jit
  def run():
    keys = jax.random.split(jax.random.key(0), 120)
    return jax.lax.scan(step, (tx.init(x), x), keys)[1]

  return float(np.sqrt(np.mean(run()[60:])))


def test_error_of_momentum_settles():
  """What the choice of the rounding is for."""
  for rounding, error, atol in (
    ('auto', 0.36, 0.03),
    ('stochastic', 0.55, 0.04),
  ):
    found = steady_error(rounding, 4, 0.95)
    np.testing.assert_allclose(found, error, atol=atol)
  np.testing.assert_allclose(steady_error('auto', 8, 0.95), 0.03, atol=0.005)


def test_momentum_of_no_gradient_decays():
  """Codes stay and scales decay, whatever the rounding."""
  for rounding in ('nearest', 'stochastic'):
    tx = so.quantize_moments(optax.trace(0.9), 4, rounding=rounding)
    state = tx.init({'w': jnp.zeros(SHAPE)})
    _, state = tx.update({'w': normal(0, *SHAPE)}, state)
    for _ in range(3):
      old = state
      _, state = tx.update({'w': jnp.zeros(SHAPE)}, state)
      codes = [x.coded.trace['w'] for x in (old, state)]
      np.testing.assert_array_equal(*codes)
      scales = [x.scales['trace']['w'] for x in (old, state)]
      np.testing.assert_allclose(scales[1], 0.9 * scales[0], rtol=1e-6)


# With Explicit axes: in 8 bits.
@pytest.mark.parametrize(
  'kind',
  [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.full)],
)
def test_on_a_mesh_and_through_a_checkpoint(kind, tmp_path):
  tx = so.quantize_moments(optax.trace(0.9), 4)
  params = {'w': normal(0, 1024, 64), 'stack': normal(1, 4, 512, 128)}
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(kind,) * 2)
  specs = {'w': P('x', 'y'), 'stack': P(None, 'x', 'y')}
  places = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
  with jax.set_mesh(mesh):
    sharded = jax.device_put(params, places)
    start = cases.jit(tx.init)(sharded)
    update = cases.jit(tx.update)
    program = update.lower(sharded, start).compile()
    assert 'all-gather' not in program.as_text()
    got, state = update(sharded, start)
  alone, own = cases.jit(lambda p: tx.update(p, tx.init(p)))(params)
  jax.tree.map(np.testing.assert_array_equal, got, alone)
  jax.tree.map(np.testing.assert_array_equal, state, own)
  ocp.save(tmp_path / 'state', state)
  everywhere = NamedSharding(mesh, P())
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
    state,
  )
  back = ocp.load(tmp_path / 'state', like)
  jax.tree.map(np.testing.assert_array_equal, back, state)
  assert back.coded.trace['w'].dtype == jnp.int4


def test_in_a_subspace_and_at_another_rank():
  """Transports and `resize_rank` read codes of 4 bits, and write such."""
  bias = np.ones(256, np.float32)
  params = {'w': normal(0, 128, 256), 'bias': bias}
  tx = so.golore(0.1, 48, update_proj_gap=2, moment_bits=4)
  other = so.golore(0.1, 32, update_proj_gap=2, moment_bits=4)
  state, update = cases.jit(tx.init)(params), cases.jit(tx.update)
  for t in range(3):
    gradients = {'w': normal(t, 128, 256), 'bias': bias}
    updates, state = update(gradients, state, params)
  assert update._cache_size() == 1
  smaller = so.resize_rank(other, state, params)
  types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert types(smaller) == types(jax.eval_shape(other.init, params))
  dtypes = {x.dtype.name for x in jax.tree.leaves(smaller)}
  assert {'int4', 'uint8'} <= dtypes
  updates, _ = cases.jit(other.update)(gradients, smaller, params)
  assert np.isfinite(updates['w']).all()
