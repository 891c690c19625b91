"""`scale_by_adam8bit` and `scale_by_lion8bit`: the code, and what it keeps."""

import functools
import math

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp
import pytest

import cases
import grid
import llama
import measure
import subspace_optax as so
from subspace_optax.low_precision import _blocks
from subspace_optax.low_precision import _codes

SHAPE = (128, 96)  # blocks of 128 rows and one column
CODES = (jnp.int8, jnp.uint8)
OCTAVES = {jnp.int8: 12, jnp.uint8: 24}


def normal(seed, *shape):
  x = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(np.float32(x))


def levels(dtype):
  """All codes' values in float64, from the formulas, the smallest first."""
  if dtype == jnp.int8:
    return (np.arange(128) / 127) ** 2
  return np.concatenate([[0.0], 2.0 ** ((np.arange(1, 256) - 255) / 10)])


def gaps(dtype, x):
  """The distance of the two levels around each number from 0 to 1."""
  place = np.searchsorted(levels(dtype), x, 'right')
  return np.diff(levels(dtype))[place.clip(1, len(levels(dtype)) - 1) - 1]


def reference(x, dtype):
  """The nearest code and scales of (128, 96) in float64, and what is a tie."""
  x = np.asarray(x, np.float64)
  scales = np.abs(x).max(axis=0, keepdims=True)
  relative, values = np.abs(x) / scales, levels(dtype)
  if dtype == jnp.uint8:  # in proportion
    with np.errstate(divide='ignore'):
      relative = np.maximum(np.log2(relative), -26.0)
      values = np.maximum(np.log2(values), -30.0)
  above = np.searchsorted(values, relative).clip(1, len(values) - 1)
  low, high = values[above - 1], values[above]
  share = (relative - low) / (high - low)
  codes = np.where(x == 0, 0, above - (share < 0.5))
  return np.sign(x) * codes, scales, np.abs(share - 0.5) < 1e-3


@functools.partial(jax.jit, static_argnums=1)
def encoded(x, dtype, noise=None):
  counts = _blocks.counts(x.shape)
  zeros = jnp.zeros(x.shape, dtype), jnp.zeros(counts, jnp.float32)
  return _codes.encode(jnp.asarray(x, jnp.float32), *zeros, noise)


decode = jax.jit(_codes.decode)


# The code.


@pytest.mark.parametrize('dtype', CODES)
def test_error_in_every_octave(dtype):
  """At most half of a gap, or all of it at random."""
  x = np.array(normal(0, *SHAPE), np.float64)
  if dtype == jnp.uint8:
    x = np.abs(x)
  # In [1/2, 1) times 2^-octave; a one in every block.
  x = np.sign(x) * (0.5 + 0.5 * np.abs(np.modf(x)[0]))
  for octave in range(OCTAVES[dtype]):
    y = (x * 2.0**-octave).astype(np.float32)
    y[0] = 1.0
    gap = gaps(dtype, np.abs(y))
    for noise, share in ((None, 0.51), ((np.uint32(1), jnp.int32(octave)), 1)):
      got = np.asarray(decode(*encoded(y, dtype, noise)), np.float64)
      error = np.abs(got - y)[1:]
      np.testing.assert_array_less(error, share * gap[1:] * (1 + 1e-3) + 1e-9)
    # First moments: a part in 64 of the largest, and of each a growing share.
    if dtype == jnp.int8:
      assert gap.max() < 2 / 127 and np.max(gap / np.abs(y)) < 2**-5 * 2 ** (
        octave / 2
      )
    else:
      assert np.max(gap / y) < 0.072


@pytest.mark.parametrize('dtype', CODES)
def test_codes_are_the_reference(dtype):
  x = normal(1, *SHAPE) ** 3
  x = jnp.abs(x) if dtype == jnp.uint8 else x
  codes, scales = encoded(x, dtype)
  wanted, wanted_scales, tie = reference(x, dtype)
  same = tie | (np.asarray(codes) == wanted)
  assert same.all() and tie.mean() < 0.01
  np.testing.assert_allclose(scales, wanted_scales, rtol=1e-7)
  # What is kept is kept: decoding and coding again changes nothing.
  again, _ = encoded(decode(codes, scales), dtype)
  np.testing.assert_array_equal(again, codes)


def test_small_second_moments_are_never_zero():
  x = np.full(SHAPE, 1e-30, np.float32)
  x[0], x[1] = 1.0, 0.0
  for noise in (None, (np.uint32(1), jnp.int32(3))):
    codes, scales = encoded(x, jnp.uint8, noise)
    got = np.asarray(decode(codes, scales))
    assert (got[2:] > 0).all() and (got[1] == 0).all()
    # Small ones, which make steps small, not large.
    assert (got[2:] < 2.0**-25).all()


