"""States of another rank: what is kept, what is new, what is refused."""

import contextlib
import functools

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
import measure
import subspace_optax as so
from subspace_optax import projectors
from subspace_optax.low_precision import _coded_state

LEAVES = {
  'tall': cases.Leaf((24, 12), jnp.float32, (0,), (1,)),
  # Layers along axis 1, of (embed, heads, dim).
  'blocks/query': cases.Leaf((12, 2, 2, 10), jnp.float32, (0,), (2, 3)),
  'bias': cases.Leaf((12,), jnp.float32),
}


def _spec(rank, **kwargs):
  numbers = cases.dimension_numbers(LEAVES)
  return so.SubspaceSpec(rank, weight_dimension_numbers=numbers, **kwargs)


def _each(rank):
  """Every matrix has an inner state of its own, and coordinates a mean."""
  return so.subspace(
    _spec(rank),
    projectors.power_iteration(5, momentum=0.9),
    optax.scale_by_adam(),
    transport='reset',
    every_k=2,
    after=optax.scale_by_learning_rate(0.1),
  )


def _in_wrappers(rank):
  spec = _spec(rank, include='blocks', allow_empty=True)
  rest = _spec(rank, include='tall|bias', allow_empty=True)
  labels = {'tall': 'b', 'blocks': {'query': 'a'}, 'bias': 'b'}
  return optax.partition(
    {
      'a': so.online_subspace_descent(0.1, spec=spec),
      'b': optax.MultiSteps(so.golore(0.1, spec=rest), 2),
    },
    labels,
  )


STORED = {
  'galore': lambda r: so.galore(0.1, spec=_spec(r, side='long')),
  'golore': lambda r: so.golore(0.1, update_proj_gap=3, spec=_spec(r)),
  'online': lambda r: so.online_subspace_descent(0.1, spec=_spec(r)),
  'fira': lambda r: so.fira_adamw(0.1, spec=_spec(r)),
  'ldadamw': lambda r: so.ldadamw(0.1, spec=_spec(r)),
  'dion': lambda r: so.dion(0.1, spec=_spec(r)),
  'each': _each,
  'wrapped': _in_wrappers,
}
DRAWN = {
  'subspace_adamw': lambda r: so.subspace_adamw(0.1, spec=_spec(r)),
  'subspace_muon': lambda r: so.subspace_muon(0.1, spec=_spec(r)),
  'trion': lambda r: so.trion(0.1, spec=_spec(r)),
  'apollo': lambda r: so.apollo_adamw(0.1, spec=_spec(r)),
}
MAKE = STORED | DRAWN
# Pairs of old and new rank.
RANKS = [(2, 4), (4, 2)]


def _filled(state):
  """Returns a state with random numbers in it, all of them different."""
  rng = np.random.default_rng(3)
  fill = lambda x: jnp.asarray(3.0 * rng.standard_normal(x.shape), x.dtype)
  return jax.tree.map(fill, state)


def _state(name, rank=2):
  params = cases.tree(LEAVES)
  return params, _filled(jax.eval_shape(MAKE[name](rank).init, params))


def _by_path(state):
  keystr = functools.partial(jax.tree_util.keystr, simple=True, separator='/')
  return {
    keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(state)
  }


# One program each, not one for every kind of array.
_decoded = jax.jit(_coded_state.decoded)
_encoded = jax.jit(_coded_state.encoded)


def _is_basis(path):
  return '/basis/' in path


def _rank_axis(one, other):
  axes = [i for i, n in enumerate(one.shape) if n != other.shape[i]]
  assert len(axes) == 1
  return axes[0]


def _take(x, size, axis):
  return np.take(x, np.arange(size), axis)


def _check_like_init(got, start):
  assert jax.tree.structure(got) == jax.tree.structure(start)
  assert measure.types(got) == measure.types(start)


def _check_extended(path, new, old):
  """Checks that orthonormal columns joined the old ones, orthogonal to them."""
  r = old.shape[-1]
  np.testing.assert_array_equal(new[..., :r], old)
  leaf = LEAVES[path.split('basis/')[1]]
  left = leaf.view(True).basis_shape(new.shape[-1]) == new.shape
  bases = leaf.view(left).bases(new)
  bases[..., :r], _ = np.linalg.qr(bases[..., :r])
  gram = np.swapaxes(bases, -1, -2) @ bases
  eye = np.broadcast_to(np.eye(gram.shape[-1]), gram.shape)
  np.testing.assert_allclose(gram, eye, atol=3e-6)


