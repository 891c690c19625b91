"""`so.layerwise`: the ordinary step's results, without its gradients."""

import dataclasses
import functools
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from benchmarks import hlo
import cases
import grid
import llama
import pretrain
import small_llama
import subspace_optax as so
import test_pretrain
import train_step

LAYERS, WIDTH, HIDDEN, CLASSES = 3, 64, 96, 8
STEPS = 20


def normal(seed, *shape, scale=1.0):
  return scale * jax.random.normal(jax.random.key(seed), shape)


def make_params(layers=LAYERS, tied=True):
  """A stack of residual MLPs; `embed` is both embedding and head.

  If they are `tied`, each `up` is the MLP's second matrix, too, so that one
  projected leaf compiles.
  """
  blocks = {
    'up': normal(0, layers, WIDTH, HIDDEN, scale=WIDTH**-0.5),
    'scale': jnp.ones((layers, WIDTH)),
  }
  if not tied:
    down = normal(1, layers, HIDDEN, WIDTH, scale=0.3 * HIDDEN**-0.5)
    blocks['down'] = down
  return {
    'net': {'blocks': blocks, 'final': {'bias': jnp.zeros(WIDTH)}},
    'embed': normal(2, CLASSES, WIDTH, scale=0.2),
  }


BATCH = jax.random.randint(jax.random.key(3), (2, 16), 0, CLASSES)


def embed(rest, batch):
  return rest['embed'][batch[0]]


def block(layer, x, batch):
  del batch
  h = jnp.tanh((x * layer['scale'][None]) @ layer['up'])
  return x + h @ second(layer)


def second(layer):
  return layer['down'] if 'down' in layer else 0.3 * layer['up'].T


def head(rest, x, batch):
  logits = (x + rest['net']['final']['bias'][None]) @ rest['embed'].T
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
  )


def loss(params, batch):
  x, _ = jax.lax.scan(
    lambda x, layer: (block(layer, x, batch), None),
    embed(params, batch),
    params['net']['blocks'],
  )
  return head(params, x, batch)


def layers(tx, **options):
  return so.layerwise(tx, embed, block, head, stack='net/blocks', **options)


def run_ordinary(tx, params, steps=STEPS):
  @cases.jit
  def step(params, state):
    value, gradient = jax.value_and_grad(loss)(params, BATCH)
    updates, state = tx.update(gradient, state, params)
    norm = optax.tree.norm(gradient)
    return optax.apply_updates(params, updates), state, (value, norm)

  return repeat(step, params, tx.init(params), steps)


def run_layers(step, params, steps=STEPS, batch=BATCH, **options):
  run = lambda p, s: step.step(p, s, batch)
  update = cases.jit(run, donate_argnums=(0, 1), **options)
  params = jax.tree.map(jnp.copy, params)
  result = repeat(update, params, step.init(params), steps)
  assert update._cache_size() == 1
  return result


def repeat(step, params, state, steps):
  rows = []
  for _ in range(steps):
    params, state, row = step(params, state)
    rows.append(np.asarray(row))
  return params, state, np.array(rows)


def assert_close(got, wanted):
  """Every leaf, by the norm: Adam blows up rounding where gradients vanish."""
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    error = np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b)
    np.testing.assert_array_less(error, 1e-5)


def chain(*parts):
  return optax.chain(*parts, optax.scale_by_learning_rate(0.01))


SPEC = so.SubspaceSpec(4, allow_empty=True)
OPTIMIZERS = {
  # Else rounding decides about signs where gradients vanish.
  'adam': optax.adam(0.01, eps=1e-4),
  'adam8bit': chain(so.scale_by_adam8bit(rounding='nearest')),
  'galore': so.galore(0.01, rank=4, update_proj_gap=7),
  'golore, staggered': so.golore(
    optax.linear_schedule(0.02, 0.0, STEPS), 4, update_proj_gap=5, stagger=True,
    weight_decay=0.1,
  ),
  'subspace_adamw': so.subspace_adamw(0.01, 4, update_proj_gap=5),
  'subspace_muon': so.subspace_muon(0.01, 4, update_proj_gap=5),
  'reset': chain(
    so.subspace(
      SPEC, so.projectors.gaussian(6, regenerate=True), optax.scale_by_adam(),
      transport='reset',
    )
  ),
}  # fmt: skip


