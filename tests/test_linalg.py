"""Cholesky QR, Haar samples and transitions against numpy in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references as ref
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg

# Five matrices of 12 x 7 with their axes in order, and with the rows on two
# axes around the batch.
R = 4
LAYOUTS = {
  'plain': _layout.Layout((5, 12, 7), (1,), (2,), True, R),
  'split': _layout.Layout((3, 5, 4, 7), (0, 2), (3,), True, R),
}
VIEWS = {
  'plain': ref.view((5, 12, 7), 1, 2, left=True),
  'split': ref.view((3, 5, 4, 7), (0, 2), 3, left=True),
}


def conditioned(name, condition):
  """Returns (5, 12, r) of a given condition number, and it in the layout."""
  rng = np.random.default_rng(0)
  u = np.linalg.qr(rng.normal(size=(5, 12, R)))[0]
  v = np.linalg.qr(rng.normal(size=(5, R, R)))[0]
  y = u * np.geomspace(1, 1 / condition, R) @ v
  y = np.asarray(y, np.float32)
  return y.astype(np.float64), LAYOUTS[name].from_matrix(jnp.asarray(y))


@functools.cache
def orthonormalize(name):
  return ref.jit(functools.partial(_linalg.orthonormalize, LAYOUTS[name]))


def gram(p):
  return np.swapaxes(p, 1, 2) @ p


@pytest.mark.parametrize('scale', [1e-8, 1.0, 1e8])
@pytest.mark.parametrize('condition', [1.0, 1e3, 1e5])
@pytest.mark.parametrize('name', LAYOUTS)
def test_orthonormalize_gives_the_q_factor(name, condition, scale):
  y, leaf = conditioned(name, condition)
  q, r = np.linalg.qr(y)
  q *= np.sign(np.diagonal(r, axis1=1, axis2=2))[:, None, :]
  found = orthonormalize(name)(leaf * scale)
  assert found.dtype == jnp.float32
  found = VIEWS[name].bases(found)
  np.testing.assert_allclose(
    gram(found), np.broadcast_to(np.eye(R), (5, R, R)), rtol=0, atol=1e-6
  )
  # The Q factor itself is only as good as the condition number lets it be.
  atol = 3e-7 * (10 + condition)
  np.testing.assert_allclose(found, q, rtol=0, atol=atol)


@pytest.mark.parametrize('bad', ['zero', 'column', 'twice', 'nan', 'inf'])
def test_orthonormalize_never_returns_finite_nonsense(bad):
  """Of matrix 1: not finite or orthonormal; the other matrices as ever."""
  y, leaf = conditioned('plain', 1.0)
  spoilt = {
    'zero': leaf.at[1].set(0),
    'column': leaf.at[1, :, 2].set(0),
    'twice': leaf.at[1, :, 2].set(leaf[1, :, 1]),
    'nan': leaf.at[1, 3, 1].set(np.nan),
    'inf': leaf.at[1, 3, 1].set(np.inf),
  }[bad]
  good = np.asarray(orthonormalize('plain')(leaf))
  found = np.asarray(orthonormalize('plain')(spoilt))
  others = [0, 2, 3, 4]
  np.testing.assert_array_equal(found[others], good[others])
  if np.isfinite(found[1]).all():
    np.testing.assert_allclose(found[1].T @ found[1], np.eye(R), atol=1e-5)


@pytest.mark.parametrize('name', LAYOUTS)
def test_haar(name):
  """Orthonormal, and a function of each matrix's seed and the period alone."""
  layout, view = LAYOUTS[name], VIEWS[name]
  seeds = jnp.array([7, 8, 9, 7, 10], jnp.uint32)
  draw = lambda seeds, period: _linalg.haar(layout, seeds, period)
  p = draw(seeds, 3)
  np.testing.assert_array_equal(draw(seeds, 3), p)
  moved = view.bases(draw(seeds[::-1], 3))
  other_period, p = view.bases(draw(seeds, 4)), view.bases(p)
  np.testing.assert_allclose(
    gram(p), np.broadcast_to(np.eye(R), (5, R, R)), rtol=0, atol=1e-6
  )
  np.testing.assert_array_equal(p[3], p[0])
  np.testing.assert_allclose(moved[::-1], p, rtol=0, atol=1e-6)
  overlaps = [
    np.linalg.norm(a.T @ b) ** 2 / R
    for a, b in [(p[0], p[1]), (p[1], p[2]), *zip(p, other_period, strict=True)]
  ]
  assert max(overlaps) < 0.9, overlaps  # 1 for equal subspaces.


@pytest.mark.parametrize('name', LAYOUTS)
def test_transition(name):
  """C = P_n^T P_o (P_o^T P_o)^-1 for bases that are not orthonormal."""
  layout, view = LAYOUTS[name], VIEWS[name]
  shape = layout.basis_shape
  new, old = ref.normal(0, shape), ref.normal(1, shape)
  found = ref.jit(functools.partial(_linalg.transition, layout))(new, old)
  pairs = zip(view.bases(new), view.bases(old), strict=True)
  for c, (pn, po) in zip(found, pairs, strict=True):
    expected = pn.T @ po @ np.linalg.inv(po.T @ po)
    np.testing.assert_allclose(c, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(c, ref.transition(pn, po), rtol=1e-5, atol=1e-5)


def test_orthogonality_error():
  p = ref.normal(0, (5, 12, R))
  found = _linalg.orthogonality_error(jnp.swapaxes(p, 1, 2) @ p)
  expected = np.linalg.norm(gram(np.float64(p)) - np.eye(R), axis=(1, 2))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('f', [_linalg.orthonormalize, _linalg.transition])
def test_products_are_in_full_float32(f, dtype):
  """Accelerators round the inputs of other float32 products to 8 or 11 bits."""
  layout = LAYOUTS['plain']
  arg = jax.ShapeDtypeStruct(layout.basis_shape, dtype)
  args = (arg,) if f is _linalg.orthonormalize else (arg, arg)
  text = jax.jit(functools.partial(f, layout)).lower(*args).as_text()
  dots = re.findall(r'stablehlo\.dot_general.*', text)
  assert len(dots) >= 2
  for dot in dots:
    assert 'precision = [HIGHEST, HIGHEST]' in dot, dot
    assert 'bf16' not in dot, dot


def test_no_batch_is_given_to_lapack():
  # Whose threads would wait for each other on jaxlib 0.10.
  name = 'plain'
  y = jax.ShapeDtypeStruct((5, 12, R), jnp.float32)
  text = orthonormalize(name).lower(y).compile().as_text()
  calls = [line for line in text.splitlines() if 'lapack_' in line]
  kinds = {kind for kind in ('potrf', 'trsm') for x in calls if kind in x}
  assert kinds == {'potrf', 'trsm'}
  for line in calls:
    shapes = re.findall(r'f32\[([\d,]+)\]', line)
    assert shapes and all(re.fullmatch(r'(1,)*4,4', x) for x in shapes), line
