"""Which leaves and trees `scale_by_adam8bit` and `scale_by_lion8bit` take."""

import collections

from flax import linen
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import errors
import subspace_optax as so

PAIRS = {
  'adam': (so.scale_by_adam8bit, optax.scale_by_adam),
  'lion': (so.scale_by_lion8bit, optax.scale_by_lion),
}


def normal(seed, *shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def types(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


# Dtypes.


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize(
  'shape, dtype',
  [
    ((64, 64), jnp.complex64),
    ((3, 67, 71), jnp.complex64),
    ((5,), jnp.complex64),
    ((), jnp.complex64),
    ((), jnp.float32),
    ((0, 64, 64), jnp.float32),
    ((4, 0), jnp.float32),
  ],
)
def test_leaves_that_are_not_coded_are_optax_s(name, shape, dtype):
  ours, wanted = (tx() for tx in PAIRS[name])
  gradient = {'w': normal(0, *shape, dtype=dtype)}
  a, b = ours.init(gradient), wanted.init(gradient)
  before = types(a)
  for _ in range(3):
    x, a = ours.update(gradient, a)
    y, b = wanted.update(gradient, b)
    np.testing.assert_array_equal(x['w'], y['w'])
    assert x['w'].dtype == y['w'].dtype
    assert types(a) == before


@pytest.mark.parametrize('name', PAIRS)
def test_numbers_that_are_no_arrays_are_refused(name):
  with errors.raises(TypeError, "'w'", 'array', '2.0'):
    PAIRS[name][0]().init({'w': 2.0})


def test_decay_rates_that_are_1_in_narrow_parameters_are_warned_of():
  tx = optax.inject_hyperparams(so.scale_by_adam8bit)(b2=0.999)
  with pytest.warns(UserWarning, match='b2 is 1 in bfloat16'):
    tx.init({'w': normal(0, 64, 64, dtype=jnp.bfloat16)})


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.bool_])
def test_whole_numbers_get_updates_in_float32(dtype):
  """optax's second moments of such leaves are rounded to whole numbers."""
  gradient = {'w': (9 * normal(0, 64, 64)).astype(dtype)}
  wide = {'w': gradient['w'].astype(jnp.float32)}
  ours, wanted = so.scale_by_adam8bit(), optax.scale_by_adam()
  got, state = ours.update(gradient, ours.init(gradient))
  exact, _ = wanted.update(wide, wanted.init(wide))
  np.testing.assert_array_equal(got['w'], exact['w'])
  assert types(state) == types(ours.init(gradient))


@pytest.mark.parametrize('shape', [(64, 64), (7,)])
def test_float64_leaves(shape):
  """Coded ones are of float32, all others optax's in float64."""
  with jax.enable_x64(True):
    gradient = {'w': normal(1, *shape, dtype=jnp.float64)}
    ours, wanted = so.scale_by_adam8bit(), optax.scale_by_adam()
    state = ours.init(gradient)
    updates, new = ours.update(gradient, state)
    exact, _ = wanted.update(gradient, wanted.init(gradient))
    coded = len(shape) == 2
    assert state.coded.mu['w'].dtype == (jnp.int8 if coded else jnp.float64)
    assert types(new) == types(state)
    assert updates['w'].dtype == jnp.float64
    rtol = 1e-5 if coded else 0
    np.testing.assert_allclose(updates['w'], exact['w'], rtol=rtol)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float8_e4m3fn'])
def test_narrow_gradients_are_taken_in_float32(dtype):
  """Squares of 1e-5 underflow in float16."""
  gradient = {'w': (1e-2 * normal(2, 64, 64)).astype(dtype)}
  gradient['b'] = gradient['w'][0]
  if dtype != 'float8_e4m3fn':
    gradient = jax.tree.map(lambda x: (1e-3 * x).astype(dtype), gradient)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), gradient)
  tx = so.scale_by_adam8bit()
  got, state = tx.update(gradient, tx.init(gradient))
  wanted, _ = tx.update(wide, tx.init(wide))
  wanted = jax.tree.map(lambda x: x.astype(dtype), wanted)
  jax.tree.map(np.testing.assert_array_equal, got, wanted)
  assert types(state) == types(tx.init(gradient))


# Trees.


BARE = {'a': {'w': normal(3, 64, 64)}, 'norm': normal(4, 9)}


