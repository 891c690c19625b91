"""Muon's orthogonalisation against dense float64, for every preconditioning.

The reference takes singular values and vectors of what the preconditioning
leaves, and puts the values alone through the polynomials.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import errors
import grid
import references as ref
from subspace_optax import residuals
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _newton_schulz

STANDARD = [(3.4445, -4.7750, 2.0315)] * 5
DION = [
  (4.0848, -6.8946, 2.9270),
  (3.9505, -6.3029, 2.6377),
  (3.7418, -5.5913, 2.3037),
  (2.8769, -3.1427, 1.2046),
  (2.8366, -3.0525, 1.2012),
]
CUBIC = (1.5, -0.5, 0.0)
# With their Gram matrices (8 x 20 and 24; heads apart, and together) and
# without (12 x 8, 9 x 12).
VIEWS = {
  'long': ref.view((8, 20)),
  'tall_stack': ref.view((2, 24, 8)),
  'heads_apart': ref.view((9, 3, 4), 0, 2),
  'head_major': ref.view((3, 4, 9), (1,), (2,)),
  'heads_first': ref.view((3, 2, 30), (0, 1), (2,)),
  'square': ref.view((2, 12, 8)),
  'query': ref.QUERY,
}


def layout_of(view, blocks=()):
  return _layout.Layout(
    view.shape, view.rows, view.cols, view.left, 1, blocks=blocks
  )


def precondition(x, name):
  """Returns X, short side first, with singular values of at most about 1."""
  if name == 'aol':
    return x / np.sqrt(np.abs(x @ x.T).sum(1, keepdims=True))
  s = np.linalg.svd(x, compute_uv=False)
  order = {'frobenius': 2, 'schatten': 4, 'spectral': np.inf}[name]
  return x / np.linalg.norm(s, order)


def dense(x, coefficients, name='frobenius'):
  """Returns the orthogonalised matrix."""
  if x.shape[0] > x.shape[1]:
    return dense(x.T, coefficients, name).T
  u, s, v = np.linalg.svd(precondition(x, name), full_matrices=False)
  for a, b, c in coefficients:
    s = a * s + b * s**3 + c * s**5
  return u * s @ v


@functools.cache
def compiled(view, how, least_ratio):
  """Returns the iteration; `least_ratio` is that of the module, for the key."""
  del least_ratio
  return ref.jit(
    lambda x: _newton_schulz.newton_schulz(layout_of(view), x, how)
  )


def run(view, leaf, ns_coeffs='standard', name='frobenius', steps=5):
  how = _newton_schulz.iteration(ns_coeffs, steps, name)
  f = compiled(view, how, _newton_schulz._LEAST_RATIO)
  return np.asarray(f(leaf), np.float64)


def assert_equals_dense(view, leaf, coefficients, name, found, rtol=2e-5):
  wanted = [dense(x, coefficients, name) for x in view.matrices(leaf)]
  np.testing.assert_allclose(
    view.matrices(found), np.stack(wanted), rtol=rtol, atol=rtol
  )


@pytest.mark.parametrize(
  'key, name',
  grid.cover(VIEWS, ['frobenius', 'spectral', 'aol', 'schatten'], of=2),
)
def test_equals_dense(key, name):
  """Also with other coefficients in every step."""
  view = VIEWS[key]
  leaf = ref.decaying(1, view, 0.6)
  found = run(view, leaf, 'dion', name)
  assert_equals_dense(view, leaf, DION, name, found)


@pytest.mark.parametrize('steps', [1, 2, 4, 7])
@pytest.mark.parametrize('key', ['long', 'square'])
def test_numbers_of_steps(key, steps):
  view, leaf = VIEWS[key], ref.normal(0, VIEWS[key].shape)
  found = run(view, leaf, steps=steps)
  assert_equals_dense(view, leaf, STANDARD[:1] * steps, 'frobenius', found)
  own = [CUBIC] * 3
  found = run(view, leaf, own, 'schatten', steps=steps)  # three, whatever steps
  assert_equals_dense(view, leaf, own, 'schatten', found)


def test_the_largest_singular_value_is_close_where_many_are_large():
  """Power iteration from below: at worst a few percent."""
  view = ref.view((2, 64, 160))
  leaf = ref.decaying(3, view, spectrum=np.linspace(1.0, 0.5, 64))
  found = run(view, leaf, [(1.0, 0.0, 0.0)], 'spectral')
  s = np.linalg.svd(view.matrices(found), compute_uv=False)[:, 0]
  np.testing.assert_array_less(s, 1.05)
  np.testing.assert_array_less(1.0 - 1e-5, s)


SPECTRA = {
  'decades': np.geomspace(1.0, 1e-6, 64),
  'power': 1.0 / np.arange(1.0, 65.0),
  'flat': np.linspace(1.0, 0.5, 64),
  'rank_8': np.r_[np.ones(8), np.full(56, 1e-7)],
}


def relative_errors(view, leaf, ns_coeffs, coefficients):
  found = view.matrices(run(view, leaf, ns_coeffs))
  wanted = np.stack([dense(x, coefficients) for x in view.matrices(leaf)])
  return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize('spectrum', SPECTRA)
@pytest.mark.parametrize('preset', ['standard', 'dion'])
def test_gram_matrices_are_as_good_as_products_of_the_whole(
  monkeypatch, preset, spectrum
):
  """To rounding in float32; in bfloat16, to what whole products lose there."""
  view = ref.view((64, 256))
  coefficients = {'standard': STANDARD, 'dion': DION}[preset]
  wide = ref.decaying(5, view, spectrum=SPECTRA[spectrum])
  narrow = wide.astype(jnp.bfloat16)
  grams = [
    relative_errors(view, x, preset, coefficients) for x in (wide, narrow)
  ]
  monkeypatch.setattr(_newton_schulz, '_LEAST_RATIO', math.inf)
  whole = relative_errors(view, narrow, preset, coefficients)
  np.testing.assert_array_less(grams[0], 5e-5)
  np.testing.assert_array_less(grams[1], 0.05 + whole)


def flops(shape):
  view = ref.view(shape)
  how = _newton_schulz.iteration('standard', 5, 'frobenius')
  f = jax.jit(lambda x: _newton_schulz.newton_schulz(layout_of(view), x, how))
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  return f.lower(x).compile().cost_analysis()['flops']


@pytest.mark.parametrize('q', [3, 4, 8])
def test_flops_of_gram_matrices(q):
  """(8q + 28) m^3 in XLA's count; whole products take (20q + 10) m^3."""
  m = 64
  for shape in ((m, q * m), (q * m, m)):
    found = flops(shape) / m**3
    assert (8 * q + 28) <= found <= 1.1 * (8 * q + 28)
    assert found < 0.9 * (20 * q + 10)


