"""`SubspaceSpec`: which leaves, as which matrices, at which rank and side."""

import functools
import math
import re
from typing import NamedTuple

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import errors
import measure
import subspace_optax as so
from subspace_optax import plan
from subspace_optax import projectors


def _shapes(shapes, dtype=jnp.float32):
  return cases.nest(
    {path: jax.ShapeDtypeStruct(shape, dtype) for path, shape in shapes.items()}
  )


def _bases(spec, params):
  """Returns the shapes of the bases that `project` makes."""
  tx = so.project(spec, projectors.stiefel(2))
  return {
    path: tuple(x.shape)
    for path, x in measure.bases(jax.eval_shape(tx.init, params)).items()
  }


def _basis(shape, spec, path='w'):
  return _bases(spec, _shapes({path: shape})).get(path)


LLAMA = {
  'embed_tokens/embedding': (100, 16),
  'wte': (100, 16),
  'wpe/kernel': (100, 16),
  'blocks/attention/query/kernel': (16, 2, 8),
  'blocks/attention/out/kernel': (2, 8, 16),
  'blocks/mlp/up/kernel': (16, 64),
  'blocks/mlp/down/kernel': (64, 16),
  'blocks/input_layernorm/weight': (16, 16),
  'blocks/rms/scale': (16, 16),
  'blocks/mlp/bias': (4, 16),
  'blocks/head_gate/kernel': (16, 16),
  'lm_head/kernel': (16, 100),
  'head': (16, 100),
}


def test_default_keeps_embeddings_heads_norms_and_biases_plain():
  assert _bases(so.SubspaceSpec(rank=2), _shapes(LLAMA)) == {
    'blocks/attention/query/kernel': (16, 2),
    'blocks/attention/out/kernel': (2, 8, 2),
    'blocks/mlp/up/kernel': (16, 2),
    'blocks/mlp/down/kernel': (16, 2),
    'blocks/head_gate/kernel': (16, 2),
  }


def test_exclude_none_brings_every_matrix_back():
  found = _bases(so.SubspaceSpec(rank=2, exclude=None), _shapes(LLAMA))
  assert found.keys() == LLAMA.keys()


def test_include_and_exclude_are_searched_in_the_path():
  params = _shapes({'a/up': (8, 12), 'b/up': (8, 12), 'b/down': (8, 12)})
  found = lambda **kwargs: sorted(_bases(so.SubspaceSpec(2, **kwargs), params))
  assert found() == ['a/up', 'b/down', 'b/up']
  assert found(include='up$') == ['a/up', 'b/up']
  assert found(include='up$', exclude='^a') == ['b/up']
  assert found(exclude='b/') == ['a/up']


@pytest.mark.parametrize(
  'side, wide, tall, square',
  [
    ('short', (8, 3), (8, 3), (8, 3)),
    ('long', (12, 3), (12, 3), (8, 3)),
    ('in', (8, 3), (12, 3), (8, 3)),
    ('out', (12, 3), (8, 3), (8, 3)),
  ],
)
def test_side(side, wide, tall, square):
  spec = so.SubspaceSpec(rank=3, side=side)
  assert _basis((8, 12), spec) == wide
  assert _basis((12, 8), spec) == tall
  assert _basis((8, 8), spec) == square


def test_square_matrices_span_rows_on_either_side():
  params = _shapes({'w': (8, 8)})
  for side in ('short', 'long'):
    text = so.describe(so.SubspaceSpec(rank=2, side=side), params)
    assert 'rows' in text and 'columns' not in text


