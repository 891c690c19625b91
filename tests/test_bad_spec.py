"""Bad specs: errors that name argument, value and leaf."""

import inspect

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
READY_MADE = list(so.optimizers.READY_MADE.values())
RANKED = [make for make in READY_MADE if so.optimizers.takes(make, 'rank')]
every_factory = pytest.mark.parametrize(
  'factory', READY_MADE, ids=lambda factory: factory.__name__
)


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


@pytest.mark.parametrize(
  'factory, arguments',
  [
    (so.galore, dict(every_k=2)),
    (so.golore, dict(random_from=4)),
    (so.golore, dict(rank=2, random_from=4, seed=1, every_k=2)),
    (so.online_subspace_descent, dict(rank=2, seed=1)),
    (so.fira_adamw, dict(rank=0.5)),
    (so.apollo_adamw, dict(rank=2, update_proj_gap=4)),
    (so.ldadamw, dict(seed=3)),
    (so.subspace_muon, dict(update_proj_gap=4)),
  ],
  ids=lambda x: getattr(x, '__name__', None) or '-'.join(x),
)
def test_traced_integers_are_named_with_the_call_that_is_right(
  factory, arguments
):
  names = tuple(arguments)
  params = {'w': jax.ShapeDtypeStruct((256, 320), jnp.float32)}
  make = optax.inject_hyperparams(factory)
  call = f'inject_hyperparams(so.{factory.__name__}, static_args={names})'
  with errors.raises(TypeError, *names, call):
    make(learning_rate=1e-3, **arguments).init(PARAMS)
  more = ['schedule(count // every_k)'] if 'every_k' in names else []
  with errors.raises(TypeError, *names, call, *more):
    jax.eval_shape(make(learning_rate=1e-3, **arguments).init, params)
  make = optax.inject_hyperparams(factory, static_args=names)
  jax.eval_shape(make(learning_rate=1e-3, **arguments).init, params)


@every_factory
def test_integers_that_nobody_passed_are_not_traced(factory):
  wide = jax.ShapeDtypeStruct((256, 320), jnp.float32)
  tx = optax.inject_hyperparams(factory)(learning_rate=1e-3)
  state = jax.eval_shape(tx.init, {'w': wide})
  dtypes = {x.dtype for x in state.hyperparams.values()}
  assert dtypes == {jnp.dtype(jnp.float32)}
  _, after = jax.eval_shape(tx.update, {'w': wide}, state, {'w': wide})
  assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


@pytest.mark.parametrize('factory', RANKED, ids=lambda make: make.__name__)
def test_signatures_show_defaults_as_numbers(factory):
  rank = inspect.signature(factory).parameters['rank']
  assert rank.default in (128, 0.25) and rank.default != 4
  assert str(rank) in ('rank: Any = 128', 'rank: Any = 0.25')


@pytest.mark.parametrize('factory', RANKED, ids=lambda make: make.__name__)
@pytest.mark.parametrize('rank', [4, 128, 0.25])
def test_rank_beside_a_spec(factory, rank):
  spec = so.SubspaceSpec(8)
  with errors.raises(ValueError, f'rank={rank}', 'rank=8', 'spec'):
    factory(1e-3, rank=rank, spec=spec)
  with errors.raises(ValueError, f'rank={rank}', 'rank=8', 'spec'):
    factory(1e-3, rank, spec=spec)
  factory(1e-3, spec=spec)


@pytest.mark.parametrize('factory', READY_MADE)
@pytest.mark.parametrize('seed', [0, 3])
def test_seed_beside_a_spec(factory, seed):
  with errors.raises(ValueError, f'seed={seed}', 'seed=7', 'spec'):
    factory(1e-3, seed=seed, spec=so.SubspaceSpec(8, seed=7))


def test_dimension_numbers_beside_a_spec():
  with errors.raises(ValueError, 'weight_dimension_numbers', 'spec'):
    so.galore(
      1e-3,
      weight_dimension_numbers=so.DimensionNumbers(),
      spec=so.SubspaceSpec(8),
    )


@every_factory
def test_something_else_for_the_spec_of_an_optimizer(factory):
  with errors.raises(TypeError, 'spec', 'SubspaceSpec', '8'):
    factory(1e-3, spec=8)


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
  'name, take',
  [
    ('include', lambda x: so.SubspaceSpec(2, include=x)),
    ('exclude', lambda x: so.SubspaceSpec(2, exclude=x)),
    ('exclude', lambda x: so.quantize_moments(optax.trace(0.9), exclude=x)),
    ('exclude', lambda x: so.dimension_numbers_from_paths({}, exclude=x)),
    ('head', lambda x: so.scale(1e-3, head=x)),
  ],
)
def test_pattern_that_does_not_compile(name, take):
  with errors.raises(ValueError, name, "'mlp('", 'position 3', 're.escape'):
    take('mlp(')


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


@pytest.mark.parametrize(
  'dtype', ['int8', jnp.int32, 'uint8', bool, 'float8_e4m3fn', 'complex64', 3]
)
def test_moments_that_are_no_floats(dtype):
  """Integers would keep moments of zero, and so train by nothing."""
  name = dtype if dtype == 3 else jnp.dtype(dtype).name
  with errors.raises(
    ValueError, 'moment_dtype', name, 'float16', 'float64', 'scale_by_adam8bit'
  ):
    so.SubspaceSpec(2, moment_dtype=dtype)


@pytest.mark.parametrize('dtype', [None, 'float32', jnp.bfloat16, np.float16])
def test_moments_of_any_float(dtype):
  assert so.SubspaceSpec(2, moment_dtype=dtype).moment_dtype is dtype


@pytest.mark.parametrize('dtype', ['float8_e4m3fn', 'float8_e5m2'])
def test_float8_leaf_selected_for_projection(dtype):
  params = PARAMS | {'narrow': jnp.ones((8, 12), dtype)}
  with errors.raises(TypeError, 'narrow', dtype, 'bfloat16', 'exclude'):
    _project().init(params)
  _project(so.SubspaceSpec(2, exclude='narrow')).init(params)
