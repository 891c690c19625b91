"""Stacked layers whose moments are codes: one of them is decoded at a time."""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import grid
import subspace_optax as so
from subspace_optax.low_precision import _by_layer

LAYERS = 24
STACK = jax.ShapeDtypeStruct((LAYERS, 256, 256), jnp.float32)
STACKS = {'up': STACK, 'down': STACK}
INNERS = {'adam': optax.scale_by_adam(), 'lion': optax.scale_by_lion()}


def loss(params: Any, x: jax.Array) -> jax.Array:
  def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
    return x + jnp.tanh(x @ p['up']) @ p['down'], None

  return jnp.mean(lax.scan(jax.checkpoint(layer), x, params)[0] ** 2)


def temporaries(inner: optax.GradientTransformation) -> int:
  """Bytes that a training step needs beside what it is given."""
  tx = optax.chain(inner, optax.scale(-1e-3))

  def step(params: Any, state: Any, x: jax.Array) -> Any:
    gradients = jax.grad(loss)(params, x)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  arguments = STACKS, jax.eval_shape(tx.init, STACKS), jnp.ones((8, 256))
  program = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
  return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('name, bits', grid.cover(INNERS, [8, 4], of=2))
def test_temporaries_are_those_of_float32(name, bits):
  """Those of all layers at once are five times as many for Adam."""
  wide = temporaries(INNERS[name])
  assert temporaries(so.quantize_moments(INNERS[name], bits)) < 1.2 * wide


def assert_same(found: Any, wanted: Any) -> None:
  """Of updates and states; the last bit may tip a code over."""
  (updates, state), (others, own) = found, wanted
  for x, y in zip(*map(jax.tree.leaves, (state, own)), strict=True):
    if jnp.issubdtype(x.dtype, jnp.integer):
      assert np.mean(np.asarray(x != y)) < 1e-3
    else:
      np.testing.assert_allclose(x, y, rtol=1e-5)
  different = jax.tree.map(
    lambda x, y: np.mean(np.abs(x - y) > 1e-4), updates, others
  )
  assert max(jax.tree.leaves(different)) < 2e-3


@pytest.mark.parametrize('name, bits', grid.cover(INNERS, [4, 8], of=2))
def test_steps_are_those_of_all_layers_at_once(name, bits, monkeypatch):
  tx = so.quantize_moments(INNERS[name], bits)
  params = {
    'up': jnp.ones((6, 256, 256)),
    # Layers along the second axis, taken in four turns.
    'middle': jnp.ones((256, 4, 256)),
    'bias': jnp.ones((6, 256)),
    'w': jnp.ones((64, 64)),
  }
  rng = np.random.default_rng(0)
  draw = lambda x: rng.standard_normal((3, *x.shape), np.float32)
  gradients = jax.tree.map(draw, params)

  def run(params, gradients):
    def step(carry, gradient):
      updates, state = tx.update(gradient, carry[1])
      return (updates, state), None

    start = (params, tx.init(params))
    return lax.scan(step, start, gradients)[0]

  found = []
  for least in (_by_layer._LEAST_SIZE, 2**40):
    monkeypatch.setattr(_by_layer, '_LEAST_SIZE', least)
    found.append(cases.jit(lambda *x: run(*x))(params, gradients))
  (_, state), (_, own) = found
  assert jax.tree.structure(state) == jax.tree.structure(own)
  assert int(state.count) == int(state.coded.count) == 3
  assert_same(*found)


@functools.cache
def alone() -> Any:
  """Returns layers and their updates on one device."""
  params = {'up': jax.random.normal(jax.random.key(0), (4, 512, 512))}
  tx = so.scale_by_adam8bit()
  updates, _ = cases.jit(lambda g: tx.update(g, tx.init(g)))(params)
  return params, updates


@pytest.mark.parametrize('spec', [P('x', None, 'y'), P(None, 'x', 'y')])
def test_layers_on_several_devices_are_not_taken_one_by_one(spec):
  """That would gather them; cut along other axes they are."""
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(AxisType.Explicit,) * 2)
  params, wanted = alone()
  tx = so.scale_by_adam8bit()
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, NamedSharding(mesh, spec))
    state = cases.jit(tx.init)(placed)
    program = cases.jit(tx.update).lower(placed, state).compile()
    found, _ = program(placed, state)
  text = program.as_text()
  assert 'all-gather' not in text
  assert ('while(' in text) == (spec[0] is None)
  np.testing.assert_allclose(found['up'], wanted['up'], rtol=1e-5)


def test_optimizers_that_look_at_other_layers_see_them_all():
  """Clipping by a norm, whose state says nothing, goes before codes."""
  inner = optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9))
  tx = so.quantize_moments(inner)
  params = {'up': jnp.ones((6, 256, 256)), 'down': jnp.ones((6, 256, 256))}
  updates, _ = cases.jit(lambda g: tx.update(g, tx.init(g)))(params)
  np.testing.assert_allclose(optax.global_norm(updates), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
  'shape, cuts, turns',
  [
    ((24, 512, 1376), 24, 24),
    ((128, 512, 512), 128, 128),
    ((4096, 32, 11008), 4096, 128),  # layers along the second axis
    ((4096, 32, 128), 4096, 128),  # heads
    ((256, 4, 256), 256, 4),
    ((1021, 64, 1024), 1021, 1),  # nothing divides it
    ((16, 64, 64), 16, 1),  # too small
    ((1, 512, 512), 1, 1),
    # LLaMA-7B's embedding, head and a matrix of one layer.
    ((32000, 4096), 200, 25),
    ((4096, 32000), 32, 16),
    ((4096, 11008), 32, 1),
    ((50257, 1600), 29, 29),  # short ones
    ((151936, 896), 1187, 1),  # a prime number of rows of blocks
    ((32003, 4096), 1, 1),  # its blocks fit no rows
  ],
)
def test_turns(shape, cuts, turns):
  assert _by_layer._turns(shape, cuts) == turns


@pytest.mark.parametrize('name, bits', grid.cover(INNERS, [8, 4], of=2))
def test_rows_of_an_embedding_are_those_of_the_whole(name, bits, monkeypatch):
  tx = so.quantize_moments(INNERS[name], bits)
  params = {'embedding': jnp.ones((512, 96)), 'head': jnp.ones((96, 512))}
  rng = np.random.default_rng(0)
  gradients = jax.tree.map(
    lambda x: rng.standard_normal((3, *x.shape), np.float32), params
  )
  found, loops = [], []
  for large in (2**10, _by_layer._LARGE):
    monkeypatch.setattr(_by_layer, '_LARGE', large)
    monkeypatch.setattr(_by_layer, '_LEAST_ROWS', large)

    def run(gradients):
      updates, state = None, tx.init(params)
      for t in range(3):
        at = jax.tree.map(lambda x, t=t: x[t], gradients)
        updates, state = tx.update(at, state)
      return updates, state

    program = cases.jit(lambda g: run(g)).lower(gradients)
    loops.append(program.as_text().count('stablehlo.while'))
    found.append(program.compile()(gradients))
  assert loops[0] - loops[1] == 6  # two leaves, three steps
  assert_same(*found)
