"""SCALE against a dense float64 loop, and which leaf it takes for what."""

import warnings

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
import references as ref
import subspace_optax as so

LR, B, DECAY, STEPS = 0.1, 0.9, 0.3, 5
SHAPES = {
  'embed': {'embedding': (11, 6)},
  # Two layers; inputs 6, 3 x 4 outputs; and the other way round.
  'layers': {
    'query': {'kernel': (2, 6, 3, 4)},
    'out': {'kernel': (2, 3, 4, 6)},
    'up': {'kernel': (2, 6, 8), 'bias': (2, 8)},
    'norm': {'scale': (2, 6)},
  },
  'lm_head': {'kernel': (6, 11)},
}
# The axes of the inputs of all that is normalised.
INPUTS = {
  'embed/embedding': (0,),
  'layers/query/kernel': (1,),
  'layers/out/kernel': (1, 2),
  'layers/up/kernel': (1,),
  'lm_head/kernel': (0,),
}
HEAD = 'lm_head/kernel'


def tree(seed, dtype=jnp.float32):
  leaves = cases.flat(SHAPES)
  return cases.nest(
    {
      path: (0.01 * ref.normal(100 * seed + i, shape)).astype(dtype)
      for i, (path, shape) in enumerate(leaves.items())
    }
  )


def float64(x):
  return np.asarray(x.astype(jnp.float32), np.float64)


def unit(x, inputs):
  rms = np.sqrt(np.mean(x**2, axis=inputs, keepdims=True))
  return x / np.maximum(rms, 1e-8)


class Scale:
  """Glentis et al., Algorithm 1, for one leaf; Adam for one without inputs."""

  def __init__(self, shape, inputs, has_momentum):
    self.inputs, self.has_momentum = inputs, has_momentum
    self.m, self.adam = np.zeros(shape), ref.Adam()
    self.state = self.adam.start(shape)

  def step(self, g):
    if self.inputs is None:
      n, self.state = self.adam.update(g, self.state)
      return n
    self.m = B * self.m + (1 - B) * g
    return unit(self.m if self.has_momentum else g, self.inputs)


def assert_steps(tx, inputs, heads, params=None, rtol=1e-5):
  params = params or tree(0)
  update, state = ref.jit(tx.update), tx.init(params)
  loops = {
    path: Scale(x.shape, inputs.get(path), path in heads)
    for path, x in cases.flat(params).items()
  }
  for t in range(STEPS):
    g = jax.tree.map(lambda x, y: x.astype(y.dtype), tree(t + 1), params)
    updates, state = update(g, state, params)
    for path, u in cases.flat(updates).items():
      w = float64(cases.flat(params)[path])
      wanted = loops[path].step(float64(cases.flat(g)[path]))
      np.testing.assert_allclose(
        float64(u),
        -LR * (wanted + DECAY * w),
        rtol=rtol,
        atol=rtol * LR,
        err_msg=f'{path} at step {t}',
      )
  assert update._cache_size() == 1
  return state


def make(**options):
  return so.scale(LR, b=B, weight_decay=DECAY, **options)


def test_equals_dense_loop():
  state = assert_steps(make(), INPUTS, [HEAD])
  # Momentum of the head, and Adam's of the bias and the norm.
  sizes = sorted(x.size for x in jax.tree.leaves(state))
  assert sizes == sorted([1, 1, 66, 16, 16, 12, 12])


def test_bfloat16_has_momentum_in_float32():
  params = tree(0, jnp.bfloat16)
  state = assert_steps(make(), INPUTS, [HEAD], params, rtol=1e-2)
  dtypes = {x.dtype for x in jax.tree.leaves(state) if x.size > 1}
  assert dtypes == {jnp.dtype('float32')}


def test_head_by_a_regular_expression():
  spec = so.SubspaceSpec(1, exclude='embed|lm_head|bias|norm')
  inputs = {k: x for k, x in INPUTS.items() if 'embed' not in k}
  assert_steps(make(head='^lm_head', spec=spec), inputs, [HEAD])
  # Another than that by name; its inputs are the width.
  inputs = INPUTS | {'embed/embedding': (1,)}
  assert_steps(make(head='embedding$'), inputs, ['embed/embedding'])


def test_no_head():
  state = assert_steps(make(head=None), INPUTS, [])
  assert max(x.size for x in jax.tree.leaves(state)) == 16


