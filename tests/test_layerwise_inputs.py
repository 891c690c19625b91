"""`so.layerwise`: trees, leaves, optimizers and functions of all kinds."""

import collections
import functools

from flax import linen
from flax import nnx
from flax.core import frozen_dict
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
import subspace_optax as so

LAYERS, WIDTH = 3, 8
BATCH = jnp.array([0, 1, 2, 3, 4, 1])
SGD = optax.sgd(0.1, momentum=0.9)


def normal(seed, *shape, scale=1.0):
  x = scale * np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(x, jnp.float32)


def make_params(width=WIDTH):
  """One matrix, one vector and one scalar in each layer."""
  return {
    'embed': normal(0, 5, width),
    'blocks': {
      'w': normal(1, LAYERS, width, width, scale=0.3),
      'g': 1.0 + normal(2, LAYERS, width, scale=0.1),
      's': 1.0 + normal(3, LAYERS, scale=0.1),
    },
    'a_head': normal(4, width, 1),
  }


def value(x):
  return x[...] if isinstance(x, nnx.Variable) else x


def embed(rest, batch):
  return value(rest['embed'])[batch]


def block(layer, x, batch):
  del batch
  g, s = value(layer['g']), value(layer['s'])
  return x + jnp.tanh((x * g[None] * s) @ value(layer['w']))


def head(rest, x, batch):
  del batch
  return jnp.mean((x @ value(rest['a_head']) - 1.0) ** 2)


def loss(params, batch=BATCH):
  x = embed(params, batch)
  for i in range(LAYERS):
    x = block(jax.tree.map(lambda x, i=i: x[i], params['blocks']), x, batch)
  return head(params, x, batch)


@functools.cache
def first_gradient():
  return cases.jit(jax.grad(loss))(make_params())


@functools.cache
def one_step_of_sgd():
  step = so.layerwise(optax.sgd(0.1), embed, block, head)
  return cases.jit(step.step)(make_params(), step.init(make_params()), BATCH)


@functools.cache
def of_bare_trees():
  """What boxes must give, too."""
  tx = so.golore(0.1, rank=2, update_proj_gap=2)
  return run(so.layerwise(tx, embed, block, head), make_params())[0]


def run(step, params, steps=3, batch=BATCH, state=None):
  """Parameters, state and metrics after some steps, compiled once."""
  update = cases.jit(step.step)
  state = step.init(params) if state is None else state
  rows = []
  for _ in range(steps):
    params, state, metrics = update(params, state, batch)
    rows.append(metrics)
  assert update._cache_size() == 1
  return params, state, rows


def assert_close(got, wanted):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6),
    got,
    wanted,
  )


# --- Trees -------------------------------------------------------------------


def boxed(params):
  return jax.tree.map(nnx.Param, params)


def reordered(params):
  """The stack in the middle, keys in no order."""
  keys = ('embed', 'blocks', 'a_head')
  return collections.OrderedDict((key, params[key]) for key in keys)


TREES = {
  'OrderedDict': reordered,
  'defaultdict': lambda p: collections.defaultdict(dict, p),
  'FrozenDict': frozen_dict.freeze,
  'nnx.State': lambda p: nnx.State(boxed(p)),
  'boxes': boxed,
}


@pytest.fixture(scope='module')
def plain():
  params, _, _ = run(so.layerwise(SGD, embed, block, head),
                     make_params())  # fmt: skip
  return jax.tree.leaves(params)


@pytest.mark.parametrize('name', TREES)
def test_the_tree_stays_what_it_was(name, plain):
  params = TREES[name](make_params())
  step = so.layerwise(SGD, embed, block, head)
  kept = list(params)
  got, state, _ = run(step, params)
  assert jax.tree.structure(got) == jax.tree.structure(params)
  assert list(params) == kept  # nothing is taken from the user's own
  by_size = lambda x: (x.shape, float(jnp.sum(x)))
  assert_close(
    sorted(map(np.asarray, jax.tree.leaves(got)), key=by_size),
    sorted(map(np.asarray, plain), key=by_size),
  )
  one = lambda carry, _: (step.step(*carry, BATCH)[:2], None)
  jax.eval_shape(lambda c: jax.lax.scan(one, c, length=2), (got, state))


