"""Where state lives: what is said of it, and where a jitted `init` puts it."""

import itertools
import math
import re

from flax import nnx
import flax.linen as nn
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
import measure
import subspace_optax as so

SHAPES = {
  'w': ((32, 64), P('fsdp', 'tensor')),
  'layers': ((2, 64, 32), P(None, 'tensor', 'fsdp')),
  'experts': ((4, 32, 64), P('fsdp', None, 'tensor')),
  # A mesh axis is left.
  'tall': ((64, 32), P('fsdp')),
  'bias': ((64,), P('tensor')),
}
MADE = {
  'galore': lambda: so.galore(0.02, 4),
  'golore': lambda: so.golore(0.02, 4),
  'online_subspace_descent': lambda: so.online_subspace_descent(0.02, 4),
  'fira_adamw': lambda: so.fira_adamw(0.02, 4),
  'apollo_adamw': lambda: so.apollo_adamw(0.02, 4),
  'ldadamw': lambda: so.ldadamw(0.02, 4),
  'subspace_adamw': lambda: so.subspace_adamw(0.02, 4),
  'subspace_muon': lambda: so.subspace_muon(0.02, 4),
  'dion': lambda: so.dion(0.02, 4),
  'trion': lambda: so.trion(0.02, 4),
}
WRAPPED = {
  'chain': lambda: optax.chain(
    optax.clip_by_global_norm(1.0), so.golore(0.02, 4), optax.trace(0.9)
  ),
  'partition': lambda: optax.partition(
    {'a': so.golore(0.02, 4), 'b': optax.adam(0.1)},
    lambda params: {k: 'b' if k in ('w', 'bias') else 'a' for k in params},
  ),
  'masked': lambda: optax.masked(
    so.online_subspace_descent(0.02, 4),
    lambda params: {k: k != 'tall' for k in params},
  ),
  'MultiSteps': lambda: optax.MultiSteps(so.golore(0.02, 4), 2),
}
KINDS = [AxisType.Auto, AxisType.Explicit]
PATHS = ['w', 'layers', 'experts', 'tall']


def _mesh(kind=AxisType.Auto, shape=(2, 2)):
  return jax.make_mesh(shape, ('fsdp', 'tensor'), axis_types=(kind,) * 2)


def _shapes(mesh):
  return {
    path: jax.ShapeDtypeStruct(
      shape, jnp.float32, sharding=NamedSharding(mesh, spec)
    )
    for path, (shape, spec) in SHAPES.items()
  }


def _params(mesh, paths=tuple(SHAPES)):
  make = lambda s: jax.device_put(np.ones(s.shape, s.dtype), s.sharding)
  shapes = _shapes(mesh)
  return jax.tree.map(make, {path: shapes[path] for path in paths})


def _assert_placed(state, shardings):
  """Checks every array's sharding against what was said."""
  assert jax.tree.structure(state) == jax.tree.structure(shardings)
  for (path, x), sharding in zip(
    jax.tree.leaves_with_path(state), jax.tree.leaves(shardings), strict=True
  ):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (path, x.sharding)


@pytest.mark.parametrize('name, kind', grid.cover(WRAPPED, KINDS, of=2))
def test_is_where_eager_init_of_wrappers_puts_the_state(name, kind):
  tx, mesh = WRAPPED[name](), _mesh(kind)
  with jax.set_mesh(mesh):
    params = _params(mesh, ('w', 'tall', 'bias'))
    state = tx.init(params)
  shapes = {name: _shapes(mesh)[name] for name in params}
  shardings = so.state_sharding(tx, shapes)
  assert sum(x.ndim > 0 for x in jax.tree.leaves(state)) > len(params)
  for x, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
  ):
    # Optax's own scalars start on one device; in a jitted step they don't.
    if isinstance(x.sharding, NamedSharding):
      assert x.sharding.is_equivalent_to(sharding, x.ndim)
    else:
      assert x.ndim == 0 and sharding.spec == P()


