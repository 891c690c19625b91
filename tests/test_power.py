"""`projectors.power_iteration` and LDAdam, against dense float64 loops.

The loops form b and b b^T P; they start from the first basis in the state, and
with a positive diagonal of R the Q factor leaves no sign to choose.
"""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

VIEWS = ref.KERNELS  # The right side of one, the left of two layers.
SPEC = so.SubspaceSpec(ref.RANK)
RHO = 0.908
STEPS = 10
# The step adds a little of the last basis, for gradients of low rank.
TOL = 1e-4


@functools.cache
def made(gap, momentum):
  tx = so.project(SPEC, so.projectors.power_iteration(gap, momentum))
  return tx.init, ref.jit(tx.update)


def run(gap, momentum, gradients):
  """Returns the bases before and after every step."""
  init, update = made(gap, momentum)
  states = [init(gradients[0])]
  for g in gradients:
    states.append(update(g, states[-1])[1])
  return [
    {k: v.bases(ref.bases(s)[k]) for k, v in VIEWS.items()} for s in states
  ]


def gradients(t):
  """A mean that stays and noise, of decaying spectra."""
  of = lambda seed: {k: ref.decaying(seed, v, 0.8) for k, v in VIEWS.items()}
  mean, noise = of(100), of(t)
  return {k: mean[k] + noise[k] for k in VIEWS}


class Power:
  """The recursion of one matrix: its basis and the mean of coordinates."""

  def __init__(self, p, momentum):
    self.p, self.rho, self.t = p, momentum, 0
    self.mean = 0

  def step(self, g, refresh):
    if self.t == 0:
      self.mean = np.zeros((self.p.shape[1], g.shape[1]))
    if refresh:
      debiased = self.mean / (1 - self.rho**self.t if self.t else 1)
      old, self.p = self.p, ref.power_step(self.p, debiased, g, self.rho)
      self.mean = self.p.T @ old @ self.mean
    self.mean = self.rho * self.mean + (1 - self.rho) * self.p.T @ g
    self.t += 1


@pytest.mark.parametrize('gap', [1, 3])
@pytest.mark.parametrize('momentum', [0.0, RHO])
def test_recursion(momentum, gap):
  """P <- orth(b b^T P) at every T-th step, the mean taken at every one."""
  grads = [gradients(t) for t in range(STEPS)]
  bases = run(gap, momentum, grads)
  for k, v in VIEWS.items():
    dense = [Power(p, momentum) for p in bases[0][k]]
    for t in range(STEPS):
      for d, g in zip(dense, v.matrices(grads[t][k]), strict=True):
        d.step(g, t % gap == 0)
      expected = np.stack([d.p for d in dense])
      np.testing.assert_allclose(
        bases[t + 1][k], expected, rtol=0, atol=TOL, err_msg=f'{k} at step {t}'
      )
      if t % gap:
        np.testing.assert_array_equal(bases[t + 1][k], bases[t][k])


@pytest.mark.parametrize('momentum', [0.0, RHO])
def test_finds_the_leading_subspace_of_a_constant_gradient(momentum):
  grads = {k: ref.decaying(0, v, 0.5) for k, v in VIEWS.items()}
  found = run(1, momentum, [grads] * 250)[-1]
  for k, v in VIEWS.items():
    for g, p in zip(v.matrices(grads[k]), found[k], strict=True):
      best = ref.projection(ref.svd_basis(g, ref.RANK))
      np.testing.assert_allclose(ref.projection(p), best, rtol=0, atol=1e-5)
      # In order, without an eigenproblem.
      aligned = np.abs(ref.svd_basis(g, ref.RANK).T @ p)
      np.testing.assert_allclose(aligned, np.eye(ref.RANK), rtol=0, atol=1e-3)


def test_keeps_a_full_basis_of_a_gradient_of_rank_one():
  grads = {k: jnp.zeros(v.shape).at[..., 2, :].set(1) for k, v in VIEWS.items()}
  for bases in run(1, 0.0, [grads] * 4)[1:]:
    for k, v in VIEWS.items():
      for g, p in zip(v.matrices(grads[k]), bases[k], strict=True):
        np.testing.assert_allclose(p.T @ p, np.eye(ref.RANK), atol=3e-6)
        np.testing.assert_allclose(p @ p.T @ g, g, rtol=0, atol=1e-3)


@pytest.mark.parametrize('momentum', [0.0, RHO])
@pytest.mark.parametrize('bad', [0.0, np.nan], ids=['zero', 'nan'])
def test_bad_first_gradients_leave_no_trace(bad, momentum):
  """A layer without a gradient starts when it has one."""
  grads = [gradients(t) for t in range(5)]
  alone = run(1, momentum, grads[2:])
  for g in grads[:2]:
    g['stack'] = g['stack'].at[1].set(bad)
  bases = run(1, momentum, grads)
  for t in range(2):
    np.testing.assert_array_equal(
      bases[t + 1]['stack'][1], bases[0]['stack'][1]
    )
  for t in range(3):
    found, expected = bases[t + 3]['stack'][1], alone[t + 1]['stack'][1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_ldadam():
  """P, both moments and updates of LDAdam without error feedback."""
  adam = ref.Adam(RHO, 0.99)
  tx = so.subspace(
    SPEC,
    so.projectors.power_iteration(1, RHO),
    optax.scale_by_adam(b1=RHO, b2=0.99),
    transport=so.transports.both(RHO, 0.99),
  )
  update = ref.jit(tx.update)
  grads = [gradients(t) for t in range(8)]
  state = tx.init(grads[0])
  dense = {k: ref.BothInSubspace(v, adam) for k, v in VIEWS.items()}
  for k, v in VIEWS.items():
    dense[k].move(v.bases(ref.bases(state)[k]))
  for t, g in enumerate(grads):
    updates, state = update(g, state)
    inner = ref.find(state, 'inner').inner
    for k, v in VIEWS.items():
      wanted = ldadam_step(dense[k], v.matrices(g[k]), t)
      found = {
        'basis': v.bases(ref.bases(state)[k]),
        'first': v.coords(inner.mu[k], ref.RANK),
        'second': v.coords(inner.nu[k], ref.RANK),
        'update': v.matrices(updates[k]),
      }
      for name, x in found.items():
        np.testing.assert_allclose(
          x, wanted[name], rtol=1e-3, atol=1e-3, err_msg=f'{name} of {k} at {t}'
        )


def ldadam_step(adam, gradient, t):
  """Moves the bases with Adam's own mean, its moments, and then the weights."""
  weight = 1 - RHO**t if t else 1
  bases = [
    ref.power_step(p, s['m'] / weight, g, RHO)
    for p, s, g in zip(adam.bases, adam.states, gradient, strict=True)
  ]
  adam.move(np.stack(bases))
  update = adam.step(adam.view.leaf(gradient))
  moment = lambda name: np.stack([s[name] for s in adam.states])
  return {
    'basis': adam.bases,
    'first': moment('m'),
    'second': moment('v'),
    'update': update,
  }


@pytest.mark.parametrize('momentum', [-0.1, 1.0, 1.5, np.nan])
def test_momentum_raises(momentum):
  with pytest.raises(ValueError, match='momentum must lie in'):
    so.projectors.power_iteration(1, momentum)