@pytest.mark.parametrize(
  'rank, wanted',
  [
    (1, 1),
    (3, 3),
    (np.int64(3), 3),
    (0.25, 2),
    (np.float32(0.5), 4),
    (0.01, 1),  # never none
    (lambda path, leaf: 2, 2),
    (lambda path, leaf: 0.5, 4),
    (lambda path, leaf: leaf.shape[-1] // 4, 3),
    (lambda path, leaf: {'w': 5}[path], 5),
  ],
)
def test_rank_as_int_fraction_or_callable(rank, wanted):
  spec = so.SubspaceSpec(rank, only_if_smaller=False)
  assert _basis((8, 12), spec) == (8, wanted)


@pytest.mark.parametrize('rank', [8, 9, 100, 1.0])
def test_rank_above_the_short_side_is_clipped_or_refused(rank):
  clipped = so.SubspaceSpec(rank, only_if_smaller=False)
  assert _basis((8, 12), clipped) == (8, 8)
  with errors.raises(ValueError, f'rank={rank}', '8 x 12', 'only_if_smaller'):
    _basis((8, 12), so.SubspaceSpec(rank))


def test_leaves_that_would_save_nothing_stay_plain():
  # m r + 2 n r < 2 m n: 32 r < 192 for 8 x 12.
  assert _basis((8, 12), so.SubspaceSpec(rank=5)) == (8, 5)
  with errors.raises(ValueError, 'rank 6 of 8 x 12'):
    _basis((8, 12), so.SubspaceSpec(rank=6))
  params = _shapes({'w': (8, 12), 'thin': (4, 12)})
  with pytest.warns(UserWarning, match='thin: rank 4 of 4 x 12'):
    assert _bases(so.SubspaceSpec(rank=5), params) == {'w': (8, 5)}


def _composed(learning_rate, rank):
  spec = so.SubspaceSpec(rank)
  rule = projectors.gaussian(5, regenerate=True)
  after = optax.scale(-learning_rate)
  return so.subspace(spec, rule, optax.scale_by_adam(), after=after)


def _given_a_spec(learning_rate, rank):
  return so.subspace_adamw(learning_rate, spec=so.SubspaceSpec(rank))


def _planned(name, **settings):
  return lambda learning_rate, rank: plan.optimizer(name, rank=rank, **settings)


@pytest.mark.parametrize(
  'make',
  [
    so.apollo_adamw,
    functools.partial(so.golore, regenerate=True),
    so.subspace_adamw,
    so.subspace_muon,
    so.trion,
    _composed,
    _given_a_spec,
    _planned('subspace_muon'),
    _planned('subspace_adamw8bit'),
    _planned('golore', regenerate=True),
    _planned('golore8bit'),
    _planned('gaussian8bit'),
  ],
)
@pytest.mark.filterwarnings('ignore::UserWarning')  # of the planner's spec
def test_optimizers_that_store_no_bases_count_none(make):
  """2 n r < 2 m n, and a vector with an axis of 1 stays plain."""
  params = _shapes({'w': (8, 8), 'column': (64, 1)})
  tx = make(1e-3, rank=7)
  shapes = {x.shape for x in jax.tree.leaves(jax.eval_shape(tx.init, params))}
  assert (8, 8) not in shapes or make is so.trion
  assert (64, 1) in shapes
  described = so.describe(tx, params)
  assert '8 x 8' in described and '64 x 1' not in described
  with errors.raises(ValueError, 'rank 8 of 8 x 8 saves nothing', '2 moments'):
    make(1e-3, rank=8).init({'w': jnp.ones((8, 8))})


@pytest.mark.parametrize(
  'make',
  [
    so.dion,
    so.fira_adamw,
    so.golore,
    functools.partial(so.golore, random_from=5),
    so.ldadamw,
    so.online_subspace_descent,
    _planned('galore'),
    _planned('golore'),
  ],
)
@pytest.mark.filterwarnings('ignore::UserWarning')
def test_optimizers_that_store_bases_count_them(make):
  params = _shapes({'w': (8, 8), 'other': (8, 16)})
  described = so.describe(make(1e-3, rank=6), params)
  assert '8 x 16' in described and 'rank 6 of 8 x 8' in described
  assert 'a basis and 2 moments' in described


def test_a_rule_of_what_is_counted_has_a_known_name():
  with errors.raises(ValueError, 'only_if_smaller', "'basis'"):
    so.SubspaceSpec(7, only_if_smaller='basis')


@pytest.mark.parametrize(
  'path, shape, basis',
  [
    ('query', (12, 2, 6), (12, 3)),
    ('key/kernel', (24, 2, 6), (2, 6, 3)),  # 24 x (2 x 6)
    ('attn/value', (5, 24, 2, 6), (5, 2, 6, 3)),  # stacked
    ('out', (2, 6, 12), (2, 6, 3)),
    ('attn/o_proj', (5, 2, 6, 12), (5, 2, 6, 3)),
    ('query', (16, 12), (12, 3)),  # 2-D: nothing to merge
  ],
)
def test_axes_by_name(path, shape, basis):
  spec = so.SubspaceSpec(rank=3, only_if_smaller=False)
  assert _basis(shape, spec, path) == basis


@pytest.mark.parametrize(
  'path, shape, basis',
  [
    ('query', (16, 2, 6), (2, 6, 3)),  # heads are not as wide as the model
    ('attn/o_proj', (5, 2, 6, 10), (5, 10, 3)),
    ('queryish', (9, 16, 12), (9, 12, 3)),  # not the word
    ('output', (9, 16, 12), (9, 12, 3)),
    ('mlp', (9, 16, 12), (9, 12, 3)),
    ('moe', (4, 2, 16, 12), (4, 2, 12, 3)),  # experts and layers
  ],
)
def test_axes_that_are_assumed(path, shape, basis):
  spec = so.SubspaceSpec(rank=3, only_if_smaller=False)
  with pytest.warns(UserWarning, match=path):
    assert _basis(shape, spec, path) == basis


class OptaxDimensionNumbers(NamedTuple):
  """Fields as of optax's GaLore and Muon."""

  reduction_axis: tuple[int, ...] | int
  output_axis: tuple[int, ...] | int


@pytest.mark.parametrize(
  'numbers',
  [so.DimensionNumbers(0, (2, 3)), OptaxDimensionNumbers((0,), (-2, -1))],
)
@pytest.mark.parametrize('form', ['one', 'tree', 'callable'])
def test_dimension_numbers_as_one_tree_or_callable(numbers, form):
  params = _shapes({'w': (16, 3, 4, 5)})
  if form == 'one':
    given = numbers
  elif form == 'tree':
    given = {'w': numbers}
  else:
    given = lambda p: jax.tree.map(lambda _: numbers, p)
  spec = so.SubspaceSpec(2, weight_dimension_numbers=given)
  assert _bases(spec, params) == {'w': (16, 3, 2)}


def test_the_tree_of_dimension_numbers_names_the_leaves():
  params = _shapes({'embed': (16, 12), 'w': (16, 12), 'b': (16,)})
  spec = so.SubspaceSpec(
    2,
    weight_dimension_numbers={
      'embed': so.DimensionNumbers(0, 1),
      'w': None,
      'b': None,
    },
  )
  assert _bases(spec, params) == {'embed': (12, 2)}


def test_swapped_dimension_numbers_transpose():
  spec = so.SubspaceSpec(
    2, side='in', weight_dimension_numbers=so.DimensionNumbers(1, 0)
  )
  assert _basis((8, 12), spec) == (12, 2)


def test_axis_1_stack_is_a_batch():
  spec = so.SubspaceSpec(3, weight_dimension_numbers=so.DimensionNumbers(0, 2))
  assert _basis((8, 5, 12), spec) == (8, 5, 3)


def test_empty_trees_and_masked_leaves_are_accepted():
  spec = so.SubspaceSpec(2)
  assert spec.match({}) == []
  params = _shapes({'w': (8, 12)}) | {'b': optax.MaskedNode()}
  assert _bases(spec, params) == {'w': (8, 2)}


def test_leaves_without_elements_stay_plain():
  params = _shapes({'w': (8, 12), 'none': (0, 12)})
  assert _bases(so.SubspaceSpec(2), params) == {'w': (8, 2)}


def test_spec_is_immutable_and_compares_by_value():
  spec = so.SubspaceSpec(2, include='a')
  assert spec == so.SubspaceSpec(2, include='a') != so.SubspaceSpec(3)
  with pytest.raises(AttributeError):
    spec.rank = 3


@hypothesis.given(
  rank=st.one_of(
    st.integers(),
    st.floats(allow_nan=True),
    st.booleans(),
    st.none(),
    st.text(max_size=2),
  )
)
@hypothesis.settings(max_examples=60)
def test_every_rank_is_taken_or_refused_by_name(rank):
  is_int = isinstance(rank, int) and not isinstance(rank, bool)
  good = (is_int and rank > 0) or (isinstance(rank, float) and 0 < rank <= 1)
  if good:
    assert _basis((8, 12), so.SubspaceSpec(rank, only_if_smaller=False))
    return
  with pytest.raises((ValueError, TypeError), match='rank'):
    so.SubspaceSpec(rank)


_dims = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)
_names = st.sampled_from(
  ['w', 'query', 'out', 'bias', 'embed', 'up', 'down', 'norm', 'a', 'b']
)