@pytest.mark.parametrize('dtype', CODES)
def test_rounding_at_random_is_right_in_the_mean(dtype):
  x = np.array(np.abs(normal(2, *SHAPE)))
  x[0] = 4.0
  x[1:9] = 4.0 * 2.0**-17  # below the smallest signed code
  one = jax.jit(lambda t: _codes.decode(*encoded(x, dtype, (np.uint32(7), t))))
  n = 400
  got = np.stack([one(jnp.int32(t)) for t in range(n)]).astype(np.float64)
  error = np.abs(got.mean(axis=0) - x)[1:]
  # What is rounded up once in a thousand times may not be in so many.
  unseen = 4.0 * gaps(dtype, x / 4.0) / n
  deviation = (got.std(axis=0) / math.sqrt(n) + unseen)[1:]
  np.testing.assert_array_less(error, 6 * deviation)
  assert 0.4 < np.mean(error / deviation) < 0.9


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('dtype', CODES)
def test_what_is_not_finite_spoils_its_block(dtype, bad):
  x = np.array(np.abs(normal(3, *SHAPE)))
  x[5, 7] = bad
  got = np.asarray(decode(*encoded(x, dtype)))
  assert np.isnan(got[:, 7]).all()
  assert np.isfinite(np.delete(got, 7, axis=1)).all()


def test_scales_of_any_size():
  for scale in (1e-35, 1e37):  # beyond, what is small is zero on a CPU
    x = scale * normal(4, *SHAPE)
    got = np.asarray(decode(*encoded(x, jnp.int8)))
    np.testing.assert_allclose(got, x, rtol=0, atol=4 * scale / 127)


