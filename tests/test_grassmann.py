"""Geodesic moves of bases, against thin SVDs of dense tangents in float64."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import references as ref
import subspace_optax as so
from subspace_optax._matrix import _linalg

P = so.projectors
VIEWS = ref.KERNELS  # The right side of one, the left of two layers.


def spec(dtype='float32'):
  return so.SubspaceSpec(ref.RANK, basis_dtype=jnp.dtype(dtype))


def zeros():
  return {k: jnp.zeros(v.shape) for k, v in VIEWS.items()}


@functools.cache
def made(rule, dtype='float32'):
  """Returns `init` and an `update` whose gap and step size are traced."""

  def update(grads, state, gap, step_size):
    return so.project(spec(dtype), rule(gap, step_size)).update(grads, state)

  return so.project(spec(dtype), rule()).init, ref.jit(update)


def run(rule, gradients, step_size, gap=1, dtype='float32'):
  """Returns the bases before and after every step, and the last state."""
  init, update = made(rule, dtype)
  state = init(zeros())
  of = lambda s: {k: v.bases(ref.bases(s)[k]) for k, v in VIEWS.items()}
  bases = [of(state)]
  for g in gradients:
    _, state = update(g, state, jnp.int32(gap), jnp.float32(step_size))
    bases.append(of(state))
  return bases, state


def geodesic(p, tangent):
  """P V cos(S) V^T + U sin(S) V^T + P (I - V V^T), where D = U S V^T."""
  u, s, vt = np.linalg.svd(tangent, full_matrices=False)
  v = vt.T
  turned = (p @ v * np.cos(s) + u * np.sin(s)) @ vt
  return turned + p @ (np.eye(p.shape[1]) - v @ vt)


def track(p, g, step_size):
  """SubTrack++: along minus the best rank-one part of T = -2 (G - P A) A^T."""
  g = g / np.linalg.norm(g)
  a = p.T @ g
  u, s, vt = np.linalg.svd(-2 * (g - p @ a) @ a.T, full_matrices=False)
  assert s[0] <= 1 and s[1] < 0.95 * s[0]  # Well defined.
  return geodesic(p, -step_size * s[0] * np.outer(u[:, 0], vt[0]))


@pytest.mark.parametrize('step_size', [0.3, 1.0, 10.0])
@pytest.mark.parametrize('scale', [1.0, 1e-6])
def test_tracking(step_size, scale):
  """On either side, whatever the gradient's scale, at every other step."""
  gradients = [
    {k: scale * ref.decaying(t, v, 0.5) for k, v in VIEWS.items()}
    for t in range(6)
  ]
  bases, _ = run(P.grassmann_tracking, gradients, step_size, gap=2)
  for k, v in VIEWS.items():
    for t, grads in enumerate(gradients):
      old, new = bases[t][k], bases[t + 1][k]
      if t % 2:
        np.testing.assert_array_equal(new, old)
        continue
      pairs = zip(old, v.matrices(grads[k]), strict=True)
      expected = np.stack([track(p, g, step_size) for p, g in pairs])
      np.testing.assert_allclose(new, expected, rtol=0, atol=1e-5)


def test_tracking_tells_singular_values_apart():
  """Of which one is 7 % larger than the next: G = (P R + Q B) V^T has T = -2
  Q B R^T.
  """
  init, update = made(P.grassmann_tracking)
  state, rng = init(zeros()), np.random.default_rng(0)
  square = lambda size: np.linalg.qr(rng.normal(size=(size, size)))[0]
  bases = {k: v.bases(ref.bases(state)[k]) for k, v in VIEWS.items()}
  grads = {}
  for k, v in VIEWS.items():
    gs = []
    for p in bases[k]:
      x = rng.normal(size=p.shape)
      q = ref.positive_qr(x - p @ p.T @ x)
      sides = p @ square(ref.RANK) + q * [1, 0.93, 0.4]
      gs.append(sides @ square(v.n)[: ref.RANK])
    grads[k] = jnp.asarray(v.leaf(np.stack(gs)), jnp.float32)
  _, after = update(grads, state, jnp.int32(1), jnp.float32(1.0))
  for k, v in VIEWS.items():
    pairs = zip(bases[k], v.matrices(grads[k]), strict=True)
    expected = np.stack([track(p, g, 1.0) for p, g in pairs])
    found = v.bases(ref.bases(after)[k])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_tracking_climbs_on_a_constant_gradient():
  """To where the best subspace is, which a random one is far from."""
  grads = {k: ref.decaying(0, v, 0.5) for k, v in VIEWS.items()}
  bases, _ = run(P.grassmann_tracking, [grads] * 600, 0.2)
  for k, v in VIEWS.items():
    for i, g in enumerate(v.matrices(grads[k])):
      shares = np.array([ref.captured(b[k][i], g) for b in bases])
      assert (np.diff(shares) > -1e-6).all(), k
      assert shares[0] < 0.8 and shares[-1] > 0.999, shares[[0, -1]]


