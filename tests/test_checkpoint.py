"""`so.checkpoint`: runs that go on on another mesh, rank or projector."""

import functools
import warnings

import flax
from flax import nnx
import flax.linen as nn
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
import grid
import measure
import subspace_optax as so
from subspace_optax import projectors
from subspace_optax.low_precision import _coded_state


def normal(*shape):
  x = np.random.default_rng(len(shape)).standard_normal(shape)
  return jnp.asarray(x, jnp.float32)


PARAMS = {
  'up': normal(12, 20),
  'layers': {'down': normal(2, 20, 12)},
  'bias': jnp.ones(12),
  'empty': jnp.zeros((0, 3)),
}
SPEC = functools.partial(so.SubspaceSpec, exclude='empty')


def saved(folder, tx, params=PARAMS):
  """Writes a run; returns its state."""
  state = measure.filled(tx, params)
  so.checkpoint.save(folder / 'run', tx, params, state, step=3)
  return state


def restored(folder, tx, params=PARAMS, **kwargs):
  """Returns the run, which must warn of just what it says.

  It can go on: its state is finite, and of the types of `tx.init`.
  """
  with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter('always')
    run = so.checkpoint.restore(folder / 'run', tx, params, **kwargs)
  told = [str(x.message) for x in told if 'checkpoint' in str(x.message)]
  assert len(told) == bool(run.changes)
  assert all(change in told[0] for change in run.changes)
  kind = lambda x: (x.shape, x.dtype, x.weak_type)
  init = jax.eval_shape(tx.init, params)
  assert jax.tree.map(kind, run.state) == jax.tree.map(kind, init)
  floats = [x for x in measure.values(run.state) if x.dtype.kind not in 'biu']
  assert all(np.isfinite(x.astype(np.float32)).all() for x in floats)
  return run


def assert_same(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  assert measure.types(got) == measure.types(wanted)
  measure.assert_trees_close(got, wanted, rtol=0, atol=0)


def takes_a_step(tx, run):
  updates, state = cases.jit(tx.update)(run.params, run.state, run.params)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
  return state


MAKE = {
  'online': lambda r: so.online_subspace_descent(0.1, spec=SPEC(r)),
  'apollo': lambda r: so.apollo_adamw(0.1, spec=SPEC(r)),
  'muon': lambda r: so.subspace_muon(0.1, spec=SPEC(r)),
  'coded': lambda r: so.galore(
    0.1, moment_bits=8, spec=SPEC(r, basis_dtype='int8')
  ),
  'wrapped': lambda r: optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.MultiSteps(so.golore(0.1, spec=SPEC(r)), 2),
    optax.ema(0.9),
  ),
  'adam': lambda r: optax.adam(0.1),
}


@pytest.mark.parametrize('name', MAKE)
def test_the_same_optimizer_gets_every_bit(name, tmp_path):
  tx, first = MAKE[name](4), dict(PARAMS)
  if name in ('apollo', 'coded', 'adam'):
    del first['empty']  # which no checkpoint has, so that the state is made
  state = saved(tmp_path, tx, first)
  run = restored(tmp_path, MAKE[name](4), first)
  assert run.step == 3 and not run.changes
  assert_same((run.params, run.state), (first, state))


@pytest.mark.parametrize(
  'name, old, new',
  [
    ('online', 2, 4),
    ('apollo', 4, 2),
    pytest.param('coded', 2, 4, marks=pytest.mark.full),
    ('coded', 4, 2),
    ('wrapped', 2, 4),
  ],
)
def test_another_rank_is_what_resize_rank_makes(name, old, new, tmp_path):
  state = saved(tmp_path, MAKE[name](old))
  tx = MAKE[name](new)
  run = restored(tmp_path, tx)
  assert_same(run.params, PARAMS)
  assert_same(run.state, so.resize_rank(tx, state, PARAMS))
  assert f'rank {old} -> {new} of layers/down, up' in run.changes


