"""What `init` says of matrices that are assumed, too small or missing."""

import warnings

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import errors
import model_trees
import subspace_optax as so
from subspace_optax import projectors

# Elsewhere what is assumed or left plain is passed over.
pytestmark = pytest.mark.filterwarnings('error')


def _init(params, **kwargs):
  spec = so.SubspaceSpec(2, **kwargs)
  return jax.eval_shape(so.project(spec, projectors.stiefel(2)).init, params)


ASSUMED = {
  'w': ((5, 16, 24), (5, 16, 24)),
  'o_proj/kernel': ((12, 64, 64), (12, 64, 64)),
  'query/kernel': ((12, 64, 64), (12, 64, 64)),
  'key/w': ((12, 64, 16), (12, 64, 16)),
  'attention/out/kernel': ((64, 12, 32), (12, 64, 32)),
  'moe/w': ((4, 2, 16, 24), (8, 16, 24)),
  'out': ((3, 3, 64, 32), None),
  'query': ((3, 3, 32, 64), None),
  'filters': ((64, 32, 5, 5), None),
  'value': ((3, 3, 3, 16, 32), None),
}


@pytest.mark.parametrize('path', ASSUMED)
def test_what_nothing_tells_is_assumed_with_a_warning(path):
  shape, wanted = ASSUMED[path]
  match = model_trees.matches_of({path: shape})[path]
  assert model_trees.matrices_of(match) == wanted and match.how == 'assumed'
  params = cases.nest({path: jnp.ones(shape), 'plain': jnp.ones((16, 24))})
  words = [path, *shape, 'assumed', 'weight_dimension_numbers', 'exclude']
  with _warns(*words):
    _init(params)


LAYERS = {'h/up': (12, 64, 96), 'h/down': (12, 96, 64), 'h/ln/scale': (12, 64)}
SQUARE = {'h/up/kernel': (64, 64, 64), 'h/up/bias': (64, 64)}
EITHER = {
  'a weight as long as layers are many': (
    {'in_proj/kernel': (12, 64)} | LAYERS,
    {'in_proj/kernel': (1, 12, 64)},
  ),
  'a vector of no usual name': (
    {'h/shift': (12, 64)} | LAYERS,
    {'h/shift': None},
  ),
  'a router of no usual name': (
    {'moe/assign': (8, 64), 'moe/w1': (8, 64, 256), 'moe/w2': (8, 256, 64)},
    {'moe/assign': None},
  ),
  "RWKV's u": ({'h/attn/u': (12, 4, 16)} | LAYERS, {'h/attn/u': (12, 4, 16)}),
  'layers as many as units': (SQUARE, {'h/up/kernel': (64, 64, 64)}),
  'and norms': (
    SQUARE | {'h/ln/scale': (64, 64)},
    {'h/up/kernel': (64, 64, 64)},
  ),
  'and heads': (
    {'query/kernel': (64, 64, 8, 8)},
    {'query/kernel': (64, 64, 64)},
  ),
  'and heads, norms': (
    {'h/query/kernel': (64, 64, 8, 8), 'h/ln/scale': (64, 64)},
    {'h/query/kernel': (64, 64, 64)},
  ),
  # Flax's (embed, heads, head_dim), whose sizes agree the other way round.
  'a head wider than the model': (
    {'query/kernel': (32, 2, 64), 'key/kernel': (32, 1, 64)},
    {'query/kernel': (1, 64, 64), 'key/kernel': (1, 64, 32)},
  ),
}


@pytest.mark.parametrize('name', EITHER)
def test_what_may_be_either_is_warned_of(name):
  shapes, wanted = EITHER[name]
  found = model_trees.matches_of(shapes)
  for path, matrices in wanted.items():
    assert model_trees.matrices_of(found[path]) == matrices
    assert found[path].how == 'assumed'
  params = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}
  with _warns(*wanted, 'weight_dimension_numbers'):
    _init(cases.nest(params))


def _warns(*words):
  return pytest.warns(UserWarning, match='(?s)' + _all(words))


def _all(words):
  return ''.join(f'(?=.*{word})' for word in words)


def test_one_warning_names_every_leaf_and_the_callers_line():
  params = {'a': jnp.ones((3, 8, 12)), 'b': jnp.ones((5, 8, 12))}
  tx = so.golore(1e-3, rank=2)
  with pytest.warns(UserWarning) as found:
    tx.init(params)
  assert len(found) == 1 and found[0].filename == __file__
  message = str(found[0].message)
  assert 'a (3, 8, 12): 3 x (8 x 12)' in message and 'b (5, 8, 12)' in message


def test_only_init_warns():
  params = {'w': jnp.ones((5, 16, 24))}
  tx = so.golore(1e-3, rank=2)
  with pytest.warns(UserWarning, match='assumed'):
    state = tx.init(params)
  so.describe(tx, params)
  so.memory_report(tx, params)
  so.state_sharding(tx, params)
  tx.update(params, state, params)


def test_what_is_named_or_confirmed_needs_no_warning():
  numbers = so.DimensionNumbers(-2, -1)
  _init({'w': jnp.ones((5, 16, 24))}, weight_dimension_numbers=numbers)
  _init({'h': {'up': jnp.ones((5, 16, 24)), 'down': jnp.ones((5, 24, 16))}})
  _init({'query': jnp.ones((16, 2, 8)), 'out': jnp.ones((2, 8, 16))})
  _init({'query': {'kernel': jnp.ones((64, 12, 8, 8))}})  # layers on axis 1
  _init({'w': jnp.ones((5, 16, 24)), 'x': jnp.ones((16, 24))}, exclude='w')


