"""Each device iterates on matrices of its own: values, places, traffic."""

import functools
import itertools
import math
import re

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from benchmarks import hlo
import grid
import references as ref
import subspace_optax as so
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _newton_schulz
from subspace_optax._matrix import _spread

MODES = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}
MESHES = {'fsdp': (4,), 'fsdp, tensor': (2, 2)}
M, N = 8, 12


def make_mesh(axes, mode):
  names = tuple(axes.split(', '))
  return jax.make_mesh(
    MESHES[axes], names, axis_types=(MODES[mode],) * len(names)
  )


def layout(shape, rows=(-2,), cols=(-1,)):
  up = lambda axes: tuple(i % len(shape) for i in axes)
  return _layout.Layout(shape, up(rows), up(cols), True, 1)


HOW = _newton_schulz.iteration('standard', 3, 'frobenius')


def iterate(of, x):
  return _newton_schulz.newton_schulz(of, x, HOW)


def dense(of, x):
  """Returns the same in float64, matrix by matrix."""
  axes = (*of.rows, *of.cols), (-2, -1)
  a = np.moveaxis(np.asarray(x, np.float64), *axes)
  u, s, v = np.linalg.svd(a, full_matrices=False)
  s = s / np.linalg.norm(s, axis=-1, keepdims=True)
  for _ in range(3):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
  return np.moveaxis(u * s[..., None, :] @ v, *axes[::-1])


CUT = 'stacks that are cut already'
CUT_SHORT = 'a stack that is cut and cannot be cut further'
# The leaves' layouts, and the spec of each on a mesh of two axes.
TREES = {
  'a stack that divides': [(layout((8, M, N)), P(None, 'fsdp', 'tensor'))],
  'four stacks of two, of one shape': [
    (layout((2, M, N)), P(None, 'fsdp', 'tensor'))
  ]
  * 4,
  'five matrices and a stack': [
    *[(layout((M, N)), P('fsdp', 'tensor'))] * 5,
    (layout((3, M, N)), P(None, 'tensor', 'fsdp')),
  ],
  'counted in the middle, and last': [
    (layout((M, 8, N), (0,), (2,)), P('fsdp', None, 'tensor')),
    (layout((N, M, 4), (1,), (0,)), P('fsdp')),
  ],
  'two axes that count': [(layout((2, 4, M, N)), P(None, None, 'fsdp'))],
  CUT: [
    (layout((8, M, N)), P('fsdp', None, 'tensor')),
    (layout((4, M, N)), P(('fsdp', 'tensor'))),
  ],
  CUT_SHORT: [(layout((2, M, N)), P('fsdp', None, 'tensor'))],
}


def placed(mesh, tree):
  names, leaves = set(mesh.axis_names), []
  for seed, (of, spec) in enumerate(tree):
    kept = [
      tuple(k for k in (e if isinstance(e, tuple) else (e,)) if k in names)
      for e in spec
    ]
    place = NamedSharding(mesh, P(*[k or None for k in kept]))
    leaves.append(jax.device_put(ref.normal(seed, of.shape), place))
  return leaves


@functools.cache
def program(name, axes, mode):
  """Returns the leaves of a tree on a mesh, and the program that spreads."""
  mesh, tree = make_mesh(axes, mode), TREES[name]
  leaves = placed(mesh, tree)
  return leaves, compiled(mesh, [of for of, _ in tree], leaves)


def compiled(mesh, layouts, leaves):
  with jax.set_mesh(mesh):
    run = jax.jit(lambda leaves: _spread.spread(iterate, layouts, leaves))
    return run.lower(leaves).compile()


@pytest.mark.parametrize(
  'name, axes, mode', grid.cover(TREES, MESHES, MODES, of=2)
)
def test_is_the_map_of_every_matrix_where_it_was(name, axes, mode):
  if name == CUT_SHORT and axes == 'fsdp':
    return  # two matrices on four devices
  leaves, run = program(name, axes, mode)
  for (of, _), x, y in zip(TREES[name], leaves, run(leaves), strict=True):
    np.testing.assert_allclose(y, dense(of, x), rtol=1e-4, atol=1e-5)
    if mode == 'explicit' or name not in (CUT_SHORT, CUT):
      assert y.sharding.is_equivalent_to(x.sharding, x.ndim)


