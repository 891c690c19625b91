"""The battery: what every optimizer of this library keeps, whatever it does.

Each point of the grid runs on one tree of plain, stacked and attention kernels
in float32 and bfloat16, at ranks below and above the short side: jit, scan,
vmap and donation, a stable state, bases and updates of the stated rank, state
bytes by formula, randomness, convergence, and optax's own contrib properties.
"""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import grid
import measure
import subspace_optax as so


def cases_but(*left_out):
  """Returns all cases for `parametrize`; some only run with `--full`."""
  return grid.but(cases.CASES, left_out)


# Both GoLores have one factory, and the late one runs all of it.
every_case = pytest.mark.parametrize('name', cases_but('golore'))

_READY_MADE = {  # factory, arguments
  'galore': (so.galore, dict(rank=3, update_proj_gap=2)),
  'golore': (so.golore, dict(rank=3, update_proj_gap=2)),
  'golore_late': (so.golore, dict(rank=3, update_proj_gap=2, random_from=3)),
  'online': (so.online_subspace_descent, dict(rank=3)),
}


def _tolerance(*dtypes):
  return 2e-2 if jnp.bfloat16 in [jnp.dtype(d) for d in dtypes] else 2e-5


@every_case
def test_one_compilation_serves_every_step(name):
  assert measure.run(name).compilations == 1


@every_case
def test_params_and_fresh_state_are_donated_together(name):
  donated = measure.run(name).donated
  assert donated and all(donated)


@every_case
def test_state_keeps_structure_dtype_and_weak_type(name):
  run = measure.run(name)
  assert measure.types(run.first_state) == measure.types(run.last_state)
  branch = lambda flag: lax.cond(
    flag, lambda: run.first_state, lambda: run.last_state
  )
  jax.eval_shape(branch, True)


@every_case
def test_state_has_arrays_only_and_none_empty(name):
  run = measure.run(name)
  for state in (run.first_state, run.last_state):
    for path, x in jax.tree.leaves_with_path(state):
      assert isinstance(x, jax.Array), path
      assert x.size > 0, path


@every_case
def test_state_bytes_follow_the_formula(name):
  nbytes = sum(x.nbytes for x in jax.tree.leaves(measure.run(name).last_state))
  assert nbytes == cases.state_bytes(name, cases.LEAVES)


@every_case
def test_bases_have_the_stated_shape_and_are_orthonormal(name):
  case, run = cases.CASES[name], measure.run(name)
  of = cases.projected(name, cases.LEAVES)
  # Learned bases are held near orthonormal by a penalty only.
  tolerance = 0.5 if case.bases == 3 else _tolerance(case.basis_dtype)
  tolerance = 0.2 if name.startswith('online_lion') else tolerance
  for state in run.states:
    found = measure.bases(state)
    assert found.keys() == of.keys()
    for path, basis in found.items():
      e = of[path]
      assert basis.shape == e.view.basis_shape(e.rank), path
      assert basis.dtype == case.basis_dtype, path
      p = e.view.bases(basis)
      assert p.shape == (e.view.count, e.view.m, e.rank)
      gram = np.swapaxes(p, 1, 2) @ p
      eye = np.broadcast_to(np.eye(e.rank), gram.shape)
      np.testing.assert_allclose(gram, eye, atol=tolerance, err_msg=path)


@every_case
def test_bases_move_when_they_should(name):
  case, run = cases.CASES[name], measure.run(name)
  for t, moves in enumerate(case.moves):
    old, new = measure.bases(run.states[t]), measure.bases(run.states[t + 1])
    for path, e in cases.projected(name, cases.LEAVES).items():
      p = e.view.bases(old[path])
      q = e.view.bases(new[path])
      moved = (p != q).any(axis=(1, 2))
      assert moved.all() if moves == 'x' else not moved.any(), (t, path)