@pytest.mark.parametrize('old_rank,new_rank', RANKS)
@pytest.mark.parametrize('name', STORED)
def test_what_is_kept(name, old_rank, new_rank):
  params, state = _state(name, old_rank)
  tx = MAKE[name](new_rank)
  got = so.resize_rank(tx, state, params)
  _check_like_init(got, jax.eval_shape(tx.init, params))
  old, new = _by_path(state), _by_path(got)
  bases, resized = 0, 0
  for path, x in new.items():
    y = old[path]
    if x.shape == y.shape:
      np.testing.assert_array_equal(x, y, err_msg=path)
      continue
    axis = _rank_axis(x, y)
    assert (y.shape[axis], x.shape[axis]) == (old_rank, new_rank)
    resized += 1
    bases += _is_basis(path)
    if new_rank < old_rank:
      np.testing.assert_array_equal(x, _take(y, new_rank, axis), err_msg=path)
    elif _is_basis(path):
      _check_extended(path, x, y)
    else:
      np.testing.assert_array_equal(_take(x, old_rank, axis), y, err_msg=path)
      # Right factors start as random numbers, all else as zeros.
      first = np.zeros_like(x)
      if '/right/' in path:
        first = _by_path(tx.init(params))[path]
      rest = lambda x, axis=axis: np.delete(x, np.arange(old_rank), axis)
      np.testing.assert_array_equal(rest(x), rest(first), err_msg=path)
  assert bases == 2 and resized >= 4


def _trained(tx, params, state):
  """Returns parameters, state and the losses of a few steps."""

  def loss(params):
    target = cases.tree({path: LEAVES[path] for path in cases.flat(params)}, 7)
    squares = lambda x, y: jnp.sum(jnp.square(x - y))
    return jax.tree.reduce(jnp.add, jax.tree.map(squares, params, target))

  @cases.jit
  def steps(params, state):
    def step(carry, _):
      params, state = carry
      value, gradients = jax.value_and_grad(loss)(params)
      updates, state = tx.update(gradients, state, params)
      return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, state), length=12)

  (params, state), losses = steps(params, state)
  return params, state, np.asarray(losses)


@pytest.mark.parametrize(
  'name',
  [
    # As bases of gradients, moments that are kept, and those that are not.
    pytest.param('galore', marks=pytest.mark.full),
    pytest.param('golore', marks=pytest.mark.full),
    'online',
    pytest.param('fira', marks=pytest.mark.full),
    pytest.param('ldadamw', marks=pytest.mark.full),
    'subspace_adamw',
  ],
)
def test_training_goes_on(name):
  params = cases.tree(LEAVES)
  params = {key: params[key] for key in ('blocks', 'bias')}
  tx = MAKE[name](2)
  params, state, losses = _trained(tx, params, tx.init(params))
  for rank in (4, 3):
    tx = MAKE[name](rank)
    state = so.resize_rank(tx, state, params)
    params, state, after = _trained(tx, params, state)
    assert after[0] < losses[0]
    assert after[-1] < 0.95 * after[0], after
    losses = after


# Coordinates of (64, 256) have codes from rank 16 on, smaller ones are float32.
# Codes at both ranks: `test_moments_in_8_bits_are_read_in_their_own_blocks`.
@pytest.mark.parametrize(
  'old_rank,new_rank',
  [(15, 16), (16, 15), pytest.param(33, 48, marks=pytest.mark.full)],
)
def test_moments_in_8_bits(old_rank, new_rank):
  """Within a code's rounding what float32 moments would be."""
  params = {'w': jnp.ones((64, 256)), 'bias': jnp.ones(5)}

  def make(rank, inner):
    return so.subspace(so.SubspaceSpec(rank), projectors.stiefel(9), inner)

  def resized(inner, with_moments):
    old, new = (make(rank, inner) for rank in (old_rank, new_rank))
    project, own, rest = old.init(params)
    state = project, own._replace(inner=with_moments(own.inner)), rest
    state = so.resize_rank(new, state, params)
    _check_like_init(state, new.init(params))
    return state[1].inner

  moments = {}

  def coded(start):
    filled = jax.tree.map(abs, _filled(_decoded(start)))
    moments['old'] = _encoded(filled, start)
    return moments['old']

  got = _decoded(resized(so.scale_by_adam8bit(), coded))
  wanted = resized(optax.scale_by_adam(), lambda _: _decoded(moments['old']))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0.05, atol=0.01),
    got,
    wanted,
  )
  assert float(got.mu['w'][:15].min()) >= 0 and float(got.nu['w'].max()) > 3