def test_without_a_mesh_nothing_moves():
  of, x = layout((3, M, N)), ref.normal(0, (3, M, N))
  text = str(jax.make_jaxpr(lambda x: _spread.spread(iterate, [of], [x]))(x))
  assert 'sharding_constraint' not in text and 'pad' not in text


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('axes', MESHES)
@pytest.mark.parametrize(
  ('name', 'slots'),
  [
    ('a stack that divides', 8),
    ('four stacks of two, of one shape', 8),
  ],
)
def test_one_exchange_there_and_one_back(name, slots, axes, mode):
  """Bytes by arithmetic; no device ever has more than its matrices."""
  text = program(name, axes, mode)[1].as_text()
  found = hlo.collectives(text, 4)
  assert {c.kind for c in found.values()} == {'all-to-all'}
  # An all-to-all over n devices sends (n - 1) / n of a device's quarter.
  hops = sum((n - 1) / n for n in MESHES[axes])
  expected = 2 * hops * slots * M * N * 4 / 4
  np.testing.assert_allclose(hlo.sent(found), expected)
  sizes = [
    math.prod(map(int, dims.split(',')))
    for dims in re.findall(r'f32\[([\d,]+)\]', text)
  ]
  assert max(sizes) <= slots // 4 * M * N


@pytest.mark.parametrize(
  ('name', 'ways'),
  [('normuon', 2), ('muon, 8 bits', 2), ('subspace_muon', 2.125)],
)
def test_optimizers_send_a_stack_there_and_back(name, ways):
  """And coordinates of rank m / 16, likewise; a few numbers beside them."""
  of, mesh = layout((8, 64, 96)), make_mesh('fsdp', 'auto')
  params = {'w': placed(mesh, [(of, P(None, 'fsdp', None))])[0]}
  tx = OPTIMIZERS[name]()
  with jax.set_mesh(mesh):
    places = so.state_sharding(tx, params)
    update = jax.jit(tx.update, out_shardings=(params['w'].sharding, places))
    state = jax.jit(tx.init, out_shardings=places)(params)
    text = update.lower(params, state, params).compile().as_text()
  found = hlo.collectives(text, 4, 'cheap')
  moved = {k: c for k, c in found.items() if c.kind == 'all-to-all'}
  way = 3 / 4 * math.prod(of.shape) * 4 / 4
  np.testing.assert_allclose(hlo.sent(moved), ways * way)
  assert hlo.sent(found) - hlo.sent(moved) < 0.2 * way


def test_few_matrices_are_not_filled_up_with_more_zeros():
  of, mesh = layout((64, 96)), make_mesh('fsdp', 'auto')
  (whole,) = placed(mesh, [(of, P())])
  run = compiled(mesh, [of], [whole])
  assert not hlo.collectives(run.as_text(), 4)
  assert run.memory_analysis().temp_size_in_bytes < 2 * whole.nbytes
  # Three of four are.
  run = compiled(mesh, [of] * 3, [whole] * 3)
  assert hlo.collectives(run.as_text(), 4)


def test_a_matrix_with_infinity_is_not_a_number():
  for axes in MESHES:
    mesh = make_mesh(axes, 'auto')
    (x,) = placed(mesh, [(layout((4, M, N)), P(None, 'fsdp'))])
    x = jax.jit(lambda x: x.at[2, 1, 1].set(np.inf))(x)
    (y,) = compiled(mesh, [layout(x.shape)], [x])([x])
    np.testing.assert_array_equal(
      np.isnan(y), np.broadcast_to(np.arange(4)[:, None, None] == 2, y.shape)
    )


