"""The battery: what every optimizer of this library keeps, whatever it does.

Each point of the grid runs on one tree of plain, stacked and attention kernels
in float32 and bfloat16, at ranks below and above the short side: jit, scan,
vmap and donation, a stable state, bases and updates of the stated rank, state
bytes by formula, randomness, convergence, and optax's own contrib properties.
"""

import functools
import os
import subprocess
import sys
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import subspace_optax as so
from subspace_optax import projectors

every_case = pytest.mark.parametrize('name', cases.CASES)
# The ready-made optimizers.
READY = ('galore', 'golore', 'golore_late', 'online')
every_ready = pytest.mark.parametrize('name', READY)

_READY_MADE = {  # factory, arguments, static ones for inject_hyperparams
  'galore': (so.galore, dict(rank=3, update_proj_gap=2), ('rank',)),
  'golore': (
    so.golore,
    dict(rank=3, update_proj_gap=2),
    ('rank', 'random_from'),
  ),
  'golore_late': (
    so.golore,
    dict(rank=3, update_proj_gap=2, random_from=3),
    ('rank', 'random_from'),
  ),
  'online': (so.online_subspace_descent, dict(rank=3), ('rank',)),
}


def _tolerance(*dtypes):
  return 2e-2 if jnp.bfloat16 in [jnp.dtype(d) for d in dtypes] else 2e-5


@every_case
def test_one_compilation_serves_every_step(name):
  assert cases.run(name).compilations == 1


@every_case
def test_params_and_fresh_state_are_donated_together(name):
  donated = cases.run(name).donated
  assert donated and all(donated)


@every_case
def test_state_keeps_structure_dtype_and_weak_type(name):
  run = cases.run(name)
  assert cases.types(run.first_state) == cases.types(run.last_state)
  branch = lambda flag: lax.cond(
    flag, lambda: run.first_state, lambda: run.last_state
  )
  jax.eval_shape(branch, True)


@every_case
def test_state_has_arrays_only_and_none_empty(name):
  run = cases.run(name)
  for state in (run.first_state, run.last_state):
    for path, x in jax.tree.leaves_with_path(state):
      assert isinstance(x, jax.Array), path
      assert x.size > 0, path


@every_case
def test_state_bytes_follow_the_formula(name):
  nbytes = sum(x.nbytes for x in jax.tree.leaves(cases.run(name).last_state))
  assert nbytes == cases.state_bytes(name, cases.LEAVES)


@every_case
def test_bases_have_the_stated_shape_and_are_orthonormal(name):
  case, run = cases.CASES[name], cases.run(name)
  of = cases.projected(name, cases.LEAVES)
  # Learned bases are held near orthonormal by a penalty only.
  tolerance = 0.5 if case.bases == 3 else _tolerance(case.basis_dtype)
  tolerance = 0.2 if name.startswith('online_lion') else tolerance
  for state in run.states:
    found = cases.bases(state)
    assert found.keys() == of.keys()
    for path, basis in found.items():
      e = of[path]
      assert basis.shape == e.basis_shape, path
      assert basis.dtype == case.basis_dtype, path
      p = cases.as_bases(cases.LEAVES[path], e.project_rows, basis)
      assert p.shape == (e.matrices, e.m, e.rank)
      gram = np.swapaxes(p, 1, 2) @ p
      eye = np.broadcast_to(np.eye(e.rank), gram.shape)
      np.testing.assert_allclose(gram, eye, atol=tolerance, err_msg=path)


@every_case
def test_bases_move_when_they_should(name):
  case, run = cases.CASES[name], cases.run(name)
  for t, moves in enumerate(case.moves):
    old, new = cases.bases(run.states[t]), cases.bases(run.states[t + 1])
    for path, e in cases.projected(name, cases.LEAVES).items():
      leaf = cases.LEAVES[path]
      p = cases.as_bases(leaf, e.project_rows, old[path])
      q = cases.as_bases(leaf, e.project_rows, new[path])
      moved = (p != q).any(axis=(1, 2))
      assert moved.all() if moves == 'x' else not moved.any(), (t, path)


