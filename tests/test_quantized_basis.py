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
PLAIN = {path: leaf for path, (leaf, _, _) in LEAVES.items()}
every_dtype = pytest.mark.parametrize('dtype', TOP)


def _spec(dtype, rank=6, **options):
  return so.SubspaceSpec(
    rank,
    weight_dimension_numbers=cases.dimension_numbers(PLAIN),
    basis_dtype=dtype,
    **options,
  )


def _float64(x):
  return np.asarray(x.astype(jnp.float32), np.float64)


def _gradients(t):
  return cases.tree(PLAIN, seed=10 + t)


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
def _run(dtype, name='svd', steps=7):
  """Returns nodes and states of steps; layers take turns within three."""
  rule = RULES[name]()
  tx = so.project(_spec(dtype), rule)
  state = tx.init(cases.tree(PLAIN))
  step = cases.jit(tx.update)
  nodes, states = [None], [state]
  for t in range(steps):
    node, state = step(_gradients(t), state)
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
  rule = projectors.stiefel(2)
  exact = so.project(_spec('float32'), rule).init(cases.tree(PLAIN))
  stored = so.project(_spec(dtype), rule).init(cases.tree(PLAIN))
  for path, (_, axis, rows) in LEAVES.items():
    basis = _float64(exact.subspaces.basis[path])
    found = stored.subspaces.basis[path]
    assert found.codes.dtype == dtype
    rows = rows[list(TOP).index(dtype)]
    codes, scales = _encode(basis, axis, rows, TOP[dtype])
    np.testing.assert_allclose(_float64(found.scales), scales, rtol=1e-6)
    np.testing.assert_array_equal(_float64(found.codes), codes)
    wanted, got = _matrices(path, basis), _decode(path, found)
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert LOOSE[dtype] < error < OFF[dtype] * (1 if path == 'w' else 1.5)


@pytest.mark.parametrize(
  'dtype, name',
  [
    ('int8', 'svd'),
    ('int4', 'svd'),
    ('int4', 'switch'),
    ('int4', 'importance'),
  ],
)
def test_bases_are_those_of_the_codes_and_orthonormal(dtype, name):
  nodes, states = _run(dtype, name)
  for t, (node, state) in enumerate(zip(nodes[1:], states[1:], strict=True)):
    errors_found = so.subspace_metrics(state)
    for path in LEAVES:
      wanted = _decode(path, state.subspaces.basis[path])
      p = _matrices(path, np.asarray(node[path].basis))
      np.testing.assert_allclose(p, wanted, atol=2e-6)
      assert (_orthogonality(wanted) < LOOSE[dtype]).all()
      g = _leaf_matrices(path, _gradients(t)[path])
      r = _coords_matrices(path, node[path].coords)
      np.testing.assert_allclose(r, np.swapaxes(p, -1, -2) @ g, atol=2e-4)
      moved = np.asarray(node[path].before.moved).reshape(-1)
      error = errors_found[path]['orthogonality_error']
      error = np.asarray(error).reshape(-1)[moved]
      np.testing.assert_allclose(error, _orthogonality(p)[moved], atol=5e-6)


@every_dtype
def test_bases_that_rest_keep_codes_and_values_to_the_bit(dtype):
  nodes, states = _run(dtype)
  rested = 0
  for t in range(2, len(nodes)):
    for path in LEAVES:
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
  assert 20 < rested < 6 * 7


@every_dtype
def test_moves_are_between_the_bases_that_are_stored(dtype):
  nodes, states = _run(dtype)
  seen = 0
  for t in range(1, len(nodes)):
    drift = so.subspace_metrics(states[t])
    for path in LEAVES:
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
  assert seen > 10


@every_dtype
def test_gaussian_bases_keep_their_lengths(dtype):
  nodes, states = _run(dtype, 'gaussian', 2)
  for path in LEAVES:
    wanted = _decode(path, states[-1].subspaces.basis[path], orthonormal=False)
    p = _matrices(path, np.asarray(nodes[-1][path].basis))
    np.testing.assert_allclose(p, wanted, rtol=1e-5, atol=1e-6)
    assert (_orthogonality(p) > 0.5).all()


def _adam(dtype, rule=None, rank=6, **options):
  return so.subspace(
    _spec(dtype, rank, **options),
    rule or projectors.stiefel(2),
    optax.scale_by_adam(),
    transport='first',
    after=optax.scale(-0.01),
  )


@every_dtype
def test_moments_go_with_the_stored_bases(dtype):
  tx = so.subspace(
    _spec(dtype), projectors.stiefel(1), optax.trace(0.9), transport='first'
  )
  state = tx.init(cases.tree(PLAIN))
  step = cases.jit(tx.update)
  mean = {path: 0.0 for path in LEAVES}
  old = {p: _decode(p, ref.bases(state)[p]) for p in LEAVES}
  for t in range(3):
    updates, state = step(_gradients(t), state)
    for path in LEAVES:
      p = _decode(path, ref.bases(state)[path])
      carried = np.swapaxes(p, -1, -2) @ (old[path] @ mean[path]) if t else 0.0
      g = _leaf_matrices(path, _gradients(t)[path])
      mean[path] = 0.9 * carried + np.swapaxes(p, -1, -2) @ g
      got = _leaf_matrices(path, updates[path])
      tolerance = 3 * LOOSE[dtype]  # P^T P is I within that
      np.testing.assert_allclose(got, p @ mean[path], atol=tolerance)
      old[path] = p