def test_one_leaf_of_another_rank(tmp_path):
  saved(tmp_path, MAKE['online'](4))
  rank = lambda path, leaf: 3 if path == 'up' else 4
  run = restored(tmp_path, so.online_subspace_descent(0.1, spec=SPEC(rank)))
  assert run.changes == ('rank 4 -> 3 of up',)
  assert {k: x.shape[-1] for k, x in measure.bases(run.state).items()} == {
    'up': 3,
    'layers/down': 4,
  }


def with_projector(projector, rank=4):
  return so.subspace(
    SPEC(rank), projector, optax.scale_by_adam(), transport='first'
  )


def test_a_projector_of_like_state_goes_on(tmp_path):
  """GaLore's SVD after Haar bases: all of the state stays, and that is said."""
  state = saved(tmp_path, with_projector(projectors.stiefel(2)))
  tx = with_projector(projectors.svd(5, method='exact'))
  run = restored(tmp_path, tx)
  (change,) = run.changes
  assert change.startswith('projector stiefel(update_proj_gap=2) -> svd(')
  assert change.endswith(' of layers/down, up')
  assert_same((run.params, run.state), (PARAMS, state))


def test_a_projector_with_another_state_keeps_basis_and_moments(tmp_path):
  """Online PCA after Haar bases, at a higher rank: its optimizer is new."""
  old = with_projector(projectors.stiefel(2))
  state = saved(tmp_path, old)
  make = functools.partial(
    with_projector, projectors.online_pca(optax.sgd(1e-3))
  )
  run = restored(tmp_path, make(4))
  got, was = run.state, state
  assert_same(got[0].subspaces.basis, was[0].subspaces.basis)
  assert_same(got[1], was[1])
  assert int(got[0].count) == int(was[0].count)
  assert_same(got[0].projector, make(4).init(PARAMS)[0].projector)
  assert "the projector's own state anew, opt_state/0/projector" in run.changes
  wider = restored(tmp_path, make(6))
  want = so.resize_rank(with_projector(projectors.stiefel(2), 6), state, PARAMS)
  close = functools.partial(measure.assert_trees_close, rtol=1e-5, atol=1e-6)
  # The columns that join are those that the new rule starts with.
  kept = jax.tree.map(lambda x: x[..., :4], wider.state[0].subspaces.basis)
  assert_same(kept, was[0].subspaces.basis)
  close(wider.state[1], want[1])
  takes_a_step(make(6), wider)


@pytest.mark.parametrize(
  'old, new',
  [
    (projectors.stiefel(2), projectors.stiefel(2, regenerate=True)),
    (projectors.dct(2), projectors.stiefel(2)),
    (projectors.gaussian(2), projectors.stiefel(2)),
  ],
)
def test_a_basis_that_can_not_stay_takes_its_moments_with_it(
  old, new, tmp_path
):
  state = saved(tmp_path, with_projector(old))
  tx = with_projector(new)
  run = restored(tmp_path, tx)
  assert 'basis and moments anew of layers/down, up' in run.changes
  moments, was = run.state[1].inner, state[1].inner
  for path in ('up', 'layers/down'):
    for moment in (moments.mu, moments.nu):
      assert not np.any(cases.flat(moment)[path])
    assert np.any(cases.flat(was.mu)[path])
  np.testing.assert_array_equal(moments.mu['bias'], was.mu['bias'])
  assert int(moments.count) == int(was.count)
  basis = run.state[0].subspaces.basis
  if jax.tree.leaves(basis):
    assert_same(basis, tx.init(PARAMS)[0].subspaces.basis)


def test_dtypes_of_moments_may_change(tmp_path):
  state = saved(tmp_path, MAKE['online'](4))
  spec = SPEC(4, moment_dtype=jnp.bfloat16)
  tx = so.online_subspace_descent(0.1, spec=spec)
  run = restored(tmp_path, tx)
  (change,) = run.changes
  assert change.startswith('float32 -> bfloat16 of opt_state/')
  assert_same(run.state, so.resize_rank(tx, state, PARAMS))


