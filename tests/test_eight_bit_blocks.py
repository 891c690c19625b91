"""Blocks of `scale_by_adam8bit`: of leaves of any shape, on any mesh."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import subspace_optax as so
from subspace_optax.low_precision import _blocks
from subspace_optax.low_precision import _codes

# Primes, twice and four times primes, with a side below 128, with one of each.
SHAPES = [
  (10007, 64),
  (4099, 4099),
  (61, 67, 71),
  (257, 257),
  (521, 521),
  (10006, 64),
  (4036, 67),
  (4, 12108),
  (1, 4099),
  (10007, 1),
  (2, 2144, 100),
  (97, 43),
  (3, 3, 64, 64),
]
OCTAVES = {'int8': 12, 'uint8': 25}
LEVELS = {
  'int8': (np.arange(128) / 127) ** 2,
  'uint8': 2.0 ** ((np.arange(1, 256) - 255) / 10),
}


def normal(seed, *shape):
  x = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(np.float32(x))


@functools.lru_cache
def blocks_of(shape):
  """The number of each entry's block, and one entry of every block."""
  counts = _blocks.counts(shape)
  number = np.arange(math.prod(counts), dtype=np.int32).reshape(counts)
  spread = jax.jit(_blocks.Blocks(shape, counts).spread)
  number = np.asarray(spread(number))
  return number, np.unique(number, return_index=True)[1]


