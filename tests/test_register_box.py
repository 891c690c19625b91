"""Arrays in boxes: whose they are, and in which ones the state comes."""

import functools
from typing import NamedTuple

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import errors
import grid
import measure
import model_trees
import subspace_optax as so


class Axis(NamedTuple):
  name: str
  size: int


@jax.tree_util.register_pytree_with_keys_class
class NamedArray:
  """An array with named axes as haliax has it, which checks its sizes."""

  def __init__(self, array, axes):
    self.array, self.axes = array, axes
    shape = getattr(array, 'shape', None)
    if shape is not None and shape != tuple(axis.size for axis in axes):
      raise ValueError(f'an array of {shape} with axes {axes}')

  dtype = property(lambda self: self.array.dtype)
  shape = property(lambda self: {x.name: x.size for x in self.axes})

  def tree_flatten_with_keys(self):
    return ((jax.tree_util.GetAttrKey('array'), self.array),), self.axes

  @classmethod
  def tree_unflatten(cls, axes, arrays):
    self = object.__new__(cls)
    self.array, self.axes = arrays[0], axes
    return self


def wrap(box, array, names):
  sizes = zip(names, array.shape, strict=True)
  axes = [Axis(k or f'axis_{i}', n) for i, (k, n) in enumerate(sizes)]
  return NamedArray(array, tuple(axes))


@pytest.fixture(autouse=True)
def registered():
  so.register_box(
    NamedArray, lambda box: [axis.name for axis in box.axes], wrap
  )


def named(**sizes):
  rng = np.random.default_rng(sum(sizes.values()))
  array = jnp.asarray(rng.standard_normal(tuple(sizes.values())), jnp.float32)
  return NamedArray(array, tuple(map(Axis, sizes, sizes.values())))


def model():
  return {
    'q_proj': {'weight': named(layers=3, embed=12, heads=2, head_size=6)},
    'up_proj': {'weight': named(layers=3, embed=12, mlp=20)},
    'norm': {'weight': named(layers=3, embed=12)},
  }


def is_named(x):
  return isinstance(x, NamedArray)


def test_names_of_axes_tell_the_matrix():
  weight = named(layers=3, embed=16, heads=2, head_size=8)
  params = {'o_proj': {'weight': weight}}
  (match,) = so.SubspaceSpec(1).match(params)
  assert model_trees.matrices_of(match) == (3, 16, 16)
  assert match.how == 'metadata'