def test_moments_of_8_bits_in_4(tmp_path):
  make = lambda bits: so.golore(0.1, moment_bits=bits, spec=so.SubspaceSpec(16))
  params = {'w': jnp.ones((64, 256))}
  state = saved(tmp_path, make(8), params)
  run = restored(tmp_path, make(4), params)
  assert 'int8 -> int4 of opt_state/0/1/inner/coded/mu/w' in run.changes
  own = lambda state: _coded_state.decoded(state[0][1].inner)
  read = jax.jit(lambda state: own(state).mu['w'])
  one, other = map(np.asarray, (read(run.state), read(state)))
  np.testing.assert_allclose(one, other, rtol=0, atol=0.15 * abs(other).max())
  assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.98


@pytest.mark.parametrize(
  'kind, rank', grid.cover([AxisType.Auto, AxisType.Explicit], [3, 4], of=2)
)
def test_another_mesh_and_rank_in_one_call(rank, kind, tmp_path):
  params = {
    'w': normal(16, 32),
    'bias': jnp.ones(32),
  }
  specs = {'w': P('fsdp', 'tensor'), 'bias': P('tensor')}

  def shapes_on(sizes):
    mesh = jax.make_mesh(sizes, ('fsdp', 'tensor'), axis_types=(kind,) * 2)
    of = lambda k, x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, specs[k])
    )
    return {k: of(k, x) for k, x in params.items()}

  place = lambda x, like: jax.device_put(x, like.sharding)
  there, here = shapes_on((2, 2)), shapes_on((4, 1))
  tx, new = MAKE['online'](4), MAKE['online'](rank)
  own = jax.tree.map(place, params, there)
  state = saved(tmp_path, tx, own)
  run = restored(tmp_path, new, here)
  wanted = so.resize_rank(new, state, own) if rank != 4 else state
  measure.assert_trees_close(run.state, wanted, rtol=1e-5, atol=2e-6)
  placed = so.state_sharding(new, here)
  for x, s in zip(
    jax.tree.leaves((run.params, run.state)),
    jax.tree.leaves((jax.tree.map(lambda x: x.sharding, here), placed)),
    strict=True,
  ):
    assert x.sharding.is_equivalent_to(s, x.ndim)
  assert measure.bases(run.state)['w'].sharding.mesh.shape['fsdp'] == 4


def test_boxes_shapes_and_shardings(tmp_path):
  tx = MAKE['online'](4)
  model = nnx.Linear(16, 24, rngs=nnx.Rngs(0))
  params = nnx.state(model, nnx.Param)
  state = saved(tmp_path, tx, params)
  shapes = jax.eval_shape(lambda: params)
  host = so.state_sharding(tx, params, memory_kind='pinned_host')
  run = restored(tmp_path, tx, shapes, shardings=host)
  assert jax.tree.structure(run.state) == jax.tree.structure(state)
  measure.assert_trees_close((run.params, run.state), (params, state))
  kinds = jax.tree.map(lambda x: x.sharding.memory_kind, run.state)
  assert 'pinned_host' in jax.tree.leaves(kinds)
  # Names of axes and none: what is saved has no boxes.
  boxed = {'w': nn.Partitioned(jnp.ones((16, 24)), names=(None, None))}
  so.checkpoint.save(tmp_path / 'boxed', tx, boxed, tx.init(boxed))
  bare = {'w': jnp.ones((16, 24))}
  run = so.checkpoint.restore(tmp_path / 'boxed', tx, bare)
  assert_same((run.params, run.state), (bare, tx.init(bare)))


