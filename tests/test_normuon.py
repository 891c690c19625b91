"""NorMuon on whole matrices, against a dense float64 loop."""

import functools
import re

from flax import linen
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import errors
import grid
import references as ref
import subspace_optax as so
from subspace_optax import whole
from subspace_optax._matrix import _tree

B, B2, SCALE, LR, DECAY = 0.9, 0.8, 8.0, 0.05, 0.1
# Matrices that widen and narrow, a stack, heads that belong together.
VIEWS = {
  'up': ref.view((8, 20), left=True),
  'layers/down': ref.view((2, 12, 8), left=True),
  'query/kernel': ref.QUERY._replace(left=True),
}
PARAMS = ref.like(VIEWS, 9) | {'norm': ref.normal(8, (8,))}


def gradients(t):
  return ref.like(VIEWS, t) | {'norm': ref.normal(100 + t, (8,))}


class Dense:
  """NorMuon for one matrix of inputs by outputs; Muon where b2 is None."""

  def __init__(self, b2=B2, b=B):
    self.b2, self.b, self.m, self.v = b2, b, 0.0, 0.0

  def step(self, g):
    self.m = self.b * self.m + g
    u, s, w = np.linalg.svd(g + self.b * self.m, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
      s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    o = u * s @ w
    return np.sqrt(max(1.0, g.shape[1] / g.shape[0])) * self.equalize(o)

  def equalize(self, o):
    if self.b2 is None:
      return o
    self.v = self.b2 * self.v + (1 - self.b2) * np.mean(o**2, axis=0)
    new = o / (np.sqrt(self.v) + 1e-8)
    return new * np.linalg.norm(o) / np.linalg.norm(new)


@functools.cache
def make(b2=B2, b=B, **options):
  return so.normuon(LR, b=b, b2=b2, weight_decay=DECAY, **options)


@functools.cache
def compiled(tx):
  return cases.jit(tx.update)


def run(tx, steps=5, put=lambda x: x, of=gradients):
  """Returns the updates, and the last state."""
  params = jax.tree.map(put, PARAMS)
  state, update, found = tx.init(params), compiled(tx), []
  programs = update._cache_size()
  for t in range(steps):
    updates, new = update(jax.tree.map(put, of(t)), state, params)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
      assert (x.shape, x.dtype, x.weak_type) == (y.shape, y.dtype, y.weak_type)
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    state = new
    found.append(jax.tree.map(np.asarray, updates))
  assert update._cache_size() <= programs + 1
  return found, state


def own(state):
  """Returns NorMuon's state inside of the optimizer's."""
  ((_, found),) = _tree.find(state, whole.NorMuonState)
  return found


@pytest.mark.parametrize('b', [B, None])
def test_equals_a_dense_loop(b):
  found, state = run(make(b=b, moment_bits=32))
  for k, view in VIEWS.items():
    loops = [Dense(b=b or 0.0) for _ in range(view.count)]
    weights = view.matrices(PARAMS[k])
    for t, updates in enumerate(found):
      wanted = np.stack(
        [
          f.step(g)
          for f, g in zip(loops, view.matrices(gradients(t)[k]), strict=True)
        ]
      )
      np.testing.assert_allclose(
        view.matrices(updates[k]),
        -LR * (SCALE * wanted + DECAY * weights),
        rtol=1e-4,
        atol=1e-5,
        err_msg=f'{k} step {t}',
      )
    nu = view._replace(shape=own(state).nu[k].shape).matrices(own(state).nu[k])
    np.testing.assert_allclose(
      nu[:, 0], np.stack([f.v for f in loops]), rtol=1e-4
    )


def test_other_leaves_are_those_of_the_plain_optimizer():
  found, _ = run(make(plain=optax.scale_by_lion()))
  lion = optax.chain(
    optax.scale_by_lion(),
    optax.add_decayed_weights(DECAY),
    optax.scale_by_learning_rate(LR),
  )
  params = {'norm': PARAMS['norm']}
  state = lion.init(params)
  for t, updates in enumerate(found):
    wanted, state = lion.update({'norm': gradients(t)['norm']}, state, params)
    np.testing.assert_allclose(updates['norm'], wanted['norm'], rtol=1e-6)


def test_without_the_learning_rate_other_leaves_stay_as_they_are():
  tx = so.scale_by_normuon(b=B, b2=B2)
  state = tx.init(PARAMS)
  updates, _ = cases.jit(tx.update)(gradients(0), state)
  np.testing.assert_array_equal(updates['norm'], gradients(0)['norm'])
  wanted = Dense().step(VIEWS['up'].matrices(gradients(0)['up'])[0])
  np.testing.assert_allclose(updates['up'], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'kind, bits',
  grid.cover([AxisType.Auto, AxisType.Explicit], [8, 32], of=2),
)
def test_sharded_equals_unsharded(kind, bits):
  wanted, _ = run(make(moment_bits=bits))
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(kind,) * 2)

  def put(x):
    spec = {1: P('x'), 2: P('x', 'y')}.get(x.ndim, P(None, None, 'x'))
    spec = spec if x.shape != VIEWS['layers/down'].shape else P(None, 'x', 'y')
    return jax.device_put(x, NamedSharding(mesh, fits(spec, x.shape)))

  def fits(spec, shape):
    entries = [
      k if n % 2 == 0 else None for k, n in zip(spec, shape, strict=True)
    ]
    while entries and entries[-1] is None and kind == AxisType.Auto:
      entries.pop()
    return P(*entries)

  with jax.set_mesh(mesh):
    found, _ = run(make(moment_bits=bits), put=put)
  for x, y in zip(found, wanted, strict=True):
    for k in PARAMS:
      np.testing.assert_allclose(x[k], y[k], rtol=1e-3, atol=1e-4)


