"""nnx and linen: annotated, sharded, scan-stacked and boxed parameters."""

from flax import linen as nn
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import errors
import measure
import subspace_optax as so
from subspace_optax._chain import _match_updates

LAYERS = 3


def _mesh():
  return jax.make_mesh(
    (2, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2
  )


def _annotated(*names):
  return nnx.with_partitioning(nnx.initializers.lecun_normal(), names)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(
      16,
      32,
      use_bias=False,
      kernel_init=_annotated('fsdp', 'tensor'),
      rngs=rngs,
    )
    self.down = nnx.Linear(
      32, 16, kernel_init=_annotated('tensor', 'fsdp'), rngs=rngs
    )

  def __call__(self, x):
    return x + self.down(jax.nn.silu(self.up(x)))


class Model(nnx.Module):
  """A scan over stacked blocks."""

  def __init__(self, rngs):
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
    def stack(rngs):
      return Block(rngs)

    self.blocks = stack(rngs.split(LAYERS))

  def __call__(self, x):
    x, _ = jax.lax.scan(lambda x, block: (block(x), None), x, self.blocks)
    return x


def _loss(model, x):
  return jnp.mean(jnp.square(model(x) - 1.0))


_make = jax.jit(lambda: Model(nnx.Rngs(0)))


@pytest.fixture
def model():
  with jax.set_mesh(_mesh()):
    yield _make()


def _linen_params(model, x):
  """Returns random parameters, which take no program, in their boxes."""
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)['params']
  draw = lambda x: 0.25 * rng.standard_normal(x.shape)
  return jax.tree.map(lambda x: jnp.asarray(draw(x), x.dtype), shapes)


@nnx.jit
def _step(model, optimizer, x):
  loss, gradients = nnx.value_and_grad(_loss)(model, x)
  optimizer.update(model, gradients)
  return loss


def _assert_sharded(optimizer, rank):
  arrays = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
  of_basis = [x for x in arrays if x.shape == (LAYERS, 16, rank)]
  assert of_basis
  for x in of_basis:
    # By the leaf's own axes, not by annotations for arrays of other shapes.
    assert x.addressable_shards[0].data.nbytes * 2 <= x.nbytes


def test_nnx_optimizer_at_a_rank_that_no_mesh_axis_divides(model):
  tx = so.golore(0.01, rank=3, random_from=4)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  _assert_sharded(optimizer, 3)
  x = jax.ShapeDtypeStruct((8, 16), jnp.float32)
  # Tracing is where metadata of another shape would be rejected.
  loss = nnx.eval_shape(_step, model, optimizer, x)
  assert loss.shape == ()


def test_nnx_steps_equal_those_on_a_plain_tree():
  plain = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
  tx = so.online_subspace_descent(0.01, rank=3)
  optimizer = nnx.Optimizer(plain, tx, wrt=nnx.Param)
  pure = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
  gradients = jax.tree.map(
    lambda x: jnp.asarray(np.sin(7.0 * np.asarray(x)) + 0.1), pure
  )
  # The seeds come from paths, which are those of the plain tree.
  state = tx.init(pure)

  @jax.jit
  def update(gradients, state, params):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  nnx_update = nnx.jit(lambda optimizer, model, g: optimizer.update(model, g))
  boxed = jax.tree.map(lambda x: x, nnx.state(plain, nnx.Param))
  nnx.replace_by_pure_dict(boxed, gradients)
  for _ in range(3):
    pure, state = update(gradients, state, pure)
    nnx_update(optimizer, plain, boxed)
  got = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
  measure.assert_trees_close(got, pure, rtol=1e-5, atol=1e-6)


def test_boxes_come_back_as_they_went_in(model):
  params = nnx.state(model, nnx.Param)
  tx = so.golore(0.01, rank=4)
  state = jax.eval_shape(tx.init, params)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  # Arrays of the state are in boxes of their own, whose axes are named.
  specs = nnx.to_pure_dict(nnx.get_partition_spec(state[0][1].inner.mu))
  assert specs['blocks']['up']['kernel'] == P(None, 'fsdp', 'tensor')
  for (path, x), spec in zip(
    jax.tree.leaves_with_path(state),
    jax.tree.leaves(nnx.get_partition_spec(state)),
    strict=True,
  ):
    assert len(spec) <= x.ndim, path