@every_case
def test_updates_have_the_rank_and_span_of_the_basis(name):
  case, run = cases.CASES[name], cases.run(name)
  for path, e in cases.projected(name, cases.LEAVES).items():
    leaf = cases.LEAVES[path]
    loose = _tolerance(leaf.dtype, case.basis_dtype)
    for t, update in enumerate(run.updates):
      u = cases.as_matrices(leaf, e.project_rows, cases.flat(update)[path])
      values = np.linalg.svd(u, compute_uv=False)
      strong = values > loose * values[:, :1]
      where = f'{path} at step {t}'
      assert (values[:, 0] > 1e-4).all(), where
      assert (strong.sum(-1) == e.rank).all(), where
      state = run.states[t + 1 if case.used[t] == 'new' else t]
      basis = cases.bases(state)[path]
      p = cases.as_bases(leaf, e.project_rows, basis)
      inside = p @ np.linalg.pinv(p) @ u
      np.testing.assert_allclose(
        inside, u, atol=loose * values.max(), err_msg=where
      )


@every_case
def test_updates_have_the_shape_and_dtype_of_the_parameter(name):
  for update in cases.run(name).updates:
    for path, x in cases.flat(update).items():
      leaf = cases.LEAVES[path]
      assert (x.shape, x.dtype) == (leaf.shape, leaf.dtype), path
      assert np.isfinite(np.asarray(x, np.float32)).all(), path


@every_case
def test_plain_leaves_get_what_the_inner_optimizer_gives(name):
  run = cases.run(name)
  plain = cases.LEAVES.keys() - cases.projected(name, cases.LEAVES).keys()
  assert {'bias', 'embed'} <= plain
  for update, alone in zip(run.updates, run.plain_updates, strict=True):
    for path in plain:
      got = np.asarray(cases.flat(update)[path], np.float32)
      wanted = np.asarray(alone[path], np.float32)
      np.testing.assert_allclose(got, wanted, rtol=1e-6, err_msg=path)


# The other cases use these projectors and transports, too.
@pytest.mark.parametrize(
  'name',
  [name for name in cases.CASES if name not in ('golore', 'stiefel_sgd')],
)
def test_vmap_over_replicas_equals_each_alone(name):
  small = cases.small(name)
  stack = lambda *x: jnp.stack(x)
  params = [cases.tree(cases.SMALL, i) for i in (0, 1)]
  gradients = [
    [cases.tree(cases.SMALL, 10 * i + t) for t in range(3)] for i in (1, 2)
  ]
  both = jax.tree.map(stack, *params)
  state = jax.vmap(small.tx.init)(both)
  update = cases.jit(jax.vmap(small.tx.update))
  for t in range(3):
    pair = jax.tree.map(stack, *[g[t] for g in gradients])
    updates, state = update(pair, state, both)
    both = optax.apply_updates(both, updates)
  for i in (0, 1):
    start = params[i], small.tx.init(params[i])
    alone = small.run(gradients[i], start)[-1][:2]
    replica = jax.tree.map(lambda x, i=i: x[i], (both, state))
    cases.assert_trees_close(replica, alone, rtol=2e-4, atol=2e-5)


@every_case
def test_init_works_on_shapes_and_under_jit(name):
  tx = cases.small(name).tx
  params, state = cases.small(name).init()
  shapes = jax.eval_shape(lambda: params)
  cases.assert_trees_close(tx.init(shapes), state)
  assert cases.types(tx.init(shapes)) == cases.types(state)
  traced = jax.eval_shape(tx.init, params)
  assert cases.types(traced)[1] == cases.types(state)[1]
  assert jax.tree.structure(traced) == jax.tree.structure(state)


@pytest.mark.parametrize('name', ['galore', 'online'])
def test_jitted_init_equals_eager_init(name):
  params, state = cases.small(name).init()
  jitted = jax.jit(cases.small(name).tx.init)(params)
  cases.assert_trees_close(jitted, state, rtol=1e-5, atol=1e-6)
  assert cases.types(jitted) == cases.types(state)


@every_case
def test_map_params_sees_bases_and_moments_with_extra_trees(name):
  tx = cases.small(name).tx
  params, state = cases.small(name).init()
  doubled = optax.tree.map_params(tx, lambda x: x + x, state)
  assert cases.types(doubled) == cases.types(state)
  assert jax.tree.structure(doubled) == jax.tree.structure(state)
  case = cases.CASES[name]
  seen = []

  def visit(x, path):
    seen.append((path, getattr(x, 'shape', None)))
    return x

  # As with `optax.masked`, plain leaves of a basis are masked nodes.
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  paths = cases.nest({path: path for path in cases.SMALL})
  same = optax.tree.map_params(tx, visit, state, paths, is_leaf=is_masked)
  assert jax.tree.structure(same) == jax.tree.structure(state)
  e = cases.projected(name, cases.SMALL)['up']
  coords = (3, e.rank, 12) if e.project_rows else (3, 8, e.rank)
  assert seen.count(('up', e.basis_shape)) == case.bases
  assert seen.count(('up', coords)) == case.moments
  assert seen.count(('bias', (12,))) == case.moments