@pytest.mark.parametrize('kind', ['linen', 'nnx'])
def test_boxes_that_name_axes(kind):
  """A layer's boxes have the stack's names, one too many."""

  def box(x):
    names = ('layers', 'embed', 'mlp')[: x.ndim]
    if kind == 'linen':
      return linen.Partitioned(x, names)
    return nnx.Param(x, out_sharding=names, eager_sharding=False)

  def inside(f):
    return lambda layer, *rest: f(jax.tree.map(open_, layer, is_leaf=is_box),
                                  *rest)  # fmt: skip

  is_box = lambda x: isinstance(x, linen.Partitioned | nnx.Variable)
  open_ = lambda x: jax.tree.leaves(x)[0]
  tx = so.golore(0.1, rank=2, update_proj_gap=2)
  bare = make_params()
  boxes = bare | {'blocks': jax.tree.map(box, bare['blocks'])}
  step = so.layerwise(tx, embed, inside(block), head)
  if kind == 'nnx':  # as the other kind is, once it is traced
    state = jax.eval_shape(step.init, boxes)
    got, after, _ = jax.eval_shape(step.step, boxes, state, BATCH)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.structure(got) == jax.tree.structure(boxes)
    return
  got, _, _ = run(step, boxes)
  assert jax.tree.structure(got) == jax.tree.structure(boxes)
  assert_close(jax.tree.leaves(got), jax.tree.leaves(of_bare_trees()))


def test_a_stack_below_other_mappings():
  params = make_params()
  inner = collections.OrderedDict(
    z=params['a_head'], blocks=params['blocks'], a=jnp.zeros(1)
  )
  params = nnx.State({'embed': params['embed'], 'net': inner})
  step = so.layerwise(
    optax.sgd(0.1),
    embed,
    block,
    lambda rest, x, batch: head({'a_head': rest['net']['z']}, x, batch),
    stack='net/blocks',
  )
  got, _, _ = cases.jit(step.step)(params, step.init(params), BATCH)
  assert jax.tree.structure(got) == jax.tree.structure(params)
  wanted = first_gradient()
  moved = (inner['z'] - got['net']['z'], params['embed'] - got['embed'])
  assert_close(moved, (0.1 * wanted['a_head'], 0.1 * wanted['embed']))


# --- Vectors of each layer, which are matrices when stacked ------------------


def one_by_one(tx, params, steps):
  """Each layer's own optimizer, and one of all else."""
  layer = lambda p, i: jax.tree.map(lambda x: x[i], p['blocks'])
  rest = lambda p: {k: x for k, x in p.items() if k != 'blocks'}
  parts = [{'blocks': layer(params, i)} for i in range(LAYERS)]
  parts.append(rest(params))
  states = [tx.init(part) for part in parts]

  def joined(parts):
    layers = [part['blocks'] for part in parts[:-1]]
    blocks = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return parts[-1] | {'blocks': blocks}

  @cases.jit
  def step(parts, states):
    gradient = jax.grad(loss)(joined(parts))
    gradients = [{'blocks': layer(gradient, i)} for i in range(LAYERS)]
    gradients.append(rest(gradient))
    new = list(map(tx.update, gradients, states, parts))
    parts = list(map(optax.apply_updates, parts, [x for x, _ in new]))
    return parts, [state for _, state in new]

  for _ in range(steps):
    parts, states = step(parts, states)
  return joined(parts)


