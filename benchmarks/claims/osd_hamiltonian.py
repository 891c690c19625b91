"""Hamiltonian descent: H falls along the ODE, whatever the bases do.

An inner optimizer takes explicit Euler steps of the ODE on coordinates; the
library projects gradients and maps the steps back. Arrays in formulas are
coordinates, g = P^T grad L. dH/dt is measured by extrapolated differences of H
over tiny steps.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks.claims import claim
import subspace_optax as so


class Flow(NamedTuple):
  """An optimizer as an ODE: velocities, H - loss_weight L, and dH/dt."""

  velocity: Any
  moments: Any
  energy: Any
  rate: Any
  loss_weight: float = 1.0


# Adam at the edge of a >= b / 4; Lion-K with a smooth K, sum log cosh.
A, B, EPS = 0.5, 2.0, 0.1
LION_A, LION_B = 0.7, 0.6
DT, PROBE, STEPS, SHAPE, RANK = 0.005, 1e-5, 1000, (6, 8), 2


def log_cosh(x):
  return jnp.logaddexp(x, -x) - math.log(2)


def adam_rate(g, m, v):
  """The paper's bound of dH/dt, less what it leaves out: eps > 0."""
  root = jnp.sqrt(v)
  scaled = m / (root + EPS)
  bound = -(1 - B / (4 * A)) * jnp.sum(m * scaled)
  bound -= B / (4 * A) * jnp.sum(scaled**2 * g**2 / root)
  return bound - B / (4 * A) * EPS * jnp.sum(scaled**2)


def lion_rate(g, m, v):
  del v
  bracket = lambda x, y: jnp.sum(y * (jnp.tanh(x + y) - jnp.tanh(x)))
  u = (1 - LION_B) * m
  first = LION_A / LION_B * bracket(u, -LION_B * g)
  return -first - LION_A / (1 - LION_B) * bracket(0 * u, u)