@pytest.mark.parametrize(
  'place, name',
  grid.cover(
    [
      ('fsdp', P(), P('fsdp')),
      ('fsdp', P(None, 'fsdp'), P('fsdp')),
      ('fsdp, tensor', P(), P(('fsdp', 'tensor'))),
      ('fsdp, tensor', P(None, None, 'tensor'), P('fsdp')),
      ('fsdp, tensor', P(None, 'tensor'), P(('fsdp', 'tensor'))),
    ],
    ['subspace_muon', 'muon in chosen columns'],
    of=2,
  ),
)
def test_a_plain_step_moves_nothing(place, name):
  """Where nobody says where the results of a step are to be."""
  axes, spec, parts = place
  mesh = make_mesh(axes, 'auto')
  loss = lambda p, x: ((x @ p['w'].sum(0)) ** 2).mean()
  made = so.train_step(loss, OPTIMIZERS[name]())
  put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    params = {'w': put(ref.normal(0, (4, M, N)), spec)}
    state, step = made.init(params), jax.jit(made.step)
    before = jax.tree.map(lambda x: x.sharding, (params, state))
    for t in range(3):
      batch = put(ref.normal(t, (8, M)), parts)
      params, state, _ = step(params, state, batch)
  after = jax.tree.map(lambda x: x.sharding, (params, state))
  assert after == before
  assert step._cache_size() == 1


SPEC = so.SubspaceSpec(4, weight_dimension_numbers=so.DimensionNumbers(-2, -1))
OPTIMIZERS = {
  'subspace_muon': lambda: so.subspace_muon(0.1, update_proj_gap=2, spec=SPEC),
  'muon in chosen columns': lambda: so.subspace(
    SPEC,
    so.projectors.dct(2),
    optax.trace(0.9, nesterov=True),
    transport='first',
    residual=so.residuals.orthogonal(1.9, b2=0.9),
  ),
  'normuon': lambda: so.normuon(0.1, spec=SPEC),
  'muon, 8 bits': lambda: so.scale_by_muon8bit(SPEC),
  'trion': lambda: so.trion(0.1, spec=SPEC),
  'dion': lambda: so.dion(0.1, spec=SPEC),
}


def run(tx, leaves):
  """Returns the updates of three steps, and the compiled step."""
  params = {str(i): x for i, x in enumerate(leaves)}
  state, found = tx.init(params), []
  step = jax.jit(tx.update)
  for t in range(3):
    gradients = {
      k: jax.device_put(ref.normal(10 * t + int(k), x.shape), x.sharding)
      for k, x in params.items()
    }
    updates, new = step(gradients, state, params)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
      assert y.sharding.is_equivalent_to(x.sharding, x.ndim)
    state = new
    found.append(jax.tree.map(np.asarray, updates))
  return found


STACKS = [
  *TREES['four stacks of two, of one shape'][:1],
  *TREES['a stack that divides'],
]


@functools.cache
def on_one_device(name):
  leaves = [ref.normal(i, x.shape) for i, (x, _) in enumerate(STACKS)]
  return run(OPTIMIZERS[name](), leaves)


# Both meshes and both kinds, one for each optimizer. The others take such steps
# in tests/test_sharding.py and, in chosen columns, in
# tests/test_orthogonal_blocks.py.
ON_MESH = {
  'subspace_muon': ('fsdp, tensor', 'auto'),
  'normuon': ('fsdp', 'explicit'),
  'muon, 8 bits': ('fsdp, tensor', 'explicit'),
}


@pytest.mark.parametrize(
  'name, axes, mode',
  [
    pytest.param(
      name, *on, marks=() if on == ON_MESH.get(name) else pytest.mark.full
    )
    for name in OPTIMIZERS
    for on in itertools.product(MESHES, MODES)
  ],
)
def test_optimizers_step_as_on_one_device(name, axes, mode):
  mesh = make_mesh(axes, mode)
  with jax.set_mesh(mesh):
    found = run(OPTIMIZERS[name](), placed(mesh, STACKS))
  wanted = on_one_device(name)
  # Codes of 8 bits round another way where a sum rounds another way.
  near = {'rtol': 1e-5, 'atol': 1e-5}
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **near), found, wanted
  )