@pytest.mark.parametrize(
  'name',
  # The others have adam's moments of vectors and bases as random as reset's.
  grid.but(OPTIMIZERS, ('adam', 'reset')),
)
def test_equals_the_ordinary_step(name):
  tx = OPTIMIZERS[name]
  # Bases of both kernels in one; sums of codes of both round to others.
  tied = name not in ('golore, staggered', 'adam8bit')
  # Codes and small singular values multiply rounding; in float64 it is small.
  wide = name in ('adam8bit', 'subspace_muon')
  with jax.enable_x64(wide):
    dtype = jnp.float64 if wide else jnp.float32
    params = optax.tree.cast(make_params(tied=tied), dtype)
    wanted, _, rows = run_ordinary(tx, params)
    got, state, metrics = run_layers(layers(tx), params)
  assert_close(got, wanted)
  np.testing.assert_allclose(metrics, rows, rtol=1e-5)
  # Not by standing still.
  assert rows[-1, 0] < 0.8 * rows[0, 0]
  first = {x.shape[0] for x in jax.tree.leaves(state.blocks)}
  assert first == {LAYERS}


def test_equals_the_ordinary_step_without_momentum():
  """Few steps: gradients of 16 rows alone have directions of mere rounding.

  The iteration lifts those to the size of the others.
  """
  tx, params = so.normuon(0.01, b=None), make_params(tied=False)
  wanted, _, rows = run_ordinary(tx, params, 3)
  got, _, metrics = run_layers(layers(tx), params, 3)
  assert_close(got, wanted)
  np.testing.assert_allclose(metrics, rows, rtol=1e-5)


def test_gradients_that_are_accumulated_in_the_subspace():
  params = make_params()
  wanted, _, _ = run_ordinary(so.golore(0.01, 4, update_proj_gap=5), params, 3)
  got, state, _ = run_layers(
    layers(so.golore(0.01, 4, update_proj_gap=5, every_k=4)), params, 12
  )
  assert_close(got, wanted)
  means = jax.tree.leaves(state.blocks.mean)
  assert {x.shape for x in means} == {(LAYERS, 4, HIDDEN), (LAYERS, WIDTH)}


# Clipping.


def test_two_passes_clip_the_norm_of_the_whole_gradient():
  tx, params = optax.sgd(1.0), make_params()
  clipped = optax.chain(optax.clip_by_global_norm(0.1), tx)
  wanted, _, rows = run_ordinary(clipped, params)
  step = layers(tx, max_norm=0.1, clip='two_pass')
  got, _, metrics = run_layers(step, params)
  assert_close(got, wanted)
  np.testing.assert_allclose(metrics, rows, rtol=1e-5)
  assert (rows[:, 1] > 0.1).all()


@functools.cache
def clipping(clip):
  """Clips to a norm of 0.02; with a learning rate of one."""
  step = layers(optax.sgd(1.0), max_norm=0.02, clip=clip)
  return step, jax.jit(step.step)


@functools.cache
def first_gradient():
  return jax.jit(jax.grad(loss))(make_params(), BATCH)


def test_the_norm_of_the_step_before():
  params = make_params()
  step, run = clipping('previous')
  _, state, (_, norm) = run(params, step.init(params), BATCH)
  np.testing.assert_allclose(state.norm, norm)
  after, _, _ = run(params, state, BATCH)
  moved = jax.tree.map(jnp.subtract, params, after)
  wanted = jax.tree.map(lambda g: 0.02 / norm * g, first_gradient())
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
    moved,
    wanted,
  )


@pytest.mark.parametrize('clip', ['layer', 'previous'])
def test_the_norm_of_each_layer(clip):
  """In the first step, also for want of one before."""
  params = make_params()
  step, run = clipping(clip)
  after, _, _ = run(params, step.init(params), BATCH)
  moved = jax.tree.map(jnp.subtract, params, after)
  gradient = first_gradient()
  for i in range(LAYERS):
    of_layer = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
    a, b = (of_layer(tree['net']['blocks']) for tree in (moved, gradient))
    size = optax.tree.norm(b)
    assert size > 0.02
    jax.tree.map(
      lambda a, b, size=size: np.testing.assert_allclose(
        a, 0.02 / size * b, rtol=1e-3, atol=1e-7
      ),
      a,
      b,
    )