FLOWS = {
  'GD': Flow(
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
  'Adam': Flow(
    lambda g, m, v: -m / (jnp.sqrt(v) + EPS),
    lambda g, m, v: (A * (g - m), B * (g**2 - v)),
    lambda m, v: jnp.sum(m**2 / (jnp.sqrt(v) + EPS)) / (2 * A),
    adam_rate,
  ),
  'Lion-K': Flow(
    lambda g, m, v: jnp.tanh((1 - LION_B) * m - LION_B * g),
    lambda g, m, v: (-LION_A * (g + m), 0 * v),
    lambda m, v: jnp.sum(log_cosh((1 - LION_B) * m)) / (1 - LION_B),
    lion_rate,
    loss_weight=LION_A,
  ),
}
# Bases that jump at every step or at times, that learn, and that stay.
EVERY_STEP = 'new at every step'
BASES = {
  EVERY_STEP: lambda: so.projectors.stiefel(1),
  'new every 50 steps': lambda: so.projectors.stiefel(50),
  'online PCA': lambda: so.projectors.online_pca(optax.sgd(0.1)),
  'fixed': lambda: so.projectors.stiefel(10 * STEPS),
}


def euler(flow: Flow, dt: float) -> optax.GradientTransformation:
  """A step of the ODE, which returns the velocity of the weights."""

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return {'m': zeros, 'v': jax.tree.map(lambda x: x + 0.5, zeros), 'g': zeros}

  def update(updates: Any, state: Any, params: Any = None):
    del params
    g = updates
    m, v = state['m']['w'], state['v']['w']
    dm, dv = flow.moments(g['w'], m, v)
    new = {'m': {'w': m + dt * dm}, 'v': {'w': v + dt * dv}, 'g': g}
    return {'w': flow.velocity(g['w'], m, v)}, new

  return optax.GradientTransformation(init, update)


def loss(w):
  """A smooth loss of a matrix."""
  rng = np.random.default_rng(1)
  mix, target = rng.normal(size=(6, 6)), rng.normal(size=SHAPE)
  return jnp.sum(log_cosh(mix @ w - target))


def moments(state: Any) -> tuple[jax.Array, jax.Array]:
  """m and v in the state of `subspace`: the second of its three pieces."""
  inner = state[1].inner
  return inner['m']['w'], inner['v']['w']


def trajectory(flow: Flow, projector) -> dict[str, np.ndarray]:
  """H, dH/dt measured and as the paper says it is, at every step."""
  spec = so.SubspaceSpec(RANK, only_if_smaller=False, basis_dtype=jnp.float64)
  make = lambda dt: so.subspace(spec, projector, euler(flow, dt))
  h = lambda w, s: flow.loss_weight * loss(w) + flow.energy(*moments(s))

  def step(carry, _):
    w, state = carry
    gradient = {'w': jax.grad(loss)(w)}

    def after(dt) -> tuple[Any, Any]:
      velocity: Any
      velocity, new = make(dt).update(gradient, state, {'w': w})
      return w + dt * velocity['w'], new

    now = h(w, state)
    coarse, fine = h(*after(PROBE)), h(*after(PROBE / 2))
    measured = (4 * (fine - now) - (coarse - now)) / PROBE
    new = after(DT)
    rate = flow.rate(new[1][1].inner['g']['w'], *moments(state))
    return new, {'h': now, 'measured': measured, 'rate': rate}

  @jax.jit
  def run(w):
    return lax.scan(step, (w, make(DT).init({'w': w})), length=STEPS)[1]

  start = 2 * np.random.default_rng(2).normal(size=SHAPE)
  return {k: np.asarray(v) for k, v in run(jnp.asarray(start)).items()}


def summary(found: dict[str, np.ndarray]) -> dict:
  """How far the rate is off, and how much of the fall of H comes back."""
  h, rate = found['h'], found['rate']
  size = np.abs(rate) + np.abs(rate).max() / 100
  return {
    'off': float((np.abs(found['measured'] - rate) / size).max()),
    'highest': float(rate.max()),
    'back': float(np.sum(np.diff(h).clip(0)) / (h[0] - h[-1])),
    'h': (h[:: STEPS // 100]).tolist(),
  }


def run() -> claim.Found:
  """Every optimizer with every kind of basis."""
  pairs = [(f, b) for f in FLOWS for b in BASES]
  with jax.enable_x64(True):
    found = {
      f'{flow}, {basis}': summary(trajectory(FLOWS[flow], BASES[basis]()))
      for flow, basis in harness.track(pairs, 'Hamiltonian descent')
    }
  # No Euler step follows bases that are new at every step, see the notes.
  followed = {k: row for k, row in found.items() if EVERY_STEP not in k}
  checks: list[claim.Check] = []
  table: claim.Table = [
    ('optimizer, bases', 'dH/dt off by', 'highest dH/dt', 'comes back')
  ]
  for name, row in found.items():
    checks += [
      claim.Check(f'{name}: dH/dt off by', row['off'], most=1e-5),
      claim.Check(f'{name}: highest dH/dt', row['highest'], most=1e-12),
    ]
    if name in followed:
      what = f'{name}: share of the fall of H that comes back'
      checks.append(claim.Check(what, row['back'], most=0.01))
    table.append((name, row['off'], row['highest'], row['back']))
  numbers = {
    'worst': max(row['off'] for row in found.values()),
    'back': max(row['back'] for row in followed.values()),
    'flows': len(FLOWS),
    'bases': len(BASES),
  }
  return claim.Found(checks, found, table, numbers)


@harness.picture(2, 2, figsize=(9, 6), sharex=True, sharey=True)
def picture(panels: Any, found: dict) -> None:
  """H over time, a panel for every optimizer."""
  time = np.arange(100) * (STEPS // 100) * DT
  for axes, flow in zip(panels.flat, FLOWS, strict=True):
    axes.set_title(flow, fontsize=10)
    for basis in BASES:
      h = np.array(found[f'{flow}, {basis}']['h'])
      axes.plot(time, h / h[0], label=basis)
  panels[0, 0].legend(fontsize=8)
  panels[0, 0].figure.supxlabel('time')
  panels[0, 0].figure.supylabel('H, of the first')