ALONE = {
  'muon': optax.contrib.muon(0.01),
  'adafactor': optax.adafactor(0.01, min_dim_size_to_factor=2),
  'schedule_free': optax.contrib.schedule_free_adamw(0.01, b1=0.8),
  'masked': optax.chain(
    optax.scale_by_adam(),
    optax.add_decayed_weights(
      0.1, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    optax.scale(-0.01),
  ),
}


@pytest.mark.parametrize(
  'name',
  # 'adafactor' tells matrices from vectors, too, in a smaller program.
  grid.but(ALONE, ('muon',)),
)
def test_shapes_of_one_layer_decide(name):
  tx, params = ALONE[name], make_params()
  got, state, _ = run(so.layerwise(tx, embed, block, head), params, 2)
  assert {x.shape[0] for x in jax.tree.leaves(state.blocks)} == {LAYERS}
  assert_close(got, one_by_one(tx, params, 2))


def test_codes_are_of_matrices_in_one_layer():
  """(2, 64, 64) has codes, and (2, 4096) has none."""
  tx = optax.chain(so.scale_by_adam8bit(exclude=None), optax.scale(-0.01))
  blocks = {'w': jnp.ones((2, 64, 64)), 'g': jnp.ones((2, 4096))}
  step = so.layerwise(tx, embed, block, head)
  state = step.init({'blocks': blocks}).blocks[0]
  dtypes = jax.tree.map(lambda x: x.dtype.name, state.coded.mu['blocks'])
  assert dtypes == {'w': 'int8', 'g': 'float32'}
  assert state.coded.nu['blocks']['g'].shape == (2, 4096)


SUBSPACES = {
  'golore': lambda spec: so.golore(0.01, spec=spec, update_proj_gap=2),
  'muon': lambda spec: so.subspace_muon(0.01, spec=spec),
  'staggered': lambda spec: so.subspace_adamw(
    0.01, spec=spec, update_proj_gap=2, stagger=True
  ),
}


@pytest.mark.parametrize('name', SUBSPACES)
def test_a_stack_of_vectors_is_no_matrix(name):
  """States are those of a spec that leaves vectors out by their names."""
  excluded = 'embed|head|g$|s$'
  tx, named = (
    SUBSPACES[name](so.SubspaceSpec(2, allow_empty=True, **options))
    for options in ({}, {'exclude': excluded})
  )
  params = make_params()
  step = so.layerwise(tx, embed, block, head)
  state = step.init(params)
  wanted = so.layerwise(named, embed, block, head).init(params)
  assert jax.tree.structure(state) == jax.tree.structure(wanted)
  jax.tree.map(np.testing.assert_array_equal, state, wanted)
  # Each layer has a seed of its own, and the update takes the state.
  seeds = optax.tree.get(state.blocks, 'seed')['blocks']['w']
  assert len(set(seeds.tolist())) == LAYERS
  jax.eval_shape(step.step, params, state, BATCH)


def test_another_matrix_in_a_stack():
  """Named from the first axis, it is that of the stack."""
  spec = so.SubspaceSpec(
    2,
    include='w',
    only_if_smaller=False,
    weight_dimension_numbers=so.DimensionNumbers(0, 1),
  )
  step = so.layerwise(
    so.golore(0.1, spec=spec), embed, block, head, rest=optax.sgd(0.1)
  )
  with pytest.raises(ValueError) as error:
    step.init(make_params())
  text = str(error.value)
  assert "'blocks/w' of shape (8, 8) in each layer" in text
  assert 'DimensionNumbers(-2, -1)' in text
  assert len(text) < 500 and 'PyTreeDef' not in text


@pytest.mark.parametrize(
  'kind, tx',
  grid.cover(
    [AxisType.Auto, AxisType.Explicit],
    [so.golore(0.1, 2), optax.contrib.muon(0.1)],
    of=2,
  ),
)
def test_moments_of_vectors_are_placed_like_them(kind, tx):
  mesh = jax.make_mesh((2,), ('x',), axis_types=(kind,))
  params = make_params()
  specs = {'w': P(None, None, 'x'), 'g': P(None, 'x'), 's': P()}
  place = lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec))
  params['blocks'] = {
    k: place(specs[k], x) for k, x in params['blocks'].items()
  }
  step = so.layerwise(tx, embed, block, head, rest=optax.sgd(0.1))
  state = step.init(params)
  found = [
    x.sharding.spec
    for path, x in jax.tree_util.tree_leaves_with_path(state.blocks)
    if jax.tree_util.keystr(path).endswith("['blocks']['g']")
  ]
  assert found and set(found) == {P(None, 'x')}


# --- Leaves without a gradient -----------------------------------------------