def test_a_gradient_that_is_nan_is_not_hidden():
  params = make_params()
  params['net']['blocks']['scale'] = (
    params['net']['blocks']['scale'].at[1, 3].set(jnp.nan)
  )
  for clip in (None, 1.0):
    step = layers(optax.sgd(0.1), max_norm=clip)
    after, _, metrics = jax.jit(step.step)(params, step.init(params), BATCH)
    assert np.isnan(metrics.loss) and np.isnan(metrics.norm)
    assert np.isnan(after['net']['blocks']['up']).all()


def test_a_norm_that_is_not_finite_is_forgotten():
  """Else no step would ever be finite again."""
  params = make_params()
  step, run = clipping('previous')
  state = step.init(params)
  wanted, _, _ = run(params, state, BATCH)
  for nothing in (jnp.nan, jnp.inf):
    norm = jnp.full_like(state.norm, nothing)
    got, _, _ = run(params, state._replace(norm=norm), BATCH)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


# Programs.


def program(step, *args):
  return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()


@pytest.fixture(scope='module')
def twelve():
  """A LLaMA of 12 layers: its parameters' shapes, batch, loss and parts."""
  config = llama.LlamaConfig(
    width=64, mlp_width=176, layers=12, heads=2, vocab=32, remat=True
  )
  model = nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  batch = jax.ShapeDtypeStruct((2, 17), jnp.int32)
  parts = train_step.by_layer(model)
  return nnx.to_pure_dict(params), batch, train_step.make_loss(graphdef), parts


@pytest.mark.parametrize(
  'name',
  ['adam', 'adam8bit'],
)
def test_temporaries_and_copies(twelve, name):
  params, batch, of_loss, parts = twelve
  tx = OPTIMIZERS[name]

  def ordinary(params, state, batch):
    value, gradient = jax.value_and_grad(of_loss)(params, batch)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  step = so.layerwise(tx, *parts)
  states = (jax.eval_shape(init, params) for init in (tx.init, step.init))
  old, new = (
    program(f, params, state, batch)
    for f, state in zip((ordinary, step.step), states, strict=True)
  )
  temporary = [x.memory_analysis().temp_size_in_bytes for x in (old, new)]
  assert temporary[1] < 0.5 * temporary[0], temporary
  copies = re.findall(r'= \w+\[12,\d[\d,]*\]\S* copy\(', new.as_text())
  assert not copies
  # What is donated is used.
  memory = new.memory_analysis()
  kept = memory.argument_size_in_bytes - memory.alias_size_in_bytes
  assert kept < 1000


def test_stacks_keep_their_order_of_axes(twelve):
  """On a TPU, where others come to XLA's mind. All stacks, at every turn."""
  params, batch, _, parts = twelve
  step = so.layerwise(OPTIMIZERS['adam'], *parts)
  state = jax.eval_shape(step.init, params)
  traced = jax.jit(step.step).trace(params, state, batch)
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  stacks = re.findall(r'@LayoutConstraint\(.*tensor<12x', text)
  of_layers = jax.tree.leaves(params['blocks'])
  assert len(stacks) >= 3 * len(of_layers)  # weights and Adam's two moments


ON_MESHES = {
  # Else rounding decides about signs where gradients vanish.
  'adam': optax.adam(0.01, eps=1e-4),
  'golore': so.golore(0.01, rank=4, update_proj_gap=3),
  'subspace_muon': so.subspace_muon(0.01, rank=4),
}


@functools.cache
def run_alone(name):
  """Returns the parameters and metrics that a mesh must give, too."""
  params, _, rows = run_layers(layers(ON_MESHES[name]), make_params(), 6)
  return params, rows