@pytest.mark.parametrize('q', [1, 2])
def test_flops_of_whole_products(q):
  """(4q + 2) m^3 a step, of which XLA's count has the one in the loop."""
  m = 64
  found = flops((m, q * m)) / m**3
  assert (4 * q + 2) <= found <= 1.1 * (4 * q + 2)


@pytest.mark.parametrize('name', ['frobenius', 'spectral', 'aol', 'schatten'])
@pytest.mark.parametrize('key', ['tall_stack', 'square'])
def test_zeros_extremes_and_nan(key, name):
  """Matrices of a stack do not meet; sizes do not matter."""
  view = VIEWS[key]
  one = ref.normal(2, view.shape)
  wanted = run(view, one, name=name)
  leaf = one.at[0].set(0.0)
  found = run(view, leaf, name=name)
  np.testing.assert_array_equal(found[0], 0.0)
  np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-6)
  for size in (1e-30, 1e30):
    found = run(view, size * one, name=name)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
  found = run(view, one.at[0, 1, 2].set(jnp.nan), name=name)
  assert np.isnan(found[0]).all()
  np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'arguments, parts',
  [
    ({'ns_coeffs': 'polar'}, ('ns_coeffs', 'polar', 'standard', 'dion')),
    ({'ns_coeffs': (1.5, -0.5)}, ('ns_coeffs', '(1.5, -0.5)', 'three')),
    ({'ns_coeffs': ()}, ('ns_coeffs', '()')),
    ({'ns_coeffs': [(1.0, 2.0, 3.0), (1.0,)]}, ('ns_coeffs', 'three')),
    ({'ns_coeffs': (1.5, math.nan, 0.0)}, ('ns_coeffs', 'finite')),
    ({'ns_coeffs': 3.4445}, ('ns_coeffs', '3.4445')),
    ({'preconditioning': 'none'}, ('preconditioning', "'none'", 'aol')),
    ({'b2': 1.0}, ('b2', '1.0')),
    ({'b2': -0.1}, ('b2', '-0.1')),
  ],
)
def test_bad_arguments(arguments, parts):
  with errors.raises(ValueError, *parts):
    residuals.orthogonal(**arguments)
