"""`describe`: a line for every leaf, and a reason for every plain one."""

import re

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import optax
import pytest

import cases
import subspace_optax as so
from subspace_optax import projectors

PARAMS = {
  'blocks': {'up': jnp.ones((3, 8, 12)), 'down': jnp.ones((3, 12, 8))},
  'query': jnp.ones((16, 2, 8)),
  'embed': jnp.ones((99, 8)),
  'thin': jnp.ones((3, 12)),
  'empty': jnp.ones((0, 12)),
  'scalar': jnp.ones(()),
  'bias': jnp.ones(12),
}

# Path, shape, matrices, rank, side, axes, basis.
TABLE = {
  'blocks/up': (
    '(3,8,12)',
    '3 x (8 x 12)',
    '3',
    'rows',
    'siblings',
    'float32(3,8,3)',
  ),
  'blocks/down': (
    '(3,12,8)',
    '3 x (12 x 8)',
    '3',
    'columns',
    'siblings',
    'float32(3,8,3)',
  ),
  'query': ('(16,2,8)', '16 x 16', '3', 'rows', 'name', 'float32(16,3)'),
  'embed': ('(99,8)', '-', '-', 'plain', '-', 'is an embedding by its name'),
  'thin': (
    '(3,12)',
    '-',
    '-',
    'plain',
    'two axes',
    'rank 3 of 3 x 12 saves nothing with a basis and 2 moments',
  ),
  'empty': ('(0,12)', '-', '-', 'plain', 'two axes', 'has no elements'),
  'scalar': ('()', '-', '-', 'plain', '-', 'has fewer than two axes'),
  'bias': ('(12)', '-', '-', 'plain', '-', 'has fewer than two axes'),
}


@pytest.mark.parametrize(
  ('path', 'kind'),
  [
    ('A_log', 'a vector or buffer'),
    ('r_k', 'a vector or buffer'),
    ('mask', 'a vector or buffer'),
    ('attn/rope_freqs', 'a vector or buffer'),
    ('bias', 'a bias'),
    ('b_qkv', 'a bias'),
  ],
)
def test_vectors_are_called_what_they_are(path, kind):
  params = {path: jnp.ones((64, 16)), 'w': jnp.ones((64, 16))}
  text = so.describe(so.SubspaceSpec(2), params)
  assert f'is {kind} by its name' in text


def _table(text):
  """Returns the rows of a description by path, and the lines above it."""
  lines = text.splitlines()
  start = next(i for i, x in enumerate(lines) if x.startswith('path'))
  rows = [re.split(r'\s{2,}', line.strip()) for line in lines[start + 1 :]]
  return {row[0]: tuple(row[1:]) for row in rows}, lines[:start]


def _spec(**kwargs):
  return so.SubspaceSpec(3, **kwargs)


def test_every_leaf_of_a_spec_appears_with_its_reason():
  table, above = _table(so.describe(_spec(), PARAMS))
  assert table == TABLE
  assert above == []


def test_shapes_are_enough():
  shapes = jax.eval_shape(lambda: PARAMS)
  assert so.describe(_spec(), shapes) == so.describe(_spec(), PARAMS)
  tx = so.golore(1e-3, spec=_spec())
  assert so.describe(tx, shapes) == so.describe(tx, PARAMS)


def _inner():
  return so.golore(1e-3, update_proj_gap=7, spec=_spec())


@pytest.mark.parametrize(
  'wrap',
  [
    _inner,
    lambda: optax.chain(optax.clip(1.0), _inner(), optax.scale(2.0)),
    lambda: optax.MultiSteps(_inner(), 2),
    lambda: optax.MultiSteps(_inner(), 2).gradient_transformation(),
    lambda: optax.apply_if_finite(_inner(), 3),
    lambda: optax.inject_hyperparams(
      so.golore, static_args=('spec', 'random_from')
    )(learning_rate=1e-3, update_proj_gap=7, spec=_spec()),
    lambda: optax.masked(_inner(), jax.tree.map(lambda _: True, PARAMS)),
    lambda: so.project(_spec(), projectors.stiefel(7)),
  ],
  ids=[
    'bare',
    'chain',
    'MultiSteps',
    'MultiSteps_transformation',
    'apply_if_finite',
    'inject_hyperparams',
    'masked',
    'project',
  ],
)
def test_optimizers_are_described_through_wrappers(wrap):
  table, above = _table(so.describe(wrap(), PARAMS))
  assert table == TABLE
  assert len(above) == 1 and above[0].startswith('stiefel(')
  assert '7' in above[0] or 'traced' in above[0]