@pytest.mark.parametrize(
  'name, kind',
  [
    ('adam', AxisType.Auto),
    ('golore', AxisType.Explicit),
    pytest.param('adam', AxisType.Explicit, marks=pytest.mark.full),
    pytest.param('golore', AxisType.Auto, marks=pytest.mark.full),
  ],
)
def test_on_a_mesh(name, kind):
  tx, (wanted, _) = ON_MESHES[name], run_alone(name)
  params, step = make_params(), layers(tx)
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(kind,) * 2)
  specs = {'up': P(None, 'x', 'y')}
  place = lambda path, x: NamedSharding(mesh, specs.get(path[-1].key, P()))
  placed = jax.tree.map_with_path(place, params)
  with jax.set_mesh(mesh):
    sharded = jax.device_put(params, placed)
    batch = jax.device_put(BATCH, NamedSharding(mesh, P()))
    if kind == AxisType.Explicit:
      step = so.layerwise(
        tx, explicit_embed, explicit_block, head, stack='net/blocks'
      )
    whole = NamedSharding(mesh, P())
    out = (placed, so.state_sharding(step, sharded), whole)
    out = {} if kind == AxisType.Explicit else {'out_shardings': out}
    got, state, _ = run_layers(step, sharded, 6, batch, **out)
  assert_close(got, wanted)
  made = step.init(sharded)
  for x, y in zip(
    jax.tree.leaves((got, state)), jax.tree.leaves((sharded, made)), strict=True
  ):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def test_no_stack_is_gathered_on_a_mesh():
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
  specs = {'up': P(None, 'x', 'y')}
  place = lambda path, x: NamedSharding(mesh, specs.get(path[-1].key, P()))
  params = jax.device_put(
    make_params(), jax.tree.map_with_path(place, make_params())
  )
  step = layers(optax.adam(0.01))
  placed = jax.tree.map(lambda x: x.sharding, params)
  out = (placed, so.state_sharding(step, params), None)
  run = jax.jit(step.step, out_shardings=out)
  # As many callers have it: no mesh is set.
  program = run.lower(params, step.init(params), BATCH).compile()
  found = hlo.collectives(program.as_text(), 4).values()
  assert 0 < max(x.elements for x in found) <= WIDTH * HIDDEN


@functools.cache
def parallel_step(name):
  """Returns parameters, state and program of four devices with rows each."""
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  step = layers(ON_MESHES[name], mesh=mesh)
  same = NamedSharding(mesh, P())
  params = jax.device_put(make_params(), same)
  place = step.state_sharding(params)
  state = jax.jit(step.init, out_shardings=place)(params)
  run = cases.jit(step.step, out_shardings=(same, place, same))
  return params, state, run.lower(params, state, tuple(BATCH)).compile()


@pytest.mark.parametrize(
  'name',
  [
    # A leaf outside of the subspaces, which the others have, too.
    pytest.param('adam', marks=pytest.mark.full),
    'golore',
    # Beside a mesh axis that shards, too: tests/test_data_parallel.py.
    pytest.param('subspace_muon', marks=pytest.mark.full),
  ],
)
def test_data_parallel_equals_the_step_on_the_mean_gradient(name):
  wanted, rows = run_alone(name)
  params, state, run = parallel_step(name)
  update = lambda params, state: run(params, state, tuple(BATCH))
  got, _, found = repeat(update, params, state, 6)
  assert_close(got, wanted)
  np.testing.assert_allclose(found[:, 0], rows[:, 0], rtol=1e-5)
  # That of the mean is no greater than the mean of the devices' own.
  np.testing.assert_array_less(rows[:, 1], found[:, 1])


def test_data_parallel_averages_coordinates_alone():
  found = hlo.collectives(parallel_step('golore')[2].as_text(), 4).values()
  # Of a layer r x n numbers of each kernel, and the embedding as it is.
  assert max(x.elements for x in found) < WIDTH * HIDDEN / 2


def with_penalty(x, batch):
  """An input that carries a sum from layer to layer, from a constant on."""
  return embed(x, batch), jnp.zeros(())


def penalised(layer, x, batch):
  return block(layer, x[0], batch), x[1] + jnp.mean(x[0] ** 2)


def scanned(layer, x, batch):
  add = lambda y, _: (y + 0.5 * penalised(layer, x, batch)[0], None)
  y, _ = jax.lax.scan(add, jnp.zeros_like(x[0]), length=2)
  return y, penalised(layer, x, batch)[1]