def test_a_training_step_and_an_orbax_checkpointer(tmp_path):
  loss = lambda params, x: jnp.mean((x @ params['w']) ** 2)
  train = so.train_step(loss, so.golore(0.1, rank=2))
  params = {'w': normal(8, 16)}
  with ocp.training.Checkpointer(tmp_path) as folder:
    with errors.raises(FileNotFoundError, 'no complete checkpoint'):
      so.checkpoint.restore(folder, train, params)
    state = train.init(params)
    step = jax.jit(train.step, donate_argnums=(0, 1))
    so.checkpoint.save(folder, train, params, state, step=0)
    params, state, _ = step(params, state, jnp.ones((4, 8)))
    so.checkpoint.save(folder, train, params, state, step=1)
  with ocp.training.Checkpointer(tmp_path) as folder:
    run = so.checkpoint.restore(folder, train, params)
  assert run.step == 1
  assert_same((run.params, run.state), (params, state))
  # Plain Orbax reads it, too.
  tree = ocp.load(tmp_path / '1', {'params': params, 'opt_state': state})
  assert_same(tree['opt_state'], state)


REFUSED = {
  'inner': (
    lambda: so.golore(0.1, inner=optax.scale_by_lion(), spec=SPEC(4)),
    ('opt_state/0/1/inner', 'ScaleByAdamState', 'ScaleByLionState'),
  ),
  'like_inner': (
    lambda: so.golore(0.1, inner=optax.scale_by_belief(), spec=SPEC(4)),
    ('opt_state/0/1/inner', 'ScaleByBeliefState'),
  ),
  'bits': (
    lambda: so.golore(0.1, moment_bits=8, spec=SPEC(4)),
    ('opt_state/0/1/inner', 'CodedState', 'bits'),
  ),
  'integers': (
    lambda: so.golore(0.1, spec=SPEC(4, basis_dtype='int8')),
    ('opt_state/0/0/subspaces/basis', 'QuantizedBasis'),
  ),
  'wrapped': (
    lambda: optax.chain(so.golore(0.1, spec=SPEC(4))),
    ('opt_state/', 'wrappers', 'tx.init'),
  ),
  'leaves': (
    lambda: so.golore(0.1, spec=SPEC(4, include='up')),
    ("'layers/down'", 'projected in the checkpoint', 'plain by tx'),
  ),
  'rank': (
    lambda: so.golore(
      0.1, spec=SPEC(lambda path, leaf: 12 if path == 'up' else 4)
    ),
    ('projected in the checkpoint', 'plain by tx', 'ranks'),
  ),
  'side': (
    lambda: so.golore(0.1, spec=SPEC(4, side='long')),
    ("side='rows'", "side='columns'", 'layers/down'),
  ),
}


@pytest.fixture(scope='module')
def golore_run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('golore')
  saved(folder, so.golore(0.1, spec=SPEC(4)))
  return folder


@pytest.mark.parametrize('name', REFUSED)
def test_what_can_not_be_carried_over_is_refused(name, golore_run):
  make, words = REFUSED[name]
  with errors.raises(ValueError, *words):
    restored(golore_run, make())


@pytest.mark.parametrize(
  'params, words',
  [
    ({'up': jnp.ones((12, 20))}, ('params/bias', 'tx and params do not')),
    (PARAMS | {'more': jnp.ones(3)}, ('no params/more',)),
    (PARAMS | {'bias': jnp.ones(13)}, ('float32[12]', 'float32[13]', 'bias')),
    (
      PARAMS | {'bias': jnp.ones(12, jnp.bfloat16)},
      ('float32[12]', 'bfloat16[12]', 'cast'),
    ),
  ],
)
def test_other_parameters_are_refused(params, words, golore_run):
  with errors.raises(ValueError, *words):
    restored(golore_run, so.golore(0.1, spec=SPEC(4)), params)


def test_other_dtypes_of_counters_are_refused(tmp_path):
  make = lambda dtype: optax.GradientTransformation(
    lambda params: jnp.zeros((), dtype), lambda u, s, p=None: (u, s)
  )
  params = {'w': jnp.ones(3)}
  so.checkpoint.save(
    tmp_path / 'run', make(jnp.int32), params, jnp.zeros((), jnp.int32)
  )
  with errors.raises(ValueError, 'int32', 'float32', 'opt_state'):
    restored(tmp_path, make(jnp.float32), params)