def test_8_bits_or_not_is_no_change_of_rank():
  params = {'w': jnp.ones((64, 256))}
  make = lambda inner: so.subspace(
    so.SubspaceSpec(16), projectors.stiefel(9), inner
  )
  state = make(so.scale_by_adam8bit()).init(params)
  _refused(make(optax.scale_by_adam()), state, params, 'CodedState')


@pytest.mark.parametrize('name', DRAWN)
def test_bases_that_are_drawn_again_have_no_moments_to_keep(name):
  params, state = _state(name)
  tx = MAKE[name](4)
  start = tx.init(params)
  got = so.resize_rank(tx, state, params)
  _check_like_init(got, start)
  old, new, fresh = map(_by_path, (state, got, start))
  anew = 0
  for path, x in new.items():
    same = x.shape == old[path].shape
    np.testing.assert_array_equal(
      x, old[path] if same else fresh[path], err_msg=path
    )
    anew += not same
  assert anew >= 2


def test_the_same_rank_changes_nothing():
  for name in ('online', 'subspace_adamw'):
    params, state = _state(name)
    got = so.resize_rank(MAKE[name](2), state, params)
    measure.assert_trees_close(got, state)


def test_to_the_full_rank():
  spec = functools.partial(_spec, only_if_smaller=False)
  tree = cases.tree(LEAVES)
  params = {key: tree[key] for key in ('tall', 'bias')}
  state = so.golore(0.1, spec=spec(9)).init(params)
  got = so.resize_rank(so.golore(0.1, spec=spec(12)), state, params)
  for path, x in measure.bases(got).items():
    _check_extended('/basis/' + path, np.asarray(x), x[..., :9])


def test_dtypes_are_those_of_the_new_optimizer():
  params, state = _state('online')
  spec = _spec(4, basis_dtype=jnp.bfloat16, moment_dtype=jnp.bfloat16)
  tx = so.online_subspace_descent(0.1, spec=spec)
  got = so.resize_rank(tx, state, params)
  _check_like_init(got, jax.eval_shape(tx.init, params))
  basis = measure.bases(got)['tall']
  assert basis.dtype == jnp.bfloat16
  old = measure.bases(state)['tall'].astype(jnp.bfloat16)
  np.testing.assert_array_equal(basis[:, :2], old)


def test_gap_and_learning_rate_may_change():
  params, state = _state('golore')
  tx = so.golore(0.5, update_proj_gap=7, spec=_spec(4))
  got = so.resize_rank(tx, state, params)
  before = measure.project_state(state).count
  assert measure.project_state(got).count == before


def test_a_checkpoint_at_another_rank(tmp_path):
  params, state = _state('online')
  ocp.save(tmp_path / 'state', state)
  shapes = jax.eval_shape(MAKE['online'](2).init, params)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
  )
  restored = ocp.load(tmp_path / 'state', shapes)
  tx = MAKE['online'](4)
  measure.assert_trees_close(
    so.resize_rank(tx, restored, params), so.resize_rank(tx, state, params)
  )


# Growing or shrinking, and the kind of axes, are decided apart.
@pytest.mark.parametrize(
  'kind, old_rank, new_rank',
  [
    (AxisType.Auto, 2, 4),
    (AxisType.Explicit, 4, 2),
    pytest.param(AxisType.Auto, 4, 2, marks=pytest.mark.full),
    pytest.param(AxisType.Explicit, 2, 4, marks=pytest.mark.full),
  ],
)
def test_on_a_mesh(kind, old_rank, new_rank):
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(kind,) * 2)
  # Bases of `tall` are split along the rank, too: `fsdp` has no other use.
  specs = {
    'tall': P('fsdp', 'tensor'),
    'blocks/query': P('fsdp', None, 'tensor', None),
    'bias': P('tensor'),
  }
  params, state = _state('online', old_rank)
  tx, old_tx = MAKE['online'](new_rank), MAKE['online'](old_rank)
  put = lambda path, x: jax.device_put(x, NamedSharding(mesh, specs[path]))
  placed = cases.nest({p: put(p, x) for p, x in cases.flat(params).items()})
  state_there = jax.device_put(state, so.state_sharding(old_tx, placed))
  places = so.state_sharding(tx, placed)
  # With a mesh that is set, and without one.
  auto = kind == AxisType.Auto
  with jax.set_mesh(mesh) if auto else contextlib.nullcontext():
    got = so.resize_rank(tx, state_there, placed)
  expected = so.resize_rank(tx, state, params)
  split = 0
  for x, y, z in zip(
    *map(jax.tree.leaves, (got, places, expected)), strict=True
  ):
    assert x.sharding.is_equivalent_to(y, x.ndim)
    np.testing.assert_allclose(x, z, rtol=1e-5, atol=2e-6)
    split += x.ndim > 1 and x.sharding.spec[-1] is not None
  assert split  # some are split along the rank