@pytest.mark.parametrize(
  'name',
  [
    # The smallest has most leaves that are too small for blocks.
    'llama_60m',
    pytest.param('llama_350m', marks=pytest.mark.full),
    pytest.param('llama_1b', marks=pytest.mark.full),
    pytest.param('llama_7b', marks=pytest.mark.full),
  ],
)
def test_bytes_of_a_moment(name):
  config = llama.named(name, param_dtype='bfloat16')
  shapes = nnx.to_pure_dict(
    nnx.state(nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0))))
  )
  count = sum(x.size for x in jax.tree.leaves(shapes))
  for tx, moments in ((so.scale_by_adam8bit(), 2), (so.scale_by_lion8bit(), 1)):
    assert so.memory_report(tx, shapes).state < 1.05 * moments * count
  # In the subspace: beside float32 moments of the same coordinates.
  low = lambda inner: so.subspace(
    so.SubspaceSpec(config.width // 4),
    so.projectors.stiefel(200, regenerate=True),
    inner,
  )
  sizes = [
    so.memory_report(low(x), shapes).state
    for x in (so.scale_by_adam8bit(), optax.scale_by_adam(mu_dtype='float32'))
  ]
  plain = 2 * 2 * (2 * config.vocab * config.width)  # of float32 + bfloat16
  assert sizes[0] < 1.05 * (sizes[1] + plain) / 3


# The optimizers.


def quadratic():
  target = {'w': normal(5, *SHAPE), 'norm': normal(6, 96)}
  curvature = jnp.exp(normal(7, *SHAPE))
  gradient = lambda p, t: {
    'w': curvature * (p['w'] - target['w'])
    + jax.random.normal(jax.random.key(t), SHAPE),
    'norm': p['norm'] - target['norm'],
  }
  value = lambda p: float(jnp.sum(curvature * (p['w'] - target['w']) ** 2))
  return jax.tree.map(jnp.zeros_like, target), gradient, value


def test_adam_and_lion_by_the_reference():
  params, gradient, _ = quadratic()
  for tx, lion in (
    (so.scale_by_adam8bit(rounding='nearest'), False),
    (so.scale_by_lion8bit(rounding='nearest'), True),
  ):
    state, update = tx.init(params), jax.jit(tx.update)
    mu, nu = np.zeros(SHAPE), np.zeros(SHAPE)
    for t in range(1, 4):
      g = gradient(params, t)
      got, state = update(g, state)
      g = np.asarray(g['w'], np.float64)
      if lion:
        wanted = np.sign(0.1 * g + 0.9 * mu)
        mu = 0.01 * g + 0.99 * mu
      else:
        mu, nu = 0.1 * g + 0.9 * mu, 0.001 * g**2 + 0.999 * nu
        v = nu / (1 - 0.999**t)
        wanted = mu / (1 - 0.9**t) / (np.sqrt(v) + 1e-8)
      np.testing.assert_allclose(got['w'], wanted, rtol=2e-4, atol=2e-4)
      # Goes on from the codes, which a tie may tip over.
      for name, dtype in (('mu', jnp.int8), ('nu', jnp.uint8)):
        if name == 'nu' and lion:
          continue
        codes = np.asarray(getattr(state.coded, name)['w'])
        scales = np.asarray(state.scales[name]['w'])
        exact = mu if name == 'mu' else nu
        wanted_codes, _, tie = reference(exact, dtype)
        assert (tie | (codes == wanted_codes)).all()
        kept = np.sign(codes) * levels(dtype)[np.abs(codes)] * scales
        mu, nu = (kept, nu) if name == 'mu' else (mu, kept)


def test_leaves_that_are_not_coded_are_optax_s():
  params = {
    'w': normal(0, 8, 16), 'norm': {'scale': normal(1, 128, 64)},
    'b': normal(2, 9000),
  }  # fmt: skip
  for ours, optaxs in (
    (so.scale_by_adam8bit(), optax.scale_by_adam()),
    (so.scale_by_lion8bit(), optax.scale_by_lion()),
  ):
    a, b = ours.init(params), optaxs.init(params)
    for _ in range(3):
      x, a = ours.update(params, a)
      y, b = optaxs.update(params, b)
      jax.tree.map(np.testing.assert_array_equal, x, y)
  coded = so.scale_by_adam8bit(exclude=None).init(params).coded.mu
  assert coded['norm']['scale'].dtype == jnp.int8


SPEC = so.SubspaceSpec(32, only_if_smaller=False, exclude='norm')
WITHIN = {
  'whole': lambda inner: inner,
  'keep': lambda inner: so.subspace(SPEC, so.projectors.stiefel(9), inner),
  'first': lambda inner: so.subspace(
    SPEC, so.projectors.stiefel(9), inner, transport='first', every_k=2
  ),
  'both': lambda inner: so.subspace(
    SPEC, so.projectors.stiefel(9), inner,
    transport=so.transports.both(0.9, 0.999),
  ),
  'reset': lambda inner: so.subspace(
    SPEC, so.projectors.stiefel(9), inner, transport='reset'
  ),
  'fira': lambda inner: so.subspace(
    SPEC, so.projectors.stiefel(9), inner,
    transport='first', residual=so.residuals.fira(),
  ),
}  # fmt: skip


@pytest.mark.parametrize(
  'name',
  # Nobody reads the codes but the inner optimizer and a transport.
  grid.but(WITHIN, ('whole', 'keep', 'fira')),
)
def test_trains_as_in_float32(name):
  params, gradient, value = quadratic()
  found = []
  for inner in (optax.scale_by_adam(), so.scale_by_adam8bit()):
    tx = optax.chain(WITHIN[name](inner), optax.scale(-0.05))

    @cases.jit
    def step(params, state, t, tx=tx):
      updates, state = tx.update(gradient(params, t), state, params)
      return optax.apply_updates(params, updates), state

    p, state = params, cases.jit(tx.init)(params)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for t in range(60):
      p, state = step(p, state, t)
    assert step._cache_size() == 1
    assert before == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    found.append(value(p))
  codes = [x for x in jax.tree.leaves(state) if x.dtype == jnp.uint8]
  assert codes and all(x.size >= 4096 for x in codes)
  np.testing.assert_allclose(found[1], found[0], rtol=0.01)
  assert found[0] < 0.9 * value(params)


def test_rounding_to_the_nearest_freezes_second_moments():
  """What the default is for: it fails the comparison above."""
  ones = {'w': jnp.ones(SHAPE)}
  x = {'w': ones['w'].at[1:].set(0.1)}
  kept = {}
  for rounding in ('nearest', 'stochastic'):
    tx = so.scale_by_adam8bit(rounding=rounding)

    @jax.jit
    def run(state, tx=tx):
      gradient = lambda t: jax.tree.map(
        lambda a, b: jnp.where(t, a, b), x, ones
      )
      step = lambda state, t: (tx.update(gradient(t > 0), state)[1], None)
      return lax.scan(step, state, jnp.arange(401))[0]

    state = run(jax.jit(tx.init)(x))
    nu = decode(state.coded.nu['w'], state.scales['nu']['w'])
    kept[rounding] = float(jnp.mean(nu[1:]))
  exact = 0.01 * (1 - 0.999**400) + 0.999**400 * 0.001
  np.testing.assert_allclose(kept['stochastic'], exact, rtol=0.02)
  assert abs(kept['nearest'] / exact - 1) > 0.1


def test_transport_maps_what_the_codes_say():
  tx = so.subspace(
    SPEC, so.projectors.stiefel(2), so.scale_by_adam8bit(), transport='first'
  )
  params = {'w': normal(0, *SHAPE)}
  state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
  for t in range(2):
    _, state = update({'w': normal(t, *SHAPE)}, state)
  moments = lambda state: state[1].inner

  def mean(state):
    m = moments(state)
    return np.asarray(decode(m.coded.mu['w'], m.scales['mu']['w']))

  zero = {'w': jnp.zeros(SHAPE)}
  _, after = update(zero, state)  # a new basis, and a gradient of zero
  old, new = (np.asarray(x[0].subspaces.basis['w']) for x in (state, after))
  c = new.T @ old
  wanted = 0.9 * mean(state) @ c.T  # coordinates G Q
  error = np.linalg.norm(mean(after) - wanted) / np.linalg.norm(wanted)
  np.testing.assert_array_less(error, 0.09)  # two codings, of 4.4 % at most
  assert np.linalg.norm(mean(after) - 0.9 * mean(state)) > 0.3 * np.linalg.norm(
    wanted
  )


# As any optimizer.


def test_wrappers_and_params_of_any_dress():
  params = {'w': normal(0, *SHAPE).astype(jnp.bfloat16), 'b': jnp.ones(3)}
  tx = so.scale_by_adam8bit()
  state = tx.init(params)
  updates, _ = jax.eval_shape(tx.update, params, state, params)
  assert updates['w'].dtype == jnp.bfloat16
  shapes = optax.tree.map_params(
    tx, lambda x, p: (x.ndim, p.ndim), state, params
  )
  assert shapes.coded.mu['w'] == (2, 2)
  for wrapped in (
    optax.MultiSteps(tx, 2),
    optax.masked(tx, {'w': True, 'b': False}),
    optax.partition({'a': tx, 'b': optax.identity()}, {'w': 'a', 'b': 'b'}),
    optax.inject_hyperparams(so.scale_by_adam8bit, static_args=('rounding',))(
      b1=0.8
    ),
    optax.apply_if_finite(tx, 3),
  ):
    own = jax.eval_shape(wrapped.init, params)
    _, new = jax.eval_shape(wrapped.update, params, own, params)
    assert measure.types(new) == measure.types(own)
  assert not jax.tree.leaves(tx.init({}).coded.mu)
  model = nnx.Linear(128, 96, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  gradients = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 128))) ** 2))(model)
  optimizer.update(model, gradients)
  with pytest.raises(ValueError, match="rounding must be one of.*got 'up'"):
    so.scale_by_adam8bit(rounding='up')