def test_tracking_stays_where_it_has_all():
  """A gradient in the span of P makes no tangent, and a bad one no move."""
  init, update = made(P.grassmann_tracking)
  state = init(zeros())
  grads = {}
  for k, v in VIEWS.items():
    p = v.bases(ref.bases(state)[k])
    x = np.random.default_rng(0).normal(size=(v.count, ref.RANK, v.n))
    grads[k] = jnp.asarray(v.leaf(p @ x), jnp.float32)
  grads['stack'] = grads['stack'].at[1].set(np.nan)
  _, after = update(grads, state, jnp.int32(1), jnp.float32(1.0))
  for k in VIEWS:
    found, expected = ref.bases(after)[k], ref.bases(state)[k]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def tangents(state, period):
  """Returns Z of every matrix, in the period's own random numbers."""
  matches = {m.path: m.layout for m in spec().match(zeros())}
  z = {
    k: _linalg.gaussian(x, state.seed[k], period) for k, x in matches.items()
  }
  return {k: v.bases(z[k]) for k, v in VIEWS.items()}


@pytest.mark.parametrize('step_size', [0.05, 0.5, 1.5])
def test_walk(step_size):
  """Along (I - P P^T) Z, scaled; gradients, if any, are not looked at."""
  gradients = [zeros(), ref.like(VIEWS), zeros(), ref.like(VIEWS, 1), zeros()]
  bases, state = run(P.grassmann_walk, gradients, step_size, gap=2)
  for t in range(len(gradients)):
    z = tangents(state, t // 2)
    for k in VIEWS:
      old, new = bases[t][k], bases[t + 1][k]
      if t % 2:
        np.testing.assert_array_equal(new, old)
        continue
      for p, q, x in zip(old, new, z[k], strict=True):
        d = x - p @ p.T @ x
        d *= step_size * np.sqrt(ref.RANK) / np.linalg.norm(d)
        np.testing.assert_allclose(q, geodesic(p, d), rtol=0, atol=1e-5)


@pytest.mark.parametrize('step_size', [0.05, 0.5])
def test_walk_turns_by_its_step_size(step_size):
  """The root mean square of the principal angles, from their sines."""
  bases, _ = run(P.grassmann_walk, [zeros()] * 4, step_size)
  for old, new in zip(bases[:-1], bases[1:], strict=True):
    for k in VIEWS:
      for p, q in zip(old[k], new[k], strict=True):
        sines = np.linalg.svd(q - p @ p.T @ q, compute_uv=False)
        angle = np.sqrt(np.mean(np.arcsin(sines) ** 2))
        np.testing.assert_allclose(angle, step_size, rtol=1e-4)


@pytest.mark.parametrize(
  'rule, step_size', [(P.grassmann_walk, 0.5), (P.grassmann_tracking, 1.0)]
)
@pytest.mark.parametrize('dtype, atol', [('float32', 2e-6), ('bfloat16', 8e-3)])
def test_stays_orthonormal(rule, step_size, dtype, atol):
  """Over 200 moves, to the rounding of one."""
  many = [ref.like(VIEWS, t) for t in range(10)]
  bases, _ = run(rule, many * 20, step_size, dtype=dtype)
  for k in VIEWS:
    assert (bases[-1][k] != bases[-2][k]).any((1, 2)).all()
    for p in bases[-1][k]:
      np.testing.assert_allclose(p.T @ p, np.eye(ref.RANK), rtol=0, atol=atol)


@pytest.mark.parametrize('step_size', [0.0, -0.1, 1.6, np.nan])
def test_walk_raises(step_size):
  with pytest.raises(ValueError, match='step_size must lie in'):
    P.grassmann_walk(1, step_size)