@functools.cache
def _constant_rate(name):
  """Returns five steps of a ready-made optimizer, and their gradients."""
  factory, kwargs, _ = _READY_MADE[name]
  gradients = [cases.tree(cases.SMALL, 30 + t) for t in range(5)]
  tx = factory(0.02, weight_decay=0.1, **kwargs)
  return cases.compiled(tx).run(gradients), gradients


def _assert_same_steps(got, wanted):
  for (params, state, updates), (wanted_params, wanted_state, _) in zip(
    got, wanted, strict=True
  ):
    cases.assert_trees_close(params, wanted_params, rtol=1e-4, atol=1e-5)
    cases.assert_trees_close(
      cases.bases(state), cases.bases(wanted_state), rtol=1e-4, atol=1e-5
    )
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@every_ready
def test_injected_hyperparameters_equal_constants(name):
  factory, kwargs, static = _READY_MADE[name]
  wanted, gradients = _constant_rate(name)
  injected = optax.inject_hyperparams(factory, static_args=static)
  small = cases.compiled(
    injected(learning_rate=0.02, weight_decay=0.1, **kwargs)
  )
  got = small.run(gradients)
  _assert_same_steps(got, wanted)
  np.testing.assert_allclose(
    got[-1][1].hyperparams['learning_rate'], 0.02, rtol=1e-6
  )
  assert small.update._cache_size() == 1


@every_ready
def test_constant_schedule_equals_scalar(name):
  factory, kwargs, _ = _READY_MADE[name]
  wanted, gradients = _constant_rate(name)
  schedule = optax.constant_schedule(0.02)
  small = cases.compiled(factory(schedule, weight_decay=0.1, **kwargs))
  _assert_same_steps(small.run(gradients), wanted)
  assert small.update._cache_size() == 1


@every_case
def test_converges_on_a_problem_of_low_rank(name):
  case, small = cases.CASES[name], cases.small(name)
  rng = np.random.default_rng(7)
  left, right = rng.standard_normal((3, 8, 2)), rng.standard_normal((3, 2, 12))
  target = {'up': left @ right / 4.0, 'bias': rng.standard_normal(12)}
  target = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), target)
  params = jax.tree.map(jnp.zeros_like, target)
  state = small.tx.init(params)
  loss = lambda p: sum(
    float(np.mean(np.square(np.asarray(p[k]) - np.asarray(target[k]))))
    for k in target
  )
  start = loss(params)
  for _ in range(300):
    gradient = jax.tree.map(lambda p, t: p - t, params, target)
    updates, state = small.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  assert loss(params) < case.loss * start, (loss(params), start)


@pytest.mark.parametrize(
  'name', [name for name in cases.CASES if 'online' not in name]
)
def test_factorisations_stay_inside_an_unbatched_cond(name):
  tx = cases.CASES[name].make(cases.LEAVES)
  params = jax.eval_shape(lambda: cases.tree(cases.LEAVES))
  state = jax.eval_shape(tx.init, params)
  jaxpr = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
  places = [
    inside
    for eqn, inside in cases.equations(jaxpr)
    if eqn.primitive.name in cases.FACTORISATIONS
  ]
  assert len(places) >= len(cases.projected(name, cases.LEAVES))
  assert all(places)


def test_stacked_matrices_share_one_factorisation():
  tx = cases.CASES['galore'].make(cases.SMALL)
  params = jax.eval_shape(lambda: cases.tree(cases.SMALL))
  state = jax.eval_shape(tx.init, params)
  jaxpr = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
  names = [eqn.primitive.name for eqn, _ in cases.equations(jaxpr)]
  assert names.count('svd') == 1


def test_online_pca_compiles_to_no_factorisation():
  small = cases.small('online')
  params, state = small.init()
  text = small.update.lower(params, state, params).compile().as_text()
  for word in ('potrf', 'gesdd', 'syev', 'geqrf', 'cholesky', 'triangular'):
    assert word not in text, word


