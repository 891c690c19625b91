"""Auto and Explicit meshes: same steps, sharded state, small collectives.

Compiled for 2 x 2 devices, no collective may return as much as a device's
block of the gradient: only arrays of width r cross devices.
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
import grid
import measure
import subspace_optax as so
from subspace_optax import projectors

AXES = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}

# Every matrix is 32 x 64 and cut in four, so that a block has 512 elements or
# more, and the largest array of width r, of two layers, 256.
RANK = 2
BLOCK = 32 * 64 // 4
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


def _spec(side='short'):
  return so.SubspaceSpec(
    RANK,
    side=side,
    weight_dimension_numbers=cases.dimension_numbers(PLAIN),
  )


def _galore(method):
  return optax.chain(
    so.subspace(
      _spec('long'), projectors.svd(2, method), optax.scale_by_adam()
    ),
    optax.scale_by_learning_rate(0.02),
  )


class Case(NamedTuple):
  paths: tuple[str, ...]
  make: Any
  alone: Any  # on one device


OPTIMIZERS = {
  # SVD's `auto` takes another way where gradients are sharded.
  'galore': Case(
    ('w', 'experts_out', 'bias'),
    lambda: so.galore(0.02, update_proj_gap=2, spec=_spec('long')),
    lambda: _galore('randomized'),
  ),
  'golore': Case(
    ('layers', 'middle', 'bias'),
    lambda: so.golore(0.02, update_proj_gap=2, spec=_spec()),
    lambda: so.golore(0.02, update_proj_gap=2, spec=_spec()),
  ),
  'online_first': Case(
    ('w', 'layers', 'middle', 'experts_out', 'bias'),
    lambda: _online(),
    lambda: _online(),
  ),
}


# Rules of the grid that multiply matrices only. Those that gather a gradient to
# factorise it are left out: with more devices than cores, XLA's collectives on
# CPUs can wait for ever for a device that waits for LAPACK.
RULES = {
  name: functools.partial(grid.PROJECTORS[name], True)
  for name in (
    'randomized',
    'warm',
    'power',
    'tracking',
    'walk',
    'stiefel_regenerated',
    'gaussian',
  )
} | {
  'online_options': lambda: projectors.online_pca(
    optax.sgd(0.1), update_every=2, orthonormalize_every=4
  )
}
for _name, _rule in RULES.items():
  _make = functools.partial(lambda rule: _of_grid(rule()), _rule)
  OPTIMIZERS[_name] = Case(('layers', 'bias'), _make, _make)


def _of_grid(rule, inner=None, **options):
  return so.subspace(
    _spec(),
    rule,
    inner or optax.scale_by_adam(),
    transport='both',
    after=optax.scale(-0.02),
    **options,
  )


def _accumulated():
  return _of_grid(projectors.stiefel(1), every_k=2)


def _of_coordinates():
  return _of_grid(
    projectors.stiefel(2),
    optax.adamw(1.0, weight_decay=0.1),
    params='coordinates',
    per_matrix=True,
    plain=optax.scale_by_lion(),
  )


for _make in (_accumulated, _of_coordinates):
  OPTIMIZERS[_make.__name__[1:]] = Case(('layers', 'bias'), _make, _make)


def _online():
  return so.subspace(
    _spec(),
    projectors.online_pca(optax.adam(0.02)),
    optax.scale_by_adam(),
    transport='first',
  )


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


def _params(name):
  params = cases.tree(PLAIN)
  return {path: params[path] for path in OPTIMIZERS[name].paths}


def _gradients(name, t):
  """Returns gradients with a few strong directions, as `galore` needs."""
  rng = np.random.default_rng(30 + t)
  found = {}
  for path, leaf in PLAIN.items():
    if not leaf.rows:
      found[path] = rng.standard_normal(leaf.shape)
      continue
    batch = [leaf.shape[i] for i in leaf.batch]
    rows, cols = leaf.size(leaf.rows), leaf.size(leaf.cols)
    u = rng.standard_normal((*batch, rows, 2)) * np.array([3.0, 1.0])
    g = u @ rng.standard_normal((*batch, 2, cols))
    g = g + 0.01 * rng.standard_normal(g.shape)
    order = leaf.batch + leaf.rows + leaf.cols
    g = g.reshape([leaf.shape[i] for i in order])
    found[path] = np.transpose(g, np.argsort(order))
  return {
    path: jnp.asarray(found[path], jnp.float32)
    for path in OPTIMIZERS[name].paths
  }


class Run(NamedTuple):
  """Three steps on a mesh, over a refresh at step 2."""

  first_state: Any
  params: Any
  state: Any
  compilations: int
  text: str


def _step(tx):
  def step(params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  return step


@functools.cache
def _run(name, kind):
  mesh = _mesh(kind)
  tx = OPTIMIZERS[name].make()
  with jax.set_mesh(mesh):
    params = _put(_params(name), mesh)
    state = first_state = tx.init(params)
    step = cases.jit(_step(tx))
    for t in range(3):
      params, state = step(params, state, _put(_gradients(name, t), mesh))
    jax.block_until_ready(params)
    count = step._cache_size()
    text = step.lower(params, state, params).compile().as_text()
  return Run(first_state, params, state, count, text)


@functools.cache
def _alone(name):
  """Returns the same three steps on one device."""
  tx = OPTIMIZERS[name].alone()
  params = _params(name)
  state = tx.init(params)
  step = cases.jit(_step(tx))
  for t in range(3):
    params, state = step(params, state, _gradients(name, t))
  return params, state


both_meshes = pytest.mark.parametrize('kind', AXES)
every_optimizer = pytest.mark.parametrize('name', OPTIMIZERS)


@both_meshes
@every_optimizer
def test_sharded_steps_equal_those_on_one_device(name, kind):
  run = _run(name, kind)
  params, state = _alone(name)
  measure.assert_trees_close(run.params, params, rtol=1e-3, atol=2e-4)
  if name != 'stiefel_regenerated':  # its state holds none
    measure.assert_trees_close(
      measure.bases(run.state), measure.bases(state), rtol=1e-2, atol=1e-3
    )


@both_meshes
@every_optimizer
def test_state_keeps_its_sharding_and_one_compilation_serves(name, kind):
  run = _run(name, kind)
  assert run.compilations == 1
  for (path, x), y in zip(
    jax.tree.leaves_with_path(run.first_state),
    jax.tree.leaves(run.state),
    strict=True,
  ):
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), path
  if kind == 'explicit':
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


@both_meshes
@every_optimizer
def test_only_arrays_of_width_r_cross_devices(name, kind):
  found = _collectives(_run(name, kind).text)
  assert found, 'a sharded projection needs a sum over devices'
  for size, line in found:
    assert size < BLOCK, line


@both_meshes
@every_optimizer
def test_bases_and_moments_are_sharded(name, kind):
  run = _run(name, kind)
  state = run.state
  largest = 0
  for path, x in jax.tree.leaves_with_path(state):
    device = [s.data.nbytes for s in x.addressable_shards]
    assert len(set(device)) == 1
    largest += device[0]
    if x.ndim > 1 and x.size >= 64:
      # No leaf lies whole on a device.
      assert device[0] * 2 <= x.nbytes, path
  whole = sum(x.nbytes for x in jax.tree.leaves(state))
  # All but counters, seeds and metrics is cut in two, most of it in four.
  assert largest < 0.4 * whole


def test_bytes_per_device_fall_with_the_mesh():
  tx = so.online_subspace_descent(0.02, RANK)
  per_device = []
  for shape in ((1, 1), (2, 1), (2, 2)):
    mesh = _mesh('auto', shape)
    with jax.set_mesh(mesh):
      state = tx.init(_put({'w': jnp.ones((32, 64))}, mesh))
    leaves = jax.tree.leaves(state)
    per_device.append(sum(x.addressable_shards[0].data.nbytes for x in leaves))
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
    assert size < BLOCK, line
  for _ in range(2):
    params, state = step(params, state, params)
  assert step._cache_size() == 1