def parts_with_others():
  """A model whose layers and rest hold integers, booleans and keys."""
  params = make_params()
  params['blocks'] |= {
    'lags': jnp.arange(LAYERS),
    'on': jnp.array([True, False, True]),
    'key': jax.random.split(jax.random.key(7), LAYERS),
  }
  params |= {'table': jnp.array([1, 0, 2, 3, 4]), 'key': jax.random.key(1)}

  def my_embed(rest, batch):
    return {
      'x': embed(rest, rest['table'][batch]),
      'depth': 0,
      'key': rest['key'],
    }

  def my_block(layer, x, batch):
    h = jnp.roll(x['x'], layer['lags'], axis=0)
    h = jnp.where(layer['on'], block(layer, h, batch), h)
    keep = jax.random.bernoulli(layer['key'], 0.5, h.shape)
    keep |= jax.random.bernoulli(x['key'], 0.5, h.shape)
    key = jax.random.fold_in(x['key'], x['depth'])
    return {'x': h * keep, 'depth': x['depth'] + 1, 'key': key}

  return params, my_embed, my_block, lambda r, x, b: head(r, x['x'], b)


@pytest.mark.parametrize(
  ('tx', 'clip'),
  [
    pytest.param(optax.adam(0.01), 'layer', marks=pytest.mark.full),
    (so.golore(0.01, 2), 'two_pass'),
  ],
)
def test_leaves_without_a_gradient_stay_as_they_are(tx, clip):
  params, *parts = parts_with_others()
  step = so.layerwise(
    tx, *parts, rest=optax.adam(0.01), max_norm=1e9, clip=clip
  )
  got, state, rows = run(step, params, 2)
  for name in ('lags', 'on', 'key'):
    np.testing.assert_array_equal(
      *(jax.random.key_data(x) if name == 'key' else x
        for x in (got['blocks'][name], params['blocks'][name]))
    )  # fmt: skip
  np.testing.assert_array_equal(got['table'], params['table'])
  assert rows[1].loss < rows[0].loss
  paths = map(str, dict(jax.tree_util.tree_leaves_with_path(state)))
  assert not any('lags' in path or 'table' in path for path in paths)


def test_gradients_beside_leaves_without_one():
  params, my_embed, my_block, my_head = parts_with_others()
  fixed = {k: x for k, x in params['blocks'].items() if k not in 'wgs'}
  trained = make_params()

  def whole(p):
    x = my_embed(p | {'table': params['table'], 'key': params['key']}, BATCH)
    x['depth'] = jnp.int32(0)
    for i in range(LAYERS):
      layer = jax.tree.map(lambda x, i=i: x[i], p['blocks'] | fixed)
      x = my_block(layer, x, BATCH)
    return my_head(p, x, BATCH)

  wanted = cases.jit(jax.grad(whole))(trained)
  step = so.layerwise(optax.sgd(1.0), my_embed, my_block, my_head)
  got, _, metrics = cases.jit(step.step)(params, step.init(params), BATCH)
  only = lambda p: (
    {k: p[k] for k in ('embed', 'a_head')}
    | {'blocks': {k: p['blocks'][k] for k in 'wgs'}}
  )
  moved = jax.tree.map(jnp.subtract, trained, only(got))
  assert_close(moved, wanted)
  np.testing.assert_allclose(metrics.norm, optax.tree.norm(wanted), rtol=1e-5)


def test_complex_parameters():
  params = {'blocks': {'w': (1.0 + 2.0j) * normal(0, 2, 4)}, 'b': jnp.ones(())}
  step = so.layerwise(
    optax.sgd(0.5),
    lambda rest, batch: rest['b'] * batch,
    lambda layer, x, batch: x * jnp.real(jnp.vdot(layer['w'], layer['w'])),
    lambda rest, x, batch: jnp.sum(x),
  )
  got, _, metrics = cases.jit(step.step)(params, step.init(params), jnp.ones(3))
  whole = lambda w: 3 * jnp.prod(jnp.sum(jnp.abs(w) ** 2, 1))
  wanted = jax.grad(whole)(params['blocks']['w'])
  moved = params['blocks']['w'] - got['blocks']['w']
  np.testing.assert_allclose(moved, 0.5 * wanted, rtol=1e-5)
  of_b = metrics.norm**2 - jnp.sum(jnp.abs(wanted) ** 2)
  np.testing.assert_allclose(of_b, metrics.loss**2, rtol=1e-3)