def test_leaves_that_a_wrapper_hides_are_left_out():
  is_matrix = lambda params: jax.tree.map(lambda x: x.ndim > 2, params)
  table, _ = _table(so.describe(optax.masked(_inner(), is_matrix), PARAMS))
  assert table.keys() == {'blocks/up', 'blocks/down', 'query'}


def test_each_part_of_a_partition_is_described():
  labels = jax.tree.map(lambda x: 'a' if x.ndim > 2 else 'b', PARAMS)
  tx = optax.partition(
    {
      'a': so.galore(1e-3, rank=2),
      'b': so.online_subspace_descent(1e-3, spec=_spec(exclude=None)),
    },
    labels,
  )
  text = so.describe(tx, PARAMS)
  first, second = text.split('online_pca')
  assert 'svd(update_proj_gap=200' in first
  assert _table(first)[0].keys() == {'blocks/up', 'blocks/down', 'query'}
  found = _table('online_pca' + second)[0]
  assert found.keys() == PARAMS.keys() - {'blocks', 'query'}
  assert found['embed'][3:5] == ('columns', 'two axes')


def test_projectors_and_dtypes_are_named():
  spec = _spec(basis_dtype=jnp.bfloat16, include='up')
  rule = projectors.switch(
    {
      0: projectors.svd(4, 'gram'),
      8: projectors.online_pca(optax.sgd(0.1), orthogonality=0.3),
    }
  )
  tx = so.subspace(spec, rule, optax.scale_by_adam())
  table, above = _table(so.describe(tx, PARAMS))
  for word in (
    "0: svd(update_proj_gap=4, method='gram')",
    '8: online_pca',
    '0.3',
  ):
    assert word in above[0]
  assert table['blocks/up'][-1] == 'bfloat16(3,8,3)'
  assert table['query'][-1] == "path matches no include='up'"


def test_named_axes_show():
  leaves = cases.LEAVES
  tx = cases.CASES['galore'].make(leaves)
  table, _ = _table(so.describe(tx, cases.tree(leaves)))
  assert table.keys() == leaves.keys()
  assert table['blocks/query'][1:4] == ('3 x (8 x 12)', '3', 'columns')
  assert table['thin'][1:4] == ('2 x 12', '2', 'columns')
  assert table['bias'][-1] == 'has no weight_dimension_numbers'


def test_flax_states_and_boxes_show_plain_paths():
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.up = nnx.Linear(8, 12, rngs=rngs)

  state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
  dense = nn.Dense(
    12,
    kernel_init=nn.with_partitioning(
      nn.initializers.lecun_normal(), (None, None)
    ),
  )
  boxed = dense.init(jax.random.key(0), jnp.ones((1, 8)))['params']
  for tx in (_spec(), _inner()):
    table, _ = _table(so.describe(tx, state))
    assert table.keys() == {'up/kernel', 'up/bias'}
    assert table['up/kernel'][-1] == 'float32(8,3)'
    table, _ = _table(so.describe(tx, boxed))
    assert table.keys() == {'kernel', 'bias'}
    assert table['kernel'][-1] == 'float32(8,3)'


def test_what_is_assumed_or_named_shows():
  params = {'w': jnp.ones((5, 8, 12)), 'filters': jnp.ones((3, 3, 16, 32))}
  table, _ = _table(so.describe(_spec(), params))
  assert table['w'][-2:] == ('assumed', 'float32(5,8,3)')
  assert table['filters'][-2:] == ('assumed', 'looks like a convolution')
  spec = _spec(weight_dimension_numbers=so.DimensionNumbers())
  assert _table(so.describe(spec, params))[0]['w'][-2] == 'named'


def test_blocks_of_fused_kernels_show():
  dims = so.DimensionNumbers(1, 2, (6, 3, 3))
  spec = _spec(weight_dimension_numbers=dims)
  table, _ = _table(so.describe(spec, {'qkv': jnp.ones((3, 8, 12))}))
  assert table['qkv'][1] == '3 x (8 x (6 + 3 + 3))'


def test_describing_leaves_no_trace():
  first = so.describe(_inner(), PARAMS)
  _inner().init({'w': jnp.ones((8, 12))})
  assert so.describe(_inner(), PARAMS) == first