@pytest.mark.parametrize(
  ('of_layer', 'check_vma'), [(penalised, True), (scanned, False)]
)
def test_data_parallel_inputs_and_loops_that_start_from_constants(
  of_layer, check_vma
):
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  top = lambda rest, x, batch: head(rest, x[0], batch) + 0.1 * x[1]
  make = lambda **options: so.layerwise(
    optax.sgd(0.1), with_penalty, of_layer, top, stack='net/blocks', **options
  )
  wanted, *_ = run_layers(make(), make_params(), 2)
  step = make(mesh=mesh, check_vma=check_vma)
  params = jax.device_put(make_params(), NamedSharding(mesh, P()))
  got, *_ = run_layers(step, params, 2, (BATCH[0], BATCH[1]))
  assert_close(got, wanted)


def test_an_axis_without_a_mesh():
  with pytest.raises(ValueError, match="axis_name='rows' without a mesh"):
    layers(optax.adam(0.01), axis_name='rows')


def test_data_parallel_refusals():
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  for options, message in (
    ({'max_norm': 1.0}, 'max_norm=1.0 with a mesh'),
    ({'has_aux': True}, 'has_aux=True with a mesh'),
    ({'axis_name': 'rows'}, "axis_name='rows' is none of the mesh axes"),
  ):
    with pytest.raises(ValueError, match=message):
      layers(optax.adam(0.01), mesh=mesh, **options)


def explicit_embed(rest, batch):
  return rest['embed'].at[batch[0]].get(out_sharding=P())


def explicit_block(layer, x, batch):
  del batch
  y = x * layer['scale'][None]
  h = jnp.tanh(
    jnp.einsum('bd,df->bf', y, layer['up'], out_sharding=P(None, 'y'))
  )
  return x + jnp.einsum('bf,fd->bd', h, second(layer), out_sharding=P())


# What is said of it.


def test_memory_report_and_description():
  params, tx = make_params(tied=False), so.golore(0.01, rank=4)
  step = layers(tx)
  report = so.memory_report(step, params)
  per_layer = 2 * WIDTH * HIDDEN + WIDTH
  assert report.gradients == 4 * (per_layer + WIDTH + CLASSES * WIDTH)
  shapes = jax.eval_shape(step.init, params)
  assert report.state == sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)
  )
  # Beyond the ordinary state: a counter for each layer, and the norm.
  ordinary = so.memory_report(tx, params).state
  assert 0 < report.state - ordinary < 4 * 8 * LAYERS
  text = so.describe(step, params)
  assert text.count('net/blocks/up ') == 1 and '3 x (64 x 96)' in text


def test_state_sharding_is_that_of_init():
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
  put = lambda x: jax.device_put(
    x, NamedSharding(mesh, P(None, 'x', 'y') if x.ndim == 3 else P())
  )
  params = jax.tree.map(put, make_params())
  step = layers(chain(so.scale_by_adam8bit()))
  wanted = so.state_sharding(step, params)
  jax.tree.map(
    lambda x, s: np.testing.assert_equal(x.sharding, s),
    step.init(params),
    wanted,
  )


ERRORS = {
  'clip': (dict(clip='global'), "clip must be one of .*got 'global'"),
  'max_norm': (dict(max_norm=0.0), 'max_norm must be positive, got 0.0'),
  'stack': (dict(stack='net/layers'), "no 'layers' among the parameters"),
}


@pytest.mark.parametrize('name', ERRORS)
def test_bad_arguments(name):
  options, message = ERRORS[name]
  options = {'stack': 'net/blocks'} | options
  with pytest.raises(ValueError, match=message):
    so.layerwise(optax.adam(1.0), embed, block, head, **options).init(
      make_params()
    )


def test_the_rest_needs_nothing_to_project():
  """As where Hugging Face's target modules are all in the stack."""
  params = make_params()
  spec = so.SubspaceSpec(2, include='blocks/', only_if_smaller=False)
  make = lambda spec: chain(
    so.subspace(spec, so.projectors.stiefel(3), optax.scale_by_adam())
  )
  found, wanted = (
    str(jax.make_jaxpr(step.step)(params, step.init(params), BATCH))
    for step in (
      layers(make(dataclasses.replace(spec, allow_empty=empty)))
      for empty in (False, True)
    )
  )
  assert found == wanted
  with pytest.raises(ValueError, match='matches no leaf'):
    layers(optax.adam(1.0), rest=make(spec)).init(params)
  nowhere = make(dataclasses.replace(spec, include='nowhere'))
  with pytest.raises(ValueError, match='matches no leaf'):
    layers(nowhere).init(params)
  with pytest.raises(ValueError, match='matches no leaf'):
    make(spec).init({'embed': params['embed']})


