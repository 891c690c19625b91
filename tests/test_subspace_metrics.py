"""`subspace_metrics`: what it finds, where it looks, and that it is right."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import grid
import measure
import subspace_optax as so
from subspace_optax import projectors

NAMES = {'captured_energy', 'orthogonality_error', 'drift'}
PARAMS = {'w': jnp.ones((8, 12)), 'bias': jnp.ones(12)}


# A projector's way to its bases is nothing to the metrics of them.
_ALIKE = (
  'golore_late',
  'gram_adam_reset',
  'randomized_rms_first',
  'stiefel_sgd',
)
every_case = pytest.mark.parametrize(
  'name',
  grid.but(cases.CASES, _ALIKE),
)


@every_case
def test_paths_names_shapes_and_dtypes(name):
  for state in (measure.run(name).first_state, measure.run(name).last_state):
    metrics = so.subspace_metrics(state)
    assert metrics.keys() == cases.projected(name, cases.LEAVES).keys()
    for path, of_leaf in metrics.items():
      leaf = cases.LEAVES[path]
      assert of_leaf.keys() == NAMES
      for value in of_leaf.values():
        assert value.dtype == jnp.float32
        assert value.shape == tuple(
          leaf.shape[i] for i in leaf.view(True).batch
        )


@every_case
def test_captured_energy_is_what_the_used_basis_keeps(name):
  case, run = cases.CASES[name], measure.run(name)
  gradients = cases.gradients(cases.LEAVES)
  loose = 2e-2 if case.basis_dtype == jnp.bfloat16 else 1e-4
  for t in range(cases.STEPS):
    metrics = so.subspace_metrics(run.states[t + 1])
    used = measure.bases(run.states[t + 1 if case.used[t] == 'new' else t])
    for path, e in cases.projected(name, cases.LEAVES).items():
      p = e.view.bases(used[path])
      g = cases.flat(gradients[t])[path]
      g = e.view.matrices(g)
      # The share that P P^T G leaves of G; ||P^T G||^2 for orthonormal P.
      left = g - p @ (np.swapaxes(p, 1, 2) @ g)
      share = 1.0 - np.sum(left**2, (1, 2)) / np.sum(g**2, (1, 2))
      found = np.ravel(metrics[path]['captured_energy'])
      tolerance = loose if cases.LEAVES[path].dtype == jnp.float32 else 2e-2
      np.testing.assert_allclose(found, share, atol=tolerance, err_msg=path)
      assert (found > 0.0).all() and (found < 1.0 + tolerance).all()


@every_case
def test_orthogonality_error_and_drift_are_those_of_the_bases(name):
  case, run = cases.CASES[name], measure.run(name)
  for t, moves in enumerate(case.moves):
    if moves != 'x':
      continue
    metrics = so.subspace_metrics(run.states[t + 1])
    old, new = measure.bases(run.states[t]), measure.bases(run.states[t + 1])
    learned = case.used[t] == 'old'
    for path, e in cases.projected(name, cases.LEAVES).items():
      p = e.view.bases(old[path])
      q = e.view.bases(new[path])
      of = p if learned else q
      gram = np.swapaxes(of, 1, 2) @ of
      error = np.linalg.norm(gram - np.eye(e.rank), axis=(1, 2))
      if learned:
        drift = np.linalg.norm(q - p, axis=(1, 2)) / np.sqrt(e.rank)
      else:
        chordal = q @ np.swapaxes(q, 1, 2) - p @ np.swapaxes(p, 1, 2)
        drift = np.linalg.norm(chordal, axis=(1, 2)) / np.sqrt(2 * e.rank)
      for key, wanted in (('orthogonality_error', error), ('drift', drift)):
        found = np.ravel(metrics[path][key])
        loose = 2e-2 if case.basis_dtype == jnp.bfloat16 else 1e-3
        np.testing.assert_allclose(
          found, wanted, atol=loose, err_msg=f'{key} of {path} at {t}'
        )


def _inner():
  return so.galore(1e-2, rank=2)


@pytest.mark.parametrize(
  'wrap',
  [
    lambda: optax.chain(optax.clip(9.0), optax.chain(_inner())),
    lambda: optax.MultiSteps(_inner(), 1),
    lambda: optax.apply_if_finite(_inner(), 3),
    lambda: optax.masked(_inner(), {'w': True, 'bias': False}),
    lambda: optax.partition(
      {'a': _inner(), 'b': optax.sgd(0.1)}, {'w': 'a', 'bias': 'b'}
    ),
    lambda: so.project(so.SubspaceSpec(2), projectors.svd(3)),
  ],
  ids=['chain', 'MultiSteps', 'if_finite', 'masked', 'partition', 'project'],
)
def test_found_through_wrappers(wrap):
  tx = wrap()
  state = jax.eval_shape(tx.init, PARAMS)
  _, state = jax.eval_shape(tx.update, PARAMS, state, PARAMS)
  metrics = so.subspace_metrics(state)
  assert {k: set(v) for k, v in metrics.items()} == {'w': NAMES}


def test_found_in_an_nnx_optimizer():
  model = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, _inner(), wrt=nnx.Param)
  gradients = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
  nnx.jit(lambda o, m, g: o.update(m, g))(optimizer, model, gradients)
  metrics = so.subspace_metrics(optimizer.opt_state)
  assert metrics.keys() == {'kernel'}
  for name in NAMES:
    value = metrics['kernel'][name]
    assert np.isfinite(np.asarray(value)).all(), name
  energy = np.asarray(metrics['kernel']['captured_energy'])
  values = np.linalg.svd(gradients['kernel'][...], compute_uv=False)
  wanted = np.sum(values[:2] ** 2) / np.sum(values**2)
  np.testing.assert_allclose(energy, wanted, rtol=1e-5)


def test_of_two_optimizers_both_are_found():
  tx = optax.partition(
    {'a': _inner(), 'b': so.golore(1e-2, rank=2)}, {'w': 'a', 'v': 'b'}
  )
  params = {'w': jnp.ones((8, 12)), 'v': jnp.ones((6, 8))}
  metrics = so.subspace_metrics(jax.eval_shape(tx.init, params))
  assert metrics.keys() == {'w', 'v'}


@pytest.mark.parametrize(
  'state', [(), {}, {'w': jnp.ones(2)}, optax.adam(1e-3).init(PARAMS)]
)
def test_state_without_any_is_a_value_error(state):
  with pytest.raises(ValueError, match='project'):
    so.subspace_metrics(state)


def test_optimizer_with_nothing_projected_has_no_metrics():
  state = so.galore(1e-2, rank=2).init({'bias': jnp.ones(12)})
  assert so.subspace_metrics(state) == {}
