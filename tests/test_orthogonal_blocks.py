"""Heads and fused kernels are orthogonalised each alone, on any mesh."""

import functools
import itertools

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
import references as ref
import subspace_optax as so
from subspace_optax import projectors
from subspace_optax import residuals
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _orthogonalize

WIDTHS = (16, 4, 12)
CUTS = np.cumsum(WIDTHS)[:-1]
B2 = 0.9
RULE = _orthogonalize.make_rule('standard', 5, 'frobenius', B2, 1e-8)
MODES = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}


def layout(shape, rows, cols, blocks=()):
  return _layout.Layout(shape, rows, cols, True, 1, blocks=blocks)


@functools.partial(jax.jit, static_argnums=0)
def steps(of, leaves):
  """Returns the directions of NorMuon for some leaves, and the last squares."""
  squares, found = _orthogonalize.first_squares(of, leaves[0]), []
  for x in leaves:
    (direction,), (squares,) = _orthogonalize.orthogonalize(
      RULE, [of], [x], [squares]
    )
    found.append(direction)
  return found, squares


def dense(leaves):
  """Returns NorMuon's directions for matrices of inputs by outputs."""
  v, found = 0.0, []
  for x in leaves:
    u, s, w = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
      s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    o = u * s @ w
    v = B2 * v + (1 - B2) * np.mean(o**2, axis=0)
    scaled = o / (np.sqrt(v) + 1e-8)
    scaled *= np.linalg.norm(o) / np.linalg.norm(scaled)
    found.append(np.sqrt(max(1.0, x.shape[1] / x.shape[0])) * scaled)
  return found, v


def dense_blocks(leaves):
  """Returns the same for kernels that hold three side by side."""
  parts = [
    dense([x[:, i : i + n] for x in leaves])
    for i, n in zip([0, *CUTS], WIDTHS, strict=True)
  ]
  directions = zip(*(found for found, _ in parts), strict=True)
  whole = [np.concatenate(d, axis=1) for d in directions]
  return whole, np.concatenate([v for _, v in parts])