def test_stacks_that_are_none():
  params = make_params()
  params['net']['blocks']['scale'] = jnp.ones((LAYERS + 1, WIDTH))
  with pytest.raises(ValueError, match=r'one number of layers.*\(4, 64\)'):
    layers(optax.adam(1.0)).init(params)
  spec = so.SubspaceSpec(
    2,
    include='up|down',
    only_if_smaller=False,
    weight_dimension_numbers=so.DimensionNumbers(0, -1),
  )
  tx = so.subspace(spec, so.projectors.stiefel(3), optax.scale_by_adam())
  with pytest.raises(ValueError, match='not a stack of states'):
    layers(tx, rest=optax.adam(1.0)).init(make_params())


def test_blocks_must_keep_shapes():
  step = so.layerwise(
    optax.adam(1.0), embed, lambda layer, x, batch: x[:, :1], head,
    stack='net/blocks',
  )  # fmt: skip
  with pytest.raises(ValueError, match='block must return what it is given'):
    step.step(make_params(), step.init(make_params()), BATCH)


# The trainer.


def test_parts_of_a_llama_make_its_loss(twelve):
  shapes, batch, of_loss, (first, layer_of, last) = twelve
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
  params = jax.tree.map(draw, shapes)
  batch = jnp.asarray(rng.integers(32, size=batch.shape), jnp.int32)

  def composed(params, batch):
    rest = {k: x for k, x in params.items() if k != 'blocks'}
    step = lambda x, layer: (layer_of(layer, x, batch), None)
    x, _ = jax.lax.scan(step, first(rest, batch), params['blocks'])
    return last(rest, x, batch)

  wanted = cases.jit(of_loss)(params, batch)
  np.testing.assert_allclose(cases.jit(composed)(params, batch), wanted, 1e-5)


MICRO = {'accumulation': 2, 'accumulate_in_subspace': True, 'clip': 0.0}


@pytest.fixture
def losses(tmp_path, monkeypatch):
  """Trains under some name; returns the validation loss and the memory."""
  small_llama.install_in(monkeypatch, layers=12)
  words = np.random.default_rng(0).choice(test_pretrain.WORDS, 2400)
  (tmp_path / 'a.txt').write_text(' '.join(words))
  config = pretrain.Config(
    model='llama_test', data=(str(tmp_path / 'a.txt'),), rank=small_llama.RANK,
    batch=4, seq=16, steps=4, optimizer='online_subspace_descent',
    update_proj_gap=2, log_every=4, eval_every=4, save_every=4, clip=0.5,
    eval_batches=2, final_eval_batches=2,
  )  # fmt: skip

  def train(name, **changes):
    out = str(tmp_path / name)
    run = dataclasses.replace(config, out=out, **changes)
    (summary,) = pretrain.main(run)
    return summary['validation_loss'], summary['memory']

  return train


@pytest.mark.slow
@pytest.mark.full  # two trainers
def test_trainers_have_the_same_losses(losses):
  whole, memory = losses('whole', **MICRO)
  loss_by_layer, layered = losses(
    'layers', **MICRO, layerwise=True, attention_chunk=4
  )
  np.testing.assert_allclose(loss_by_layer, whole, rtol=1e-5)
  assert layered['gradients'] < 0.8 * memory['gradients']


@pytest.mark.slow
def test_trainer(losses):
  found, memory = losses('layers', **MICRO, layerwise=True)
  assert found < np.log(256)  # before the first step
  # A layer's are coordinates, and the rest is the embedding and the head.
  assert memory['gradients'] < 0.5 * memory['params']
  with pytest.raises(ValueError, match='add --accumulate-in-subspace'):
    losses('bad', accumulation=2, layerwise=True)
  with pytest.raises(ValueError, match='accumulate_in_subspace=True with'):
    losses('bad', **MICRO | {'optimizer': 'subspace_adamw'})