def test_quantize_moments_codes_the_momentum_alone():
  params = {'w': jnp.ones((2, 64, 128), jnp.bfloat16)}
  tx = so.quantize_moments(so.scale_by_normuon())
  state = tx.init(params)
  assert state.coded.trace['w'].dtype == jnp.int8
  assert state.coded.nu['w'].dtype == jnp.float32
  assert state.coded.nu['w'].shape == (2, 1, 128)
  wide = so.scale_by_normuon()
  exact, update = wide.init(params), cases.jit(tx.update)
  for t in range(4):
    g = {'w': ref.normal(t, (2, 64, 128)).astype(jnp.bfloat16)}
    found, state = update(g, state)
    wanted, exact = cases.jit(wide.update)(g, exact)
    x, y = (np.asarray(u['w'], np.float64) for u in (found, wanted))
    assert np.linalg.norm(x - y) < 0.05 * np.linalg.norm(y)
  np.testing.assert_allclose(state.coded.nu['w'], exact.nu['w'], rtol=0.05)


def test_rank_side_and_size_of_the_spec_do_not_matter():
  spec = so.SubspaceSpec(64, side='out', exclude='norm')
  found, _ = run(make(spec=spec), 2)
  wanted, _ = run(make(moment_bits=32), 2)
  for k in PARAMS:
    np.testing.assert_allclose(found[1][k], wanted[1][k], rtol=1e-5, atol=1e-6)


def test_zero_and_nan_gradients():
  """Zeros move nothing but by momentum; squares forget no neuron for NaN."""

  def of(t):
    g = gradients(t)
    if t == 0:
      return jax.tree.map(jnp.zeros_like, g)
    return g | {'up': g['up'].at[0, 0].set(jnp.nan)} if t == 2 else g

  found, state = run(make(moment_bits=32), 3, of=of)
  for k in VIEWS:
    np.testing.assert_allclose(
      found[0][k], -LR * DECAY * PARAMS[k], rtol=1e-5, atol=1e-8
    )
  assert np.isnan(found[2]['up']).all()  # as optax: it shows
  assert np.isfinite(own(state).nu['up']).all()
  assert np.isfinite(found[2]['layers/down']).all()


@pytest.mark.parametrize('dtype', ['parameter', None])
def test_dtypes(dtype):
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  spec = so.SubspaceSpec(1, moment_dtype=dtype)
  tx = make(spec=spec)
  state = jax.eval_shape(tx.init, params)
  updates, new = jax.eval_shape(tx.update, params, state, params)
  types = lambda x: [
    (v.shape, v.dtype, v.weak_type) for v in jax.tree.leaves(x)
  ]
  assert types(new) == types(state)
  assert types(updates) == types(params)
  wanted = jnp.bfloat16 if dtype else jnp.float32
  assert own(state).trace['up'].dtype == wanted
  assert own(state).nu['up'].dtype == jnp.float32