class Linen(nn.Module):
  """Boxed kernels, one of them stacked by a scan along axis 1."""

  @nn.compact
  def __call__(self, x):
    kernel = nn.with_partitioning(
      nn.initializers.lecun_normal(), ('embed', 'mlp')
    )
    scanned = nn.scan(
      _LinenBlock,
      variable_axes={'params': 1},
      split_rngs={'params': True},
      length=LAYERS,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    x, _ = scanned(name='layers')(x)
    x = nn.Dense(32, kernel_init=kernel, name='wide')(x)
    return nn.Dense(16, name='plain')(nn.relu(x))


class _LinenBlock(nn.Module):
  @nn.compact
  def __call__(self, x):
    kernel = nn.with_partitioning(
      nn.initializers.lecun_normal(), ('embed', 'mlp')
    )
    return x + nn.Dense(16, kernel_init=kernel, name='dense')(x), None


def test_linen_train_state_with_boxed_axis_1_stacked_parameters():
  model = Linen()
  x = jax.random.normal(jax.random.key(1), (4, 16))
  params = _linen_params(model, x)

  def numbers(params):
    return {
      'layers': {'dense': {'kernel': so.DimensionNumbers(0, 2), 'bias': None}},
      'wide': {'kernel': so.DimensionNumbers(0, 1), 'bias': None},
      'plain': {'kernel': so.DimensionNumbers(0, 1), 'bias': None},
    }

  spec = so.SubspaceSpec(4, weight_dimension_numbers=numbers)
  state = train_state.TrainState.create(
    apply_fn=model.apply,
    params=params,
    tx=so.online_subspace_descent(0.01, spec=spec),
  )
  # A Python int at first, which would cost a compilation of its own.
  state = state.replace(step=jnp.zeros((), jnp.int32))
  start = jax.tree.structure(state)

  @jax.jit
  def step(state):
    def loss(params):
      y = state.apply_fn({'params': params}, x)
      return jnp.mean(jnp.square(y - 1.0))

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value

  losses = []
  for _ in range(8):
    state, value = step(state)
    losses.append(float(value))
  assert losses[-1] < 0.9 * losses[0], losses
  assert step._cache_size() == 1
  assert jax.tree.structure(state) == start
  metrics = so.subspace_metrics(state.opt_state)
  assert metrics['layers/dense/kernel']['drift'].shape == (LAYERS,)
  assert metrics.keys() == {
    'layers/dense/kernel',
    'wide/kernel',
    'plain/kernel',
  }
  # Boxes have the names of the axes that are in them.
  specs = nn.get_partition_spec(measure.project_state(state.opt_state))
  assert specs.subspaces.basis['wide']['kernel'] == P('embed', 'mlp')
  assert specs.subspaces.basis['layers']['dense']['kernel'] == P(
    'embed', 'layers', 'mlp'
  )
  assert specs.subspaces.drift['layers']['dense']['kernel'] == P('layers')
  assert specs.subspaces.basis['plain']['kernel'] == P()


def test_linen_boxes_give_the_steps_of_bare_arrays():
  model = Linen()
  boxed = _linen_params(model, jnp.ones((1, 16)))
  bare = nn.unbox(boxed)
  assert jax.tree.structure(boxed) != jax.tree.structure(bare)
  tx = so.golore(0.01, rank=4)
  shapes = jax.eval_shape(tx.init, boxed)
  assert jax.tree.structure(nn.unbox(shapes)) == jax.tree.structure(
    jax.eval_shape(tx.init, bare)
  )
  updates, _ = jax.eval_shape(tx.update, boxed, shapes, boxed)
  assert jax.tree.structure(updates) == jax.tree.structure(boxed)


@pytest.mark.parametrize('box', [nn.Partitioned, nn.LogicallyPartitioned])
def test_axes_that_boxes_name_are_known_without_boxes(box):
  """`nnx.Optimizer` gives `init` boxes, and takes them off for `update`."""
  bare = {'stacked': jnp.ones((16, 3, 12)), 'odd': jnp.ones((6, 2, 12))}
  named = {
    'stacked': box(bare['stacked'], ('embed', 'layers', 'mlp')),
    'odd': box(bare['odd'], ('kv', 'heads', 'embed')),
  }
  tx = so.golore(1e-3, rank=2)
  state = tx.init(named)
  bases = measure.bases(state)
  assert bases['stacked'].shape == (3, 12, 2)
  assert bases['odd'].shape == (6, 2, 2)
  updates, _ = jax.eval_shape(tx.update, bare, state, bare)
  assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, bare)