@every_case
def test_updates_have_the_rank_and_span_of_the_basis(name):
  case, run = cases.CASES[name], measure.run(name)
  for path, e in cases.projected(name, cases.LEAVES).items():
    leaf = cases.LEAVES[path]
    loose = _tolerance(leaf.dtype, case.basis_dtype)
    for t, update in enumerate(run.updates):
      u = e.view.matrices(cases.flat(update)[path])
      values = np.linalg.svd(u, compute_uv=False)
      strong = values > loose * values[:, :1]
      where = f'{path} at step {t}'
      assert (values[:, 0] > 1e-4).all(), where
      assert (strong.sum(-1) == e.rank).all(), where
      state = run.states[t + 1 if case.used[t] == 'new' else t]
      basis = measure.bases(state)[path]
      p = e.view.bases(basis)
      inside = p @ np.linalg.pinv(p) @ u
      np.testing.assert_allclose(
        inside, u, atol=loose * values.max(), err_msg=where
      )


@every_case
def test_updates_have_the_shape_and_dtype_of_the_parameter(name):
  for update in measure.run(name).updates:
    for path, x in cases.flat(update).items():
      leaf = cases.LEAVES[path]
      assert (x.shape, x.dtype) == (leaf.shape, leaf.dtype), path
      assert np.isfinite(np.asarray(x, np.float32)).all(), path


@every_case
def test_plain_leaves_get_what_the_inner_optimizer_gives(name):
  run = measure.run(name)
  plain = cases.LEAVES.keys() - cases.projected(name, cases.LEAVES).keys()
  assert {'bias', 'embed'} <= plain
  for update, alone in zip(run.updates, run.plain_updates, strict=True):
    for path in plain:
      got = np.asarray(cases.flat(update)[path], np.float32)
      wanted = np.asarray(alone[path], np.float32)
      # Pieces are rounded to bfloat16 twice, behind the learning rate again.
      narrow = cases.LEAVES[path].dtype == jnp.bfloat16
      rtol = 2**-7 if narrow else 1e-6
      np.testing.assert_allclose(got, wanted, rtol, err_msg=path)


# One for each way to find bases and to carry moments that batching may change:
# Gram matrices, an SVD and online PCA in turn, PCA alone, and random bases.
@pytest.mark.parametrize(
  'name',
  cases_but(
    'galore', 'golore', 'golore_late', 'online', 'randomized_rms_first'
  ),
)
def test_vmap_over_replicas_equals_each_alone(name):
  small = measure.small(name)
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
    measure.assert_trees_close(replica, alone, rtol=2e-4, atol=2e-5)


@every_case
def test_init_works_on_shapes_and_under_jit(name):
  tx = measure.small(name).tx
  params, state = measure.small(name).init()
  shapes = jax.eval_shape(lambda: params)
  measure.assert_trees_close(tx.init(shapes), state)
  assert measure.types(tx.init(shapes)) == measure.types(state)
  traced = jax.eval_shape(tx.init, params)
  assert measure.types(traced)[1] == measure.types(state)[1]
  assert jax.tree.structure(traced) == jax.tree.structure(state)


@pytest.mark.parametrize('name', ['galore', 'online'])
def test_jitted_init_equals_eager_init(name):
  params, state = measure.small(name).init()
  jitted = jax.jit(measure.small(name).tx.init)(params)
  measure.assert_trees_close(jitted, state, rtol=1e-5, atol=1e-6)
  assert measure.types(jitted) == measure.types(state)


@every_case
def test_map_params_sees_bases_and_moments_with_extra_trees(name):
  tx = measure.small(name).tx
  params, state = measure.small(name).init()
  doubled = optax.tree.map_params(tx, lambda x: x + x, state)
  assert measure.types(doubled) == measure.types(state)
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
  coords = (3, e.rank, 12) if e.view.left else (3, 8, e.rank)
  assert seen.count(('up', e.view.basis_shape(e.rank))) == case.bases
  assert seen.count(('up', coords)) == case.moments
  assert seen.count(('bias', (12,))) == case.moments