def _refused(tx, state, params, *words):
  with errors.raises(ValueError, *words):
    so.resize_rank(tx, state, params)


def test_another_optimizer_is_refused():
  params, state = _state('golore')
  online = MAKE['online'](4)
  _refused(
    online, state, params, 'projector', 'PeriodicState', 'OnlinePcaState'
  )
  lion = so.golore(0.1, inner=optax.scale_by_lion(), spec=_spec(4))
  _refused(lion, state, params, '0/1/inner', 'ScaleByAdamState')
  # The same fields, but not the same rule.
  belief = so.golore(0.1, inner=optax.scale_by_belief(), spec=_spec(4))
  _refused(belief, state, params, '0/1/inner', 'ScaleByBeliefState')
  _refused(optax.adam(0.1), state, params, 'no `subspace_optax.project`')


def test_other_parameters_are_refused():
  params, state = _state('golore')
  tx = so.golore(0.1, spec=_spec(3))
  without = {k: v for k, v in params.items() if k != 'bias'}
  _refused(tx, state, without, "['bias', 'blocks', 'tall']", 'dict')
  wider = params | {'tall': jnp.ones((24, 13))}
  _refused(tx, state, wider, 'tall', (12, 2), (13, 3))
  # As long as two ranks, but not a rank.
  state = MAKE['golore'](2).init(params | {'bias': jnp.ones(2)})
  _refused(
    MAKE['golore'](4), state, params | {'bias': jnp.ones(4)}, 'bias', (2,), (4,)
  )


def test_another_side_and_a_leaf_that_turns_plain_are_refused():
  params, state = _state('golore')
  tx = so.golore(0.1, spec=_spec(3, side='long'))
  _refused(tx, state, params, 'side', 'basis/')
  rank = lambda path, leaf: 11 if path == 'tall' else 3
  _refused(MAKE['golore'](rank), state, params, 'same leaves', 'nothing')
  _refused(MAKE['golore'](11), state, params, 'leaves no matrix')


def test_matrices_of_rank_by_rank_are_refused():
  def init(params):
    return jax.tree.map(lambda x: jnp.zeros((x.shape[0],) * 2), params)

  inner = optax.GradientTransformation(init, lambda u, s, p=None: (u, s))
  params = {'w': jnp.ones((12, 24))}
  make = lambda r: so.subspace(so.SubspaceSpec(r), projectors.stiefel(2), inner)
  _refused(make(4), make(2).init(params), params, 'inner/w', 'rank x rank')


def test_a_spoilt_basis_is_refused():
  params, state = _state('golore')
  spoilt = jax.tree.map(lambda x: x * jnp.nan, state[0][0].subspaces.basis)
  project = state[0][0]
  project = project._replace(subspaces=project.subspaces._replace(basis=spoilt))
  state = ((project, *state[0][1:]), *state[1:])
  _refused(MAKE['golore'](4), state, params, 'basis/', 'not finite')


def test_a_path_that_is_the_end_of_another():
  params = {
    'attention': jnp.ones((24, 12)),
    'encoder': {'attention': jnp.ones((12, 24))},
  }
  state = so.golore(0.1, rank=2).init(params)
  got = so.resize_rank(so.golore(0.1, rank=4), state, params)
  old, new = measure.bases(state), measure.bases(got)
  for path, p in new.items():
    p = np.asarray(p, np.float64)
    np.testing.assert_allclose(p.T @ p, np.eye(4), atol=1e-5)
    np.testing.assert_array_equal(p[:, :2], np.asarray(old[path], np.float64))