# --- Functions and extra arguments -------------------------------------------


def test_dropout_that_differs_by_layer():
  drop = lambda x, key, i: (
    x * jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, x.shape)
  )

  def my_block(layer, x, batch, index):
    return block(layer, drop(x, batch[1], index), batch)

  def whole(params, batch):
    x = embed(params, batch[0])
    for i in range(LAYERS):
      layer = jax.tree.map(lambda x, i=i: x[i], params['blocks'])
      x = block(layer, drop(x, batch[1], i), batch)
    return head(params, x, batch)

  params, batch = make_params(), (BATCH, jax.random.key(5))
  wanted, gradient = cases.jit(jax.value_and_grad(whole))(params, batch)
  step = so.layerwise(
    optax.sgd(1.0),
    lambda rest, batch: embed(rest, batch[0]),
    my_block,
    head,
    with_index=True,
  )
  got, _, metrics = cases.jit(step.step)(params, step.init(params), batch)
  np.testing.assert_allclose(metrics.loss, wanted, rtol=1e-6)
  assert_close(jax.tree.map(jnp.subtract, params, got), gradient)


def test_optimizers_that_look_at_the_loss():
  """Without steps there is no progress, and the plateau's scale falls."""
  plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
  step = so.layerwise(optax.chain(optax.sgd(0.0), plateau), embed, block, head)
  _, state, rows = run(step, make_params(), 4)
  wanted = plateau.init(0.0)
  for row in rows:
    _, wanted = plateau.update(jnp.zeros(()), wanted, value=row.loss)
  assert wanted.scale < 1.0
  np.testing.assert_allclose(state.blocks[-1].scale, [wanted.scale] * LAYERS)
  np.testing.assert_allclose(state.rest[-1].scale, wanted.scale)


def test_the_step_of_polyak():
  params = make_params()
  step = so.layerwise(
    optax.sgd(0.0), embed, block, head, rest=optax.polyak_sgd(1.0)
  )
  got, _, metrics = cases.jit(step.step)(params, step.init(params), BATCH)
  gradient = first_gradient()
  rest = {k: gradient[k] for k in ('embed', 'a_head')}
  size = metrics.loss / optax.tree.norm(rest, squared=True)
  moved = {k: params[k] - got[k] for k in rest}
  assert_close(moved, jax.tree.map(lambda g: min(size, 1.0) * g, rest))


def test_what_head_returns_besides():
  both = lambda rest, x, batch: (head(rest, x, batch), {'x': x, 'n': 3})
  step = so.layerwise(optax.sgd(0.1), embed, block, both, has_aux=True)
  params = make_params()
  got, _, rows = run(step, params, 1)
  wanted, _, metrics = one_step_of_sgd()
  assert_close(got, wanted)
  assert rows[0].loss.shape == () and metrics._fields == ('loss', 'norm')
  assert rows[0].aux['n'] == 3 and rows[0].aux['x'].shape == (6, WIDTH)
  np.testing.assert_allclose(
    head(params, rows[0].aux['x'], BATCH), rows[0].loss, rtol=1e-6
  )


@pytest.mark.parametrize(
  ('my_head', 'has_aux', 'message'),
  [
    (lambda r, x, b: (head(r, x, b), x), False, 'needs has_aux=True'),
    (lambda r, x, b: jnp.mean(x, axis=1), False, 'the loss as a scalar'),
    (head, True, r'head must return \(loss, aux\), since has_aux=True'),
  ],
)
def test_heads_that_return_something_else(my_head, has_aux, message):
  params = make_params()
  step = so.layerwise(optax.sgd(0.1), embed, block, my_head, has_aux=has_aux)
  with pytest.raises(ValueError, match=message):
    step.step(params, step.init(params), BATCH)


# --- Numbers that are set for all layers -------------------------------------


@functools.cache
def with_injected_rates():
  tx = optax.inject_hyperparams(optax.sgd)(0.1)
  step = so.layerwise(tx, embed, block, head)
  return step, cases.jit(step.step)