def partitioned(x):
  return linen.Partitioned(x, names=(None,) * x.ndim)


def logically(x):
  return linen.LogicallyPartitioned(x, names=(None,) * x.ndim)


def state_of(tree):
  return nnx.State(jax.tree.map(nnx.Param, tree))


DRESSES = {
  'Partitioned': lambda tree: jax.tree.map(partitioned, tree),
  'LogicallyPartitioned': lambda tree: jax.tree.map(logically, tree),
  'Param': lambda tree: jax.tree.map(nnx.Param, tree),
  'State': state_of,
  'OrderedDict': collections.OrderedDict,
  'tuple': lambda tree: (tree['a'], None, [tree['norm']]),
}


@pytest.mark.parametrize('dress', DRESSES)
def test_results_are_boxed_as_gradients_are(dress):
  tx = so.scale_by_adam8bit(rounding='nearest')
  boxed = DRESSES[dress](BARE)
  update = cases.jit(tx.update)
  state = tx.init(boxed)
  got, new = update(boxed, state, boxed)
  wanted, _ = update(BARE, tx.init(BARE), BARE)
  assert jax.tree.structure(got) == jax.tree.structure(boxed)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert any(x.dtype == jnp.int8 for x in jax.tree.leaves(new))
  for x, y in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
    np.testing.assert_array_equal(x, y)
  # And may be given bare.
  if dress not in ('State', 'tuple', 'OrderedDict'):
    bare, _ = update(BARE, state, boxed)
    jax.tree.map(np.testing.assert_array_equal, bare, wanted)


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize(
  'tree',
  [{}, None, (), {'a': {}, 'b': None}, {'a': optax.MaskedNode(), 'b': []}],
)
def test_trees_without_leaves(tree, name):
  tx = PAIRS[name][0]()
  state = tx.init(tree)
  updates, new = jax.jit(tx.update)(tree, state, tree)
  assert updates == tree
  assert jax.tree.structure(new) == jax.tree.structure(state)
  assert int(new.coded.count) == 1


def test_masked_leaves_and_unused_groups():
  tx = so.scale_by_adam8bit(rounding='nearest')
  wanted, _ = tx.update(BARE, tx.init(BARE))
  groups = {'left': tx, 'right': tx, 'unused': tx}
  sides = {'a': {'w': 'left'}, 'norm': 'right'}
  masked = lambda w: optax.masked(tx, {'a': {'w': w}, 'norm': False})
  for wrapped, a, norm in (
    (masked(True), wanted, BARE),
    (masked(False), BARE, BARE),
    (optax.partition(groups, sides), wanted, wanted),
  ):
    state = wrapped.init(BARE)
    got, new = cases.jit(wrapped.update)(BARE, state, BARE)
    assert types(new) == types(state)
    np.testing.assert_allclose(got['a']['w'], a['a']['w'], rtol=1e-5)
    np.testing.assert_allclose(got['norm'], norm['norm'], rtol=1e-5)


# Wrappers.


@pytest.mark.parametrize('name', PAIRS)
def test_states_keep_their_types(name):
  """In a scan with donated buffers, rates traced, over accumulated steps."""
  make = PAIRS[name][0]
  waves = BARE | {'wave': normal(5, 64, 64, dtype=jnp.complex64)}
  for tx, params in (
    (make(), waves),
    (optax.inject_hyperparams(make)(b1=lambda t: 0.9 - 0.1 / (1 + t)), BARE),
    (optax.MultiSteps(make(), 2), BARE),
  ):
    state = tx.init(params)
    run = lambda state, tx=tx, params=params: jax.lax.scan(
      lambda s, _: tx.update(params, s, params)[::-1], state, length=4
    )
    before = types(state)
    new, _ = jax.jit(run, donate_argnums=0)(state)
    assert types(new) == before


def test_norms_and_biases_are_told_by_whole_names():
  shape = jax.ShapeDtypeStruct((64, 128), jnp.float32)
  coded = ('upscale/kernel', 'normal_proj/kernel', 'scaled_attn/w')
  plain = ('ln_1/weight', 'attention_norm/scale', 'proj/bias', 'LayerNorm_0/g')
  params = {path: shape for path in (*coded, *plain)}
  state = jax.eval_shape(so.scale_by_adam8bit().init, params)
  found = {path for path, x in state.coded.mu.items() if x.dtype == jnp.int8}
  assert found == set(coded)
