"""Hamiltonian descent in moving subspaces: Online Subspace Descent, Section 4.

Whatever the basis P does, H falls, at the rate that the optimizer's ODE says.
An inner optimizer takes explicit Euler steps of the ODE, the library does the
rest, in float64. Arrays in the formulas are coordinates, g = P^T grad L.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


SHAPES = {'left': (6, 8), 'right': (6, 4), 'plain': (6,)}
# Each leaf is a stack, with a matrix for each flow.
SPEC = so.SubspaceSpec(
  2,
  only_if_smaller=False,
  basis_dtype=jnp.float64,
  weight_dimension_numbers={
    'left': so.DimensionNumbers(1, 2),
    'right': so.DimensionNumbers(1, 2),
    'plain': None,
  },
)


class Flow(NamedTuple):
  """An optimizer as an ODE.

  Attributes:
    velocity: of the weights' coordinates.
    moments: velocities of m and v.
    energy: H - loss_weight L.
    rate: dH/dt.
    loss_weight: of L in H.
  """

  velocity: Any
  moments: Any
  energy: Any
  rate: Any
  loss_weight: float = 1.0


# Adam at the edge of a >= b / 4. Lion-K with K(X) = sum_ij log cosh X_ij, which
# is convex and, unlike Lion's norm, smooth.
A, B, EPS = 0.5, 2.0, 0.1
LION_A, LION_B = 0.7, 0.6
log_cosh = lambda x: jnp.logaddexp(x, -x) - math.log(2)


def adam_rate(g, m, v):
  """Returns the paper's bound of dH/dt, less what it leaves out: eps > 0."""
  root = jnp.sqrt(v)
  scaled = m / (root + EPS)
  bound = -(1 - B / (4 * A)) * jnp.sum(m * scaled)
  bound -= B / (4 * A) * jnp.sum(scaled**2 * g**2 / root)
  return bound - B / (4 * A) * EPS * jnp.sum(scaled**2)


def lion_rate(g, m, v):
  del v
  bracket = lambda x, y: jnp.sum(y * (jnp.tanh(x + y) - jnp.tanh(x)))
  a, b, u = LION_A, LION_B, (1 - LION_B) * m
  return -a / b * bracket(u, -b * g) - a / (1 - b) * bracket(0 * u, u)


FLOWS = {
  'gd': Flow(
    lambda g, m, v: -g,
    lambda g, m, v: (0 * m, 0 * v),
    lambda m, v: 0.0,
    lambda g, m, v: -jnp.sum(g**2),
  ),
  'momentum': Flow(
    lambda g, m, v: -m,
    lambda g, m, v: (A * (g - m), 0 * v),
    lambda m, v: jnp.sum(m**2) / (2 * A),
    lambda g, m, v: -jnp.sum(m**2),
  ),
  'adam': Flow(
    lambda g, m, v: -m / (jnp.sqrt(v) + EPS),
    lambda g, m, v: (A * (g - m), B * (g**2 - v)),
    lambda m, v: jnp.sum(m**2 / (jnp.sqrt(v) + EPS)) / (2 * A),
    adam_rate,
  ),
  'lion_k': Flow(
    lambda g, m, v: jnp.tanh((1 - LION_B) * m - LION_B * g),
    lambda g, m, v: (-LION_A * (g + m), 0 * v),
    lambda m, v: jnp.sum(log_cosh((1 - LION_B) * m)) / (1 - LION_B),
    lion_rate,
    loss_weight=LION_A,
  ),
}
# Bases that jump at every step, and bases that learn, not orthonormal.
MOVING = {
  'stiefel': so.projectors.stiefel(update_proj_gap=1),
  'online_pca': so.projectors.online_pca(optax.sgd(0.1)),
}
DT, PROBE, FLOW_STEPS = 0.005, 1e-5, 500


def per_flow(field, *trees):
  """Returns, per flow, what `field` gives for all its leaves."""
  return {
    name: {
      k: getattr(flow, field)(*(tree[k][i] for tree in trees)) for k in SHAPES
    }
    for i, (name, flow) in enumerate(FLOWS.items())
  }


def stacked(found):
  return {
    k: jnp.stack([leaves[k] for leaves in found.values()]) for k in SHAPES
  }