def test_what_is_no_checkpoint_or_no_state_of_tx(tmp_path):
  params, tx = {'w': jnp.ones((8, 16))}, so.golore(0.1, rank=2)
  state = tx.init(params)
  with errors.raises(ValueError, 'structure', 'the optimizer that made'):
    so.checkpoint.save(tmp_path / 'run', optax.adam(0.1), params, state)
  with pytest.raises(FileNotFoundError):
    so.checkpoint.restore(tmp_path / 'run', tx, params)
  ocp.save(tmp_path / 'run', {'params': params, 'opt_state': state})
  with errors.raises(ValueError, 'was not written by', 'run'):
    restored(tmp_path, tx, params)
  with ocp.training.Checkpointer(str(tmp_path / 'steps')) as saved:
    saved.save(1, {'params': params, 'opt_state': state})
    with errors.raises(ValueError, 'was not written by', "/steps'"):
      so.checkpoint.restore(saved, tx, params)


NOISE = lambda matrix, basis, period: jax.random.normal(
  matrix.key(period), basis.shape
)


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    (
      projectors.switch({0: projectors.stiefel(2), 2: projectors.gaussian(2)}),
      projectors.switch({0: projectors.stiefel(2), 2: projectors.stiefel(50)}),
    ),
    (
      projectors.periodic('noise', NOISE, 2, orthonormal=False),
      projectors.periodic('noise', NOISE, 2),
    ),
  ],
  ids=['switch', 'periodic'],
)
def test_bases_that_are_not_orthonormal_start_anew(old, new, tmp_path):
  make = lambda rule: so.subspace(SPEC(4), rule, optax.scale_by_adam())
  saved(tmp_path, make(old))
  run = restored(tmp_path, make(new))
  assert any('basis and moments anew' in change for change in run.changes)
  first = measure.bases(make(new).init(PARAMS))['up']
  np.testing.assert_array_equal(measure.bases(run.state)['up'], first)


def test_all_that_an_inner_optimizer_keeps_of_coordinates_starts_anew(tmp_path):
  """Factored moments are of no shape that coordinates have; plain ones stay."""
  params = {'w': PARAMS['up'], 'head': {'w': PARAMS['up']}}
  spec = so.SubspaceSpec(4, include='^w$')
  make = lambda rule: so.subspace(
    spec,
    rule,
    optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    params='coordinates',
  )
  state = saved(tmp_path, make(projectors.gaussian(2)), params)
  tx = make(projectors.stiefel(2))
  run = restored(tmp_path, tx, params)
  got, old, first = (x[1].inner for x in (run.state, state, tx.init(params)))
  for name in ('v_row', 'v_col'):
    mine, saved_one, fresh = (getattr(x, name) for x in (got, old, first))
    np.testing.assert_array_equal(mine['w'], fresh['w'])
    np.testing.assert_array_equal(mine['head']['w'], saved_one['head']['w'])
    assert np.any(np.asarray(saved_one['w']) != np.asarray(fresh['w']))


def test_what_orbax_or_restore_could_not_keep_is_refused(tmp_path):
  tx = optax.chain(so.golore(0.1, spec=SPEC(4)), optax.add_noise(0.1, 0.5, 0))
  state = tx.init(PARAMS)
  if not jnp.issubdtype(state[1].rng_key.dtype, jax.dtypes.prng_key):
    state = (state[0], state[1]._replace(rng_key=jax.random.key(0)))
  with pytest.raises(ValueError, match="1/rng_key' is random keys"):
    so.checkpoint.save(tmp_path / 'run', tx, PARAMS, state)
  adam = optax.adam(0.1)
  state = adam.init(PARAMS)
  state = (state[0]._replace(count=3), *state[1:])
  with pytest.raises(ValueError, match="0/count' is 3"):
    so.checkpoint.save(tmp_path / 'run', adam, PARAMS, state)


