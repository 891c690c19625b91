"""Auto and Explicit meshes: same steps, sharded state, small collectives.

Twelve steps of every kind of projector and ready-made optimizer on 2 x 2
devices equal those on one. Of the compiled steps, refreshes included, no
collective may carry more than r (m + n) numbers of a matrix.

Each optimizer has one of the four layouts here and one kind of mesh; `--full`
takes all of them, and those that are like others.
"""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import measure
import subspace_optax as so
from subspace_optax import projectors
from subspace_optax import residuals

AXES = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}

# Every matrix is 32 x 64, and there are two in a stack.
RANK, GAP, STEPS = 2, 5, 12
LEARNING_RATE = 0.002
MOST = 2 * RANK * (32 + 64)
GRAM = 2 * 32 * 32
# What devices may hold that orthogonalise matrices of their own: a share of
# three, and one more.
HELD = 32 * 64 * 7 // 4
LEAVES = {
  'w': (cases.Leaf((32, 64), jnp.float32, (0,), (1,)), P('fsdp', 'tensor')),
  'layers': (
    cases.Leaf((2, 32, 64), jnp.float32, (1,), (2,)),
    P(None, 'tensor', 'fsdp'),
  ),
  # Layers along axis 1, and both mesh axes on one side.
  'middle': (
    cases.Leaf((64, 2, 32), jnp.float32, (0,), (2,)),
    P(('fsdp', 'tensor')),  # jit drops trailing Nones
  ),
  # A batch axis is sharded, and heads are a part of the rows.
  'experts_out': (
    cases.Leaf((2, 4, 8, 64), jnp.float32, (1, 2), (3,)),
    P('fsdp', 'tensor'),
  ),
  'bias': (cases.Leaf((64,), jnp.float32), P('tensor')),
}
PLAIN = {path: leaf for path, (leaf, _) in LEAVES.items()}
SPECS = {path: spec for path, (_, spec) in LEAVES.items()}


def _spec(side='short', basis_dtype=jnp.float32):
  return so.SubspaceSpec(
    RANK,
    side=side,
    basis_dtype=basis_dtype,
    weight_dimension_numbers=cases.dimension_numbers(PLAIN),
  )


class Case(NamedTuple):
  """An optimizer, and what its collectives may carry.

  Attributes:
    make: the optimizer.
    alone: what it is on one device, where it differs.
    most: elements of a collective; None where a gradient is gathered.
  """

  make: Any
  alone: Any = None
  most: int | None = MOST


def _of(rule, inner=None, basis_dtype=jnp.float32, **options):
  """Returns a case of a projector, with Adam."""

  def make():
    return so.subspace(
      _spec(basis_dtype=basis_dtype),
      rule(),
      inner or optax.scale_by_adam(),
      transport='first',
      after=optax.scale(-LEARNING_RATE),
      **options,
    )

  return make


def _ready_made(name, side='short', **options):
  options = {'update_proj_gap': GAP} | options
  return lambda: getattr(so, name)(LEARNING_RATE, spec=_spec(side), **options)


def _randomized(side, **options):
  """Returns what SVD's `auto` does where gradients are sharded."""
  return lambda: so.subspace(
    _spec(side),
    projectors.svd(GAP, 'randomized'),
    optax.scale_by_adam(),
    after=optax.scale_by_learning_rate(LEARNING_RATE),
    **options,
  )


# Adam would blow the noise up that tells one set of singular vectors from
# another; momentum turns with them.
_MOMENTUM = optax.trace(0.9)