def test_boxes_of_another_init_decide_nothing():
  bare = {'w': jnp.ones((3, 16, 24))}
  boxed = {'w': nn.Partitioned(bare['w'], ('heads', 'head_dim', 'embed'))}
  tx = so.golore(1e-3, rank=2)
  before, state = so.describe(tx, bare), tx.init(bare)
  other = tx.init(boxed)
  _, other = jax.eval_shape(tx.update, bare, other, bare)  # 48 x 24
  assert measure.bases(other)['w'].shape == (24, 2)
  assert so.describe(tx, bare) == before
  _, state = jax.eval_shape(tx.update, bare, state, bare)  # 3 x (16 x 24)
  assert measure.bases(state)['w'].shape == (3, 16, 2)


@pytest.mark.parametrize('shape', [(8, 3, 12), (8, 8, 8)])
def test_boxes_that_are_only_described_decide_nothing(shape):
  bare = {'w': jnp.ones(shape)}
  boxed = {'w': nn.Partitioned(bare['w'], ('embed', 'layers', 'mlp'))}
  tx = so.golore(1e-3, rank=2)
  so.describe(tx, boxed)
  state = jax.eval_shape(tx.init, bare)
  jax.eval_shape(tx.update, bare, state, bare)


def test_names_of_axes_are_kept_however_many_trees_there_are(monkeypatch):
  monkeypatch.setattr(_match_updates, '_MOST_TREES', 8)
  monkeypatch.setattr(_match_updates, '_names_at_init', {})
  bare = {'w': jnp.ones((24, 8, 16))}
  boxed = {'w': nn.Partitioned(bare['w'], ('embed', 'layers', 'mlp'))}
  tx = so.golore(1e-3, rank=2)
  state = tx.init(boxed)
  # Of any optimizer, so one whose bases are soon traced.
  given = so.projectors.periodic(
    'given', lambda matrix, basis, period: basis, 2, uses_gradient=False
  )
  other = so.project(so.SubspaceSpec(2), given)
  for n in range(10):
    tree = {'w': jax.ShapeDtypeStruct((24, 8, 17 + n), jnp.float32)}
    jax.eval_shape(other.init, tree)
  _, state = jax.eval_shape(tx.update, bare, state, bare)
  assert measure.bases(state)['w'].shape == (8, 16, 2)


def test_one_init_in_boxes_whose_names_alone_tell():
  """Without them, layers would stand first, and bases have the same shapes."""
  bare = {'w': jnp.ones((16, 16, 24))}
  boxed = {'w': nn.Partitioned(bare['w'], ('embed', 'layers', 'mlp'))}
  tx = so.golore(1e-3, rank=2)
  _, state = jax.eval_shape(tx.update, bare, tx.init(boxed), bare)
  assert measure.bases(state)['w'].shape == (16, 16, 2)


def test_two_models_whose_boxes_differ():
  bare = {'w': jnp.ones((8, 8, 12))}
  box = lambda *names: {'w': nn.Partitioned(bare['w'], names)}
  tx = so.golore(1e-3, rank=2)
  stack = tx.init(box('layers', 'embed', 'mlp'))
  kernel = tx.init(box('embed', 'heads', 'kv'))
  for state, shape in [(kernel, (8, 2)), (stack, (8, 8, 2))]:
    _, state = jax.eval_shape(tx.update, bare, state, bare)
    assert measure.bases(state)['w'].shape == shape
  tx.init(box('embed', 'layers', 'mlp'))  # bases of the same shape
  with errors.raises(ValueError, "'w'", 'weight_dimension_numbers'):
    # Traced once more: the trace that is known had other names.
    jax.eval_shape(lambda *args: tx.update(*args), bare, stack, bare)
