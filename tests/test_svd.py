"""`projectors.svd`: every method against numpy's float64 SVD, leaf by leaf.

A subspace is compared through P P^T, which does not depend on signs. Spectra
decay, so that the leading subspaces are well defined.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import references as ref
import subspace_optax as so

METHODS = ['exact', 'gram', 'randomized']
# Attention kernels are found by their paths: (d, h, k) under query, (h, k, d)
# under out, here with a layer axis in front.
VIEWS = {**ref.KERNELS, **ref.ATTENTION}
# Given by dimension numbers: layers on axis 1, and on axes 0 and 2, with the
# columns first.
GIVEN = {
  'axis_1': (ref.view((8, 2, 12), 0, 2), so.DimensionNumbers(0, 2)),
  'two_axes': (ref.view((2, 12, 2, 8), 3, 1), so.DimensionNumbers(3, 1)),
}
GAP = 3


@functools.cache
def run(method):
  """Returns gradients, nodes and states of GAP + 1 steps."""
  spec = so.SubspaceSpec(ref.RANK)
  return _run(spec, so.projectors.svd(GAP, method), VIEWS, GAP + 1)


@functools.cache
def run_given(method):
  dims = {name: dims for name, (_, dims) in GIVEN.items()}
  spec = so.SubspaceSpec(ref.RANK, weight_dimension_numbers=dims)
  views = {name: view for name, (view, _) in GIVEN.items()}
  return _run(spec, so.projectors.svd(GAP, method), views, 1)


def _run(spec, projector, views, steps, ratio=0.5):
  tx = so.project(spec, projector)
  update = ref.jit(tx.update)
  grads = [
    {k: ref.decaying(t, v, ratio) for k, v in views.items()}
    for t in range(steps)
  ]
  state, nodes, states = tx.init(grads[0]), [], []
  for g in grads:
    node, state = update(g, state)
    nodes.append(node)
    states.append(state)
  return grads, nodes, states


def assert_leading(method, g, p):
  """Checks that P is orthonormal and spans G's leading singular subspace."""
  np.testing.assert_allclose(p.T @ p, np.eye(ref.RANK), rtol=0, atol=2e-6)
  if method == 'randomized':  # A random subspace would have 0.4.
    assert ref.captured(p, g) > 0.9
    return
  best = ref.projection(ref.svd_basis(g, ref.RANK))
  np.testing.assert_allclose(ref.projection(p), best, rtol=0, atol=2e-6)


def assert_all_leading(method, view, grad, basis):
  pairs = zip(view.matrices(grad), view.bases(basis), strict=True)
  for g, p in pairs:
    assert_leading(method, g, p)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('name', VIEWS)
def test_spans_the_leading_subspace(method, name):
  grads, nodes, _ = run(method)
  for t in 0, GAP:  # Both are refreshes.
    basis = nodes[t][name].basis
    assert_all_leading(method, VIEWS[name], grads[t][name], basis)


@pytest.mark.parametrize('method', ['exact', 'randomized'])
@pytest.mark.parametrize('name', GIVEN)
def test_spans_the_leading_subspace_of_given_axes(method, name):
  grads, nodes, _ = run_given(method)
  view, _ = GIVEN[name]
  assert_all_leading(method, view, grads[0][name], nodes[0][name].basis)