# Of every two leaves with both kinds of axes.
ON_MESH = {
  name: (KINDS[i % 2], PATHS[i // 2 % 4]) for i, name in enumerate(MADE)
}


@pytest.mark.parametrize(
  'name',
  # Others have the arrays of these.
  grid.but(MADE, ('galore', 'apollo_adamw', 'subspace_adamw', 'trion')),
)
def test_is_where_eager_and_jitted_init_put_the_state(name):
  (kind, path), tx = ON_MESH[name], MADE[name]()
  mesh = _mesh(kind)
  with jax.set_mesh(mesh):
    params = _params(mesh, (path, 'bias'))
    shapes = {name: _shapes(mesh)[name] for name in params}
    shardings = so.state_sharding(tx, shapes)
    state = tx.init(params)
    _assert_placed(state, shardings)
    init = cases.jit(tx.init, out_shardings=so.state_sharding(tx, params))
    jitted = init(params)
  _assert_placed(jitted, shardings)
  measure.assert_trees_close(jitted, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'name',
  # All state but that of some residuals; steps as such:
  # tests/test_sharding.py.
  grid.only(MADE, ('online_subspace_descent', 'ldadamw')),
)
def test_steps_stay_there_with_one_compilation(name):
  (kind, path), tx = ON_MESH[name], MADE[name]()
  mesh = _mesh(kind)
  with jax.set_mesh(mesh):
    params = _params(mesh, (path, 'bias'))
    shardings = so.state_sharding(tx, params)
    state = cases.jit(tx.init, out_shardings=shardings)(params)

    def step(params, state):
      gradients = jax.tree.map(lambda x: jnp.cos(x), params)
      updates, state = tx.update(gradients, state, params)
      return optax.apply_updates(params, updates), state

    placed = jax.tree.map(lambda x: x.sharding, params)
    step = cases.jit(
      step, donate_argnums=(0, 1), out_shardings=(placed, shardings)
    )
    old = jax.tree.leaves((params, state))
    for _ in range(3):
      params, state = step(params, state)
    assert all(x.is_deleted() for x in old)
    assert step._cache_size() == 1
    _assert_placed(state, shardings)


@pytest.mark.parametrize(
  'name',
  # Each kind of array: of bases and moments, of the bases' optimizer, whole
  # buffers, one number for each output.
  grid.only(MADE, ('golore', 'online_subspace_descent', 'ldadamw', 'dion')),
)
def test_no_device_holds_more_than_its_part(name):
  # Rank 8, so that the axes which are left divide it. Buffers of the residual
  # are whole leaves, which have no other axes than the leaf's own.
  whole = name in ('ldadamw', 'dion', 'trion')
  left = P('tensor', 'fsdp') if whole else P('tensor')
  mesh = _mesh()
  shapes = {
    'layers': ((2, 128, 128), P(None, 'fsdp', 'tensor')),
    'wide': ((128, 256), left),
    'bias': ((128,), P('tensor')),
  }
  params = {
    k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec))
    for k, (s, spec) in shapes.items()
  }
  tx = getattr(so, name)(0.02, 8)
  shardings = so.state_sharding(tx, params)
  whole = jax.tree.leaves(jax.eval_shape(tx.init, params))
  size = lambda x, shape: math.prod(shape) * x.dtype.itemsize
  held = lambda x, s: size(x, s.shard_shape(x.shape))
  parts = [*map(held, whole, jax.tree.leaves(shardings))]
  # One number for each output has no other axis than the outputs'.
  cut = [1 not in x.shape for x in whole]
  total = sum(size(x, x.shape) for x in itertools.compress(whole, cut))
  assert sum(itertools.compress(parts, cut)) <= 1.1 * total / 4
  init = cases.jit(tx.init, out_shardings=shardings).lower(params).compile()
  mine = sum(parts)
  # Rounded up to the alignment of buffers.
  size = init.memory_analysis().output_size_in_bytes
  assert mine <= size < 1.2 * mine + 8192
  # Nor on the way there.
  made = re.findall(r'f32\[([\d,]+)\]', init.as_text())
  sizes = [4 * math.prod(map(int, shape.split(','))) for shape in made]
  assert max(sizes) <= total / 4