def test_the_embedding_of_a_tied_model_is_its_head():
  params = tree(0)
  del params['lm_head']
  params['wpe'] = jnp.ones((4, 6))
  tx = make()
  with pytest.warns(UserWarning, match="'embed/embedding'.*head=None") as found:
    tx.init(params)
  assert len(found) == 1
  g = jax.tree.map(jnp.cos, params)
  updates, _ = ref.jit(tx.update)(g, tx.init(params), params)
  for path, axis in (('embed', 1), ('wpe', 0)):
    u, x, w = (
      float64(jax.tree.leaves(y[path])[0]) for y in (updates, g, params)
    )
    wanted = -LR * (unit(x, axis) + DECAY * w)
    np.testing.assert_allclose(u, wanted, rtol=1e-5, err_msg=path)


def test_neither_head_nor_embedding_is_warned_of():
  with pytest.warns(UserWarning, match='no leaf has momentum.*head=None'):
    make().init({'up': jnp.ones((4, 8))})


def test_kernels_with_outputs_first():
  """All but tables of embeddings, whose tokens are first in any library."""
  spec = so.SubspaceSpec(1, outputs_first=True)
  params = {
    'embed': {'weight': ref.normal(1, (11, 6))},
    'up': {'weight': ref.normal(2, (8, 6))},
    'lm_head': {'weight': ref.normal(3, (11, 6))},
  }
  tx = so.scale(-1.0, b=0.0, spec=spec)
  updates, _ = ref.jit(tx.update)(params, tx.init(params), params)
  for path, axis in (('embed', 0), ('up', 1), ('lm_head', 1)):
    x = float64(params[path]['weight'])
    found = updates[path]['weight']
    np.testing.assert_allclose(found, unit(x, axis), rtol=1e-5, err_msg=path)


def test_names_of_axes_tell_tables_from_heads():
  """Also where `update` is given no boxes, as by `nnx.Optimizer`."""
  arrays = {'a': ref.normal(1, (11, 6)), 'b': ref.normal(2, (6, 11))}
  names = {'a': ('vocab', 'embed'), 'b': ('embed', 'vocab')}
  boxed = {k: linen.Partitioned(x, names[k]) for k, x in arrays.items()}
  tx = so.scale(-1.0, b=0.5)
  state = tx.init(boxed)
  for given in (boxed, arrays):
    updates, _ = ref.jit(tx.update)(given, state, given)
    for k, x in arrays.items():
      found = jax.tree.leaves(updates[k])[0]
      np.testing.assert_allclose(found, unit(float64(x), 0), rtol=1e-5)
  (momentum,) = [x for x in jax.tree.leaves(state) if x.size > 1]
  assert momentum.shape == (6, 11)


def test_names_of_axes_that_differ_between_inits_are_refused():
  """Without boxes nothing tells which of the two this state is of."""
  x = {'w': ref.normal(3, (5, 6, 7)), 'lm_head': ref.normal(4, (6, 13))}
  tx = so.scale(1e-3)
  for names in (('layers', 'embed', 'mlp'), ('embed', 'heads', 'kv')):
    state = tx.init(x | {'w': linen.Partitioned(x['w'], names)})
  with errors.raises(ValueError, "'w'", 'weight_dimension_numbers'):
    tx.update(x, state, x)


@pytest.mark.parametrize('head', ['auto', 'lm_head'])
def test_layer_by_layer(head):
  """A stack without a head is a part of a model: nothing to warn of."""
  params = {
    'embed': ref.normal(0, (11, 6)),
    'blocks': {'up': ref.normal(1, (3, 6, 6)), 'norm': jnp.ones((3, 6))},
    'lm_head': ref.normal(2, (6, 11)),
  }
  block = lambda p, x, batch: x + jnp.tanh(p['norm'][None] * x @ p['up'])
  top = lambda p, x, batch: jnp.mean(jnp.square(x @ p['lm_head'] - 1))
  bottom = lambda p, batch: p['embed'][batch]
  tx, batch = make(head=head), jnp.arange(4)
  train = so.layerwise(tx, embed=bottom, block=block, head=top)
  with warnings.catch_warnings():
    warnings.filterwarnings('error', message='scale finds')
    state = train.init(params)

  def loss(p):
    x = bottom(p, batch)
    for i in range(3):
      x = block(jax.tree.map(lambda y, i=i: y[i], p['blocks']), x, batch)
    return top(p, x, batch)

  found = wanted = params
  own, step = tx.init(params), ref.jit(train.step)
  for _ in range(3):
    found, state, _ = step(found, state, batch)
    updates, own = ref.jit(tx.update)(jax.grad(loss)(wanted), own, wanted)
    wanted = optax.apply_updates(wanted, updates)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_description():
  text = so.describe(make(), tree(0))
  assert [line.split()[:5] for line in text.splitlines()] == [
    ['scale'],
    ['path', 'shape', 'as', 'inputs', 'update'],
    ['embed/embedding', '(11,6)', 'embedding', '11', 'normalized'],
    ['layers/norm/scale', '(2,6)', 'plain', '-', 'is'],
    ['layers/out/kernel', '(2,3,4,6)', 'matrix', '12', 'normalized'],
    ['layers/query/kernel', '(2,6,3,4)', 'matrix', '6', 'normalized'],
    ['layers/up/bias', '(2,8)', 'plain', '-', 'is'],
    ['layers/up/kernel', '(2,6,8)', 'matrix', '6', 'normalized'],
    ['lm_head/kernel', '(6,11)', 'head', '6', 'momentum'],
  ]