@hypothesis.given(
  shapes=st.dictionaries(_names, _dims, max_size=3),
  rank=st.one_of(st.integers(1, 7), st.floats(0.01, 1.0)),
  side=st.sampled_from(['short', 'long', 'in', 'out']),
  only_if_smaller=st.sampled_from([True, False, 'moments']),
)
@hypothesis.settings(max_examples=30)
@pytest.mark.filterwarnings('ignore::UserWarning')  # nothing tells their axes
def test_any_tree_gives_bases_updates_and_a_state_that_saves(
  shapes, rank, side, only_if_smaller
):
  spec = so.SubspaceSpec(
    rank, side=side, only_if_smaller=only_if_smaller, allow_empty=True
  )
  params = _shapes(shapes)
  matches = {match.path: match for match in spec.match(params)}
  wanted = [match for match in matches.values() if match.selected]
  if wanted and not any(match.layout for match in wanted):
    assert only_if_smaller
    with pytest.raises(ValueError, match='leaves no matrix'):
      _bases(spec, params)
    return
  found = _bases(spec, params)
  for path, shape in shapes.items():
    if len(shape) < 2 or re.search('embed|norm|bias', path):
      assert path not in found
    elif path not in found:
      assert only_if_smaller or not matches[path].selected
      assert matches[path].reason
    else:
      *axes, r = found[path]
      assert math.prod(shape) % math.prod(axes) == 0
      assert 1 <= r <= (rank if isinstance(rank, int) else max(shape))
  tx = so.subspace(spec, projectors.stiefel(2), optax.scale_by_adam())
  state = jax.eval_shape(tx.init, params)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert measure.types(updates) == measure.types(params)
  assert measure.types(after) == measure.types(state)
  if only_if_smaller:
    size = lambda tree: sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if x.ndim
    )
    own = measure.bases(state) if only_if_smaller == 'moments' else ()
    seeds = jax.tree.leaves(measure.project_state(state).seed)
    # Beside its basis, which 'moments' does not count, and two moments, a
    # matrix has a seed, three metrics and a flag; of a single one, scalars.
    more = sum(17 * x.size for x in seeds if x.ndim)
    adam = 8 * sum(math.prod(shape) for shape in shapes.values())
    assert size(state) - size(own) - more <= adam