def test_names_in_linen_boxes():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      kernel_init = nn.with_partitioning(
        nn.initializers.lecun_normal(), ('fsdp', 'tensor')
      )
      return nn.Dense(64, kernel_init=kernel_init)(x)

  variables = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((1, 32)))
  mesh, tx = _mesh(), so.golore(0.02, 4)
  with jax.set_mesh(mesh):
    shardings = so.state_sharding(tx, variables['params'])
  own = measure.project_state(shardings)
  basis = jax.tree.leaves(own.subspaces.basis)
  assert basis == [NamedSharding(mesh, P('fsdp', 'tensor'))]
  moments = shardings[0][1].inner.mu['Dense_0']
  assert moments['kernel'] == NamedSharding(mesh, P('fsdp', 'tensor'))
  assert moments['bias'] == NamedSharding(mesh, P())


def test_names_in_nnx_variables():
  def kernel(rngs):
    init = nnx.with_partitioning(
      nnx.initializers.lecun_normal(), ('fsdp', 'tensor')
    )
    return nnx.Linear(32, 64, kernel_init=init, rngs=rngs)

  @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
  def stack(rngs):
    return kernel(rngs)

  mesh, tx = _mesh(), so.online_subspace_descent(0.02, 4)
  with jax.set_mesh(mesh):
    model = nnx.eval_shape(lambda: stack(nnx.Rngs(0).split(3)))
    params = nnx.state(model, nnx.Param)
    shardings = so.state_sharding(tx, params)
  own = measure.project_state(shardings)
  [basis] = jax.tree.leaves(own.subspaces.basis)
  assert basis == NamedSharding(mesh, P(None, 'fsdp', 'tensor'))


def test_one_device_without_a_mesh():
  params = {'w': jnp.ones((32, 64))}
  tx = so.golore(0.02, 4)
  state = tx.init(params)
  shardings = so.state_sharding(tx, params)
  assert jax.tree.structure(state) == jax.tree.structure(shardings)
  for x, sharding in zip(
    jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True
  ):
    assert x.sharding == sharding


def test_needs_one_mesh():
  tx = so.golore(0.02, 4)
  with errors.raises(ValueError, 'set_mesh'):
    so.state_sharding(tx, {'w': jax.ShapeDtypeStruct((32, 64), jnp.float32)})
  one, other = _mesh(), _mesh(shape=(4, 1))
  params = {'a': _shapes(one)['w'], 'b': _shapes(other)['w']}
  with errors.raises(ValueError, '2 meshes', "'fsdp': 4"):
    so.state_sharding(tx, params)


def test_arrays_on_one_device_are_replicated_beside_a_mesh():
  mesh = _mesh()
  params = {'w': _shapes(mesh)['w'], 'bias': jnp.ones(7)}
  shardings = so.state_sharding(so.golore(0.02, 4), params)
  assert shardings[0][1].inner.mu['bias'] == NamedSharding(mesh, P())
  assert np.size(shardings[0][1].inner.mu['w'].spec) == 2


def test_axes_to_replicate():
  mesh = _mesh()
  tx = so.golore(0.02, 4)
  params = {'tall': _shapes(mesh)['tall'], 'bias': jnp.ones(7)}
  split = so.state_sharding(tx, params)
  same = so.state_sharding(tx, params, replicated=('tensor',))
  at = lambda tree: measure.project_state(tree).subspaces.basis['tall'].spec
  assert at(split) == P(None, ('fsdp', 'tensor'))
  assert at(same) == P(None, 'fsdp')
  assert all(x.mesh == mesh for x in jax.tree.leaves(same))
  with errors.raises(ValueError, "'fsdp'", 'replicated'):
    so.state_sharding(tx, params, replicated=('fsdp',))
  with errors.raises(ValueError, "'data'", "'fsdp', 'tensor'"):
    so.state_sharding(tx, params, replicated=('data',))