@pytest.mark.parametrize('rate', [0.5, np.float32(0.5), jnp.array(0.5)])
def test_a_learning_rate_that_is_set(rate):
  params, (step, update) = make_params(), with_injected_rates()
  _, state, _ = update(params, step.init(params), BATCH)
  shapes = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
  state = optax.tree.set(state, learning_rate=rate)
  got, state, _ = update(params, state, BATCH)
  # From here on the first program goes on.
  assert (
    jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state) == shapes
  )
  np.testing.assert_allclose(
    state.blocks.hyperparams['learning_rate'], [0.5] * LAYERS
  )
  moved = jax.tree.map(jnp.subtract, params, got)
  assert_close(moved, jax.tree.map(lambda g: 0.5 * g, first_gradient()))
  programs = update._cache_size()
  update(params, state, BATCH)
  assert update._cache_size() == programs


def test_rates_of_each_layer_and_of_too_many():
  params, (step, update) = make_params(), with_injected_rates()
  state = step.init(params)
  rates = lambda x: state._replace(
    blocks=optax.tree.set(state.blocks, learning_rate=x)
  )
  got, _, _ = update(params, rates(jnp.array([1.0, 0.0, 2.0])), BATCH)
  gradient = first_gradient()['blocks']['w']
  wanted = gradient * jnp.array([1.0, 0.0, 2.0])[:, None, None]
  assert_close(params['blocks']['w'] - got['blocks']['w'], wanted)
  with pytest.raises(ValueError, match=r"learning_rate'.* has shape \(4,\)"):
    step.step(params, rates(jnp.ones(4)), BATCH)
  for wrong in (jnp.ones((3, 1)), jnp.ones((3, 12))):
    with pytest.raises(ValueError, match=r'state\.blocks .*learning_rate'):
      step.step(params, rates(wrong), BATCH)
  with pytest.raises(ValueError, match=r'state\.rest .*learning_rate'):
    step.step(
      params, optax.tree.set(state, learning_rate=jnp.ones(LAYERS)), BATCH
    )


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.complex64])
def test_a_loss_that_is_not_real(dtype):
  params = make_params()
  my_head = lambda *args: head(*args).astype(dtype)
  step = so.layerwise(optax.sgd(0.1), embed, block, my_head)
  with pytest.raises(ValueError, match='real loss, got'):
    jax.eval_shape(step.step, params, step.init(params), BATCH)


def test_masks_of_the_whole_tree_are_told_of_its_parts():
  params = make_params()
  mask = jax.tree.map(lambda x: x.ndim > 1, params)
  step = so.layerwise(
    optax.masked(optax.scale_by_adam(), mask), embed, block, head
  )
  with pytest.raises(Exception) as error:
    step.init(params)
  notes = ' '.join(error.value.__notes__)
  assert 'must be functions of such trees' in notes
  step = so.layerwise(
    optax.masked(
      optax.scale_by_adam(), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    embed,
    block,
    head,
  )
  step.init(params)


def test_a_small_matrix_outside_of_the_stack_is_trained():
  """What only `init` tells of is in the way of nothing else."""
  params = make_params() | {'proj': normal(5, WIDTH, 2)}
  head = lambda rest, x, batch: jnp.mean((x @ rest['proj'] - 1.0) ** 2)
  step = so.layerwise(so.golore(0.01, rank=4), embed, block, head)
  with pytest.warns(UserWarning, match='leaves no matrix to project'):
    state = step.init(params)
  assert so.memory_report(step, params).state == sum(
    x.nbytes for x in jax.tree.leaves(state)
  )
  so.state_sharding(step, params)
  trained, _, rows = run(step, params, state=state)
  assert rows[-1].loss < rows[0].loss
  assert jnp.abs(trained['proj'] - params['proj']).max() > 0


@pytest.mark.parametrize('leaf', [0.5, 'gelu'])
def test_a_leaf_of_the_stack_that_is_no_array(leaf):
  params = make_params()
  params['blocks']['s'] = leaf
  step = so.layerwise(SGD, embed, block, head)
  with errors.raises(TypeError, "'s'", 'must be an array', repr(leaf)):
    step.init(params)
