"""Bases in int8 and int4, against codes and polar factors in float64 NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp
import pytest

import cases
import errors
import measure
import references as ref
import subspace_optax as so
from subspace_optax import projectors

TOP = {'int8': 127, 'int4': 7}
STEPS = {'int8': 1, 'int4': 2}  # of Newton-Schulz
LOOSE = {'int8': 1e-3, 'int4': 1e-2}  # ||P^T P - I||_F
OFF = {'int8': 7e-3, 'int4': 0.11}  # relative error

# By path: leaf, axis of the basis that is cut, and rows of a block, in int8 and
# int4. Of a basis, the axes that count matrices come last but for the rank.
LEAVES = {
  'w': (cases.Leaf((256, 320), jnp.float32, (0,), (1,)), 0, (64, 32)),
  # 3 * 59 rows, which no block divides; the columns' side.
  'odd': (cases.Leaf((180, 177), jnp.float32, (0,), (1,)), 0, (177, 59)),
  'layers': (cases.Leaf((2, 96, 40), jnp.float32, (1,), (2,)), 1, (40, 40)),
  # Layers along axis 1, and heads.
  'heads': (
    cases.Leaf((3, 2, 32, 128), jnp.float32, (0, 2), (3,)),
    2,
    (32, 32),
  ),
}
# Both sides, one block and several, a stack and none, in each dtype.
PATHS = {'int8': ('w', 'heads'), 'int4': ('odd', 'layers')}
every_dtype = pytest.mark.parametrize('dtype', TOP)


def _tree(paths, seed=0):
  return cases.tree({path: LEAVES[path][0] for path in paths}, seed)


def _gradients(paths, t):
  return _tree(paths, seed=10 + t)


def _spec(paths, dtype, rank=6, **options):
  leaves = {path: LEAVES[path][0] for path in paths}
  return so.SubspaceSpec(
    rank,
    weight_dimension_numbers=cases.dimension_numbers(leaves),
    basis_dtype=dtype,
    **options,
  )


@functools.cache
def _first(dtype, paths):
  """Returns the bases that every projector here starts from."""
  tx = so.project(_spec(paths, dtype), projectors.stiefel(2))
  return cases.jit(tx.init)(_tree(paths)).subspaces.basis


def _float64(x):
  return np.asarray(x).astype(np.float64)


def _encode(basis, axis, rows, top):
  """Returns codes and scales of an array, a block of an axis at a time."""
  codes, scales = np.zeros_like(basis), []
  for start in range(0, basis.shape[axis], rows):
    at = (slice(None),) * axis + (slice(start, start + rows),)
    scale = np.abs(basis[at]).max(axis, keepdims=True) / top
    codes[at] = np.round(basis[at] / scale)
    scales.append(scale)
  return codes, np.concatenate(scales, axis)


def _decode(path, stored, orthonormal=True):
  """Returns (matrices, m, r), by the formulas."""
  leaf, axis, _ = LEAVES[path]
  codes, scales = map(_float64, stored)
  rows = codes.shape[axis] // scales.shape[axis]
  basis = _matrices(path, codes * np.repeat(scales, rows, axis))
  for _ in range(STEPS[stored.codes.dtype.name] if orthonormal else 0):
    gram = np.swapaxes(basis, -1, -2) @ basis
    basis = basis @ (1.5 * np.eye(gram.shape[-1]) - 0.5 * gram)
  return basis


def _matrices(path, basis):
  """Returns a basis as (matrices, m, r)."""
  if path == 'heads':
    basis = np.moveaxis(basis, 1, 0)
  r = basis.shape[-1]
  count = {'layers': 2, 'heads': 2}.get(path, 1)
  return np.asarray(basis, np.float64).reshape(count, -1, r)


def _leaf_matrices(path, x):
  """Returns a gradient as (matrices, m, n), m the side that is projected."""
  x = _float64(x)
  if path == 'heads':
    return np.moveaxis(x, 1, 0).reshape(2, 96, 128)
  if path == 'w':
    return x[None]
  return np.swapaxes(x if x.ndim == 3 else x[None], -1, -2)


def _coords_matrices(path, x):
  x = _float64(x)
  if path == 'heads':  # (r, 2, 128)
    return np.moveaxis(x, 1, 0)
  if path == 'w':
    return x[None]
  return np.swapaxes(x if x.ndim == 3 else x[None], -1, -2)


def _orthogonality(basis):
  gram = np.swapaxes(basis, -1, -2) @ basis
  return np.linalg.norm(gram - np.eye(gram.shape[-1]), axis=(-2, -1))


@functools.cache
def _run(dtype, name, paths):
  """Returns nodes and states of 7 steps; layers take turns within three."""
  tx = so.project(_spec(paths, dtype), RULES[name]())
  first = _first(dtype, PATHS[dtype])
  bases = {path: first[path] for path in paths}
  state = ref.start(tx, _tree(paths), bases)
  step = cases.jit(tx.update)
  nodes, states = [None], [state]
  for t in range(7):
    node, state = step(_gradients(paths, t), state)
    nodes.append(node)
    states.append(state)
  assert step._cache_size() == 1
  return nodes, states


RULES = {
  'svd': lambda: projectors.svd(3, 'gram', stagger=True),
  'switch': lambda: projectors.switch(
    {0: projectors.power_iteration(1, 0.9), 4: projectors.stiefel(2)}
  ),
  'importance': lambda: projectors.importance_svd(
    projectors.LazyGap(1, 0.01, 2, 2)
  ),
  'gaussian': lambda: projectors.gaussian(2),
}


@every_dtype
def test_codes_are_the_nearest_of_every_block(dtype):
  paths = PATHS[dtype]
  exact, stored = (_first(kind, paths) for kind in ('float32', dtype))
  for path in paths:
    _, axis, rows = LEAVES[path]
    basis, found = _float64(exact[path]), stored[path]
    assert found.codes.dtype == dtype
    rows = rows[list(TOP).index(dtype)]
    codes, scales = _encode(basis, axis, rows, TOP[dtype])
    np.testing.assert_allclose(_float64(found.scales), scales, rtol=1e-6)
    np.testing.assert_array_equal(_float64(found.codes), codes)
    wanted, got = _matrices(path, basis), _decode(path, found)
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert LOOSE[dtype] < error < OFF[dtype] * (1 if path == 'w' else 1.5)


@pytest.mark.parametrize(
  'dtype, name, paths',
  [
    ('int8', 'svd', PATHS['int8']),
    ('int4', 'svd', PATHS['int4']),
    ('int4', 'switch', ('layers',)),
    ('int4', 'importance', ('layers',)),
  ],
)
def test_bases_are_those_of_the_codes_and_orthonormal(dtype, name, paths):
  nodes, states = _run(dtype, name, paths)
  for t, (node, state) in enumerate(zip(nodes[1:], states[1:], strict=True)):
    errors_found = so.subspace_metrics(state)
    for path in paths:
      wanted = _decode(path, state.subspaces.basis[path])
      p = _matrices(path, np.asarray(node[path].basis))
      np.testing.assert_allclose(p, wanted, atol=2e-6)
      assert (_orthogonality(wanted) < LOOSE[dtype]).all()
      g = _leaf_matrices(path, _gradients(paths, t)[path])
      r = _coords_matrices(path, node[path].coords)
      np.testing.assert_allclose(r, np.swapaxes(p, -1, -2) @ g, atol=2e-4)
      moved = np.asarray(node[path].before.moved).reshape(-1)
      error = errors_found[path]['orthogonality_error']
      error = np.asarray(error).reshape(-1)[moved]
      np.testing.assert_allclose(error, _orthogonality(p)[moved], atol=5e-6)


@every_dtype
def test_bases_that_rest_keep_codes_and_values_to_the_bit(dtype):
  nodes, states = _run(dtype, 'svd', PATHS[dtype])
  rested = 0
  for t in range(2, len(nodes)):
    for path in PATHS[dtype]:
      moved = np.asarray(nodes[t][path].before.moved).reshape(-1)
      old, new = (s.subspaces.basis[path] for s in (states[t - 1], states[t]))
      rested += np.sum(~moved)
      for one, other in zip(old, new, strict=True):
        one, other = (_matrices(path, _float64(x)) for x in (one, other))
        np.testing.assert_array_equal(one[~moved], other[~moved])
        assert (one[moved] != other[moved]).any(axis=(-2, -1)).all()
      one, other = (
        _matrices(path, np.asarray(n[path].basis)) for n in nodes[t - 1 : t + 1]
      )
      np.testing.assert_array_equal(one[~moved], other[~moved])
  assert 10 < rested < 3 * 6


@every_dtype
def test_moves_are_between_the_bases_that_are_stored(dtype):
  nodes, states = _run(dtype, 'svd', PATHS[dtype])
  seen = 0
  for t in range(1, len(nodes)):
    drift = so.subspace_metrics(states[t])
    for path in PATHS[dtype]:
      old, new = (
        _decode(path, s.subspaces.basis[path])
        for s in (states[t - 1], states[t])
      )
      before = nodes[t][path].before
      moved = np.asarray(before.moved).reshape(-1)
      transition = np.asarray(before.transition).reshape(-1, 6, 6)
      found = np.asarray(drift[path]['drift']).reshape(-1)
      for i in range(len(moved)):
        wanted = ref.transition(new[i], old[i]) if moved[i] else np.eye(6)
        np.testing.assert_allclose(transition[i], wanted, atol=1e-5)
        if moved[i]:
          seen += 1
          sides = [x @ np.linalg.pinv(x) for x in (new[i], old[i])]
          far = np.linalg.norm(sides[0] - sides[1]) / math.sqrt(12)
          np.testing.assert_allclose(found[i], far, atol=1e-4)
  assert seen > 5


@every_dtype
def test_gaussian_bases_keep_their_lengths(dtype):
  path = PATHS[dtype][0]
  nodes, states = _run(dtype, 'gaussian', (path,))
  wanted = _decode(path, states[-1].subspaces.basis[path], orthonormal=False)
  p = _matrices(path, np.asarray(nodes[-1][path].basis))
  np.testing.assert_allclose(p, wanted, rtol=1e-5, atol=1e-6)
  assert (_orthogonality(p) > 0.5).all()


def _adam(paths, dtype, rule=None):
  return so.subspace(
    _spec(paths, dtype),
    rule or projectors.stiefel(2),
    optax.scale_by_adam(),
    transport='first',
    after=optax.scale(-0.01),
  )


@pytest.mark.parametrize('dtype, path', [('int8', 'heads'), ('int4', 'odd')])
def test_moments_go_with_the_stored_bases(dtype, path):
  tx = so.subspace(
    _spec((path,), dtype),
    projectors.stiefel(1),
    optax.trace(0.9),
    transport='first',
  )
  state = cases.jit(tx.init)(_tree((path,)))
  step = cases.jit(tx.update)
  mean = 0.0
  old = _decode(path, ref.bases(state)[path])
  for t in range(3):
    gradients = _gradients((path,), t)
    updates, state = step(gradients, state)
    p = _decode(path, ref.bases(state)[path])
    carried = np.swapaxes(p, -1, -2) @ (old @ mean) if t else 0.0
    g = _leaf_matrices(path, gradients[path])
    mean = 0.9 * carried + np.swapaxes(p, -1, -2) @ g
    got = _leaf_matrices(path, updates[path])
    tolerance = 3 * LOOSE[dtype]  # P^T P is I within that
    np.testing.assert_allclose(got, p @ mean, atol=tolerance)
    old = p


def test_bytes():
  params = _tree(LEAVES)

  def basis(dtype, rank=6):
    tx = so.project(_spec(LEAVES, dtype, rank), projectors.svd(2))
    return so.memory_report(tx, params).state

  elements = 6 * (256 + 177 + 2 * 40 + 2 * 96)
  blocks = {
    'int8': 6 * (4 + 1 + 2 * 1 + 2 * 3),
    'int4': 6 * (8 + 3 + 2 * 1 + 2 * 3),
  }
  whole = basis('float32')
  assert whole - basis('int8') == 3 * elements - 4 * blocks['int8']
  halves = elements * 7 // 2
  assert whole - basis('int4') == halves - 4 * blocks['int4']
  # Too much for Adam's bytes in float32.
  leaf = {'w': jnp.ones((8, 8))}
  kept = lambda dtype: so.describe(
    so.SubspaceSpec(6, basis_dtype=dtype, moment_dtype=jnp.bfloat16), leaf
  )
  assert 'int4(8,6)' in kept('int4')
  assert 'int8(8,6)' in kept(jnp.int8)
  one = so.SubspaceSpec(1, basis_dtype=jnp.int4)
  tx = so.project(one, projectors.svd(2))
  node, _ = cases.jit(tx.update)(leaf, tx.init(leaf))
  np.testing.assert_allclose(np.abs(node['w'].basis), 8**-0.5, rtol=1e-5)


def _assert_placed(state, places):
  for place, x in zip(places, jax.tree.leaves(state), strict=True):
    assert place.is_equivalent_to(x.sharding, x.ndim)


def _train(put, paths, jit_init=lambda f: f):
  """Returns parameters and state after steps on gradients, put somewhere."""
  tx = _adam(paths, 'int4', rule=projectors.stiefel(3, stagger=True))
  params = put(_tree(paths))

  def step(params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  wanted, state = so.state_sharding(tx, params), jit_init(tx.init)(params)
  run = cases.jit(step, donate_argnums=(0, 1))
  places = [x.sharding for x in jax.tree.leaves(state)]
  _assert_placed(state, jax.tree.leaves(wanted))
  types = measure.types(state)
  for t in range(4):
    params, state = run(params, state, put(_gradients(paths, t)))
  _assert_placed(state, places)
  assert run._cache_size() == 1
  assert measure.types(state) == types
  return params, state


@pytest.mark.parametrize(
  'kind, paths',
  [
    # Without explicit axes only the placement is the library's.
    ('Auto', ('heads',)),
    ('Explicit', ('w',)),
    # The same leaves with the other kind, and one that no axis cuts.
    pytest.param('Auto', tuple(LEAVES), marks=pytest.mark.full),
    pytest.param('Explicit', tuple(LEAVES), marks=pytest.mark.full),
  ],
)
def test_steps_on_a_mesh(kind, paths):
  axis_types = (AxisType[kind],) * 2
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=axis_types)
  # Blocks are cut by devices, are fewer than devices, or are whole.
  specs = {
    'w': P('fsdp', 'tensor'),
    'odd': P(None, None),
    'layers': P('fsdp', None, 'tensor'),
    'heads': P(None, None, 'fsdp', 'tensor'),
  }
  if kind == 'Auto':
    specs['odd'] = P()

  def put(tree):
    return {
      path: jax.device_put(x, NamedSharding(mesh, specs[path]))
      for path, x in tree.items()
    }

  with jax.set_mesh(mesh):
    both = _train(put, paths)
  cut = ref.bases(both[1])[paths[0]].codes
  assert math.prod(cut.sharding.shard_shape(cut.shape)) * 4 == cut.size
  alone = _train(lambda x: x, paths, cases.jit)
  for one, other in zip(*map(jax.tree.leaves, (alone, both)), strict=True):
    one, other = map(_float64, (one, other))
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_int8_and_int4_train_as_well_as_float32():
  x = np.asarray(ref.normal(0, (256, 48))) * 0.93 ** np.arange(48.0)
  target = np.asarray(ref.normal(1, (48, 64))) * 0.9 ** np.arange(64.0)
  y = x @ target + 0.5 * np.asarray(ref.normal(2, (256, 64)))
  x, y = (jnp.asarray(each, jnp.float32) for each in (x, y))

  def loss(params):
    return jnp.mean((x @ params['w'] - y) ** 2)

  def train(dtype):
    spec = so.SubspaceSpec(12, basis_dtype=dtype)
    tx = so.galore(
      optax.linear_schedule(0.1, 0.0, 200), update_proj_gap=20, spec=spec
    )

    def step(carry, _):
      params, state = carry
      value, gradient = jax.value_and_grad(loss)(params)
      updates, state = tx.update(gradient, state, params)
      return (optax.apply_updates(params, updates), state), value

    def run(start):
      (params, _), values = jax.lax.scan(step, start, length=200)
      return values[0], loss(params)

    params = {'w': jnp.zeros((48, 64))}
    return [float(x) for x in cases.jit(run)((params, tx.init(params)))]

  first, last = train(jnp.float32)
  assert last < 0.3 * first
  np.testing.assert_allclose(train(jnp.int8), (first, last), rtol=0.01)
  np.testing.assert_allclose(train(jnp.int4), (first, last), rtol=0.04)


@pytest.mark.parametrize(
  'dtype',
  [
    'int4',
    # Alike: such a step reads the same bases as another.
    pytest.param('int8', marks=pytest.mark.full),
  ],
)
def test_compressed_steps_take_the_stored_bases(dtype):
  spec = so.SubspaceSpec(3, side='in', basis_dtype=dtype)
  tx = so.subspace(
    spec,
    projectors.stiefel(2),
    optax.trace(0.9),
    transport='first',
    after=optax.scale(-0.1),
  )
  x = ref.normal(0, (5, 16))
  loss = lambda params: jnp.mean(so.rso.dot(x, params['w']) ** 2)
  params = {'w': ref.normal(1, (16, 24))}
  compressed = cases.jit(so.rso.compressed_step(loss, tx))

  @cases.jit
  def plain(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  one = other = params, cases.jit(tx.init)(params)
  for _ in range(3):
    one, other = compressed(*one)[:2], plain(*other)
  np.testing.assert_allclose(one[0]['w'], other[0]['w'], rtol=1e-5, atol=1e-6)
  assert np.abs(one[0]['w'] - params['w']).sum() > 0.1


@pytest.mark.parametrize(
  'dtype, path',
  [
    ('int4', 'w'),
    # Alike: columns of codes and scales are copied whatever they are.
    pytest.param('int8', 'layers', marks=pytest.mark.full),
  ],
)
def test_ranks_grow_and_shrink_and_codes_stay(dtype, path):
  params = _tree((path,))
  tx, large, small = (
    so.project(_spec((path,), dtype, r), projectors.stiefel(2))
    for r in (6, 9, 4)
  )
  state = cases.jit(tx.init)(params)
  grown = so.resize_rank(large, state, params)
  cut = so.resize_rank(small, state, params)
  again = so.resize_rank(tx, grown, params)
  types = measure.types(jax.eval_shape(large.init, params))
  assert measure.types(grown) == types
  states = state, grown, cut, again
  old, more, less, same = (ref.bases(state)[path] for state in states)
  for i in range(2):
    codes = _float64(old[i])
    np.testing.assert_array_equal(_float64(more[i])[..., :6], codes)
    np.testing.assert_array_equal(_float64(less[i]), codes[..., :4])
    np.testing.assert_array_equal(_float64(same[i]), codes)
  wide = _decode(path, more)
  assert (_orthogonality(wide) < LOOSE[dtype]).all()
  turned = np.linalg.norm(wide[..., :6] - _decode(path, old))
  assert turned < OFF[dtype] * np.linalg.norm(wide[..., :6])


@pytest.mark.parametrize('dtype, path', [('int8', 'heads'), ('int4', 'odd')])
def test_state_is_saved_restored_and_mapped(dtype, path, tmp_path):
  params = _tree((path,))
  tx = _adam((path,), dtype)
  state = cases.jit(tx.init)(params)
  ocp.save(tmp_path / 'state', state)
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  got = ocp.load(tmp_path / 'state', jax.tree.map(like, state))
  assert measure.types(got) == measure.types(state)
  measure.assert_trees_close(
    *(jax.tree.map(_float64, x) for x in (got, state)), rtol=0, atol=0
  )
  same = optax.tree.map_params(tx, lambda x: x, state)
  assert measure.types(same) == measure.types(state)


@pytest.mark.parametrize('dtype', ['int16', 'uint8', jnp.bool_, 'int3', 8])
def test_other_dtypes(dtype):
  with errors.raises(ValueError, 'basis_dtype', 'int8', 'int4'):
    so.SubspaceSpec(2, basis_dtype=dtype)


@pytest.mark.parametrize(
  'rule, words',
  [
    (projectors.online_pca(optax.sgd(0.1)), ['small steps', 'online_pca']),
    (projectors.grassmann_tracking(2), ['small steps', 'grassmann_tracking']),
    (
      projectors.switch(
        {0: projectors.svd(2), 3: projectors.online_pca(optax.sgd(0.1))}
      ),
      ['small steps', 'switch'],
    ),
    (projectors.stiefel(2, regenerate=True), ['regenerate']),
  ],
)
def test_projectors_that_integers_do_not_serve(rule, words):
  tx = so.project(so.SubspaceSpec(2, basis_dtype='int4'), rule)
  with errors.raises(ValueError, 'basis_dtype', 'int4', 'bfloat16', *words):
    tx.init({'w': jnp.ones((8, 12))})


def test_subproblems_and_other_states():
  spec = so.SubspaceSpec(2, side='in', basis_dtype='int8')
  with errors.raises(ValueError, 'basis_dtype', 'int8', 'subproblems'):
    so.rso.subproblems(spec, optax.sgd(0.1), update_proj_gap=2)
  paths = ('layers',)
  params = _tree(paths)
  state = cases.jit(_adam(paths, 'int8').init)(params)
  with errors.raises(ValueError, 'int8', 'int4', 'basis_dtype', 'basis/layers'):
    so.resize_rank(_adam(paths, 'int4'), state, params)
  with errors.raises(ValueError, 'basis in int8', 'array'):
    so.resize_rank(_adam(paths, 'float32'), state, params)