@every_case
def test_small_algebra_runs_in_float32_at_highest_precision(name):
  # The gradients' two sides, 10 and 14, appear in no other shape.
  leaves = {'w': cases.Leaf((2, 10, 14), jnp.bfloat16, (1,), (2,))}
  tx = cases.CASES[name].make(leaves)
  params = jax.eval_shape(lambda: cases.tree(leaves))
  state = jax.eval_shape(tx.init, params)
  jaxpr = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
  whole = lambda var: {10, 14} <= set(var.aval.shape)
  checked = 0
  for eqn, _ in cases.equations(jaxpr):
    kind = eqn.primitive.name
    if kind in (*cases.FACTORISATIONS, 'triangular_solve'):
      assert all(v.aval.dtype == jnp.float32 for v in eqn.invars), kind
      checked += 1
    if kind != 'dot_general' or any(map(whole, (*eqn.invars, *eqn.outvars))):
      continue
    # Moments of another dtype are widened by the product itself.
    assert any(v.aval.dtype == jnp.float32 for v in eqn.invars)
    assert eqn.outvars[0].aval.dtype == jnp.float32
    precision = eqn.params['precision']
    assert precision is not None, eqn
    assert set(precision) == {lax.Precision.HIGHEST}, eqn
    checked += 1
  assert checked


def _as(tree, dtype):
  shapes = lambda x: jax.ShapeDtypeStruct(x.shape, dtype)
  return jax.tree.map(shapes, tree)


@every_case
@pytest.mark.parametrize(
  'of_params, of_gradients',
  [
    ('float32', 'bfloat16'),
    ('bfloat16', 'float32'),
    ('bfloat16', 'bfloat16'),
    ('float16', 'float16'),
    ('float64', 'float64'),
    ('float64', 'float32'),
  ],
)
def test_any_dtypes_of_parameters_and_gradients(name, of_params, of_gradients):
  case = cases.CASES[name]
  tx = case.make(cases.SMALL)
  with jax.enable_x64('float64' in (of_params, of_gradients)):
    params = _as(cases.tree(cases.SMALL), of_params)
    gradients = _as(cases.tree(cases.SMALL), of_gradients)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    # An optimizer of one's own may still let a plain leaf's dtype change.
    assert updates['up'].dtype == of_params
    assert cases.types(after) == cases.types(state)
    assert cases.bases(state)['up'].dtype == case.basis_dtype


@pytest.mark.parametrize('transport', ['keep', 'first', 'reset'])
def test_dtypes_of_basis_and_moments_are_their_own(transport):
  spec = so.SubspaceSpec(3, basis_dtype=jnp.bfloat16, moment_dtype=jnp.float16)
  tx = so.subspace(
    spec, projectors.svd(2), optax.scale_by_adam(), transport=transport
  )
  params = cases.tree(cases.SMALL)
  small = cases.compiled(tx)
  _, state, updates = small.run([params] * 3)[-1]
  assert cases.types(state) == cases.types(small.init()[1])
  moments = [x for x in jax.tree.leaves(state) if x.shape == (3, 3, 12)]
  assert [x.dtype for x in moments] == [jnp.float16] * 2
  assert cases.bases(state)['up'].dtype == jnp.bfloat16
  for x in jax.tree.leaves(updates):
    assert x.dtype == jnp.float32
    assert np.isfinite(np.asarray(x)).all()
  p = np.asarray(cases.bases(state)['up'], np.float32)
  eye = np.broadcast_to(np.eye(3), (3, 3, 3))
  np.testing.assert_allclose(np.swapaxes(p, 1, 2) @ p, eye, atol=2e-2)


@pytest.mark.parametrize('name', ['galore', 'golore_late', 'online'])
def test_gradients_of_half_precision_give_nearly_the_same_steps(name):
  small = cases.small(name)
  gradients = [cases.tree(cases.SMALL, 90 + t) for t in range(5)]
  # The same numbers, since bfloat16 rounds once only.
  half = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), g) for g in gradients]
  rounded = [jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in half]
  wanted = small.run(rounded)
  got = cases.compiled(small.tx).run(half)
  for (params, state, _), (wanted_params, wanted_state, _) in zip(
    got, wanted, strict=True
  ):
    p = np.asarray(cases.bases(state)['up'])
    q = np.asarray(cases.bases(wanted_state)['up'])
    # Random and learned bases hardly notice; singular vectors come from the
    # same numbers.
    np.testing.assert_allclose(p, q, atol=2e-2)
    cases.assert_trees_close(params, wanted_params, atol=2e-2)