# With Auto axes: tests/test_eight_bit_blocks.py.
@pytest.mark.parametrize(
  'kind',
  [pytest.param(AxisType.Auto, marks=pytest.mark.full), AxisType.Explicit],
)
def test_on_a_mesh_and_through_a_checkpoint(kind, tmp_path):
  shape = (1024, 64)
  tx, params = (
    so.scale_by_adam8bit(rounding='nearest'),
    {'w': normal(0, *shape)},
  )
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(kind,) * 2)
  place = lambda spec: NamedSharding(mesh, spec)
  with jax.set_mesh(mesh):
    sharded = jax.device_put(params, place(P('x', 'y')))
    start = tx.init(sharded)
    assert start.scales['mu']['w'].sharding.spec == P('x', 'y')
    wanted = so.state_sharding(tx, sharded)
    jax.tree.map(
      lambda x, s: np.testing.assert_equal(
        x.sharding.is_equivalent_to(s, x.ndim), True
      ),
      start,
      wanted,
    )
    program = cases.jit(tx.update).lower(sharded, start).compile()
    assert 'all-gather' not in program.as_text()
    got, state = program(sharded, start)
  alone, own = cases.jit(tx.update)(params, tx.init(params))
  np.testing.assert_allclose(got['w'], alone['w'], rtol=1e-5)
  assert np.mean(state.coded.mu['w'] != own.coded.mu['w']) < 1e-3
  ocp.save(tmp_path / 'state', state)
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=place(P(*['y'] * (x.ndim > 0)))
    ),
    state,
  )
  back = ocp.load(tmp_path / 'state', like)
  jax.tree.map(np.testing.assert_array_equal, back, state)