OPTIMIZERS = {
  'exact': Case(_of(lambda: projectors.svd(GAP, 'exact')), most=None),
  'gram': Case(_of(lambda: projectors.svd(GAP, 'gram')), most=None),
  'importance': Case(_of(lambda: projectors.importance_svd(GAP)), most=None),
  'randomized': Case(_of(lambda: projectors.svd(GAP, 'randomized'))),
  'warm': Case(_of(lambda: projectors.svd(GAP, 'warm'))),
  'lazy': Case(
    _of(lambda: projectors.svd(projectors.LazyGap(GAP, 0.01), 'randomized'))
  ),
  'power': Case(_of(lambda: projectors.power_iteration(1, 0.9))),
  'tracking': Case(_of(lambda: projectors.grassmann_tracking(GAP))),
  'walk': Case(_of(lambda: projectors.grassmann_walk(GAP, stagger=True))),
  'stiefel': Case(_of(lambda: projectors.stiefel(GAP, stagger=True))),
  'regenerated': Case(_of(lambda: projectors.stiefel(GAP, regenerate=True))),
  'gaussian': Case(_of(lambda: projectors.gaussian(GAP))),
  'online_svd': Case(
    _of(
      lambda: projectors.online_pca(
        optax.sgd(0.1), init='svd', update_every=2, orthonormalize_every=4
      ),
      _MOMENTUM,
    )
  ),
  'switch': Case(
    _of(
      lambda: projectors.switch(
        {
          0: projectors.svd(GAP, 'randomized'),
          6: projectors.online_pca(optax.sgd(0.1)),
        }
      )
    )
  ),
  'every_k': Case(_of(lambda: projectors.stiefel(1), every_k=2)),
  'coordinates': Case(
    _of(
      lambda: projectors.stiefel(GAP),
      optax.chain(optax.adamw(1.0, weight_decay=0.1), optax.scale(-1.0)),
      params='coordinates',
      per_matrix=True,
      plain=optax.scale_by_lion(),
    )
  ),
  'sign': Case(
    _of(lambda: projectors.stiefel(GAP), residual=residuals.sign(0.3))
  ),
  'apollo_mini': Case(_ready_made('apollo_adamw', granularity='tensor')),
  'galore': Case(_ready_made('galore', 'long'), _randomized('long')),
  'golore': Case(_ready_made('golore')),
  'online_subspace_descent': Case(
    lambda: so.online_subspace_descent(LEARNING_RATE, spec=_spec()),
  ),
  'fira_adamw': Case(
    _ready_made('fira_adamw'),
    _randomized('short', residual=residuals.fira(), scale=0.25),
  ),
  'apollo_adamw': Case(_ready_made('apollo_adamw')),
  'ldadamw': Case(lambda: so.ldadamw(LEARNING_RATE, spec=_spec())),
  'subspace_adamw': Case(_ready_made('subspace_adamw')),
  # Orthogonalises whole matrices.
  'subspace_muon': Case(_ready_made('subspace_muon'), most=HELD),
  'dion': Case(lambda: so.dion(LEARNING_RATE, spec=_spec())),
  'trion': Case(lambda: so.trion(LEARNING_RATE, spec=_spec())),
  'lagged_power': Case(_of(lambda: projectors.lagged_power())),
  'int8': Case(
    _of(lambda: projectors.svd(GAP, 'randomized'), basis_dtype='int8')
  ),
  'dct': Case(_of(lambda: projectors.dct(GAP))),
  'dct_l2': Case(_of(lambda: projectors.dct(GAP, 'l2', stagger=True))),
  'subspace_normuon': Case(
    _ready_made('subspace_muon', b2=0.9, preconditioning='aol'), most=HELD
  ),
}


class Point(NamedTuple):
  """An optimizer on a mesh, and the leaves that it gets."""

  name: str
  kind: str
  paths: tuple[str, ...]

  def __str__(self) -> str:
    return f'{self.name}-{self.kind}'


# Others are like them, and have the same products on the mesh: `exact`;
# `galore` and `fira_adamw`; `walk`, `subspace_adamw` and `coordinates`;
# `online_subspace_descent`; `apollo_mini`; `dion`; `trion`; `subspace_muon` and
# tests/test_spread.py. Integers: tests/test_quantized_basis.py; the types of
# `switch` and `ldadamw`: tests/test_shard_map.py.
ALIKE = (
  'gram',
  'importance',
  'randomized',
  'warm',
  'lazy',
  'int8',
  'stiefel',
  'regenerated',
  'gaussian',
  'golore',
  'online_svd',
  'switch',
  'ldadamw',
  'sign',
  'apollo_adamw',
  'power',
  'lagged_power',
  'dct',
  'dct_l2',
  'subspace_normuon',
)


# More for the one whose collectives depend on the layout most.
MUON = ('w', 'middle', 'experts_out')


