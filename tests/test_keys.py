"""Random bases: one for every path, layer, seed and period, on every host."""

import os
import subprocess
import sys
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import measure
import subspace_optax as so
from subspace_optax import projectors


def _first_bases(path, seed, shape=(3, 8, 12)):
  tx = so.project(so.SubspaceSpec(3, seed=seed), projectors.stiefel(2))
  params = cases.nest({path: jnp.ones(shape)})
  return np.asarray(measure.bases(tx.init(params))[path])


def test_bases_differ_by_path_layer_and_seed():
  basis = _first_bases('a/up', 0)
  np.testing.assert_array_equal(basis, _first_bases('a/up', 0))
  for other in (_first_bases('b/up', 0), _first_bases('a/up', 1)):
    for p in basis:
      for q in other:
        assert np.linalg.norm(p.T @ q) < 1.6  # sqrt(3) if they agreed
  for i, j in ((0, 1), (0, 2), (1, 2)):
    assert np.linalg.norm(basis[i].T @ basis[j]) < 1.6


def test_random_bases_differ_by_period():
  tx = so.project(so.SubspaceSpec(3), projectors.stiefel(2))
  params, update = {'w': jnp.ones((12, 8))}, cases.jit(tx.update)
  states = [tx.init(params)]
  for _ in range(5):
    states.append(update(params, states[-1])[1])
  found = [measure.bases(states[t])['w'] for t in (0, 1, 3, 5)]
  for i, p in enumerate(found):
    for q in found[:i]:
      assert np.linalg.norm(p.T @ q) < 1.7


_FRESH_PROCESS = """
import pathlib, sys, zlib
import jax.numpy as jnp, numpy as np, subspace_optax as so
state = so.golore(1e-3, rank=3).init({'blocks': {'up': jnp.ones((3, 8, 12))}})
basis = state[0][0].subspaces.basis['blocks']['up']
seed = state[0][0].seed['blocks']['up']
found = zlib.crc32(np.asarray(basis).tobytes() + np.asarray(seed).tobytes())
pathlib.Path(sys.argv[1]).write_text(str(found))
"""


def test_bases_are_the_same_in_another_process(tmp_path):
  root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  path = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH'))))
  env = dict(
    os.environ, PYTHONHASHSEED='4321', JAX_PLATFORMS='cpu', PYTHONPATH=path
  )
  found = tmp_path / 'crc32'
  subprocess.run(
    [sys.executable, '-c', _FRESH_PROCESS, str(found)],
    env=env,
    check=True,
    timeout=900,  # no measure of speed: a guard against waiting for ever
  )
  state = so.golore(1e-3, rank=3).init({'blocks': {'up': jnp.ones((3, 8, 12))}})
  own = measure.project_state(state)
  basis, seed = own.subspaces.basis, own.seed
  data = [np.asarray(x['blocks']['up']).tobytes() for x in (basis, seed)]
  assert int(found.read_text()) == zlib.crc32(b''.join(data))


@pytest.mark.parametrize(
  'tx, bits',
  [
    (optax.chain(optax.sgd(1e-3), so.round_updates()), jnp.bfloat16),
    (so.quantize_moments(optax.trace(0.9)), jnp.int8),
  ],
)
def test_layers_that_are_updated_alone_round_apart(tx, bits):
  """Equal layers with equal gradients, and so equal but for the rounding."""
  layer = jax.random.normal(jax.random.key(0), (32, 32)).astype(jnp.bfloat16)
  wide = lambda x: x.astype(jnp.float32)
  step = so.layerwise(
    tx,
    embed=lambda rest, batch: wide(batch),
    block=lambda layer, x, batch: x + jnp.sum(wide(layer['w']) * wide(batch)),
    head=lambda rest, x, batch: jnp.mean(x) + jnp.sum(rest['head']),
  )
  params = {'blocks': {'w': jnp.stack([layer] * 2)}, 'head': jnp.ones(2)}
  state = step.init(params)
  params, state, _ = jax.jit(step.step)(params, state, layer)
  trees = jax.tree.leaves((params['blocks'], state.blocks))
  first, second = next(x for x in trees if x.dtype == bits)
  wrong = np.mean(np.asarray(first != second))
  assert 0.05 < wrong < 0.6


@pytest.mark.parametrize('dtype', [np.int32, np.uint32])
def test_seeds_of_numpy_are_those_of_python(dtype):
  tree = {'w': jax.random.normal(jax.random.key(0), (8, 64))}

  def codes(seed):
    tx = so.quantize_moments(optax.trace(0.9), seed=seed)
    _, state = tx.update(tree, tx.init(tree), layer=1)
    return np.asarray(state.coded.trace['w'])

  np.testing.assert_array_equal(codes(dtype(3)), codes(3))
  assert np.any(codes(3) != codes(4))


@pytest.mark.parametrize('stacked', [True, False])
def test_matrices_with_states_of_their_own_round_apart(stacked):
  """Within a stack, and as the layers that `layerwise` passes one by one."""
  tx = so.subspace(
    so.SubspaceSpec(8),
    projectors.dct(9),
    so.quantize_moments(optax.trace(0.9)),
    transport='reset',
  )
  gradient = jax.random.normal(jax.random.key(0), (1, 32, 64))
  if stacked:
    gradient = jnp.tile(gradient, (2, 1, 1))
  tree = {'blocks': {'w': gradient}}
  with warnings.catch_warnings(action='ignore'):  # axes are assumed
    state = tx.init(tree)
  update = cases.jit(lambda layer: tx.update(tree, state, tree, layer=layer)[1])
  of_layer = lambda layer: next(
    np.asarray(x) for x in jax.tree.leaves(update(layer)) if x.dtype == jnp.int8
  )
  if stacked:  # by itself, and as one of the layers
    pairs = [of_layer(None), of_layer(0)]
  else:
    pairs = [(of_layer(0)[0], of_layer(1)[0])]
  for first, second in pairs:
    assert 0.05 < np.mean(first != second) < 0.6


def test_an_optimizer_that_takes_no_layer_gets_none():
  """There is none outside of stacks and of the layers of `layerwise`."""
  taken = []

  def update(updates, state, params=None, *, value=None):
    taken.append(value)
    return updates, state

  inner = optax.GradientTransformationExtraArgs(optax.identity().init, update)
  tx = so.subspace(
    so.SubspaceSpec(8), projectors.stiefel(9), inner, transport='reset'
  )
  tree = {'w': jax.random.normal(jax.random.key(0), (32, 64))}
  tx.update(tree, tx.init(tree), tree, value=2.0)
  assert taken[-1] == 2.0