def test_bytes():
  params = cases.tree(PLAIN)

  def basis(dtype, rank=6):
    tx = so.project(_spec(dtype, rank), projectors.svd(2))
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


def _train(put, params):
  """Returns parameters and state after steps on gradients, put somewhere."""
  tx = _adam('int4', projectors.stiefel(3, stagger=True))

  def step(params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state = tx.init(params)
  run = cases.jit(step, donate_argnums=(0, 1))
  places = [x.sharding for x in jax.tree.leaves(state)]
  types = measure.types(state)
  for t in range(4):
    params, state = run(params, state, put(_gradients(t)))
  for place, x in zip(places, jax.tree.leaves(state), strict=True):
    assert place.is_equivalent_to(x.sharding, x.ndim)
  assert run._cache_size() == 1
  assert measure.types(state) == types
  return params, state


@functools.cache
def _trained_alone():
  return _train(lambda x: x, cases.tree(PLAIN))


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_steps_on_a_mesh(kind):
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

  tx = _adam('int4', projectors.stiefel(3, stagger=True))

  with jax.set_mesh(mesh):
    params = put(cases.tree(PLAIN))
    wanted = so.state_sharding(tx, params)
    for place, x in zip(
      jax.tree.leaves(wanted), jax.tree.leaves(tx.init(params)), strict=True
    ):
      assert place.is_equivalent_to(x.sharding, x.ndim)
    both = _train(put, params)
  w = ref.bases(both[1])['w'].codes
  assert math.prod(w.sharding.shard_shape(w.shape)) * 4 == w.size
  for one, other in zip(
    *map(jax.tree.leaves, (_trained_alone(), both)), strict=True
  ):
    one, other = (_float64(jnp.asarray(x)) for x in (one, other))
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_int8_and_int4_train_as_well_as_float32():
  keys = jax.random.split(jax.random.key(3), 3)
  x = jax.random.normal(keys[0], (256, 48)) * 0.93 ** jnp.arange(48.0)[None]
  target = jax.random.normal(keys[1], (48, 64)) * 0.9 ** jnp.arange(64.0)[None]
  y = x @ target + 0.5 * jax.random.normal(keys[2], (256, 64))

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

    params = {'w': jnp.zeros((48, 64))}
    start = params, tx.init(params)
    (params, _), values = cases.jit(
      lambda c: jax.lax.scan(step, c, length=200)
    )(start)
    return float(values[0]), float(loss(params))

  first, last = train(jnp.float32)
  assert last < 0.3 * first
  np.testing.assert_allclose(train(jnp.int8), (first, last), rtol=0.01)
  np.testing.assert_allclose(train(jnp.int4), (first, last), rtol=0.04)


@every_dtype
def test_compressed_steps_take_the_stored_bases(dtype):
  spec = so.SubspaceSpec(3, side='in', basis_dtype=dtype)
  tx = so.subspace(
    spec,
    projectors.stiefel(2),
    optax.trace(0.9),
    transport='first',
    after=optax.scale(-0.1),
  )
  x = jax.random.normal(jax.random.key(0), (5, 16))
  loss = lambda params: jnp.mean(so.rso.dot(x, params['w']) ** 2)
  params = {'w': jax.random.normal(jax.random.key(1), (16, 24))}
  compressed = cases.jit(so.rso.compressed_step(loss, tx))

  @cases.jit
  def plain(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  one = other = params, tx.init(params)
  for _ in range(3):
    one, other = compressed(*one)[:2], plain(*other)
  np.testing.assert_allclose(one[0]['w'], other[0]['w'], rtol=1e-5, atol=1e-6)
  assert np.abs(one[0]['w'] - params['w']).sum() > 0.1


@every_dtype
def test_ranks_grow_and_shrink_and_codes_stay(dtype):
  paths = ('w', 'layers')
  part = lambda tree: {path: tree[path] for path in paths}
  params = part(cases.tree(PLAIN))
  tx, large, small = (_adam(dtype, rank=r) for r in (6, 9, 4))
  state = tx.init(params)
  _, state = cases.jit(tx.update)(part(_gradients(0)), state, params)
  grown = so.resize_rank(large, state, params)
  cut = so.resize_rank(small, state, params)
  again = so.resize_rank(tx, grown, params)
  assert measure.types(grown) == measure.types(large.init(params))
  for path in paths:
    old, more, less, same = (
      ref.bases(s)[path] for s in (state, grown, cut, again)
    )
    for i in range(2):
      codes = _float64(old[i])
      np.testing.assert_array_equal(_float64(more[i])[..., :6], codes)
      np.testing.assert_array_equal(_float64(less[i]), codes[..., :4])
      np.testing.assert_array_equal(_float64(same[i]), codes)
    wide = _decode(path, more)
    assert (_orthogonality(wide) < LOOSE[dtype]).all()
    turned = np.linalg.norm(wide[..., :6] - _decode(path, old))
    assert turned < OFF[dtype] * np.linalg.norm(wide[..., :6])


@every_dtype
def test_state_is_saved_restored_and_mapped(dtype, tmp_path):
  params = cases.tree(PLAIN)
  tx = _adam(dtype)
  state = tx.init(params)
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
  params = cases.tree(PLAIN)
  state = _adam('int8').init(params)
  with errors.raises(ValueError, 'int8', 'int4', 'basis_dtype', 'basis/heads'):
    so.resize_rank(_adam('int4'), state, params)
  with errors.raises(ValueError, 'basis in int8', 'array'):
    so.resize_rank(_adam('float32'), state, params)
