"""Constructors and whole trees drawn at random: shapes, nothing compiled."""

import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import optax
import pytest

import subspace_optax as so
from subspace_optax import projectors

GAPS = st.one_of(
  st.integers(1, 500), st.builds(projectors.LazyGap, st.integers(1, 500))
)
DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])
RULES = st.one_of(
  st.builds(
    projectors.svd,
    GAPS,
    st.sampled_from(['auto', 'exact', 'gram', 'randomized', 'warm']),
    power_iterations=st.integers(1, 3),
    stagger=st.booleans(),
  ),
  st.builds(
    projectors.stiefel, GAPS, stagger=st.booleans(), regenerate=st.booleans()
  ),
  st.builds(
    projectors.gaussian, GAPS, stagger=st.booleans(), regenerate=st.booleans()
  ),
  st.builds(
    projectors.importance_svd,
    GAPS,
    st.sampled_from(['exact', 'gram']),
    stagger=st.booleans(),
  ),
  st.builds(
    projectors.power_iteration, GAPS, st.floats(0, 0.99), stagger=st.booleans()
  ),
  st.builds(projectors.grassmann_tracking, GAPS, st.floats(0.01, 3.0)),
  st.builds(projectors.grassmann_walk, GAPS, st.floats(0.01, 1.5)),
  st.builds(
    projectors.online_pca,
    st.just(optax.adam(1e-2)),
    st.floats(0, 1),
    st.sampled_from(['random', 'svd']),
    update_every=st.integers(1, 5),
  ),
)


@st.composite
def leaves(draw):
  """A shape, which of its axes are rows and columns, and a dtype."""
  shape = tuple(draw(st.lists(st.integers(1, 6), min_size=2, max_size=5)))
  axes = draw(st.permutations(range(len(shape))))
  rows = draw(st.integers(1, len(shape) - 1))
  cols = draw(st.integers(1, len(shape) - rows))
  numbers = so.DimensionNumbers(
    tuple(axes[:rows]), tuple(axes[rows : rows + cols])
  )
  return shape, numbers, draw(DTYPES)


@settings(max_examples=20)
@given(
  st.dictionaries(st.sampled_from('abcdef'), leaves(), min_size=1, max_size=2),
  RULES,
  st.one_of(st.integers(1, 8), st.floats(0.01, 1.0)),
  st.sampled_from(['short', 'long', 'in', 'out']),
  st.sampled_from(['keep', 'first', so.transports.both(0.9, 0.999), 'reset']),
  st.integers(1, 2),
  DTYPES,
)
def test_state_keeps_its_shapes(drawn, rule, rank, side, transport, k, dtype):
  spec = so.SubspaceSpec(
    rank,
    side=side,
    weight_dimension_numbers={key: leaf[1] for key, leaf in drawn.items()},
    only_if_smaller=False,
    basis_dtype=dtype,
  )
  params = {
    key: jax.ShapeDtypeStruct(shape, dtype)
    for key, (shape, _, dtype) in drawn.items()
  }
  tx = so.subspace(
    spec, rule, optax.scale_by_adam(), transport=transport, every_k=k
  )
  state = jax.eval_shape(tx.init, params)
  updates, new = jax.eval_shape(tx.update, params, state, params)
  assert jax.tree.structure(new) == jax.tree.structure(state)
  for before, after in zip(
    jax.tree.leaves((params, state)),
    jax.tree.leaves((updates, new)),
    strict=True,
  ):
    assert (before.shape, before.dtype) == (after.shape, after.dtype)
    assert math.prod(after.shape) > 0
  assert rule.name in so.describe(tx, params)


@pytest.mark.parametrize(
  'make',
  [
    projectors.svd,
    projectors.stiefel,
    projectors.gaussian,
    projectors.importance_svd,
    projectors.power_iteration,
    projectors.grassmann_tracking,
    projectors.grassmann_walk,
  ],
)
@settings(max_examples=30)
@given(
  st.one_of(
    st.integers(max_value=0),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.tuples(st.integers()),
  )
)
def test_gaps_that_are_no_number_of_steps(make, gap):
  with pytest.raises((TypeError, ValueError), match='update_proj_gap'):
    make(gap)