OPTIMIZERS = ['golore', 'online_subspace_descent', 'ldadamw', 'subspace_muon']


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_state_is_in_boxes_of_its_own(name):
  """Every box holds what its axes say, before and after a step."""
  tx, params = getattr(so, name)(0.1, rank=2), model()
  state = jax.eval_shape(tx.init, params)
  boxes = [x for x in jax.tree.leaves(state, is_leaf=is_named) if is_named(x)]
  assert len(boxes) > 9
  for box in boxes:
    assert box.array.shape == tuple(axis.size for axis in box.axes)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize(
  'name',
  # Boxes and their shapes in the others' states are tested above.
  grid.only(OPTIMIZERS, ('ldadamw',)),
)
def test_steps_are_those_of_bare_arrays(name):
  tx, params = getattr(so, name)(0.1, rank=2), model()
  bare = jax.tree.map(lambda x: x.array, params, is_leaf=is_named)
  numbers = {
    'q_proj': {'weight': so.DimensionNumbers(1, (2, 3))},
    'up_proj': {'weight': so.DimensionNumbers(1, 2)},
    'norm': {'weight': None},
  }
  spec = so.SubspaceSpec(2, weight_dimension_numbers=numbers)
  alone = getattr(so, name)(0.1, spec=spec)
  state, own = tx.init(params), alone.init(bare)
  update, alone_update = cases.jit(tx.update), cases.jit(alone.update)
  for t in range(3):
    gradients = jax.tree.map(lambda x, t=t: jnp.sin((t + 1) * x), params)
    updates, state = update(gradients, state, params)
    gradients = jax.tree.map(lambda x, t=t: jnp.sin((t + 1) * x), bare)
    wanted, own = alone_update(gradients, own, bare)
    for x, y in zip(*map(jax.tree.leaves, (updates, wanted)), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  assert update._cache_size() == 1


def test_names_of_a_rank_are_those_of_what_it_stands_for():
  state = jax.eval_shape(so.golore(0.1, rank=2).init, model())
  bases = measure.project_state(state).subspaces.basis
  names = lambda x: [axis.name for axis in x.axes]
  assert names(bases['up_proj']['weight']) == ['layers', 'embed', 'mlp']
  assert names(bases['q_proj']['weight']) == ['layers', 'embed', 'heads']
  moments = state[0][1].inner.mu
  assert names(moments['up_proj']['weight']) == ['layers', 'embed', 'mlp']
  assert moments['up_proj']['weight'].array.shape == (3, 2, 20)
  assert names(moments['norm']['weight']) == ['layers', 'embed']


@pytest.mark.parametrize(
  'init',
  [
    so.golore(0.1, rank=2).init,
    so.scale_by_adam8bit().init,
    so.round_updates().init,
    so.rso.subproblems(so.SubspaceSpec(2, side='in'), optax.sgd(0.1)).init,
    so.SubspaceSpec(2).match,
    functools.partial(so.describe, so.SubspaceSpec(2)),
  ],
  ids=['golore', 'adam8bit', 'rounding', 'subproblems', 'match', 'describe'],
)
def test_a_wrapper_that_nobody_registered(init):
  params = {'w': Stranger(jnp.ones((12, 16)))}
  with errors.raises(TypeError, "'w'", 'Stranger', 'register_box'):
    init(params)


@jax.tree_util.register_pytree_node_class
class Stranger:
  def __init__(self, array):
    self.array = array

  dtype = property(lambda self: self.array.dtype)
  shape = property(lambda self: self.array.shape)

  def tree_flatten(self):
    return (self.array,), None

  @classmethod
  def tree_unflatten(cls, _, arrays):
    return cls(arrays[0])


@pytest.mark.parametrize('cls', [jnp.ndarray, 'NamedArray', 3])
def test_what_is_no_box(cls):
  with errors.raises(TypeError, 'class around an array'):
    so.register_box(cls, lambda box: None, wrap)


# flax's boxes.


def test_a_sharding_of_the_optimizer_goes_before_that_of_the_model():
  kernel = nnx.Param(
    jnp.ones((16, 24)),
    out_sharding=(None, 'tensor'),
    optimizer_sharding=('fsdp', 'tensor'),
    eager_sharding=False,
  )

  class Model(nnx.Module):
    def __init__(self):
      self.kernel = kernel

  tx = so.golore(0.1, rank=4)
  optimizer = nnx.Optimizer(Model(), tx, wrt=nnx.Param)
  specs = nnx.get_partition_spec(nnx.state(optimizer.opt_state))
  found = {
    x.shape: spec
    for x, spec in zip(
      jax.tree.leaves(nnx.state(optimizer.opt_state)),
      jax.tree.leaves(specs),
      strict=True,
    )
  }
  assert found[16, 4] == found[4, 24] == P('fsdp', 'tensor')


def test_a_rank_that_the_mesh_does_not_divide_has_no_name():
  box = nn.Partitioned(jnp.ones((16, 24)), ('fsdp', None))
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
  tx = so.golore(0.1, rank=6)
  # Traced anew, since the mesh is none of the arguments.
  init = lambda: nn.get_partition_spec(
    jax.eval_shape(lambda w: tx.init(w), {'w': box})[0][1].inner.mu
  )
  assert init() == {'w': P('fsdp', None)}
  with jax.set_mesh(mesh):
    assert init() == {'w': P(None, None)}


def test_logical_names_are_looked_up_in_rules():
  box = nn.LogicallyPartitioned(jnp.ones((16, 24)), ('embed', 'mlp'))
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
  tx = so.golore(0.1, rank=6)
  for axis, name in [('fsdp', None), (None, 'embed')]:
    with jax.set_mesh(mesh), nn.logical_axis_rules([('embed', axis)]):
      state = jax.eval_shape(lambda w: tx.init(w), {'w': box})
    moment = state[0][1].inner.mu['w']
    assert moment.names == (name, 'mlp')


def test_boxes_inside_of_wrappers():
  """Leaves without a box, masked ones, and accumulation."""
  params = {
    'w': nn.Partitioned(jnp.ones((16, 24)), ('fsdp', None)),
    'bare': jnp.ones((16, 24)),
    'hidden': nn.Partitioned(jnp.ones((8, 8)), (None, 'fsdp')),
  }
  spec = so.SubspaceSpec(2)
  tx = so.subspace(
    spec, so.projectors.stiefel(2), so.scale_by_adam8bit(), every_k=2
  )
  tx = optax.masked(tx, {'w': True, 'bare': True, 'hidden': False})
  state = tx.init(params)
  for _ in range(2):
    before = jax.tree.structure(state)
    updates, state = cases.jit(tx.update)(params, state, params)
    assert jax.tree.structure(state) == before
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  specs = nn.get_partition_spec(state.inner_state)
  assert specs.mean['w'] == P('fsdp', None)
  assert specs.mean['bare'] == P()
  assert specs.project.subspaces.basis['w'] == P('fsdp', None)


def test_blocks_have_no_name_since_a_mesh_may_not_divide_them():
  """512 rows fall into 4 blocks of an int8 basis, which 8 devices can't cut."""
  box = nn.Partitioned(jnp.ones((512, 1024)), ('fsdp', 'tensor'))
  spec = so.SubspaceSpec(16, basis_dtype='int8')
  tx = so.subspace(spec, so.projectors.stiefel(9), so.scale_by_adam8bit())
  state = nn.get_partition_spec(jax.eval_shape(tx.init, {'w': box}))
  basis = measure.project_state(state).subspaces.basis['w']
  assert basis.codes == P('fsdp', 'tensor')
  assert basis.scales == P(None, 'fsdp')
  moments = state[1].inner
  assert moments.coded.mu['w'] == P('fsdp', 'tensor')
  assert moments.scales['mu']['w'] == P('fsdp', None)


@pytest.mark.parametrize(
  'names', [(('fsdp', 'tp'), None), (None, ('tp', 'dp'))]
)
def test_axes_that_are_cut_along_several_axes_of_a_mesh(names):
  tx = so.golore(0.1, rank=4, random_from=2)
  params = {'w': (16, 24), 'head': (16, 24)}
  boxes = {k: nn.Partitioned(jnp.ones(x), names) for k, x in params.items()}
  moments = nn.get_partition_spec(jax.eval_shape(tx.init, boxes)[0][1].inner.mu)
  assert moments == {'w': P(*names), 'head': P(*names)}


def test_trees_of_which_nothing_is_left():
  params = {'w': nn.Partitioned(jnp.ones((64, 64)), ('fsdp', None))}
  hidden = optax.masked(so.scale_by_adam8bit(), {'w': False})
  assert not jax.tree.leaves(hidden.init(params).inner_state.coded.mu)
  parts = {'x': so.golore(0.1, rank=4), 'y': optax.adam(0.1)}
  optax.partition(parts, {'w': 'y'}).init(params)


def test_a_list_of_boxes_in_a_chain():
  """Both are counted by numbers in paths."""
  box = lambda *names: nn.Partitioned(jnp.ones((16, 24)), names)
  inner = optax.chain(optax.trace(0.9), optax.trace(0.8))
  tx = so.subspace(so.SubspaceSpec(4), so.projectors.stiefel(2), inner)
  state = jax.eval_shape(tx.init, [box('a', 'b'), box('c', 'd')])
  for trace in state[1].inner:
    specs = nn.get_partition_spec(trace.trace)
    assert specs == [P('a', 'b'), P('c', 'd')]


def test_state_sharding_of_a_registered_box():
  mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
  shapes = jax.eval_shape(model)
  with jax.set_mesh(mesh):
    places = so.state_sharding(so.golore(0.1, rank=2), shapes)
  assert all(x.spec == P() for x in jax.tree.leaves(places))


@pytest.mark.parametrize(
  'dtype',
  [
    # What rounding loses is in boxes, too.
    pytest.param(jnp.float32, marks=pytest.mark.full),
    jnp.bfloat16,
  ],
)
def test_state_of_subproblems_is_in_boxes(dtype):
  """Steps are those of bare arrays, and the boxes stay through them."""
  rso = so.rso.subproblems(
    so.SubspaceSpec(2, side='in'),
    optax.adam(0.1),
    update_proj_gap=2,
    rounding='compensated',
  )
  bare = {'w': jnp.ones((8, 16), dtype), 'shift': jnp.ones(16)}
  names = {'w': ('embed', 'mlp'), 'shift': ('mlp',)}
  params = {k: nn.Partitioned(x, names[k]) for k, x in bare.items()}

  def loss(p, x):
    p = nn.unbox(p)
    return jnp.mean((so.rso.dot(x, p['w']) + p['shift'][None]) ** 2)

  step = cases.jit(rso.step(loss))
  state, x = rso.init(params), jnp.ones((4, 8))
  specs = nn.get_partition_spec(state)
  assert specs.coords['w'] == specs.inner.inner[0].mu['w'] == P('embed', 'mlp')
  if dtype == jnp.bfloat16:
    assert specs.lost['w'] == P('embed', 'mlp')
  for _ in range(3):
    params, state, value = step(params, state, x)
  assert step._cache_size() == 1
  assert nn.get_partition_spec(state) == specs

  alone = cases.jit(rso.step(loss))
  own = rso.init(bare)
  for _ in range(3):
    bare, own, wanted = alone(bare, own, x)
  np.testing.assert_array_equal(value, wanted)
  for k, x in bare.items():
    np.testing.assert_array_equal(params[k].value, x)
