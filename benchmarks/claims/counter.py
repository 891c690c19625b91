"""GoLore's counter-example, Eq. (1), and descent on it and on other functions.

f(X) - f* = ||X_top + [D, 0]||^2 / 2, where X has N rows of which the last R
never matter, but carry all the noise: sigma on R entries, with a random sign.
Its R singular values are sigma, so an SVD of rank R sees a direction of the
signal only while that is stronger.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_optax as so

N, R = 10, 4
TOP = N - R
D = np.random.default_rng(42).normal(size=(TOP, TOP))
START = np.eye(N, N) / 2 * (np.arange(N) < TOP)[:, None]
# Of X_top + [D, 0] at the start.
VALUES = np.linalg.svd(np.eye(TOP) / 2 + D, compute_uv=False)
GAP = float(np.sum(VALUES**2) / 2)
WIDE = np.pad(D, ((0, 0), (0, R)))


class Trace(NamedTuple):
  """What a descent measured, in `blocks` equal parts of it."""

  at: np.ndarray  # (blocks + 1,), before each block and at the end
  mean: np.ndarray  # (blocks,), over the steps of each block


def stall(sigma: float) -> float:
  """The f - f* at which GaLore gets stuck: sum_i min(s_i, sigma)^2 / 2."""
  return float(np.sum(np.minimum(VALUES, sigma) ** 2) / 2)


def spec(rank: float = R) -> so.SubspaceSpec:
  """Every matrix, its rows projected, in float64."""
  return so.SubspaceSpec(
    rank, side='in', only_if_smaller=False, basis_dtype=jnp.float64
  )


def msgd(b1: float) -> optax.GradientTransformation:
  """The momentum of GoLore's theorems: m <- (1 - b1) m + b1 g."""
  return optax.chain(optax.scale(b1), optax.trace(1 - b1))


def galore(
  lr: float, gap: int, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
  """GaLore with momentum projection, as GoLore's paper analyses it."""
  projector = so.projectors.svd(gap)
  tx = so.subspace(spec(), projector, inner, transport='first')
  return optax.chain(tx, optax.scale(-lr))


def golore(
  lr: float,
  gap: int,
  inner: optax.GradientTransformation,
  random_from: int = 0,
) -> optax.GradientTransformation:
  """GoLore, or GoLore@x% if the bases turn random later."""
  return so.golore(
    lr,
    update_proj_gap=gap,
    random_from=random_from,
    inner=inner,
    spec=spec(),
  )


def excess(x: jax.Array) -> jax.Array:
  """f - f*."""
  return jnp.sum((x[:TOP] + WIDE) ** 2) / 2


def squared_gradient(x: jax.Array) -> jax.Array:
  """||grad f||^2, which for this function is 2 (f - f*)."""
  return 2 * excess(x)


def noisy(x: jax.Array, noise: Any) -> jax.Array:
  """The gradient with `noise` on the entries that carry it."""
  lower = noise * jnp.asarray(np.eye(R, N, TOP))
  return jnp.concatenate([x[:TOP] + WIDE, lower])


def gradients(sigma: float, batch: int = 1, refresh: int = 0) -> Callable:
  """(x, key) -> gradient of a batch, and that of another for refreshes."""

  def gradient(x, key):
    sign = lambda key, count: jnp.mean(
      jax.random.rademacher(key, (count,), jnp.float64)
    )
    extra = {}
    if refresh:
      mean = sign(jax.random.fold_in(key, 1), refresh)
      extra = {'refresh_gradients': {'w': noisy(x, sigma * mean)}}
    return noisy(x, sigma * sign(key, batch)), extra

  return gradient


def descend(
  tx: optax.GradientTransformation,
  start: Any,
  steps: int,
  gradient: Callable,
  measure: Callable,
  blocks: int = 100,
  seed: int = 0,
) -> Trace:
  """Descends in float64; `gradient` as what `gradients` returns."""
  root = jax.random.key(seed)
  tx = optax.with_extra_args_support(tx)

  def step(carry, t):
    w, state = carry
    updates: Any
    g, extra = gradient(w, jax.random.fold_in(root, t))
    updates, state = tx.update({'w': g}, state, {'w': w}, **extra)
    return (optax.apply_updates(w, updates['w']), state), measure(w)

  def block(carry, times):
    carry, measured = lax.scan(step, carry, times)
    return carry, (measured[0], jnp.mean(measured, axis=0))

  @jax.jit
  def run(w):
    times = jnp.arange(steps).reshape(blocks, steps // blocks)
    (w, _), (at, mean) = lax.scan(block, (w, tx.init({'w': w})), times)
    return jnp.concatenate([at, measure(w)[None]]), mean

  return Trace(*map(np.asarray, run(jnp.asarray(start, jnp.float64))))


def slope(x: Any, y: Any) -> float:
  """Of the line through the points, both axes logarithmic."""
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])