def _points(full):
  stacks = [path for path in LEAVES if path != 'bias']
  for i, name in enumerate(OPTIMIZERS):
    if name in ALIKE and not full:
      continue
    # Neighbours are relatives, and differ in kind and layout.
    some = MUON if name == 'subspace_muon' else (stacks[i // 2 % 4],)
    for kind in AXES if full else [list(AXES)[i % 2]]:
      yield Point(name, kind, tuple(LEAVES) if full else (*some, 'bias'))


def pytest_generate_tests(metafunc):
  if 'point' in metafunc.fixturenames:
    points = list(_points(metafunc.config.getoption('full')))
    metafunc.parametrize('point', points, ids=str)


def _mesh(kind, shape=(2, 2)):
  return jax.make_mesh(shape, ('fsdp', 'tensor'), axis_types=(AXES[kind],) * 2)


def _put(tree, mesh):
  # The form in which jit gives its results: short under automatic sharding, of
  # full length under explicit. Any other spelling compiles twice, Adam's too.
  explicit = mesh.axis_types[0] == AxisType.Explicit
  specs = {
    path: P(*SPECS[path], *[None] * (x.ndim - len(SPECS[path])))
    if explicit
    else SPECS[path]
    for path, x in tree.items()
  }
  shardings = {path: NamedSharding(mesh, specs[path]) for path in tree}
  return jax.tree.map(jax.device_put, tree, shardings)


def _params(paths):
  params = cases.tree(PLAIN)
  return {path: params[path] for path in paths}


def _gradients(t, paths):
  """Returns gradients with a few strong directions, as `galore` needs."""
  rng = np.random.default_rng(30 + t)
  found = {}
  for path, leaf in PLAIN.items():
    if not leaf.rows:
      found[path] = rng.standard_normal(leaf.shape)
      continue
    view = leaf.view(True)
    u = rng.standard_normal((view.count, view.m, 2)) * np.array([3.0, 1.0])
    g = u @ rng.standard_normal((view.count, 2, view.n))
    found[path] = view.leaf(g + 0.01 * rng.standard_normal(g.shape))
  return {path: jnp.asarray(found[path], jnp.float32) for path in paths}


class Run(NamedTuple):
  """Steps on a mesh, over refreshes; the program takes no other shardings."""

  first_state: Any
  params: Any
  state: Any
  text: str


def _step(tx):
  def step(params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  return step


@functools.cache
def _run(point):
  mesh, tx = _mesh(point.kind), OPTIMIZERS[point.name].make()
  with jax.set_mesh(mesh):
    params = _put(_params(point.paths), mesh)
    state = first_state = tx.init(params)
    step = cases.jit(_step(tx)).lower(params, state, params).compile()
    for t in range(STEPS):
      gradients = _put(_gradients(t, point.paths), mesh)
      params, state = step(params, state, gradients)
    jax.block_until_ready(params)
  return Run(first_state, params, state, step.as_text())


@functools.cache
def _alone(name, paths):
  """Returns the same steps on one device."""
  case = OPTIMIZERS[name]
  tx = (case.alone or case.make)()
  params = _params(paths)
  state = tx.init(params)
  step = cases.jit(_step(tx))
  for t in range(STEPS):
    params, state = step(params, state, _gradients(t, paths))
  return params


both_meshes = pytest.mark.parametrize('kind', AXES)


def test_sharded_steps_equal_those_on_one_device(point):
  params, start = _run(point).params, _params(point.paths)
  wanted = _alone(point.name, point.paths)
  norm = lambda x: np.linalg.norm(np.asarray(x, np.float64))
  for path, x in wanted.items():
    moved = norm(x - start[path])
    assert moved > 1e-4 * norm(x)
    error = norm(params[path] - x)
    np.testing.assert_allclose(error / norm(x), 0.0, atol=1e-5, err_msg=path)
    # Of what the steps changed, too.
    np.testing.assert_allclose(error / moved, 0.0, atol=1e-4, err_msg=path)


def test_state_keeps_its_sharding(point):
  run = _run(point)
  for (path, x), y in zip(
    jax.tree.leaves_with_path(run.first_state),
    jax.tree.leaves(run.state),
    strict=True,
  ):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), path
  if point.kind == 'explicit':
    # The mesh belongs to the type.
    assert measure.types(run.first_state) == measure.types(run.state)


_COLLECTIVE = re.compile(
  r'= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|'
  r'collective-permute|collective-broadcast)(?:-start|-done)?\('
)


def _collectives(text):
  """Returns how many elements each collective returns, and its line."""
  found = []
  for line in text.splitlines():
    match = _COLLECTIVE.search(line)
    if not match:
      continue
    shapes = [
      math.prod(int(n) for n in shape.split(',') if n)
      for shape in re.findall(r'\w+\[([\d,]*)\]', match[1])
    ]
    # One all-to-all returns the parts of one array; one all-reduce or
    # all-gather may carry several arrays.
    joined = match[2] in ('all-to-all', 'collective-permute')
    size = sum(shapes) if joined else max(shapes)
    found.append((size, line.strip()[:200]))
  return found


def test_only_arrays_of_width_r_cross_devices(point):
  most = OPTIMIZERS[point.name].most
  found = _collectives(_run(point).text)
  assert found, 'a sharded projection needs a sum over devices'
  if most is None:
    return
  for size, line in found:
    assert size <= most, line


def test_no_whole_matrix_crosses_devices_where_muon_has_a_choice():
  # Explicit axes are re-arranged so that Gram matrices are sums.
  name = 'subspace_muon'
  (point,) = (x for x in _points(False) if x.name == name)
  assert point.kind == 'explicit'
  found = _collectives(_run(point).text)
  for size, line in found:
    gathers = 'all-gather' in line
    assert size <= (MOST if gathers else GRAM), line


def test_bases_and_moments_are_sharded(point):
  run = _run(point)
  state = run.state
  largest = whole = 0
  for path, x in jax.tree.leaves_with_path(state):
    device = [s.data.nbytes for s in x.addressable_shards]
    assert len(set(device)) == 1
    if 1 in x.shape:
      continue  # one number for each output, which may lie whole on a device
    largest += device[0]
    whole += x.nbytes
    if x.ndim > 1 and x.size >= 64:
      assert device[0] * 2 <= x.nbytes, path
  # All but counters, seeds and metrics is cut in two, most of it in four.
  assert largest < 0.4 * whole


def test_bytes_per_device_fall_with_the_mesh():
  tx = so.online_subspace_descent(0.02, RANK)
  per_device = []
  for shape in ((1, 1), (2, 1), (2, 2)):
    place = NamedSharding(_mesh('auto', shape), SPECS['w'])
    w = jax.ShapeDtypeStruct((32, 64), jnp.float32, sharding=place)
    state = jax.eval_shape(tx.init, {'w': w})
    held = lambda x, at: math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize
    held = jax.tree.map(held, state, so.state_sharding(tx, {'w': w}))
    per_device.append(sum(jax.tree.leaves(held)))
  assert per_device[1] < 0.6 * per_device[0]
  assert per_device[2] < 0.6 * per_device[1]


@both_meshes
def test_init_under_jit_and_on_shapes_knows_its_types(kind):
  mesh = _mesh(kind)
  tx = so.golore(0.02, RANK)
  with jax.set_mesh(mesh):
    params = _put({'w': jnp.ones((32, 64)), 'bias': jnp.ones(64)}, mesh)
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      params,
    )
    state, from_shapes = tx.init(params), tx.init(shapes)
    traced = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(traced) == jax.tree.structure(state)
    measure.assert_trees_close(from_shapes, state)
    for x, y, z in zip(
      *map(jax.tree.leaves, (state, traced, from_shapes)), strict=True
    ):
      assert (x.shape, x.dtype) == (y.shape, y.dtype)
      assert x.sharding.is_equivalent_to(z.sharding, x.ndim)
      if kind == 'explicit' and x.ndim:
        assert y.sharding.spec == x.sharding.spec


@pytest.mark.parametrize(
  'spec', [P('fsdp'), P(None, 'tensor'), P('tensor', 'fsdp')]
)
def test_one_compilation_however_the_spec_is_written(spec):
  mesh = _mesh('auto')
  tx = so.online_subspace_descent(0.02, RANK)
  with jax.set_mesh(mesh):
    w = jax.device_put(jnp.ones((32, 64)), NamedSharding(mesh, spec))
    params, state = {'w': w}, tx.init({'w': w})
    step = cases.jit(_step(tx))
    for _ in range(3):
      params, state = step(params, state, params)
  assert step._cache_size() == 1
  assert params['w'].sharding == w.sharding


def test_shardings_of_the_arguments_are_enough():
  # Nobody has called `jax.set_mesh`.
  mesh = _mesh('auto')
  tx = so.galore(0.02, RANK)
  params = _put({'w': cases.tree(PLAIN)['w']}, mesh)
  state = tx.init(params)
  assert not measure.bases(state)['w'].sharding.is_fully_replicated
  step = cases.jit(_step(tx))
  text = step.lower(params, state, params).compile().as_text()
  found = _collectives(text)
  assert found
  for size, line in found:
    assert size <= MOST, line
  for _ in range(2):
    params, state = step(params, state, params)
  assert step._cache_size() == 1