@pytest.mark.parametrize('name', VIEWS)
def test_coordinates_are_taken_in_the_basis_of_the_last_refresh(name):
  grads, nodes, states = run('exact')
  view = VIEWS[name]
  for t in range(GAP + 1):
    node = nodes[t][name]
    np.testing.assert_array_equal(node.basis, ref.bases(states[t])[name])
    refreshed = nodes[t // GAP * GAP][name]
    np.testing.assert_array_equal(node.basis, refreshed.basis)
    coords = view.coords(node.coords, ref.RANK)
    expected = view.bases(node.basis).swapaxes(1, 2) @ view.matrices(
      grads[t][name]
    )
    np.testing.assert_allclose(coords, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  'rounds, mean, least', [(1, 0.995, 0.99), (2, 0.998, 0.995)]
)
def test_randomized_captures_almost_what_the_best_subspace_does(
  rounds, mean, least
):
  """Singular values 1/i: 99.57 and 99.85 % of the best, 26 % without rounds."""
  view = ref.view((24, 48, 64))
  grad = ref.decaying(0, view, spectrum=1 / np.arange(1, 49))
  rule = so.projectors.svd(1, 'randomized', power_iterations=rounds)
  tx = so.project(so.SubspaceSpec(12), rule)
  node, _ = ref.jit(tx.update)({'w': grad}, tx.init({'w': grad}))
  pairs = zip(view.matrices(grad), view.bases(node['w'].basis), strict=True)
  shares = [ref.captured(p, g) for g, p in pairs]
  assert np.mean(shares) > mean and min(shares) > least, shares


def test_metrics():
  """Captured energy, orthogonality error and drift, as documented."""
  grads, _, states = run('exact')
  for name, view in VIEWS.items():
    metrics = [so.subspace_metrics(s)[name] for s in states]
    old = view.bases(ref.bases(states[GAP - 1])[name])
    new = view.bases(ref.bases(states[GAP])[name])
    gs = view.matrices(grads[1][name])
    captured = [
      np.linalg.norm(p.T @ g) ** 2 / np.linalg.norm(g) ** 2
      for g, p in zip(gs, old, strict=True)
    ]
    gap = np.linalg.norm(ref.projection(new) - ref.projection(old), axis=(1, 2))
    expected = {
      'captured_energy': (metrics[1], captured),
      'orthogonality_error': (metrics[GAP], np.zeros(view.count)),
      'drift': (metrics[GAP], gap / np.sqrt(2 * ref.RANK)),
    }
    for key, (found, value) in expected.items():
      assert found[key].shape == (() if view.count == 1 else (view.count,))
      np.testing.assert_allclose(
        np.ravel(found[key]), value, rtol=0, atol=3e-6, err_msg=key
      )


@pytest.mark.parametrize('side', ['long', 'in', 'out'])
def test_side(side):
  spec = so.SubspaceSpec(ref.RANK, side=side)
  left = {
    'long': {'wide': False, 'tall': True},
    'in': {'wide': True, 'tall': True},
    'out': {'wide': False, 'tall': False},
  }[side]
  views = {k: getattr(ref, k.upper())._replace(left=v) for k, v in left.items()}
  grads, nodes, _ = _run(spec, so.projectors.svd(GAP), views, 1)
  for name, view in views.items():
    assert_all_leading('exact', view, grads[0][name], nodes[0][name].basis)


def test_equal_sides_are_projected_from_the_left():
  view = ref.view((8, 8), left=True)
  spec = so.SubspaceSpec(ref.RANK)
  grads, nodes, _ = _run(spec, so.projectors.svd(GAP), {'w': view}, 1)
  assert_all_leading('exact', view, grads[0]['w'], nodes[0]['w'].basis)


@pytest.mark.parametrize(
  'method, side',
  [
    ('exact', 'short'),
    ('gram', 'short'),
    ('gram', 'long'),
    ('randomized', 'short'),
  ],
)
def test_loses_nothing_of_a_gradient_of_lower_rank(method, side):
  """P P^T G = G for G of rank 2 < r, or of one row as of a rare token; the
  rest of P is orthonormal to it.
  """
  spec = so.SubspaceSpec(ref.RANK, side=side, only_if_smaller=False)
  tx = so.project(spec, so.projectors.svd(1, method))
  update = ref.jit(tx.update)
  spectrum = [1, 0.5, *np.zeros(6)]
  views = ref.KERNELS
  low = {k: ref.decaying(3, v, spectrum=spectrum) for k, v in views.items()}
  row = {k: jnp.zeros_like(x).at[..., 2, :].set(1.0) for k, x in low.items()}
  state = tx.init(low)
  for grads in low, row:
    nodes, state = update(grads, state)
    for name, view in views.items():
      view = view._replace(left=view.left == (side == 'short'))
      gs, ps = view.matrices(grads[name]), view.bases(nodes[name].basis)
      for g, p in zip(gs, ps, strict=True):
        np.testing.assert_allclose(p.T @ p, np.eye(ref.RANK), atol=2e-6)
        np.testing.assert_allclose(p @ p.T @ g, g, rtol=0, atol=5e-6)


@functools.cache
def refresh_every_other_step(method):
  tx = so.project(so.SubspaceSpec(ref.RANK), so.projectors.svd(2, method))
  return tx.init, ref.jit(tx.update)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('bad', [0.0, np.nan], ids=['zero', 'nan'])
def test_a_bad_gradient_puts_off_the_refresh_of_its_matrix_only(method, bad):
  """Layer 1 keeps its basis at the refresh and makes up for it a step later."""
  init, update = refresh_every_other_step(method)
  view = ref.STACK
  grads = [ref.decaying(t, view, 0.5) for t in range(4)]
  grads[2] = grads[2].at[1].set(bad)
  state, bases = init({'stack': grads[0]}), []
  for g in grads:
    _, state = update({'stack': g}, state)
    bases.append(view.bases(ref.bases(state)['stack']))
  np.testing.assert_array_equal(bases[1], bases[0])
  np.testing.assert_array_equal(bases[2][1], bases[0][1])
  np.testing.assert_array_equal(bases[3][0], bases[2][0])
  for t, layer in (2, 0), (3, 1):
    assert_leading(method, view.matrices(grads[t])[layer], bases[t][layer])