@pytest.mark.parametrize('rank', [16, 128, 1.0, lambda path, leaf: 999])
@pytest.mark.parametrize('allow_empty', [False, True])
def test_a_rank_that_leaves_nothing_is_refused(rank, allow_empty):
  params = {'a': {'up': jnp.ones((16, 24))}, 'b': jnp.ones((2, 12, 16))}
  spec = so.SubspaceSpec(rank, allow_empty=allow_empty)
  words = ['a/up', '16 x 24', 'b', '12 x 16', 'only_if_smaller', 'exclude']
  words += [] if callable(rank) else [f'rank={rank}']
  tx = so.subspace(spec, projectors.stiefel(2), optax.scale_by_adam())
  with errors.raises(ValueError, *words):
    tx.init(params)
  assert 'saves nothing with a basis and 2 moments' in so.describe(tx, params)


def test_matrices_that_stay_plain_are_named():
  params = {'up': jnp.ones((16, 24)), 'a': {'thin': jnp.ones((2, 24))}}
  with _warns('a/thin', 'rank 2 of 2 x 24', 'only_if_smaller', 'exclude'):
    _init(params | {'column': jnp.ones((16, 1))})
  _init(params, exclude='thin')


def test_what_is_assumed_and_stays_plain_is_named_once():
  params = {'w': jnp.ones((64, 64)), 'x': jnp.ones((4, 5, 6))}
  with _warns('x: rank 5 of 5 x 6', 'exclude') as found:
    so.golore(1e-3, rank=8).init(params)
  assert len(found) == 1


@pytest.mark.parametrize('rank', [128, 65, lambda path, leaf: 999])
def test_ranks_clipped_to_the_full_side_are_named(rank):
  params = {'up': jnp.ones((64, 256)), 'a': {'w': jnp.ones((3, 256, 64))}}
  words = ['full rank', 'up: rank 64 of 64 x 256', 'exclude']
  words += [r'a/w: rank 64 of 3 x \(256 x 64\)']
  words += [] if callable(rank) else [f'rank={rank}']
  numbers = so.DimensionNumbers()
  tx = so.galore(1e-3, rank=rank, weight_dimension_numbers=numbers)
  with _warns(*words):
    jax.eval_shape(tx.init, params)


@pytest.mark.parametrize('rank', [8, 64, 1.0])
def test_ranks_up_to_the_full_side_are_as_asked_for(rank):
  tx = so.galore(1e-3, rank=rank)
  jax.eval_shape(tx.init, {'up': jnp.ones((64, 256))})


def test_trees_without_a_matrix_need_allow_empty():
  with errors.raises(ValueError, 'matches no leaf', 'bias'):
    _init({'bias': jnp.ones(8)})
  _init({'bias': jnp.ones(8)}, allow_empty=True)


def test_subproblems_refuse_a_rank_that_leaves_nothing():
  rso = so.rso.subproblems(so.SubspaceSpec(8, side='in'), optax.sgd(0.1))
  with errors.raises(ValueError, 'w', '8 x 16', 'rank=8'):
    rso.init({'w': jnp.ones((8, 16))})


def test_unproject_honours_allow_empty():
  spec = so.SubspaceSpec(2, allow_empty=True)
  tx = optax.chain(
    so.project(spec, projectors.stiefel(2)),
    so.in_subspace(optax.scale_by_adam(), spec),
    so.unproject(spec=spec),
  )
  params = {'bias': jnp.ones(8)}
  updates, _ = tx.update(params, tx.init(params), params)
  assert updates['bias'].shape == (8,)


def equinox_layers(**shapes):
  return {
    name: {'weight': jnp.ones(shape), 'bias': jnp.ones(shape[:-1])}
    for name, shape in shapes.items()
  }


@pytest.mark.parametrize('shape', [(32, 16), (16, 32), (3, 32, 16)])
def test_kernels_with_their_outputs_first_are_told_of(shape):
  params = equinox_layers(up=shape)
  tx = so.golore(1e-3, rank=4)
  with pytest.warns(UserWarning, match='outputs_first=True') as found:
    tx.init(params)
  assert 'up/weight' in str(found[0].message)
  flax = {'up': {'kernel': jnp.ones((32, 16)), 'bias': jnp.ones(16)}}
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    so.golore(1e-3, spec=so.SubspaceSpec(4, outputs_first=True)).init(params)
    tx.init(flax)
    tx.init(equinox_layers(square=(16, 16)))
  with pytest.warns(UserWarning, match='outputs_first=False'):
    so.golore(1e-3, spec=so.SubspaceSpec(4, outputs_first=True)).init(flax)


def test_steps_with_outputs_first_are_those_of_the_transposed_kernels():
  weight = jnp.sin(jnp.arange(20.0 * 12)).reshape(20, 12)

  def first_step(outputs_first, params):
    spec = so.SubspaceSpec(4, outputs_first=outputs_first)
    tx = so.subspace_muon(0.1, spec=spec)
    updates, _ = cases.jit(tx.update)(params, tx.init(params), params)
    return updates['w']

  wanted = first_step(False, {'w': weight.T})
  got = first_step(True, {'w': weight})
  # Newton and Schulz's iteration takes up rounding.
  np.testing.assert_allclose(got, wanted.T, rtol=1e-3, atol=1e-4)
  assert not np.allclose(first_step(False, {'w': weight}), wanted.T, rtol=0.1)


def test_outputs_first_where_boxes_name_the_axes():
  box = nn.Partitioned(jnp.ones((3, 32, 16)), ('layers', 'mlp', 'embed'))
  (match,) = so.SubspaceSpec(4, outputs_first=True).match({'w': box})
  assert match.matrices == '3 x (16 x 32)' and match.how == 'metadata'