@pytest.mark.parametrize(
  'params', [PARAMS['up'], {'count': PARAMS['up']}], ids=['bare', 'count']
)
def test_a_counter_goes_on_whatever_leaves_are_called(params, tmp_path):
  make = lambda rule: so.subspace(
    so.SubspaceSpec(4, exclude=None), rule, optax.scale_by_adam()
  )
  was = saved(tmp_path, make(projectors.gaussian(2)), params)
  run = restored(tmp_path, make(projectors.stiefel(2)), params)
  inner = run.state[1].inner
  assert int(inner.count) == int(was[1].inner.count)
  assert not np.any(jax.tree.leaves(inner.mu)[0])


def test_rules_whose_names_have_numbers_are_not_one(tmp_path):
  """Bases that are made again at every step are of another kind then."""
  make = lambda name, gap: so.subspace(
    SPEC(4),
    projectors.stiefel(gap, regenerate=True)._replace(
      name=f'{name}(update_proj_gap={gap}, regenerate=True)'
    ),
    optax.scale_by_adam(),
  )
  saved(tmp_path, make('sketch1', 2))
  same = restored(tmp_path, make('sketch1', 50))
  assert not any('anew' in change for change in same.changes)
  other = restored(tmp_path, make('sketch2', 2))
  assert any('basis and moments anew' in change for change in other.changes)
  assert not np.any(other.state[1].inner.mu['up'])


def test_keys_that_are_tuples(tmp_path):
  """Of `flax.traverse_util.flatten_dict`; Orbax spells them as strings."""
  params = {('up', 'kernel'): normal(12, 20), ('norm', 'scale'): jnp.ones(12)}
  make = lambda rank, projector: so.subspace(
    SPEC(rank), projector, optax.scale_by_adam(), transport='first'
  )
  tx = make(3, projectors.stiefel(9))
  state = saved(tmp_path, tx, params)
  run = restored(tmp_path, tx, params)
  assert run.changes == ()
  assert_same((run.params, run.state), (params, state))
  run = restored(tmp_path, make(4, projectors.stiefel(9)), params)
  assert run.changes == ('rank 3 -> 4 of up/kernel',)
  # Bases that the new rule does not store; then a tree without tuples.
  run = restored(tmp_path, make(3, projectors.dct(9)), params)
  assert 'basis and moments anew of up/kernel' in run.changes
  run = restored(tmp_path, tx, flax.traverse_util.unflatten_dict(params))
  assert run.changes == ()
  leaves = jax.tree.leaves
  assert_same(leaves((run.params, run.state)), leaves((params, state)))


@pytest.mark.parametrize('key', ['(3)', '(up', "('ab')"])
def test_keys_that_are_no_tuples(tmp_path, key):
  params = {key: normal(12, 20), 'w': jnp.ones(3)}
  state = saved(tmp_path, so.golore(0.1, 3), params)
  assert_same(restored(tmp_path, so.golore(0.1, 3), params).state, state)
  with errors.raises(ValueError, f'params/{key}'):
    restored(tmp_path, so.golore(0.1, 3), {'w': params['w']})


@pytest.mark.parametrize(
  'name, other',
  [
    ('update_proj_gap', 5),
    ('sample', 'haar'),
    ('basis_dtype', 'bfloat16'),
    ('key_group', lambda path: 'all'),
    ('rank', 3),
  ],
)
def test_coordinates_do_not_meet_other_bases(tmp_path, name, other):
  """RSO draws P again from its arguments, and the checkpoint has B alone."""

  def step(rank=2, key_group=None, basis_dtype='float32', **rule):
    spec = so.SubspaceSpec(
      rank, side='in', key_group=key_group, basis_dtype=basis_dtype
    )
    return so.rso.subproblems(spec, optax.adam(0.1), **rule).step(jnp.sum)

  params = {'gate': normal(12, 20), 'up': normal(12, 20)}
  gap = np.int64(200)  # the default, of a type that JSON does not take
  state = saved(tmp_path, step(update_proj_gap=gap), params)
  assert_same(restored(tmp_path, step(), params).state, state)
  with errors.raises(ValueError, "'gate'", f' {name}=', 'merged'):
    restored(tmp_path, step(**{name: other}), params)