@pytest.mark.parametrize('bits', [32, 8])
def test_moments_in_8_bits(bits):
  params = {'lm_head': ref.normal(0, (64, 128)), 'up': ref.normal(1, (8, 8))}
  tx = make(moment_bits=bits)
  state = jax.eval_shape(tx.init, params)
  large = {x.dtype for x in jax.tree.leaves(state) if x.size >= 4096}
  assert large == {jnp.dtype('int8' if bits == 8 else 'float32')}


@pytest.mark.parametrize('bad', [0.0, np.nan])
def test_bad_gradients(bad):
  """Zero moves nothing; NaN shows, in its outputs and the head's momentum."""
  tx, params = so.scale(LR, b=B), tree(0)
  g = jax.tree.map(
    lambda x: x.at[..., 0, 0].set(bad) if x.ndim > 1 else x, params
  )
  if bad == 0:
    g = jax.tree.map(jnp.zeros_like, params)
  state = tx.init(params)
  updates, state = ref.jit(tx.update)(g, state, params)
  for path, axes in INPUTS.items():
    u = cases.flat(updates)[path]
    spoiled = np.isnan(u)
    if bad == 0:
      np.testing.assert_array_equal(u, 0)
    else:
      assert spoiled.any() and not spoiled.all(), path
      assert (spoiled.all(axes) == spoiled.any(axes)).all(), path


def test_small_gradients_are_not_blown_up():
  """Below a root mean square of 1e-8 outputs move in proportion."""
  tx, params = so.scale(-1.0, head=None), {'up': ref.normal(0, (6, 8))}
  g = {'up': 1e-10 * params['up']}
  updates, _ = ref.jit(tx.update)(g, tx.init(params), params)
  wanted = float64(g['up']) / 1e-8
  np.testing.assert_allclose(updates['up'], wanted, rtol=1e-5)


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_sharded(kind):
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(kind,) * 2)
  params = {
    'embed': jnp.ones((12, 8)),
    'layers': {'up': ref.normal(1, (2, 8, 16)), 'norm': ref.normal(2, (2, 8))},
    'lm_head': ref.normal(3, (8, 12)),
  }
  specs = {
    'embed': P('x', 'y'),
    'layers': {'up': P(None, 'x', 'y'), 'norm': P(None, 'x')},
    'lm_head': P('y', 'x'),
  }
  g, tx = jax.tree.map(jnp.cos, params), make()
  wanted, _ = ref.jit(tx.update)(g, tx.init(params), params)
  place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    params, g = (jax.tree.map(place, x, specs) for x in (params, g))
    state = tx.init(params)
    step = cases.jit(tx.update)
    found, new = step(g, state, params)
    planned = so.state_sharding(tx, params)
  for x, s in zip(
    jax.tree.leaves(state), jax.tree.leaves(planned), strict=True
  ):
    assert x.sharding.is_equivalent_to(s, x.ndim)
  with jax.set_mesh(mesh):
    for _ in range(2):
      found, _ = step(g, state, params)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert x.size < 64 or x.addressable_shards[0].data.size * 4 == x.size
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  assert step._cache_size() == 1


def test_bad_arguments():
  with errors.raises(ValueError, 'b must', '1.0'):
    so.scale(1e-3, b=1.0)
  with errors.raises(TypeError, 'head', '3'):
    so.scale(1e-3, head=3)
  with errors.raises(ValueError, 'moment_bits', '16'):
    so.scale(1e-3, moment_bits=16)
  with errors.raises(TypeError, 'scale', "'x'"):
    so.scale(1e-3, scale='x')
  tx = so.scale(1e-3, head='logits')
  with errors.raises(ValueError, "head='logits'", 'lm_head/kernel', 'None'):
    tx.init(tree(0))
  against = optax.adam(1e-3)
  with errors.raises(ValueError, 'plain', 'scale_by_adam'):
    so.scale(1e-3, plain=against).init(tree(0))