def _first_bases(path, seed, shape=(3, 8, 12)):
  tx = so.project(so.SubspaceSpec(3, seed=seed), projectors.stiefel(2))
  params = cases.nest({path: jnp.ones(shape)})
  return np.asarray(cases.bases(tx.init(params))[path])


def test_bases_differ_by_path_layer_and_seed():
  basis = _first_bases('a/up', 0)
  np.testing.assert_array_equal(basis, _first_bases('a/up', 0))
  for other in (_first_bases('b/up', 0), _first_bases('a/up', 1)):
    for p in basis:
      for q in other:
        assert np.linalg.norm(p.T @ q) < 1.6  # sqrt(3) if they agreed
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert np.linalg.norm(basis[i].T @ basis[j]) < 1.6


def test_random_bases_differ_by_period():
  run = cases.run('golore')
  found = [cases.bases(run.states[t])['tall'] for t in (0, 1, 3, 5)]
  for i, p in enumerate(found):
    for q in found[:i]:
      assert np.linalg.norm(p.T @ q) < 1.7


_FRESH_PROCESS = """
import zlib, jax.numpy as jnp, numpy as np, subspace_optax as so
state = so.golore(1e-3, rank=3).init({'blocks': {'up': jnp.ones((3, 8, 12))}})
basis = state[0][0].subspaces.basis['blocks']['up']
seed = state[0][0].seed['blocks']['up']
print(zlib.crc32(np.asarray(basis).tobytes() + np.asarray(seed).tobytes()))
"""


def test_bases_are_the_same_in_another_process():
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  path = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH'))))
  env = dict(
    os.environ, PYTHONHASHSEED='4321', JAX_PLATFORMS='cpu', PYTHONPATH=path
  )
  done = subprocess.run(
    [sys.executable, '-c', _FRESH_PROCESS],
    env=env,
    capture_output=True,
    text=True,
    check=True,
    timeout=300,
  )
  state = so.golore(1e-3, rank=3).init({'blocks': {'up': jnp.ones((3, 8, 12))}})
  own = cases.project_state(state)
  basis, seed = own.subspaces.basis, own.seed
  data = [np.asarray(x['blocks']['up']).tobytes() for x in (basis, seed)]
  assert int(done.stdout) == zlib.crc32(b''.join(data))


@pytest.mark.parametrize(
  'name, mask',
  [
    ('galore', None),
    ('golore', {'up': True, 'bias': False}),
    ('golore_late', lambda params: {'up': False, 'bias': True}),
    ('online', None),
  ],
)
def test_weight_decay_is_decoupled_masked_and_not_scaled(name, mask):
  factory, kwargs, _ = _READY_MADE[name]
  params = cases.tree(cases.SMALL)
  gradients = [cases.tree(cases.SMALL, 50 + t) for t in range(2)]

  @cases.jit
  def second_update(weight_decay, scale):
    tx = factory(
      0.02, scale=scale, weight_decay=weight_decay, mask=mask, **kwargs
    )
    state = tx.init(params)
    _, state = tx.update(gradients[0], state, params)
    return tx.update(gradients[1], state, params)[0]

  decays = mask(params) if callable(mask) else mask
  for scale in (1.0, 0.25):
    without = second_update(0.0, scale)
    decayed = second_update(0.1, scale)
    for path in cases.SMALL:
      by_decay = np.asarray(decayed[path]) - np.asarray(without[path])
      share = 0.1 if decays is None or decays[path] else 0.0
      wanted = -0.02 * share * np.asarray(params[path])
      np.testing.assert_allclose(by_decay, wanted, rtol=1e-3, atol=1e-6)
  # While `scale` scales the subspace's part of the update, and only that.
  whole, quarter = second_update(0.0, 1.0), second_update(0.0, 0.25)
  np.testing.assert_allclose(
    quarter['up'], 0.25 * whole['up'], rtol=1e-5, atol=1e-8
  )
  np.testing.assert_allclose(quarter['bias'], whole['bias'], rtol=1e-6)