@pytest.mark.parametrize('wrapped', ['MultiSteps', 'trace'])
def test_boxes_that_a_wrapper_keeps(wrapped):
  def make(rank):
    if wrapped == 'MultiSteps':
      return optax.MultiSteps(so.golore(0.1, rank=rank), 2)
    return optax.chain(so.golore(0.1, rank=rank), optax.trace(0.9))

  params = {'w': nn.Partitioned(jnp.ones((16, 24)), names=(None, None))}
  state = make(2).init(params)
  got = so.resize_rank(make(4), state, params)
  assert jax.tree.structure(got) == jax.tree.structure(make(4).init(params))
  p = np.asarray(measure.bases(got)['w'], np.float64)
  np.testing.assert_allclose(p.T @ p, np.eye(4), atol=1e-5)


def test_boxes_around_codes():
  """Those of moments and of bases, beside bare parameters."""

  def make(rank):
    spec = so.SubspaceSpec(rank, basis_dtype='int8')
    return so.golore(0.1, moment_bits=8, spec=spec)

  def resized(params):
    state = cases.jit(make(16).init)(params)
    _, state = cases.jit(make(16).update)(params, state, params)
    return so.resize_rank(make(24), state, params)

  w = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
  got, wanted = (
    jax.tree.leaves(resized({'w': x}))
    for x in (nn.Partitioned(w, names=('e', 'm')), w)
  )
  for x, y in zip(got, wanted, strict=True):
    np.testing.assert_array_equal(x, y)
  assert sum(x.dtype == jnp.int8 for x in got) == 2
  assert all(np.any(np.asarray(x)) for x in got if x.dtype == jnp.int8)


@pytest.mark.parametrize(
  'shape, old, new',
  [
    ((121, 96), 48, 64),  # blocks of 12 and of 16 columns
    # Too small to be coded, and coded: `test_moments_in_8_bits`.
    pytest.param((96, 64), 4, 64, marks=pytest.mark.full),
    pytest.param((96, 64), 64, 4, marks=pytest.mark.full),
  ],
)
def test_moments_in_8_bits_are_read_in_their_own_blocks(shape, old, new):
  """And those of another leaf, and of the same rank, stay to the bit."""
  make = lambda rank: so.subspace(
    so.SubspaceSpec(rank, include='w', only_if_smaller=False),
    projectors.stiefel(9),
    so.scale_by_adam8bit(rounding='nearest'),
  )
  rng = np.random.default_rng(0)
  draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  params = {'w': draw(shape), 'plain': draw((64, 64))}
  state = cases.jit(make(old).init)(params)
  _, state = cases.jit(make(old).update)(params, state, params)
  got = so.resize_rank(make(new), state, params)
  _check_like_init(got, jax.eval_shape(make(new).init, params))
  before, after = (_decoded(x[1].inner).mu['w'] for x in (state, got))
  r = min(old, new)
  half_a_gap = 0.5 * (1 - (126 / 127) ** 2) * np.abs(before).max()
  np.testing.assert_allclose(
    after[:, :r], before[:, :r], rtol=0, atol=half_a_gap * (1 + 1e-5)
  )
  np.testing.assert_array_equal(after[:, r:], 0)
  codes, same = (x[1].inner.coded.nu['plain'] for x in (state, got))
  np.testing.assert_array_equal(codes, same)
  assert codes.dtype == same.dtype == jnp.uint8
  again = so.resize_rank(make(old), state, params)
  jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.parametrize('bare', [False, True])
def test_factored_moments_start_anew_with_bases_that_are_not_stored(bare):
  make = lambda rank: so.subspace(
    so.SubspaceSpec(rank),
    so.projectors.gaussian(2, regenerate=True),
    optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    params='coordinates',
  )
  w = jnp.asarray(np.random.default_rng(0).standard_normal((12, 20)), 'float32')
  params = w if bare else {'w': w}
  tx = make(4)
  state = _filled(jax.eval_shape(tx.init, params))
  got = so.resize_rank(make(6), state, params)[1].inner
  for name in ('v_row', 'v_col'):
    [moment] = jax.tree.leaves(getattr(got, name))
    assert 6 in moment.shape or moment.shape == (20,)
    np.testing.assert_array_equal(moment, 0)
  assert int(got.count) == int(state[1].inner.count)
