"""Parameters as MaxText lays them out: layers along axis 1, heads as axes."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import errors
import grid
import measure
import subspace_optax as so

# A scanned decoder of three layers, with experts, beside layers that are not
# scanned. Of every leaf: shape, axes of rows, of columns, and where MaxText's
# usual rules put it on a mesh of fsdp x tensor.
D, H, K, F, E, L = 16, 4, 8, 24, 2, 3
SCANNED = {
  'self_attention/query/kernel': ((D, L, H, K), (0,), (2, 3)),
  'self_attention/key/kernel': ((D, L, 2, K), (0,), (2, 3)),
  'self_attention/out/kernel': ((H, L, K, D), (0, 2), (3,)),
  'mlp/wi_0/kernel': ((D, L, F), (0,), (2,)),
  'mlp/wo/kernel': ((F, L, D), (0,), (2,)),
  'MoeBlock_0/wi_0': ((E, L, D, F), (2,), (3,)),
  'MoeBlock_0/wo': ((E, L, F, D), (2,), (3,)),
}
SPECS = {
  'self_attention/query/kernel': P('fsdp', None, 'tensor', None),
  'self_attention/key/kernel': P('fsdp', None, 'tensor', None),
  'self_attention/out/kernel': P('tensor', None, None, 'fsdp'),
  'mlp/wi_0/kernel': P('fsdp', None, 'tensor'),
  'mlp/wo/kernel': P('tensor', None, 'fsdp'),
  'MoeBlock_0/wi_0': P(None, None, 'fsdp', 'tensor'),
  'MoeBlock_0/wo': P(None, None, 'tensor', 'fsdp'),
}
OTHERS = {
  # Of multi-head latent attention.
  'self_attention/wq_b/kernel': ((D, L, H, K), (0,), (2, 3)),
  'self_attention/wkv_a/kernel': ((D, L, 12), (0,), (2,)),
  # Linear attention, whose heads are one axis with what each of them holds.
  'linear_attention/out/kernel': ((H * K, L, D), (0,), (2,)),
  'self_attention/o_proj/kernel': ((H, L, K, D), (0, 2), (3,)),
  'self_attention/o_a_proj/kernel': ((E, L, F, D), (2,), (3,)),
  # Fused.
  'self_attention/qkv_proj/kernel': ((D, L, 3, H, K), (0,), (3, 4)),
  'mlp/wi/kernel': ((D, L, 2, F), (0,), (3,)),
  'MoeBlock_0/gate/kernel': ((D, L, E), (0,), (2,)),
  'shared_experts/wo/kernel': ((F, L, D), (0,), (2,)),
}
PLAIN = {
  'params/decoder/layers/pre_self_attention_layer_norm/scale': (D, L),
  'params/decoder/layers/self_attention/query/bias': (H, L, K),
  'params/decoder/layers/self_attention/sinks': (H, L),
  'params/decoder/logits_dense/kernel': (D, 99),
  'params/token_embedder/embedding': (99, D),
}
STACK = 'params/decoder/layers/'
PREFIX = 'params/decoder/layers_0/'


def _leaf(shape, rows, cols):
  return cases.Leaf(shape, jnp.float32, rows, cols)


LEAVES = {STACK + path: _leaf(*of) for path, of in SCANNED.items()} | {
  path: cases.Leaf(shape, jnp.float32) for path, shape in PLAIN.items()
}


def _without_layers(shape, rows, cols):
  """The same leaf of a layer that is not scanned."""
  lower = lambda axes: tuple(i - (i > 1) for i in axes)
  return _leaf(shape[:1] + shape[2:], lower(rows), lower(cols))


def test_numbers_of_every_kernel():
  leaves = dict(LEAVES)
  norm = 'pre_self_attention_layer_norm/scale'
  leaves[PREFIX + norm] = cases.Leaf((D,), jnp.float32)
  for path, of in (SCANNED | OTHERS).items():
    leaves[STACK + path] = _leaf(*of)
    leaves[PREFIX + path] = _without_layers(*of)
  shapes = cases.nest(
    {
      path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
      for path, leaf in leaves.items()
    }
  )
  found = cases.flat(so.dimension_numbers_from_paths(shapes))
  assert found.keys() == leaves.keys()
  for path, leaf in leaves.items():
    if not leaf.rows:
      assert found[path] is None, path
    else:
      assert found[path] == so.DimensionNumbers(leaf.rows, leaf.cols), path


def test_rows_columns_and_matrices():
  spec = so.SubspaceSpec(
    2, weight_dimension_numbers=so.dimension_numbers_from_paths
  )
  params = cases.tree(LEAVES)
  for match in spec.match(params):
    leaf = LEAVES[match.path]
    assert (match.layout is None) == (match.path in PLAIN), match.path
    if match.layout:
      sides = (leaf.view(True).m, leaf.view(True).n)
      assert (match.layout.inputs, match.layout.outputs) == sides, match.path
      count = L * (E if 'MoeBlock' in match.path else 1)
      assert np.prod(match.layout.batch_shape) == count, match.path


def test_layers_along_another_axis():
  numbers = functools.partial(so.dimension_numbers_from_paths, scan_axis=0)
  leaf = lambda *shape: {'kernel': jax.ShapeDtypeStruct(shape, jnp.float32)}
  found = numbers({'query': leaf(L, D, H, K), 'out': leaf(L, H, K, D)})
  assert found['query']['kernel'] == so.DimensionNumbers((1,), (2, 3))
  assert found['out']['kernel'] == so.DimensionNumbers((1, 2), (3,))
  assert numbers({'wo': leaf(L, F, D)})['wo']['kernel'] == (
    so.DimensionNumbers((1,), (2,))
  )


def test_boxes_and_masked_leaves():
  kernel = nn.Partitioned(jnp.ones((D, L, F)), ('embed', 'layers', 'mlp'))
  params = {'wi_0': {'kernel': kernel}, 'wi_1': {'kernel': optax.MaskedNode()}}
  found = so.dimension_numbers_from_paths(params)
  assert found['wi_0']['kernel'] == so.DimensionNumbers((0,), (2,))
  assert found['wi_1']['kernel'] is None


@pytest.mark.parametrize(
  'path,shape,scan_axis,words',
  [
    ('a/wkv/kernel', (D, D), 1, ('a/wkv/kernel', (D, D), 3, 'exclude')),
    ('a/mlp/kernel', (2, L, D, F), 1, ('a/mlp/kernel', (2, L, D, F))),
    ('a/mlp/kernel', (D, F, L), 3, ('a/mlp/kernel', 'scan_axis=3')),
  ],
)
def test_a_kernel_of_another_shape_is_named(path, shape, scan_axis, words):
  params = {path: jnp.zeros(shape)}
  with errors.raises(ValueError, *words):
    so.dimension_numbers_from_paths(params, scan_axis=scan_axis)
  exclude = functools.partial(so.dimension_numbers_from_paths, exclude='^a/')
  assert exclude(params, scan_axis=scan_axis)[path] is None


def test_scan_axis_is_checked():
  with errors.raises(ValueError, 'scan_axis', -1):
    so.dimension_numbers_from_paths({}, scan_axis=-1)
  with errors.raises(TypeError, 'scan_axis', None):
    so.dimension_numbers_from_paths({}, scan_axis=None)


def _plainly(leaf, x):
  """Returns a leaf as (*batch, m, n)."""
  if not leaf.rows:
    return x
  view = leaf.view(True)
  x = jnp.transpose(x, view.batch + leaf.rows + leaf.cols)
  batch = [leaf.shape[i] for i in view.batch]
  return x.reshape(*batch, view.m, view.n)


# A step of all kinds of matrices, one each, so that it compiles soon.
FEW = {
  path: leaf
  for path, leaf in LEAVES.items()
  if path.removeprefix(STACK)
  in (
    'self_attention/query/kernel',
    'self_attention/out/kernel',
    'mlp/wo/kernel',
    'MoeBlock_0/wi_0',
    'self_attention/query/bias',
  )
}


def _map(f, tree):
  return cases.nest({p: f(LEAVES[p], x) for p, x in cases.flat(tree).items()})


def _optimizer(name, numbers):
  spec = so.SubspaceSpec(2, weight_dimension_numbers=numbers)
  make = {
    'golore': lambda: so.golore(0.02, update_proj_gap=2, spec=spec),
    'online': lambda: so.online_subspace_descent(0.02, spec=spec),
  }
  return make[name]()


def _last_axes(params):
  numbers = lambda leaf, _: so.DimensionNumbers(-2, -1) if leaf.rows else None
  return _map(numbers, params)


def _run(tx, params, gradients):
  state = tx.init(params)

  @cases.jit
  def step(params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  for gradient in gradients:
    params, state = step(params, state, gradient)
  assert step._cache_size() == 1
  return params, state


@functools.cache
def _run_alone(name):
  tx, few = _optimizer(name, so.dimension_numbers_from_paths), TREES[name]
  return _run(tx, cases.tree(few), cases.gradients(few, 4))[0]


def _only(leaves, *names):
  return {k: x for k, x in leaves.items() if k.removeprefix(STACK) in names}


# Online PCA is cheap; Haar samples are of as many axes in one leaf as another.
TREES = {
  'online': FEW,
  'golore': _only(FEW, 'self_attention/query/kernel', 'MoeBlock_0/wi_0'),
}


def _on_mesh(tree):
  """Returns the leaves whose steps are taken on a mesh, too."""
  names = 'self_attention/out/kernel', 'MoeBlock_0/wi_0'
  return _only(cases.flat(tree), *names)


@pytest.mark.parametrize(
  'name',
  [
    'online',
    # Draws bases of what the other one has of every leaf.
    pytest.param('golore', marks=pytest.mark.full),
  ],
)
def test_steps_are_those_of_the_same_matrices_laid_out_plainly(name):
  few = TREES[name]
  plain, _ = _run(
    _optimizer(name, _last_axes),
    _map(_plainly, cases.tree(few)),
    [_map(_plainly, g) for g in cases.gradients(few, 4)],
  )
  measure.assert_trees_close(
    _map(_plainly, _run_alone(name)), plain, rtol=2e-5, atol=2e-6
  )


@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(kind,) * 2)
  tx = _optimizer('online', so.dimension_numbers_from_paths)

  def put(path, x):
    spec = SPECS.get(path.removeprefix(STACK), P(*[None] * x.ndim))
    if kind == AxisType.Auto:  # the form in which jit gives its results
      while spec and spec[-1] is None:
        spec = P(*spec[:-1])
    return jax.device_put(x, NamedSharding(mesh, spec))

  def place(tree):
    return cases.nest({p: put(p, x) for p, x in _on_mesh(tree).items()})

  with jax.set_mesh(mesh):
    gradients = list(map(place, cases.gradients(FEW, 4)))
    params, state = _run(tx, place(cases.tree(FEW)), gradients)
  measure.assert_trees_close(
    cases.flat(params), _on_mesh(_run_alone('online')), rtol=2e-5, atol=2e-6
  )
  for tree in (_adam(state).mu, measure.bases(state)):
    for path, x in cases.flat(tree).items():
      if path.removeprefix(STACK) in SPECS:
        assert x.addressable_shards[0].data.size * 2 <= x.size, path


def _adam(state):
  """Finds the one state with `mu` and `nu` by its attributes.

  As code does that knows nothing of this library, such as MaxText's.
  """
  found = []

  def walk(node):
    if hasattr(node, 'mu') and hasattr(node, 'nu'):
      found.append(node)
    elif isinstance(node, dict):
      list(map(walk, node.values()))
    elif isinstance(node, list | tuple):
      list(map(walk, node))

  walk(state)
  # Online PCA may have an Adam of its own, whose moments are those of bases.
  return found[-1]


OPTIMIZERS = [
  so.galore,
  so.golore,
  so.online_subspace_descent,
  so.fira_adamw,
  so.apollo_adamw,
  so.ldadamw,
  so.subspace_adamw,
]
ALIKE = [so.golore, so.apollo_adamw, so.subspace_adamw]


@pytest.mark.parametrize(
  'make',
  # The others have the same moments.
  grid.but(OPTIMIZERS, ALIKE),
  ids=lambda make: make.__name__,
)
def test_moments_have_the_structure_of_the_parameters(make):
  numbers = so.dimension_numbers_from_paths
  if make is so.galore:
    tx = make(0.1, rank=2, weight_dimension_numbers=numbers)
  else:
    tx = make(0.1, spec=so.SubspaceSpec(2, weight_dimension_numbers=numbers))
  params = cases.tree(LEAVES)
  boxed = jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), params)
  for tree in (params, boxed):
    state = jax.eval_shape(tx.init, tree)
    adam = _adam(state)
    assert isinstance(adam, optax.ScaleByAdamState)
    for moments in (adam.mu, adam.nu):
      moments = nn.unbox(moments)  # boxes name the axes of what is in them
      assert jax.tree.structure(moments) == jax.tree.structure(params)
      for path, moment in cases.flat(moments).items():
        leaf = LEAVES[path]
        if not leaf.rows:
          assert moment.shape == leaf.shape
        else:  # the matrix's projected side is of length 2
          assert moment.size < np.prod(leaf.shape) and 2 in moment.shape


@pytest.mark.parametrize(
  'path,shape,rows,cols',
  [
    ('o_proj/kernel', (4, 16, 64), (0, 1), (2,)),
    ('o_proj/kernel', (64, 4, 64), (0,), (2,)),
    ('o_proj/kernel', (4, 3, 16, 64), (0, 2), (3,)),
    ('o_a_proj/kernel', (8, 512, 128), (1,), (2,)),
    ('out/kernel', (4096, 12, 2048), (0,), (2,)),
    ('out/kernel', (16, 256, 3072), (0, 1), (2,)),  # wider than the model
    ('query/kernel', (512, 6, 384), (0,), (2,)),
    ('query/kernel', (4096, 32, 128), (0,), (1, 2)),
    ('key/kernel', (4096, 8, 128), (0,), (1, 2)),
    ('key/kernel', (2048, 1, 256), (0,), (1, 2)),
    ('query/kernel', (512, 512), (0,), (1,)),
  ],
)
def test_sizes_tell_of_a_leaf_alone(path, shape, rows, cols):
  params = {'self_attention': {path: jax.ShapeDtypeStruct(shape, jnp.float32)}}
  found = so.dimension_numbers_from_paths(params)['self_attention'][path]
  assert found == so.DimensionNumbers(rows, cols)


def test_names_are_whole_and_those_of_a_spec():
  kernel = jax.ShapeDtypeStruct((D, F), jnp.float32)
  names = ('norm_proj', 'scaled_mlp', 'lm_head', 'conv1d', 'token_embed')
  params = {name: {'kernel': kernel} for name in names}
  found = so.dimension_numbers_from_paths(params)
  kept = [name for name in names if found[name]['kernel'] is not None]
  assert kept == ['norm_proj', 'scaled_mlp']
  found = so.dimension_numbers_from_paths(params, exclude=None)
  assert None not in [found[name]['kernel'] for name in names]


@pytest.mark.parametrize(
  'kernels,norm,scanned',
  [
    ({'query': (512, 6, 384), 'out': (384, 6, 512)}, (512, 6), True),
    ({'query': (64, 8, 128), 'key': (64, 8, 32)}, (64, 8), True),
    ({'query': (64, 8, 128), 'key': (64, 8, 32)}, (64,), False),
  ],
)
def test_attention_without_heads_is_told_by_norms(kernels, norm, scanned):
  leaf = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  layer = {name: {'kernel': leaf(shape)} for name, shape in kernels.items()}
  params = {'layers_0': layer | {'norm': {'scale': leaf(norm)}}}
  found = so.dimension_numbers_from_paths(params)['layers_0']
  cols = (2,) if scanned else (1, 2)
  for name in kernels:
    assert found[name]['kernel'] == so.DimensionNumbers((0,), cols), name


def test_fused_or_scanned_is_told_by_norms():
  leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  numbers = functools.partial(so.dimension_numbers_from_paths, scan_axis=0)
  layer = {'norm': {'scale': leaf(4, D)}, 'wi': {'kernel': leaf(4, D, F)}}
  assert numbers({'layers': layer})['layers']['wi']['kernel'] == (
    so.DimensionNumbers((1,), (2,))
  )
  layer = {'norm': {'scale': leaf(D)}, 'wi': {'kernel': leaf(D, 2, F)}}
  assert numbers({'layers_0': layer})['layers_0']['wi']['kernel'] == (
    so.DimensionNumbers((0,), (2,))
  )


def test_fused_or_scanned_is_asked():
  params = {'mlp': {'wi': {'kernel': jnp.ones((8, 2, 16))}}}
  with errors.raises(ValueError, 'mlp/wi/kernel', 'scan_axis=0', 'exclude'):
    so.dimension_numbers_from_paths(params, scan_axis=0)
