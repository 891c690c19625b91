"""The planner: what a trace holds in memory at once."""

import jax
import jax.numpy as jnp

from subspace_optax.plan import _liveness


def traced(f, *shapes):
  shapes = [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
  return _liveness.flatten(jax.make_jaxpr(f)(*shapes))


def test_elementwise_results_take_no_memory():
  f = lambda x, w, v: jnp.sum(jnp.tanh(jnp.exp(x) + 1) @ w @ v)
  trace = traced(f, (8, 16), (16, 32), (32, 4))
  # tanh(...) for the first product (8, 16), its result (8, 32) beside it; then
  # (8, 32) and (8, 4).
  assert _liveness.peak(trace) == 4 * 8 * (16 + 32)
  lonely = traced(lambda x: jnp.sum(jnp.exp(x) * 2), (8, 16))
  assert _liveness.peak(lonely) == 4


def test_what_is_fused_keeps_its_sources():
  def f(x, w):
    y = x @ w  # lives until the last product, through exp
    z = jnp.exp(y)
    return (y @ w) @ w + z

  trace = traced(f, (8, 16), (16, 16))
  # y, y w, (y w) w; the sum may take the place of one of them.
  assert _liveness.peak(trace) == 3 * 4 * 8 * 16


def test_residuals_without_arguments():
  def kept(w, x):
    value, vjp = jax.vjp(lambda w: jnp.sum(jnp.tanh(jnp.exp(x @ w)) * 2), w)
    return value, jax.tree.leaves(vjp)

  # All that it keeps is made of x w; x is an argument.
  assert _liveness.residuals(traced(kept, (16, 32), (8, 16)), 1) == 4 * 8 * 32


def test_loops_hold_what_their_bodies_do():
  def f(x, ws):
    return jax.lax.scan(lambda x, w: ((x @ w) @ w, x), x, ws)

  trace = traced(f, (8, 16), (3, 16, 16))
  # The results x (8, 16) and (3, 8, 16); inside, x w.
  assert _liveness.peak(trace) == 4 * 8 * 16 * (1 + 3 + 1)
  assert _liveness.peak(trace, count_outputs=False) == 4 * 8 * 16