@pytest.mark.parametrize('outputs_first', [False, True])
def test_blocks_are_leaves_of_their_own(outputs_first):
  whole = [ref.normal(t, (8, 32)) for t in range(3)]
  wanted, v = dense_blocks(whole)
  shape, axes = (
    ((32, 8), ((1,), (0,)))
    if outputs_first
    else (
      (8, 32),
      ((0,), (1,)),
    )
  )
  turn = np.transpose if outputs_first else np.asarray
  found, squares = steps(
    layout(shape, *axes, WIDTHS), [jnp.asarray(turn(x)) for x in whole]
  )
  for t in range(3):
    np.testing.assert_allclose(turn(found[t]), wanted[t], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(turn(squares)[0], v, rtol=1e-4)


def test_heads_are_a_stack():
  """(embed, heads, head_dim), each head with neurons of its own."""
  leaves = [ref.normal(t, (8, 3, 5)) for t in range(3)]
  found, squares = steps(layout((8, 3, 5), (0,), (2,)), leaves)
  assert squares.shape == (1, 3, 5)
  for i in range(3):
    wanted, v = dense([x[:, i] for x in leaves])
    for t in range(3):
      np.testing.assert_allclose(
        found[t][:, i], wanted[t], rtol=1e-4, atol=1e-5
      )
    np.testing.assert_allclose(squares[0, i], v, rtol=1e-4)


def test_a_stack_of_fused_kernels():
  leaves = [ref.normal(t, (8, 2, 32)) for t in range(2)]
  found, squares = steps(layout((8, 2, 32), (0,), (2,), WIDTHS), leaves)
  for i in range(2):
    wanted, v = dense_blocks([x[:, i] for x in leaves])
    np.testing.assert_allclose(found[1][:, i], wanted[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(squares[0, i], v, rtol=1e-4)


def _optimizer(blocks, **spec):
  spec = so.SubspaceSpec(
    4,
    weight_dimension_numbers=so.DimensionNumbers(-2, -1, blocks),
    only_if_smaller=False,
    **spec,
  )
  return so.subspace(
    spec,
    projectors.dct(2, 'random'),
    optax.trace(0.9, nesterov=True),
    transport='first',
    residual=residuals.orthogonal(
      1.9, ns_coeffs='dion', preconditioning='spectral', b2=B2
    ),
  )


def _run(tx, put=lambda x: x):
  step, found = cases.jit(tx.update), []
  state = tx.init({'w': put(ref.normal(9, (2, 8, 32)))})
  for t in range(4):
    update, new = step({'w': put(ref.normal(t, (2, 8, 32)))}, state)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
      assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
      assert (x.dtype, x.shape, x.weak_type) == (y.dtype, y.shape, y.weak_type)
    state = new
    found.append(np.asarray(update['w']))
  assert step._cache_size() == 1
  return found


@functools.cache
def _alone(blocks):
  return _run(_optimizer(blocks))


PLACES = [P(None, 'x', 'y'), P('x', None, 'y'), P(None, None, ('x', 'y'))]


# Whole matrices on meshes: tests/test_spread.py and tests/test_normuon.py.
CUT = [*zip(PLACES, ('auto', 'explicit', 'explicit'), strict=True)]


@pytest.mark.parametrize(
  'spec, blocks, mode',
  [
    pytest.param(
      spec,
      blocks,
      mode,
      marks=() if blocks and (spec, mode) in CUT else pytest.mark.full,
    )
    for spec, blocks, mode in itertools.product(PLACES, [None, WIDTHS], MODES)
  ],
  ids=str,
)
def test_sharded_equals_unsharded(spec, blocks, mode):
  wanted = _alone(blocks)
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(MODES[mode],) * 2)
  place = NamedSharding(mesh, spec)
  with jax.set_mesh(mesh):
    found = _run(_optimizer(blocks), lambda x: jax.device_put(x, place))
  for x, y in zip(found, wanted, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_the_state_is_one_number_for_each_output():
  params = {'w': jax.ShapeDtypeStruct((2, 8, 32), jnp.bfloat16)}
  state = jax.eval_shape(_optimizer(WIDTHS).init, params)
  found = ref.find(state, 'residual').residual['w']
  assert found.shape == (2, 1, 32) and found.dtype == jnp.float32
  tx = so.subspace(
    so.SubspaceSpec(4),
    projectors.dct(2, 'random'),
    optax.trace(0.9),
    residual=residuals.orthogonal(),
  )
  state = jax.eval_shape(tx.init, {'w': jnp.ones((8, 32))})
  assert not any(x.shape == (1, 32) for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
  'dims, parts',
  [
    (so.DimensionNumbers(0, 1, (16, 8)), ('output_blocks=(16, 8)', '32')),
    (so.DimensionNumbers(0, 1, ()), ('output_blocks=()', '32')),
    (so.DimensionNumbers(0, 1, (33, -1)), ('output_blocks', 'positive')),
    (so.DimensionNumbers(0, (1,), (8, 8)), ('output_blocks=(8, 8)', '32')),
  ],
)
def test_bad_blocks(dims, parts):
  spec = so.SubspaceSpec(4, weight_dimension_numbers={'qkv': dims})
  with errors.raises(ValueError, "'qkv'", *parts):
    so.subspace_muon(1e-3, spec=spec).init({'qkv': jnp.ones((8, 32))})


def test_blocks_cut_one_axis():
  dims = so.DimensionNumbers(0, (1, 2), (16, 16))
  spec = so.SubspaceSpec(4, weight_dimension_numbers=dims)
  with errors.raises(ValueError, "'qkv'", 'one output axis', '2'):
    so.subspace_muon(1e-3, spec=spec).init({'qkv': jnp.ones((8, 4, 8))})