@pytest.mark.parametrize('shape', SHAPES)
def test_blocks_are_small_and_scales_few(shape):
  number, first = blocks_of(shape)
  sizes = np.bincount(number.reshape(-1))
  assert sizes.min() >= 1 and sizes.max() <= 512
  assert len(first) == len(sizes) == math.prod(_blocks.counts(shape))
  # Each is a rectangle of its matrix.
  *_, m, n = shape
  flat = number.reshape(-1, m, n)
  one = flat[0] == flat[0, m // 2, n // 2]
  assert one.sum() == one.any(0).sum() * one.any(1).sum()
  # A byte, and a scale of four for at least 80.
  leaf = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  report = so.memory_report(so.scale_by_adam8bit(), {'w': leaf})
  assert report.state <= 1.05 * 2 * math.prod(shape) + 4


def test_blocks_of_any_sizes():
  random = np.random.default_rng(0)
  shapes = np.exp2(random.uniform(0, 14, (1000, 2))).astype(int).tolist()
  for m, n in shapes:
    if m * n < 512:
      continue
    counts = _blocks.counts((m, n))
    assert m * n >= 80 * math.prod(counts)
    assert _blocks.counts((5, m, n)) == (5, *counts)
    for size, count, cut in zip(
      (m, n), counts, _blocks.Blocks((m, n), counts).cuts(), strict=True
    ):
      # What a device holds has blocks of its own, which are those of the whole.
      assert size % cut == 0 and count % cut == 0
      part = _blocks.Blocks((size // cut, 1), (count // cut, 1))
      assert part.cuts() == (math.gcd(size // cut, count // cut), 1)


# Of two axes and of more, with a last block that is smaller and without one.
ROUNDED = [(10007, 64), (61, 67, 71), (4, 12108), (3, 3, 64, 64)]


@pytest.mark.parametrize(
  'shape',
  [
    pytest.param(s, marks=() if s in ROUNDED else pytest.mark.full)
    for s in SHAPES
    if s != (4099, 4099)
  ],
)
def test_error_in_every_octave(shape):
  random = np.random.default_rng(1)
  first = blocks_of(shape)[1]

  def draw(dtype):
    octaves = random.integers(0, OCTAVES[dtype], shape)
    x = (random.uniform(0.5, 1, shape) * 2.0**-octaves).astype(np.float32)
    x.reshape(-1)[first] = 1.0
    return x * random.choice([-1, 1], shape) if dtype == 'int8' else x

  @cases.jit
  def coded_and_back(xs):
    scales = jnp.zeros(_blocks.counts(shape))
    like = {dtype: (jnp.zeros(shape, dtype), scales) for dtype in LEVELS}
    at_random = np.uint32(1), jnp.int32(2)
    return {
      dtype: [
        _codes.decode(*_codes.encode(x, *like[dtype], noise))
        for noise in (None, at_random)
      ]
      for dtype, x in xs.items()
    }

  drawn = {dtype: draw(dtype) for dtype in LEVELS}
  for dtype, found in coded_and_back(drawn).items():
    x, levels = drawn[dtype], LEVELS[dtype]
    place = np.searchsorted(levels, np.abs(x), 'right').clip(1, len(levels) - 1)
    gap = np.diff(levels)[place - 1] * (1 + 1e-3)
    for got, share in zip(found, (0.51, 1.0), strict=True):
      np.testing.assert_array_less(np.abs(np.float64(got) - x), share * gap)


@pytest.mark.parametrize('shape', [(10007, 64), (61, 67, 71)])
def test_a_gradient_that_is_not_finite_spoils_its_block(shape):
  number, first = blocks_of(shape)
  tx = so.scale_by_adam8bit()
  update = cases.jit(tx.update)
  start = cases.jit(tx.init)({'w': np.ones(shape, np.float32)})
  # In a last block, which is smaller, and elsewhere.
  for bad, at in (np.nan, first[-1]), (-np.inf, 5), (1e30, first[-1]):
    gradient = np.ones(shape, np.float32)
    gradient.reshape(-1)[at] = bad
    _, state = update({'w': gradient}, start)
    updates, _ = update({'w': np.ones(shape, np.float32)}, state)
    spoiled = number == number.reshape(-1)[at]
    np.testing.assert_array_equal(np.isfinite(updates['w']), ~spoiled)


def test_rows_of_other_sizes_are_as_exact():
  """Rows with gradients a million times smaller, where one scale would fail."""
  shape = (10007, 64)
  size = np.where(np.arange(shape[0]) < 5000, 1.0, 1e-6)[:, None]
  gradient = {'w': normal(0, *shape) * jnp.asarray(size, jnp.float32)}
  tx, wanted = so.scale_by_adam8bit(), optax.scale_by_adam()
  a, b = tx.init(gradient), wanted.init(gradient)
  ours, optaxs = cases.jit(tx.update), cases.jit(wanted.update)
  for _ in range(2):
    x, a = ours(gradient, a)
    y, b = optaxs(gradient, b)
  off = np.abs(x['w'] / y['w'] - 1) > 0.1
  assert off.mean() < 2 * 256 / shape[0]  # blocks that hold both


def test_blocks_of_zeros_and_of_numbers_near_the_smallest():
  shape = (1009, 67)
  x = np.ones(shape, np.float32)
  number, first = blocks_of(shape)
  for i, value in enumerate((0.0, 1e-41, 1e-38, 1e-30, 3e38)):
    x[number == number.reshape(-1)[first[i]]] = value
  like = _blocks.counts(shape)
  code = cases.jit(lambda x, *of: _codes.decode(*_codes.encode(x, *of)))
  for dtype in LEVELS:
    got = code(x, jnp.zeros(shape, dtype), jnp.zeros(like))
    # Below 1.2e-38 a CPU takes numbers for zero.
    small = x < 1.2e-38
    np.testing.assert_allclose(np.where(small, 0, got), np.where(small, 0, x))
    np.testing.assert_array_less(np.where(small, got, 0), 1.2e-38)


PLACES = [
  ((4036, 64), ('x', 'y'), True),  # both cut, rows in pieces of 1009
  ((4099, 64), (None, ('x', 'y')), True),
  ((10006, 64), ('y', 'x'), True),
  ((3, 1009, 12), (None, None, 'x'), True),
  ((260, 64), ('x', None), True),  # tiles of 13 x 16
  ((260, 64), (None, ('x', 'y')), True),
  ((8, 260, 64), ('x', 'y', None), True),
  ((384, 384), (('x', 'y'), None), False),  # cut in blocks of 192
  ((2, 16, 32), (None, ('x', 'y'), None), False),  # of 8 x 16
]
# Cut as the first and the second one.
ALIKE = (2, 5)


@pytest.mark.parametrize(
  'place, kind',
  [
    pytest.param(
      place,
      kind,
      marks=() if i % 2 == j and i not in ALIKE else pytest.mark.full,
    )
    for i, place in enumerate(PLACES)
    for j, kind in enumerate([AxisType.Auto, AxisType.Explicit])
  ],
  ids=str,
)
def test_on_a_mesh(place, kind):
  """The state is that of one device, and no device asks another for blocks."""
  shape, spec, whole = place
  tx = so.scale_by_adam8bit(rounding='nearest')
  gradient = {'w': normal(0, *shape)}
  alone, own = cases.jit(lambda g: tx.update(g, tx.init(g)))(gradient)
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    place = NamedSharding(mesh, P(*spec))
    sharded = jax.device_put(gradient, place)
    placed = so.state_sharding(tx, sharded)
    start = cases.jit(tx.init, out_shardings=placed)(sharded)
    program = cases.jit(tx.update).lower(sharded, start).compile()
    got, state = program(sharded, start)
    text = program.as_text()
    if whole:
      assert 'all-reduce' not in text and 'collective-permute' not in text
    # Never the leaf.
    assert not any(
      'all-gather(' in line and f'[{",".join(map(str, shape))}]' in line
      for line in text.splitlines()
    )
    for new, old in zip(*map(jax.tree.leaves, (state, start)), strict=True):
      assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
  np.testing.assert_allclose(got['w'], alone['w'], rtol=1e-5)
  np.testing.assert_array_equal(state.scales['mu']['w'], own.scales['mu']['w'])
  assert np.mean(state.coded.mu['w'] != own.coded.mu['w']) < 1e-3