def test_logical_names_of_linen():
  rules = (('embed', 'fsdp'), ('mlp', 'tensor'))
  shape = jax.ShapeDtypeStruct((32, 64), jnp.float32)
  mesh, tx = _mesh(), so.golore(0.02, 4)
  box = lambda rules: {
    'w': nn.LogicallyPartitioned(shape, ('embed', 'mlp'), rules=rules)
  }
  with jax.set_mesh(mesh):
    shardings = so.state_sharding(tx, box(rules))
    with nn.logical_axis_rules(rules):
      by_context = so.state_sharding(tx, box(None))
  for tree in (shardings, by_context):
    [basis] = jax.tree.leaves(measure.project_state(tree).subspaces.basis)
    assert basis == NamedSharding(mesh, P('fsdp', 'tensor'))


def _variable(value, **metadata):
  return nnx.Param(value, eager_sharding=False, **metadata)


def test_a_sharding_of_the_optimizer_goes_before_that_of_the_model():
  mesh, tx = _mesh(), so.golore(0.02, 4)
  shape = jax.ShapeDtypeStruct((32, 64), jnp.float32)
  kept = NamedSharding(mesh, P(None, 'tensor'))
  placed = jax.device_put(jnp.ones((32, 64)), kept)
  names = {'out_sharding': (None, 'tensor')}
  own = {'optimizer_sharding': ('fsdp', 'tensor')}
  with jax.set_mesh(mesh):
    specs = [
      so.state_sharding(tx, {'w': _variable(x, **names, **own)})[0][1]
      .inner.mu['w']
      .spec
      for x in (shape, placed)
    ]
    without = so.state_sharding(tx, {'w': _variable(placed, **names)})
  assert specs == [P('fsdp', 'tensor')] * 2
  # The rank takes what the model leaves.
  assert without[0][1].inner.mu['w'].spec == P('fsdp', 'tensor')
  adam = optax.adam(0.1)
  with jax.set_mesh(mesh):
    of = lambda **kwargs: so.state_sharding(
      adam, {'w': _variable(placed, **kwargs)}
    )
    assert of(**names, **own)[0].mu['w'].spec == P('fsdp', 'tensor')
    assert of(**names)[0].mu['w'].spec == P(None, 'tensor')


@pytest.mark.parametrize('key', ['out_sharding', 'optimizer_sharding'])
def test_logical_names_of_nnx(key):
  rules = (('embed', 'fsdp'), ('mlp', 'tensor'))
  shape = jax.ShapeDtypeStruct((32, 64), jnp.float32)
  mesh, tx = _mesh(), so.golore(0.02, 4)
  names = {key: ('embed', 'mlp')}
  with jax.set_mesh(mesh):
    own = _variable(shape, sharding_rules=rules, **names)
    shardings = [so.state_sharding(tx, {'w': own})]
    with nn.logical_axis_rules(rules):
      shardings.append(so.state_sharding(tx, {'w': _variable(shape, **names)}))
  for tree in shardings:
    [basis] = jax.tree.leaves(measure.project_state(tree).subspaces.basis)
    assert basis == NamedSharding(mesh, P('fsdp', 'tensor'))


def test_an_nnx_optimizer_starts_where_its_variables_say():
  """As `nnx.Optimizer` makes it under jit, moments apart from the model."""
  mesh, tx = _mesh(), optax.adam(0.1)

  class Model(nnx.Module):
    def __init__(self):
      self.kernel = nnx.Param(
        jnp.ones((32, 64)),
        out_sharding=(None, 'tensor'),
        optimizer_sharding=('fsdp', 'tensor'),
      )

  with jax.set_mesh(mesh):
    model = Model()
    params = nnx.state(model, nnx.Param)
    said = so.state_sharding(tx, params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    named = nnx.get_partition_spec(nnx.state(optimizer.opt_state))
  assert model.kernel[...].sharding.spec == P(None, 'tensor')
  assert P('fsdp', 'tensor') in jax.tree.leaves(named)
  assert [x.spec for x in jax.tree.leaves(said)] == [
    P(),
    P('fsdp', 'tensor'),
    P('fsdp', 'tensor'),
  ]
