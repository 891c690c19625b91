"""Steps whose gradients are born projected, beside those of whole gradients."""

import functools
import math
import re
from typing import Any

from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import errors
import measure
import rso_models as models
import subspace_optax as so
from subspace_optax import rso
from subspace_optax._chain import _projection

STEPS = 9


@pytest.fixture(scope='module', autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def _spec(rank=3, **options):
  return so.SubspaceSpec(
    rank, only_if_smaller=False, basis_dtype=jnp.float64, **options
  )


def _subspace(projector, **options):
  return optax.chain(
    so.subspace(_spec(), projector, optax.scale_by_adam(), **options),
    optax.scale_by_learning_rate(0.01),
  )


def _whole_step(loss, tx):
  def step(params, state, x):
    value, gradients = jax.value_and_grad(loss)(params, x)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  return step


def _inputs(t):
  shape = (models.BATCH, models.TIME, models.WIDTH)
  return jnp.asarray(np.random.default_rng(t).standard_normal(shape))


def _start(tx, params):
  """Returns the first state, from one program."""
  on_mesh = len(jax.tree.leaves(params)[0].devices()) > 1
  placed = so.state_sharding(tx, params) if on_mesh else None
  return cases.jit(tx.init, out_shardings=placed)(params)


def _run(step, params, state, steps, inputs=_inputs):
  """Takes steps of a jitted function; returns params, state and losses."""
  values = []
  first = measure.types((params, state))
  for t in range(steps):
    params, state, value = step(params, state, inputs(t))
    values.append(value)
  assert measure.types((params, state)) == first
  # On a mesh the second step's arrays may be spelled as jit spells them.
  assert step._cache_size() == 1 or len(value.devices()) > 1
  return params, state, np.array(values)


def _steps(problem, tx):
  """Returns the jitted steps, whole and compressed."""
  return (
    cases.jit(_whole_step(problem.plain, tx)),
    cases.jit(rso.compressed_step(problem.lifted, tx)),
  )


def _assert_same(steps, tx, params, number=STEPS, rtol=1e-6, inputs=_inputs):
  """Runs whole and compressed steps; returns the last parameters and losses.

  Bases are made in float32, whose rounding may differ from one program to
  another, whatever the dtype of the rest.
  """
  state = _start(tx, params)
  whole, compressed = (
    _run(step, params, state, number, inputs) for step in steps
  )
  np.testing.assert_allclose(compressed[2], whole[2], rtol=rtol)
  found, want = models.flat(compressed[0]), models.flat(whole[0])
  assert found.keys() == want.keys()
  for path, x in want.items():
    np.testing.assert_allclose(
      found[path], x, rtol=rtol, atol=rtol, err_msg=path
    )
  # The state, too: bases, moments, counters; all but what only gradients tell.
  for (path, found), want in zip(
    jax.tree.leaves_with_path(compressed[1]),
    jax.tree.leaves(whole[1]),
    strict=True,
  ):
    if 'captured_energy' not in (name := jax.tree_util.keystr(path)):
      np.testing.assert_allclose(
        found, want, rtol=rtol, atol=rtol, err_msg=name
      )
  return whole[0], compressed[2]


def _drawn(shapes):
  """Returns random arrays, which take no program."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes
  )


class _Query(nnx.Module):
  """A layer with a kernel of three axes."""

  def __init__(self, rngs):
    width = (models.HEADS, models.WIDTH // models.HEADS)
    self.query = nnx.LinearGeneral(
      models.WIDTH, width, param_dtype=jnp.float64, rngs=rngs
    )

  def __call__(self, x):
    return self.query(jnp.sin(x)).reshape(x.shape)


def _nnx_problem():
  """A stack of layers, made again in the backward pass."""
  make = lambda: nnx.vmap(_Query)(nnx.Rngs(0).split(models.LAYERS))
  graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)

  def loss(merge, params, x):
    layer = jax.checkpoint(lambda x, layer: (layer(x), None))
    return jnp.mean(lax.scan(layer, x, merge(graphdef, params))[0] ** 2)

  return models.Problem(
    _drawn(nnx.to_pure_dict(params)),
    functools.partial(loss, nnx.merge),
    functools.partial(loss, rso.nnx_merge),
  )


def _linen_problem():
  """A layer with more inputs than outputs, which are projected."""
  model = nn.Dense(models.WIDTH, param_dtype=jnp.float64)
  of = lambda x: jnp.concatenate([jnp.sin(x), jnp.cos(x)], -1)
  shapes = jax.eval_shape(model.init, jax.random.key(0), of(_inputs(0)))
  params = _drawn(shapes['params'])
  plain = lambda p, x: jnp.mean(model.apply({'params': p}, of(x)) ** 2)
  lifted = lambda p, x: jnp.mean(
    rso.linen_apply(model, {'params': p}, of(x)) ** 2
  )
  return models.Problem(params, plain, lifted)


def test_golore_over_three_refreshes():
  """Of layers of nnx and of linen, in one model."""
  # Of 100 steps each: bases are drawn at steps 0, 100 and 200.
  tx = so.golore(
    3e-3, update_proj_gap=100, weight_decay=0.1, spec=_spec(seed=3)
  )
  parts = {'nnx': _nnx_problem(), 'linen': _linen_problem()}
  total = lambda kind: (
    lambda params, x: sum(
      getattr(part, kind)(params[k], x) for k, part in parts.items()
    )
  )
  problem = models.Problem(
    {k: part.params for k, part in parts.items()},
    total('plain'),
    total('lifted'),
  )
  _, losses = _assert_same(
    _steps(problem, tx), tx, problem.params, 300, rtol=1e-9
  )
  assert losses[-1] < 0.5 * losses[0]


@functools.cache
def _problem(*names):
  """A stack of two layers, some of whose kernels are parameters."""
  rng = np.random.default_rng(0)
  width, hidden, layers = models.WIDTH, models.HIDDEN, models.LAYERS
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 4)
  kernels = {
    'up': normal(layers, width, hidden),
    'down': normal(layers, hidden, width),
  }
  params = {'bias': normal(hidden)} | {name: kernels[name] for name in names}

  def loss(params, x):
    def layer(x, at):
      h = jnp.tanh(rso.dot(x, at['up']) + params['bias'][None, None])
      return x + rso.dot(h, at['down']), None

    stacks = kernels | {name: params[name] for name in names}
    return jnp.mean(lax.scan(layer, x, stacks)[0] ** 2)

  return models.Problem(params, loss, loss)


_CHAINS = {
  # Their bases need no gradient.
  'partition': (
    ('up', 'down'),
    optax.partition(
      {
        'some': _subspace(so.projectors.gaussian(2, stagger=True), every_k=2),
        'others': _subspace(
          so.projectors.stiefel(2, regenerate=True), transport='reset'
        ),
      },
      {'up': 'some', 'down': 'others', 'bias': 'some'},
    ),
  ),
  'masked': (
    ('up', 'down'),
    optax.masked(
      so.subspace(
        _spec(),
        so.projectors.gaussian(4, stagger=True),
        optax.trace(0.9),
        transport='first',
        after=optax.scale(-0.01),
      ),
      {'up': False, 'down': True, 'bias': True},
    ),
  ),
}


@functools.cache
def _steps_of(name):
  names, tx = _CHAINS[name]
  return _steps(_problem(*names), tx)


@pytest.mark.parametrize('name', _CHAINS)
def test_any_chain_around_project(name):
  names, tx = _CHAINS[name]
  _assert_same(_steps_of(name), tx, _problem(*names).params)


@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_boxes_and_a_false_for_a_whole_subtree(dtype):
  bare = {
    'a': {'w': jnp.ones((4, 6))},
    'b': {'w': jnp.ones((4, 6)), 'bias': jnp.zeros(6)},
  }
  box = lambda x: nn.Partitioned(x, names=(None,) * x.ndim)
  each = {'a': {'w': True}, 'b': {'w': False, 'bias': False}}

  def loss(params, x):
    p = nn.meta.unbox(params)
    return jnp.mean(rso.dot(x, p['a']['w']) * (x @ p['b']['w']))

  def trained(params, mask):
    spec = so.SubspaceSpec(2, basis_dtype=dtype, only_if_smaller=False)
    golore = so.golore(0.1, inner=optax.identity(), spec=spec)
    tx = optax.masked(golore, mask)
    step = jax.jit(rso.compressed_step(loss, tx))
    return step(params, tx.init(params), jnp.ones((3, 4)))[0]

  wanted = trained(bare, each)
  assert not np.array_equal(wanted['a']['w'], bare['a']['w'])
  for params in (bare, jax.tree.map(box, bare)):
    found = nn.meta.unbox(trained(params, {'a': True, 'b': False}))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_bad_batches_change_what_they_always_change():
  """At the second refresh of bases of SVDs, and at that of random ones."""
  # The refresh that is owed after step 2 comes before the other rule does.
  rules = {0: so.projectors.svd(2), 4: so.projectors.grassmann_walk(2)}
  inner = optax.apply_if_finite(optax.scale_by_adam(), 2)
  tx = optax.chain(
    so.subspace(
      _spec(side='in'),
      so.projectors.switch(rules),
      inner,
      transport=so.transports.both(0.9, 0.999),
    ),
    optax.scale_by_learning_rate(0.01),
  )
  bad = lambda t: _inputs(t) * (np.inf if t in (2, 6) else 1.0)
  problem = _problem('up')
  params, _ = _assert_same(_steps(problem, tx), tx, problem.params, inputs=bad)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def _matrix_loss(params, x):
  return jnp.mean(jnp.sin(rso.dot(x, params['w'])))


def _matrix_program(m, n, r, b, compress, side='in'):
  """Returns the compiled step of one layer."""
  spec = so.SubspaceSpec(r, side=side)
  tx = so.golore(1e-3, inner=optax.identity(), spec=spec)
  make = rso.compressed_step if compress else _whole_step
  params = {'w': jnp.zeros((m, n), jnp.float32)}
  x = jnp.zeros((b, m), jnp.float32)
  step = jax.jit(make(_matrix_loss, tx))
  return step.lower(params, jax.eval_shape(tx.init, params), x).compile()


@pytest.mark.parametrize('side', ['in', 'out'])
def test_flops_of_a_layer(side):
  m, n, r, b = 96, 160, 8, 512
  counts: list = [
    _matrix_program(m, n, r, b, compress, side).cost_analysis()
    for compress in (False, True)
  ]
  whole, compressed = (c['flops'] for c in counts)
  # The input of this layer has no gradient: 2bmn less than in a deep model.
  # What moves first moments at a refresh is the same in both.
  project = 2 * m * n * (b + r)
  saved = project - 2 * b * r * (m + n)
  np.testing.assert_allclose(whole - compressed, saved, rtol=0.02)


def _sizes(text, operation):
  """Returns the numbers of elements that a kind of operation results in."""
  found = re.findall(rf'= (.*?) {operation}(?:-start)?\(', text)
  shapes = [
    s for types in found for s in re.findall(r'\w\d+\[([\d,]*)\]', types)
  ]
  return [math.prod(map(int, s.split(','))) if s else 1 for s in shapes]


def _text(step, params, state, x):
  return step.lower(params, state, x).compile().as_text()


def _work(text):
  """Returns the branches and the Cholesky factorisations of a program."""
  return len(re.findall(r' conditional\(', text)), text.count('potrf')


def test_random_bases_are_refreshed_once_and_need_no_gradient():
  names, tx = _CHAINS['partition']
  params = _problem(*names).params
  state = jax.eval_shape(tx.init, params)
  whole, compressed = (
    _text(step, params, state, _inputs(0)) for step in _steps_of('partition')
  )
  branches, factorisations = _work(whole)
  assert branches and factorisations
  assert _work(compressed) == _work(whole)
  of_kernels = lambda text: [
    size for size in _sizes(text, 'dot') if size in models.KERNELS
  ]
  # Updates are as large as kernels; they are made of stacks of two.
  assert len(of_kernels(whole)) == len(names)
  assert not of_kernels(compressed)


def test_data_parallelism_moves_coordinates_only():
  problem = _problem('up')
  # Cosines are the same to the bit in any program; Haar samples, which take a
  # float32 factorisation, are not.
  tx = so.golore(1e-3, regenerate=True, inner=optax.identity(), spec=_spec())
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((4, models.TIME, models.WIDTH)))
  params = jax.device_put(problem.params, NamedSharding(mesh, P()))
  parts = jax.device_put(x, NamedSharding(mesh, P('data')))

  whole, step = _steps(problem, tx)
  state = _start(tx, params)
  largest = lambda step: max(
    _sizes(_text(step, params, state, parts), 'all-reduce')
  )
  stack = models.LAYERS * max(models.KERNELS)
  assert largest(whole) >= max(models.KERNELS)
  # 3 / 8 of the stack of kernels, at rank 3 of 8.
  assert largest(step) <= stack * 3 / 8

  alone = _run(
    step, problem.params, _start(tx, problem.params), 3, lambda _: x
  )[0]
  many = _run(step, params, state, 3, lambda _: parts)[0]
  for a, b in zip(*map(jax.tree.leaves, (alone, many)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def _two_matrices_loss(params, x):
  up, down = rso.dot(x[:, :16], params['up']), rso.dot(x, params['down'])
  return jnp.mean(jnp.sin(up)) + jnp.mean(jnp.sin(down))


@functools.cache
def _of_two_matrices():
  """Returns start, batch, optimizer, step, and the end on one device.

  The bases are of the inputs of one matrix, of the outputs of the other.
  """
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  start = {'up': normal(16, 24), 'down': normal(24, 16)}
  x = normal(4, 24)
  tx = optax.chain(
    so.subspace(
      so.SubspaceSpec(4),
      so.projectors.gaussian(2, regenerate=False),
      optax.trace(0.9),
    ),
    optax.scale_by_learning_rate(0.01),
  )
  step = cases.jit(rso.compressed_step(_two_matrices_loss, tx))
  alone = _run(step, start, _start(tx, start), 5, lambda _: x)[0]
  return start, x, tx, step, alone


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_it_is_the_same(kind):
  start, x, tx, step, alone = _of_two_matrices()
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    params = jax.device_put(start, NamedSharding(mesh, P('fsdp', 'tensor')))
    parts = jax.device_put(x, NamedSharding(mesh, P()))
    many = _run(step, params, _start(tx, params), 5, lambda _: parts)[0]
  for name, wanted in alone.items():
    np.testing.assert_allclose(many[name], wanted, rtol=1e-5, atol=1e-5)
    assert many[name].sharding.spec == P('fsdp', 'tensor')


@pytest.mark.parametrize('side', ['in', 'out'])
def test_backward_keeps_no_more_than_it_must(side):
  rng = np.random.default_rng(0)
  params = {'w': jnp.asarray(rng.standard_normal((6, 9)))}
  spec = so.SubspaceSpec(2, side=side, only_if_smaller=False)
  tx = so.subspace(spec, so.projectors.stiefel(5), optax.identity())
  x, kept = jnp.asarray(rng.standard_normal((5, 6))), []

  def value_and_grad(f):
    def run(at, *args):
      y, pull = jax.vjp(lambda at: f(at, *args), at)
      kept.extend(leaf.shape for leaf in jax.tree.leaves(pull))
      return y, pull(jnp.ones_like(y))[0]

    return run

  loss = lambda params, x: jnp.sum(rso.dot(x, params['w']))
  step = rso.compressed_step(loss, tx, value_and_grad=value_and_grad)
  state = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, params)
  )
  after, _, _ = cases.jit(step)(params, state, x)
  # x P in the place of x, if P is of the inputs.
  assert ((5, 2) in kept, (5, 6) in kept) == (side == 'in', side == 'out')
  g = np.asarray(x).T @ np.ones((5, 9))
  change = np.asarray(after['w'] - params['w'])
  [p] = measure.bases(state).values()
  # Of its own first draw, not of the bases given; projected once.
  u, s, vt = np.linalg.svd(change)
  assert (s > 1e-9).sum() == 1 and p.shape == (
    (6, 2) if side == 'in' else (9, 2)
  )
  along = u[:, :1].T @ g if side == 'in' else g @ vt[:1].T
  np.testing.assert_allclose(
    np.linalg.norm(along) ** 2, np.sum(change * g), rtol=1e-6
  )


_GOLORE = so.golore(0.01, spec=_spec())


@functools.cache
def _golore_of_a_matrix():
  """Returns params, state, a batch, and the end of two compressed steps."""
  params = {'w': jnp.ones((8, 16))}
  x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)))
  step = cases.jit(rso.compressed_step(_matrix_loss, _GOLORE))
  state = _start(_GOLORE, params)
  return params, state, x, _run(step, params, state, 2, lambda _: x)


def test_microbatches():
  params, state, x, want = _golore_of_a_matrix()

  def in_two(f):
    def run(at, x):
      halves = [jax.value_and_grad(f)(at, half) for half in jnp.split(x, 2)]
      return jax.tree.map(lambda a, b: (a + b) / 2, *halves)

    return run

  step = rso.compressed_step(_matrix_loss, _GOLORE, value_and_grad=in_two)
  found = _run(cases.jit(step), params, state, 2, lambda _: x)
  measure.assert_trees_close(found, want, rtol=1e-9, atol=1e-12)


def test_bfloat16_parameters_learn_and_keep_their_types():
  rng = np.random.default_rng(0)
  target = jnp.asarray(rng.standard_normal((16, 24)), jnp.float32)
  x = jnp.asarray(rng.standard_normal((64, 16)), jnp.bfloat16)

  def loss(params, x):
    y = rso.dot(x, params['w']).astype(jnp.float32)
    return jnp.mean((y - x.astype(jnp.float32) @ target) ** 2)

  tx = so.golore(0.1, 8, update_proj_gap=5)
  params = {'w': jnp.zeros((16, 24), jnp.bfloat16)}
  step = cases.jit(rso.compressed_step(loss, tx))
  _, _, losses = _run(step, params, _start(tx, params), 100, lambda _: x)
  assert losses[-1] < 0.2 * losses[0]


def _gradient_penalty(params, x):
  y = lambda x: jnp.sum(jnp.tanh(rso.dot(x, params['w'])))
  return jnp.sum(jax.grad(y)(x) ** 2)


def test_second_derivatives_are_refused_and_constants_are_not():
  params = {'w': models.inputs()[0] @ jnp.ones((models.WIDTH, 12))}
  x = jnp.ones((3, models.TIME))
  tx = so.subspace(
    _spec(2), so.projectors.gaussian(5), optax.identity(), scale=-0.1
  )
  step = rso.compressed_step(_gradient_penalty, tx)
  with errors.raises(ValueError, "'w'", 'stop_gradient', 'exclude'):
    jax.eval_shape(step, params, jax.eval_shape(tx.init, params), x)

  def at_an_attacked_input(params, x):
    change = jax.grad(_matrix_loss, argnums=1)(lax.stop_gradient(params), x)
    return _matrix_loss(params, x + jnp.sign(change))

  state = _start(tx, params)
  whole, compressed = (
    _run(step, params, state, 3, lambda _: x)[0]
    for step in _steps(
      models.Problem(params, at_an_attacked_input, at_an_attacked_input), tx
    )
  )
  np.testing.assert_allclose(compressed['w'], whole['w'], rtol=1e-6)


@pytest.mark.parametrize(
  ('tx', 'words'),
  [
    (so.online_subspace_descent(1e-3, 3), ['online_pca', 'tx.update']),
    (so.fira_adamw(1e-3, 3), ['residual', 'tx.update']),
    (optax.sgd(1e-3), ['holds no', 'project']),
  ],
  ids=['online_pca', 'residual', 'plain'],
)
def test_what_cannot_be_compressed_is_named(tx, words):
  problem = _problem('up')
  step = rso.compressed_step(problem.lifted, tx)
  state = jax.eval_shape(tx.init, problem.params)
  with errors.raises(ValueError, *words):
    jax.eval_shape(step, problem.params, state, _inputs(0))


def test_a_gap_that_is_injected_is_named():
  params, x = {'w': jnp.ones((8, 16))}, jnp.ones((4, 8))
  static = ('rank', 'random_from', 'seed')
  make = lambda names: optax.inject_hyperparams(so.golore, static_args=names)(
    1e-3, rank=2, update_proj_gap=3
  )
  tx = make(static)
  with errors.raises(ValueError, 'update_proj_gap', 'static_args'):
    step = rso.compressed_step(_matrix_loss, tx)
    jax.eval_shape(step, params, jax.eval_shape(tx.init, params), x)
  tx = make((*static, 'update_proj_gap'))
  step = cases.jit(rso.compressed_step(_matrix_loss, tx))
  after, _, _ = _run(step, params, _start(tx, params), 4, lambda _: x)
  assert (after['w'] != params['w']).all()


def test_wrappers_that_hide_what_they_wrap_are_named():
  # Of rank 1, whose coordinates broadcast to the size of a gradient.
  params, x = {'w': jnp.ones((8, 16))}, jnp.ones((4, 8))
  tx: Any = optax.MultiSteps(so.golore(1e-3, spec=_spec(1)), 2)
  step = rso.compressed_step(_matrix_loss, tx)
  state = jax.eval_shape(tx.init, params)
  with errors.raises(ValueError, 'extra arguments', 'every_k'):
    jax.eval_shape(step, params, state, x)
  tx = tx.gradient_transformation()
  step = rso.compressed_step(_matrix_loss, tx)
  with errors.raises(ValueError, 'extra arguments', 'every_k') as error:
    jax.eval_shape(step, params, state, x)
  assert 'gradient_transformation' not in str(error.value)


def test_a_part_without_parameters():
  parts: dict = {'some': _GOLORE, 'none': so.galore(0.01)}
  tx = optax.partition(parts, lambda p: jax.tree.map(lambda _: 'some', p))
  params, _, x, want = _golore_of_a_matrix()
  step = cases.jit(rso.compressed_step(_matrix_loss, tx))
  found, _, values = _run(step, params, _start(tx, params), 2, lambda _: x)
  np.testing.assert_allclose(found['w'], want[0]['w'])
  np.testing.assert_allclose(values, want[2])


def test_a_switch_of_random_bases_has_no_step_of_whole_gradients():
  rules = {0: so.projectors.stiefel(2), 4: so.projectors.gaussian(2)}
  tx = _subspace(so.projectors.switch(rules))
  seen = []

  def loss(params, x):
    seen.append(type(params['w']))
    return _matrix_loss(params, x)

  params, x = {'w': jnp.ones((8, 16))}, jnp.ones((4, 8))
  step = rso.compressed_step(loss, tx)
  jax.eval_shape(step, params, tx.init(params), x)
  assert seen == [rso.Lifted]


def test_one_rule_that_looks_at_gradients_makes_steps_of_whole_ones():
  parts = {
    'svd': _subspace(so.projectors.svd(2)),
    'random': _subspace(so.projectors.stiefel(2)),
  }
  tx = optax.partition(parts, {'up': 'svd', 'down': 'random'})
  seen = set()

  def loss(params, x):
    seen.add(tuple(isinstance(p, rso.Lifted) for p in params.values()))
    return _two_matrices_loss(params, x)

  params = {'up': jnp.ones((16, 24)), 'down': jnp.ones((24, 16))}
  state = jax.eval_shape(tx.init, params)
  jax.eval_shape(
    rso.compressed_step(loss, tx), params, state, jnp.ones((4, 24))
  )
  assert seen == {(True, True), (False, False)}


def test_no_tracer_leaks():
  params, x = {'w': jnp.ones((8, 16))}, jnp.ones((4, 8))
  tx = so.galore(1e-3, spec=_spec())
  step = rso.compressed_step(_matrix_loss, tx)
  state = jax.eval_shape(tx.init, params)
  with jax.checking_leaks():
    jax.eval_shape(step, params, state, x)


def test_a_state_of_other_parameters_is_named():
  problem, tx = _nnx_problem(), so.golore(1e-3, spec=_spec())
  step = rso.compressed_step(problem.lifted, tx)
  other = tx.init({'w': jnp.zeros((8, 16))})
  with errors.raises(ValueError, 'state', 'query/kernel', 'init'):
    step(problem.params, other, models.inputs())


def test_project_refuses_other_coordinates():
  spec, params = so.SubspaceSpec(2), {'w': jnp.ones((8, 16))}
  tx = so.project(spec, so.projectors.stiefel(5))
  state, coords = tx.init(params), {'w': jnp.ones((2, 16))}
  given = _projection.Given(refreshed={})
  with errors.raises(ValueError, 'compressed step', 'params'):
    tx.update(coords, state, given=given)
  with errors.raises(ValueError, "'w'", '(8, 16)', '(2, 16)'):
    tx.update(params, state, params, given=given)
  with errors.raises(ValueError, 'refresh_gradients'):
    tx.update(coords, state, params, given=given, refresh_gradients=params)
  keeping = so.project(spec, so.projectors.stiefel(5), keep_gradient=True)
  with errors.raises(ValueError, 'residual'):
    keeping.update(coords, state, params, given=given)