def euler(dt):
  """Returns a step of every flow, and g in its state."""

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {'m': zeros, 'v': jax.tree.map(lambda x: x + 0.5, zeros), 'g': zeros}

  def update(g, state, params=None):
    del params
    m, v = state['m'], state['v']
    moments = per_flow('moments', g, m, v)
    part = lambda i: stacked(
      {f: {k: x[i] for k, x in leaves.items()} for f, leaves in moments.items()}
    )
    move = lambda x, i: jax.tree.map(lambda x, dx: x + dt * dx, x, part(i))
    new = {'m': move(m, 0), 'v': move(v, 1), 'g': g}
    return stacked(per_flow('velocity', g, m, v)), new

  return optax.GradientTransformation(init, update)


@functools.cache
def trajectories(projector):
  """Returns H, its rate measured and predicted, and how far the bases moved.

  All of them per flow and step.
  """
  rng = np.random.default_rng(1)
  mix = rng.normal(size=(6, 6))
  target = {k: rng.normal(size=s) for k, s in SHAPES.items()}
  start = {k: jnp.stack([2 * x[::-1]] * len(FLOWS)) for k, x in target.items()}

  def losses(params):
    loss = lambda x, c: jnp.sum(log_cosh(mix @ x - c))
    return {
      f: sum(loss(x[i], target[k]) for k, x in params.items())
      for i, f in enumerate(FLOWS)
    }

  def hamiltonian(params, state):
    inner = ref.find(state, 'inner').inner
    energy = per_flow('energy', inner['m'], inner['v'])
    return {
      f: FLOWS[f].loss_weight * loss + sum(energy[f].values())
      for f, loss in losses(params).items()
    }

  def step(carry, _):
    params, state = carry
    grads = jax.grad(lambda p: sum(losses(p).values()))(params)

    def after(dt):
      tx = so.subspace(SPEC, MOVING[projector], euler(dt))
      updates, new = tx.update(grads, state, params)
      velocity = jax.tree.map(lambda x: dt * x, updates)
      return optax.apply_updates(params, velocity), new

    now = hamiltonian(params, state)
    # In a loop: what follows the step is compiled once.
    dts = jnp.asarray([PROBE, PROBE / 2, DT])
    news = lax.map(after, dts)
    of = lambda i: jax.tree.map(lambda x: x[i], news)
    coarse, fine = hamiltonian(*of(0)), hamiltonian(*of(1))
    # The two differences, extrapolated to dt = 0.
    measured = jax.tree.map(
      lambda h, c, f: (4 * (f - h) - (c - h)) / PROBE, now, coarse, fine
    )
    m, v = (ref.find(state, 'inner').inner[k] for k in 'mv')
    new = of(2)
    g = ref.find(new[1], 'inner').inner['g']
    rate = {f: sum(x.values()) for f, x in per_flow('rate', g, m, v).items()}
    # By how much each basis moved, the one that moved least.
    moved = jax.tree.map(
      lambda p, q: jnp.linalg.norm(p - q, axis=(1, 2)),
      ref.bases(new[1]),
      ref.bases(state),
    )
    moved = jnp.minimum(moved['left'], moved['right'])
    moved = {f: moved[i] for i, f in enumerate(FLOWS)}
    assert [x.shape[1:] for x in g.values()] == [(2, 8), (6,), (6, 2)]
    return new, (now, measured, rate, moved)

  @ref.jit
  def run(params):
    tx = so.subspace(SPEC, MOVING[projector], euler(DT))
    state = tx.init(params)
    if projector == 'online_pca':
      wave = 0.2 * jnp.cos(jnp.arange(12)).reshape(1, 6, 2)
      skew = lambda p: p + wave[:, : p.shape[1]]
      bases = jax.tree.map(skew, ref.bases(state))
      state = (ref.with_bases(state[0], bases), *state[1:])
    return lax.scan(step, (params, state), length=FLOW_STEPS)[1]

  return jax.tree.map(np.asarray, run(start))


@pytest.mark.parametrize('flow', FLOWS)
@pytest.mark.parametrize('projector', MOVING)
def test_hamiltonian_descends_for_any_moving_basis(projector, flow):
  h, measured, rate, moved = (x[flow] for x in trajectories(projector))
  assert h.dtype == np.float64
  np.testing.assert_allclose(measured, rate, rtol=1e-6, atol=1e-6)
  np.testing.assert_array_less(rate, 1e-12)
  np.testing.assert_array_less(1e-4, moved)
  # A step is not the ODE: what comes back is of second order in dt.
  assert np.sum(np.diff(h).clip(0)) < 0.01 * (h[0] - h[-1])