def test_inside_scan_vmap_and_injected_hyperparameters():
  tx = optax.inject_hyperparams(so.normuon)(
    learning_rate=LR, b=B, b2=B2, weight_decay=DECAY
  )
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(gradients, range(3)))

  def step(state, g):
    updates, state = tx.update(g, state, PARAMS)
    return state, updates

  _, found = cases.jit(lambda g: jax.lax.scan(step, tx.init(PARAMS), g))(
    stacked
  )
  wanted, _ = run(make(moment_bits=32), 3)
  for t in range(3):
    for k in PARAMS:
      np.testing.assert_allclose(
        found[k][t], wanted[t][k], rtol=1e-4, atol=1e-6
      )
  alone = make(moment_bits=32)
  one = lambda g: alone.update(g, alone.init(PARAMS), PARAMS)[0]
  mapped = cases.jit(jax.vmap(one))(stacked)
  for k in PARAMS:
    np.testing.assert_allclose(mapped[k][0], wanted[0][k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  'make, parts',
  [
    (lambda: so.scale_by_normuon(b=1.0), ('b must', '1.0')),
    (lambda: so.scale_by_normuon(b2=1.0), ('b2', '1.0')),
    (lambda: so.scale_by_normuon(b=None, b2=None), ('b=None', 'b2 is None')),
    (lambda: so.scale_by_normuon(steps=0), ('steps', '0')),
    (lambda: so.scale_by_normuon(ns_coeffs='x'), ('ns_coeffs', "'x'")),
    (lambda: so.normuon(1e-3, b=-0.1), ('b must', '-0.1')),
    (lambda: so.normuon(1e-3, preconditioning='x'), ('preconditioning', 'x')),
    (lambda: so.normuon(1e-3, moment_bits=3), ('moment_bits', '3')),
    (lambda: so.subspace_muon(1e-3, b2=1.0), ('b2', '1.0')),
    (lambda: so.subspace_muon(1e-3, ns_coeffs='x'), ('ns_coeffs', "'x'")),
    (
      lambda: so.subspace_muon(1e-3, preconditioning='x'),
      ('preconditioning', 'x'),
    ),
  ],
)
def test_bad_arguments(make, parts):
  with errors.raises(ValueError, *parts):
    make()


def test_other_trees_than_at_init():
  tx = so.scale_by_normuon()
  state = tx.init(PARAMS)
  with errors.raises(ValueError, 'tree of the parameters', 'layers/down'):
    tx.update({'up': PARAMS['up']}, state)
  # Squares tell of outputs, the momentum of inputs.
  for what, shape in (('mean squares', (8, 21)), ('momentum', (9, 20))):
    with errors.raises(ValueError, what, "'up'", str(shape)):
      tx.update(PARAMS | {'up': jnp.ones(shape)}, state)
  with errors.raises(ValueError, 'include', 'nothing'):
    so.scale_by_normuon(so.SubspaceSpec(1, include='nothing')).init(PARAMS)
  with errors.raises(TypeError, 'spec', '8'):
    so.scale_by_normuon(8)
  with errors.raises(TypeError, 'b2', "'0.9'"):
    so.scale_by_normuon(b2='0.9')


def test_matrices_are_those_of_init_without_boxes():
  """As for `nnx.Optimizer`; what nothing tells apart is refused."""
  x = ref.normal(0, (4, 6, 8))
  axes = {
    'stack': ('layers', 'embed', 'mlp'),
    'heads': ('embed', 'heads', 'kv'),
  }
  boxed = {k: linen.Partitioned(x, names) for k, names in axes.items()}
  states = {}
  for k in axes:
    tx = so.scale_by_normuon()
    states[k] = tx.init({'w': boxed[k]})
  for k, state in states.items():
    update = cases.jit(tx.update)
    wanted, _ = update({'w': boxed[k]}, state)
    found, _ = update({'w': x}, state)
    np.testing.assert_array_equal(found['w'], wanted['w'].value, err_msg=k)


@pytest.mark.parametrize(
  'make',
  [
    lambda: so.normuon(LR, moment_bits=8, spec=SPEC),
    lambda: so.quantize_moments(
      optax.chain(so.scale_by_normuon(SPEC), optax.scale_by_schedule(abs))
    ),
    lambda: optax.chain(optax.clip(1.0), so.scale_by_normuon(SPEC)),
  ],
)
def test_description(make):
  """Told once, though codes and boxes trace `init` several times."""
  params = {
    'norm': jnp.ones(16),
    'qkv': linen.Partitioned(jnp.ones((2, 16, 48)), (None, None, None)),
    'up': jnp.ones((16, 64)),
  }
  text = so.describe(make(), params).splitlines()
  assert [re.split('  +', line) for line in text] == [
    ['normuon'],
    ['path', 'shape', 'as', 'inputs', 'update'],
    ['norm', '(16)', 'plain', '-', 'has no weight_dimension_numbers'],
    ['qkv', '(2,16,48)', '2 x (16 x (32 + 8 + 8))', '16', 'orthogonal'],
    ['up', '(16,64)', '16 x 64', '16', 'orthogonal'],
  ]


SPEC = so.SubspaceSpec(
  1,
  weight_dimension_numbers={
    'norm': None,
    'qkv': so.DimensionNumbers(1, 2, (32, 8, 8)),
    'up': so.DimensionNumbers(0, 1),
  },
)


def test_without_mean_squares_it_is_muon():
  tx = so.scale_by_normuon(so.SubspaceSpec(1, allow_empty=True), b=B, b2=None)
  state, update = tx.init(PARAMS), cases.jit(tx.update)
  assert jax.tree.leaves(state.nu) == []
  loops = {k: [Dense(None) for _ in range(v.count)] for k, v in VIEWS.items()}
  for t in range(4):
    gradient = gradients(t)
    found, state = update(gradient, state)
    for k, view in VIEWS.items():
      pairs = zip(loops[k], view.matrices(gradient[k]), strict=True)
      wanted = np.stack([f.step(g) for f, g in pairs])
      np.testing.assert_allclose(
        view.matrices(found[k]), wanted, rtol=1e-4, atol=1e-5, err_msg=k
      )


@pytest.mark.parametrize('b, b2', [(B, None), (B, B2), (None, B2)])
def test_a_tree_without_matrices_stays_as_it_is(b, b2):
  """As all that is no layer is in a layer-wise step."""
  tx = so.scale_by_normuon(so.SubspaceSpec(1, allow_empty=True), b=b, b2=b2)
  gradient = {'norm': PARAMS['norm']}
  updates, _ = tx.update(gradient, tx.init(gradient))
  np.testing.assert_array_equal(updates['norm'], gradient['norm'])


@pytest.mark.parametrize('bits', [32, 8])
def test_ready_made_without_mean_squares(bits):
  """Other leaves are the plain optimizer's, whose state alone has theirs."""
  tx = make(b2=None, moment_bits=bits)
  updates, state = run(tx)
  wanted, _ = run(make(moment_bits=bits))
  np.testing.assert_array_equal(updates[-1]['norm'], wanted[-1]['norm'])
  assert isinstance(whole.matrices_in(state)['norm'], optax.MaskedNode)


@pytest.mark.parametrize('bits', [32, 8])
def test_without_momentum_matrices_have_a_number_per_output(bits):
  kept = own(jax.eval_shape(make(b=None, moment_bits=bits).init, PARAMS))
  assert jax.tree.leaves(kept.trace) == []
  for k, view in VIEWS.items():
    assert kept.nu[k].size == view.count * view.n
  assert isinstance(kept.nu['norm'], optax.MaskedNode)


@pytest.mark.parametrize(
  'name, kept, other', [('b', B, None), ('b2', B2, None)]
)
def test_a_state_without_what_the_optimizer_decays(name, kept, other):
  """And with what it does not, which would stay as it is for ever."""
  for of_state, of_update in ((kept, other), (other, kept)):
    state = make(**{name: of_state}).init(PARAMS)
    with errors.raises(ValueError, f'{name}={of_update!r}', 'call init'):
      make(**{name: of_update}).update(gradients(0), state, PARAMS)
