"""Gradients of coordinates are those of weights, projected."""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks import programs
from benchmarks.claims import claim
import subspace_optax as so

WIDTH, HIDDEN, BATCH, RANK = 16, 40, 32, 4
STEPS, GAP = 300, 100  # bases are drawn three times


class Model(nnx.Module):
  """Three layers, of which the library knows nothing."""

  def __init__(self, rngs: nnx.Rngs):
    make = lambda m, n: nnx.Linear(m, n, param_dtype=jnp.float64, rngs=rngs)
    self.up, self.middle = make(WIDTH, HIDDEN), make(HIDDEN, HIDDEN)
    self.down = make(HIDDEN, WIDTH)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(jnp.tanh(self.middle(jnp.tanh(self.up(x)))))


def problem():
  """(loss, parameters): regression on a function of the inputs."""
  graphdef, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)

  def loss(params, x):
    y = so.rso.nnx_merge(graphdef, params)(x)
    return jnp.mean((y - jnp.sin(3 * x)) ** 2)

  return loss, nnx.to_pure_dict(params)


def batches() -> jax.Array:
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.standard_normal((STEPS, BATCH, WIDTH)))


def gradient_error() -> float:
  """The greatest error of a B's gradient, over its norm."""
  (loss, params), x = problem(), batches()[0]
  spec = so.SubspaceSpec(RANK, side='in')
  rso = so.rso.subproblems(spec, optax.sgd(1.0))
  state = rso.init(params)
  bases, rng = rso.bases(params, state), np.random.default_rng(1)
  noise = lambda b: jnp.asarray(0.1 * rng.standard_normal(b.shape))
  coords = jax.tree.map(noise, state.coords)
  merged = rso.merged(params, state._replace(coords=coords))
  whole = jax.jit(jax.grad(loss))(merged, x)
  f = jax.jit(so.rso.value_and_grad(loss, spec))
  _, found = f(params, bases, coords, x)
  error = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
  return max(
    error(found[k]['kernel'], bases[k]['kernel'].T @ whole[k]['kernel'])
    for k in params
  )


def losses(compressed: bool) -> np.ndarray:
  """Of all steps of GoLore."""
  loss, params = problem()
  tx = so.golore(0.01, RANK, update_proj_gap=GAP)

  make = so.rso.compressed_step if compressed else programs.whole_step
  step: Any = make(loss, tx)

  def one(carry, x):
    params, state, value = step(*carry, x)
    return (params, state), value

  run = jax.jit(lambda carry, xs: jax.lax.scan(one, carry, xs)[1])
  return np.asarray(run((params, tx.init(params)), batches()))


def run() -> claim.Found:
  """Both checks, in float64."""
  with jax.enable_x64(True):
    error = gradient_error()
    whole, compressed = losses(False), losses(True)
  off = np.abs(compressed / whole - 1)
  most, fall = float(off.max()), whole[-1] / whole[0]
  checks = (
    claim.Check('error of the gradient of B, over its norm', error, 0, 1e-12),
    claim.Check('relative difference of the losses', most, 0, 1e-9),
    claim.Check('last loss over the first', fall, 0, 0.9),
  )
  numbers = {'error': error, 'off': most, 'count': STEPS // GAP}
  numbers |= {'first': whole[0], 'last': whole[-1]}
  return claim.Found(checks, {'off': off.tolist()}, numbers=numbers)


@harness.picture(figsize=(6, 3.5))
def picture(axes: Any, data: dict) -> None:
  """The difference over the steps."""
  axes.semilogy(np.maximum(data['off'], 1e-17))
  for step in range(0, STEPS, GAP):
    axes.axvline(step, color='0.8')
  axes.set_xlabel('step (lines: new bases)')
  axes.set_ylabel('relative difference')
