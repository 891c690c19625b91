"""The three pieces one by one, and the residual slot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import measure
import subspace_optax as so
from subspace_optax import projectors

SPEC = so.SubspaceSpec(rank=3)
is_node = lambda x: isinstance(x, so.Projected)


def _gradients(steps=3):
  return [cases.tree(cases.SMALL, 20 + t) for t in range(steps)]


@pytest.mark.parametrize(
  'projector, inner, transport',
  [
    (projectors.svd(2, 'gram'), optax.scale_by_lion(), 'first'),
    (
      projectors.online_pca(optax.sgd(0.05)),
      optax.scale_by_adam(),
      'reset',
    ),
  ],
  ids=['svd', 'online_pca'],
)
def test_chain_of_pieces_equals_subspace(projector, inner, transport):
  whole = so.subspace(SPEC, projector, inner, transport=transport, scale=0.5)
  pieces = optax.chain(
    so.project(SPEC, projector),
    so.in_subspace(inner, SPEC, transport=transport),
    so.unproject(scale=0.5),
  )
  got = measure.compiled(pieces).run(_gradients())
  wanted = measure.compiled(whole).run(_gradients())
  for one, other in zip(got, wanted, strict=True):
    measure.assert_trees_close(one, other, rtol=1e-6, atol=1e-7)


def test_nodes_on_their_way_down_the_chain():
  project = so.project(SPEC, projectors.svd(2), keep_gradient=True)
  inside = so.in_subspace(optax.scale(3.0), SPEC)
  params = cases.tree(cases.SMALL)
  gradient = _gradients(1)[0]
  nodes, state = project.update(gradient, project.init(params), params)
  node = nodes['up']
  assert is_node(node) and not is_node(nodes['bias'])
  np.testing.assert_array_equal(nodes['bias'], gradient['bias'])
  np.testing.assert_array_equal(node.gradient, gradient['up'])
  np.testing.assert_array_equal(node.basis, measure.bases(state)['up'])
  assert node.direction is None
  g, p = np.asarray(gradient['up']), np.asarray(node.basis)
  np.testing.assert_allclose(
    node.coords, np.swapaxes(p, 1, 2) @ g, rtol=1e-5, atol=1e-5
  )
  directed, _ = inside.update(nodes, inside.init(params), params)
  np.testing.assert_allclose(
    directed['up'].direction, 3.0 * node.coords, rtol=1e-6
  )
  np.testing.assert_allclose(
    directed['bias'], 3.0 * gradient['bias'], rtol=1e-6
  )
  unproject = so.unproject(scale=0.5)
  updates, empty = unproject.update(directed, unproject.init(params), params)
  assert not jax.tree.leaves(empty)
  np.testing.assert_allclose(
    updates['up'], 1.5 * (p @ np.asarray(node.coords)), rtol=1e-5, atol=1e-5
  )
  # `scale` is for what comes back from the subspace only.
  np.testing.assert_allclose(updates['bias'], 3.0 * gradient['bias'], rtol=1e-6)


def test_gradient_travels_only_if_asked():
  params = cases.tree(cases.SMALL)
  tx = so.project(SPEC, projectors.stiefel(2))
  state = jax.eval_shape(tx.init, params)
  nodes, _ = jax.eval_shape(tx.update, params, state)
  assert nodes['up'].gradient is None


def test_full_rank_and_sgd_give_back_the_gradient():
  # With P square and orthogonal, P P^T G is G.
  spec = so.SubspaceSpec(rank=100, only_if_smaller=False)
  tx = so.subspace(spec, projectors.svd(2, 'gram'), optax.identity())
  history = measure.compiled(tx).run(_gradients())
  for gradient, (_, state, updates) in zip(_gradients(), history, strict=True):
    assert measure.bases(state)['up'].shape == (3, 8, 8)
    measure.assert_trees_close(updates, gradient, rtol=1e-4, atol=1e-5)


def test_updates_have_the_gradients_dtype():
  tx = so.subspace(SPEC, projectors.stiefel(2), optax.scale_by_adam())
  params = jax.eval_shape(lambda: cases.tree(cases.SMALL))
  half = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params
  )
  state = jax.eval_shape(tx.init, params)
  updates, after = jax.eval_shape(tx.update, half, state)
  assert updates['up'].dtype == jnp.bfloat16
  updates, _ = jax.eval_shape(tx.update, half, state, params)
  assert updates['up'].dtype == jnp.bfloat16
  assert measure.types(after) == measure.types(state)


def test_elementwise_transformation_between_pieces_scales_the_coordinates():
  def only_coords(updates, state, params=None):
    halve = lambda x: (
      dataclasses.replace(x, coords=0.5 * x.coords) if is_node(x) else x
    )
    return jax.tree.map(halve, updates, is_leaf=is_node), state

  halve = optax.GradientTransformation(
    lambda p: optax.EmptyState(), only_coords
  )
  make = lambda *between: optax.chain(
    so.project(SPEC, projectors.stiefel(2)),
    *between,
    so.in_subspace(optax.identity(), SPEC),
    so.unproject(),
  )
  gradients = _gradients(1)
  updates = measure.compiled(make()).run(gradients)[0][2]
  halved = measure.compiled(make(halve)).run(gradients)[0][2]
  np.testing.assert_allclose(
    halved['up'], 0.5 * updates['up'], rtol=1e-5, atol=1e-6
  )


def _residual(share):
  """Adds a share of what the subspace leaves out, and counts steps."""

  def init(layout, leaf, dtype):
    del leaf, dtype
    return jnp.zeros(layout.batch_shape, jnp.int32)

  def update(node, scale, count, steps):
    lift = lambda x: node.layout.unproject(node.basis, x, node.sharding)
    outside = node.gradient - lift(node.coords)
    return lift(scale * node.direction) + share * outside, steps + count + 1

  return so.residuals.Residual('share', update, init)


@pytest.mark.parametrize('piecewise', [True, False])
def test_residual_adds_what_the_subspace_leaves_out(piecewise):
  projector = projectors.stiefel(2)
  if piecewise:
    tx = optax.chain(
      so.project(SPEC, projector, keep_gradient=True),
      so.in_subspace(optax.identity(), SPEC),
      so.unproject(residual=_residual(1.0)),
    )
  else:
    tx = so.subspace(SPEC, projector, optax.identity(), residual=_residual(1.0))
  history = measure.compiled(tx).run(_gradients())
  for t, (gradient, (_, state, updates)) in enumerate(
    zip(_gradients(), history, strict=True)
  ):
    # P P^T G + (G - P P^T G)
    measure.assert_trees_close(updates, gradient, rtol=1e-4, atol=1e-5)
    found = [x for x in jax.tree.leaves(state[-1].residual)]
    for steps in found:
      np.testing.assert_array_equal(steps, (t + 1) * (t + 2) // 2)
    assert len(found) == len(measure.bases(state))


def test_residual_is_not_scaled_with_the_subspace():
  tx = so.subspace(
    SPEC,
    projectors.stiefel(2),
    optax.identity(),
    residual=_residual(1.0),
    scale=0.0,
  )
  gradients = _gradients(1)
  _, state, updates = measure.compiled(tx).run(gradients)[0]
  p = np.asarray(measure.bases(state)['up'])
  g = np.asarray(gradients[0]['up'])
  wanted = g - p @ (np.swapaxes(p, 1, 2) @ g)
  np.testing.assert_allclose(updates['up'], wanted, rtol=1e-4, atol=1e-5)
