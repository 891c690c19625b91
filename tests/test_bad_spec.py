"""Bad specs: errors that name argument, value and leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import errors
import subspace_optax as so
from subspace_optax import projectors

PARAMS = {
  'mlp': {'up': jnp.ones((8, 12)), 'down': jnp.ones((12, 8))},
  'bias': jnp.ones(12),
}
SPEC = so.SubspaceSpec(rank=2)


def _project(spec=SPEC, projector=None):
  return so.project(spec, projector or projectors.stiefel(2))


FACTORIES = [so.galore, so.golore, so.online_subspace_descent]


@pytest.mark.parametrize('rank', [0, -1, np.int32(-3)])
@pytest.mark.parametrize('factory', [None, *FACTORIES])
def test_rank_not_positive(rank, factory):
  with errors.raises(ValueError, 'rank', int(rank)):
    if factory:
      factory(1e-3, rank=rank)
    else:
      so.SubspaceSpec(rank)


@pytest.mark.parametrize('rank', [0.0, -0.5, 1.5, 128.0, float('nan')])
def test_fraction_outside_0_to_1(rank):
  with errors.raises(ValueError, 'rank', '(0, 1]', rank):
    so.SubspaceSpec(rank)


@pytest.mark.parametrize('rank', ['8', None, True, (4,), 2 + 0j])
def test_rank_that_is_no_number(rank):
  with errors.raises(TypeError, 'rank', repr(rank)):
    so.SubspaceSpec(rank)


@pytest.mark.parametrize(
  'rank, error', [(0, ValueError), (1.5, ValueError), ('8', TypeError)]
)
def test_bad_rank_from_a_callable_names_the_leaf(rank, error):
  tx = _project(so.SubspaceSpec(lambda path, leaf: rank))
  with errors.raises(error, 'rank', rank, 'mlp/down'):
    tx.init(PARAMS)


@pytest.mark.parametrize('factory', FACTORIES)
def test_traced_rank(factory):
  injected = optax.inject_hyperparams(factory)(learning_rate=1e-3, rank=2)
  with errors.raises(TypeError, 'rank', 'static_args'):
    injected.init(PARAMS)
  with errors.raises(TypeError, 'rank', 'static'):
    jax.jit(lambda rank: so.SubspaceSpec(rank) and rank)(2)


def test_traced_random_from():
  injected = optax.inject_hyperparams(so.golore, static_args=('rank',))
  with errors.raises(TypeError, 'random_from', 'static_args'):
    injected(learning_rate=1e-3, rank=2, random_from=4).init(PARAMS)


@pytest.mark.parametrize('side', ['left', '', None, 'SHORT'])
def test_unknown_side(side):
  with errors.raises(ValueError, 'side', repr(side), 'short'):
    so.SubspaceSpec(2, side=side)


@pytest.mark.parametrize('name', ['include', 'exclude'])
@pytest.mark.parametrize('pattern', [3, ['a'], b'a'])
def test_pattern_that_is_no_string(name, pattern):
  with errors.raises(TypeError, name, repr(pattern)):
    so.SubspaceSpec(2, **{name: pattern})


@pytest.mark.parametrize(
  'kwargs', [dict(include='attention'), dict(exclude='.'), dict(exclude='mlp')]
)
@pytest.mark.parametrize('wrap', ['describe', 'init', 'in_subspace'])
def test_spec_that_matches_no_leaf_lists_the_nearest(kwargs, wrap):
  spec = so.SubspaceSpec(2, **kwargs)
  value = next(iter(kwargs.values()))
  with errors.raises(ValueError, repr(value), 'mlp/up', '(8, 12)', 'mlp/down'):
    if wrap == 'describe':
      so.describe(spec, PARAMS)
    elif wrap == 'init':
      _project(spec).init(PARAMS)
    else:
      so.in_subspace(optax.scale_by_adam(), spec).init(PARAMS)


def test_tree_without_matrices_matches_no_leaf():
  with errors.raises(ValueError, 'bias', '(12,)', 'fewer than two axes'):
    _project().init({'bias': PARAMS['bias']})


def test_a_rank_that_leaves_nothing_to_project():
  with errors.raises(ValueError, 'rank=100', 'mlp/up', 'mlp/down', '8 x 12'):
    _project(so.SubspaceSpec(rank=100)).init(PARAMS)


@pytest.mark.parametrize(
  'numbers, axis',
  [
    (so.DimensionNumbers(0, 2), 'output_axis=2'),
    (so.DimensionNumbers(-3, 1), 'reduction_axis=-3'),
    (so.DimensionNumbers((0, 5), 1), 'reduction_axis=(0, 5)'),
    (so.DimensionNumbers((), 1), 'reduction_axis=()'),
  ],
)
def test_dimension_numbers_that_name_a_missing_axis(numbers, axis):
  spec = so.SubspaceSpec(
    2,
    weight_dimension_numbers={
      'mlp': {'up': numbers, 'down': None},
      'bias': None,
    },
  )
  with errors.raises(ValueError, axis, 'mlp/up', '(8, 12)'):
    _project(spec).init(PARAMS)


@pytest.mark.parametrize(
  'numbers',
  [
    so.DimensionNumbers(0, 0),
    so.DimensionNumbers(1, -1),
    so.DimensionNumbers((0, 1), 1),
    so.DimensionNumbers((0, 0), 1),
  ],
)
def test_dimension_numbers_that_overlap(numbers):
  spec = so.SubspaceSpec(
    2,
    weight_dimension_numbers={
      'mlp': {'up': numbers, 'down': None},
      'bias': None,
    },
  )
  with errors.raises(
    ValueError, 'overlap', 'mlp/up', '(8, 12)', tuple(numbers)
  ):
    _project(spec).init(PARAMS)


def test_dimension_numbers_without_an_entry_for_a_leaf():
  numbers = {'mlp': {'up': so.DimensionNumbers(0, 1)}}
  spec = so.SubspaceSpec(2, weight_dimension_numbers=numbers)
  with errors.raises(ValueError, 'weight_dimension_numbers', 'bias'):
    _project(spec).init(PARAMS)


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.int8, jnp.bool_])
def test_integer_leaf_selected_for_projection(dtype):
  params = PARAMS | {'codes': jnp.ones((8, 12), dtype)}
  name = jnp.dtype(dtype).name
  with errors.raises(TypeError, 'codes', name, 'exclude'):
    _project().init(params)
  _project(so.SubspaceSpec(2, exclude='codes|bias')).init(params)


@pytest.mark.parametrize('dtype', [jnp.complex64])
def test_complex_leaf_selected_for_projection(dtype):
  params = PARAMS | {'waves': jnp.ones((8, 12), dtype)}
  with errors.raises(TypeError, 'waves', 'complex64'):
    _project().init(params)