# `test_traced_floats_equal_constants` has a schedule against traced numbers.
@pytest.mark.parametrize('name', ['galore', 'online'])
def test_constant_schedule_equals_scalar(name):
  factory, kwargs = _READY_MADE[name]
  gradients = [cases.tree(cases.SMALL, 30 + t) for t in range(5)]
  make = lambda rate: measure.compiled(
    factory(rate, weight_decay=0.1, **kwargs)
  )
  small = make(optax.constant_schedule(0.02))
  for (params, state, updates), (wanted_params, wanted_state, _) in zip(
    small.run(gradients), make(0.02).run(gradients), strict=True
  ):
    measure.assert_trees_close(params, wanted_params, rtol=1e-4, atol=1e-5)
    measure.assert_trees_close(
      measure.bases(state), measure.bases(wanted_state), rtol=1e-4, atol=1e-5
    )
    assert jax.tree.structure(updates) == jax.tree.structure(params)
  assert small.update._cache_size() == 1


@every_case
def test_converges_on_a_problem_of_low_rank(name):
  case, small = cases.CASES[name], measure.small(name)
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
  paths = ('experts/up', 'attention/out', 'bias')
  leaves = {path: cases.LEAVES[path] for path in paths}
  tx = cases.CASES[name].make(leaves)
  params = jax.eval_shape(lambda: cases.tree(leaves))
  state = jax.eval_shape(tx.init, params)
  jaxpr = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
  places = [
    inside
    for eqn, inside in measure.equations(jaxpr)
    if eqn.primitive.name in measure.FACTORISATIONS
  ]
  assert len(places) >= len(cases.projected(name, leaves)) == 2
  assert all(places)


def test_stacked_matrices_share_one_factorisation():
  tx = cases.CASES['galore'].make(cases.SMALL)
  params = jax.eval_shape(lambda: cases.tree(cases.SMALL))
  state = jax.eval_shape(tx.init, params)
  jaxpr = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
  names = [eqn.primitive.name for eqn, _ in measure.equations(jaxpr)]
  assert names.count('svd') == 1


def test_online_pca_compiles_to_no_factorisation():
  small = measure.small('online')
  params, state = small.init()
  text = small.update.lower(params, state, params).compile().as_text()
  for word in ('potrf', 'gesdd', 'syev', 'geqrf', 'cholesky', 'triangular'):
    assert word not in text, word


@pytest.mark.parametrize(
  'name, mask',
  [
    ('galore', {'up': True, 'bias': False}),
    ('golore', lambda params: {'up': False, 'bias': True}),
    ('online', None),
  ],
)
def test_weight_decay_is_decoupled_masked_and_not_scaled(name, mask):
  factory, kwargs = _READY_MADE[name]
  params, gradient = cases.tree(cases.SMALL), cases.tree(cases.SMALL, 50)

  @cases.jit
  def update(weight_decay, scale):
    tx = factory(
      0.02, scale=scale, weight_decay=weight_decay, mask=mask, **kwargs
    )
    return tx.update(gradient, tx.init(params), params)[0]

  decays = mask(params) if callable(mask) else mask
  for scale in (1.0, 0.25):
    without = update(0.0, scale)
    decayed = update(0.1, scale)
    for path in cases.SMALL:
      by_decay = np.asarray(decayed[path]) - np.asarray(without[path])
      share = 0.1 if decays is None or decays[path] else 0.0
      wanted = -0.02 * share * np.asarray(params[path])
      np.testing.assert_allclose(by_decay, wanted, rtol=1e-3, atol=1e-6)
  # While `scale` scales the subspace's part of the update, and only that.
  whole, quarter = update(0.0, 1.0), update(0.0, 0.25)
  np.testing.assert_allclose(
    quarter['up'], 0.25 * whole['up'], rtol=1e-5, atol=1e-8
  )
  np.testing.assert_allclose(quarter['bias'], whole['bias'], rtol=1e-6)
