"""The battery on numbers: precision of the small algebra, dtypes of all."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import grid
import measure
import subspace_optax as so
from subspace_optax import projectors

every_case = pytest.mark.parametrize('name', cases.CASES)


@every_case
def test_small_algebra_runs_in_float32_at_highest_precision(name):
  # The gradients' two sides, 10 and 14, appear in no other shape.
  leaves = {'w': cases.Leaf((2, 10, 14), jnp.bfloat16, (1,), (2,))}
  tx = cases.CASES[name].make(leaves)
  params = jax.eval_shape(lambda: cases.tree(leaves))
  state = jax.eval_shape(tx.init, params)
  jaxpr = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
  whole = lambda var: {10, 14} <= set(var.aval.shape)
  checked = 0
  for eqn, _ in measure.equations(jaxpr):
    kind = eqn.primitive.name
    if kind in (*measure.FACTORISATIONS, 'triangular_solve'):
      assert all(v.aval.dtype == jnp.float32 for v in eqn.invars), kind
      checked += 1
    if kind != 'dot_general' or any(map(whole, (*eqn.invars, *eqn.outvars))):
      continue
    # Moments of another dtype are widened by the product itself.
    assert any(v.aval.dtype == jnp.float32 for v in eqn.invars)
    assert eqn.outvars[0].aval.dtype == jnp.float32
    precision = eqn.params['precision']
    assert precision is not None, eqn
    assert set(precision) == {lax.Precision.HIGHEST}, eqn
    checked += 1
  assert checked


def _as(tree, dtype):
  shapes = lambda x: jax.ShapeDtypeStruct(x.shape, dtype)
  return jax.tree.map(shapes, tree)


# Of parameters and of gradients.
DTYPES = [
  ('float32', 'bfloat16'),
  ('bfloat16', 'float32'),
  ('bfloat16', 'bfloat16'),
  ('float16', 'float16'),
  ('float64', 'float64'),
  ('float64', 'float32'),
]


@pytest.mark.parametrize(
  'name, dtypes', grid.cover(cases.CASES, DTYPES, of=6), ids=str
)
def test_any_dtypes_of_parameters_and_gradients(name, dtypes):
  of_params, of_gradients = dtypes
  case = cases.CASES[name]
  tx = case.make(cases.SMALL)
  with jax.enable_x64('float64' in (of_params, of_gradients)):
    params = _as(cases.tree(cases.SMALL), of_params)
    gradients = _as(cases.tree(cases.SMALL), of_gradients)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    found = {x.dtype.name for x in jax.tree.leaves(updates)}
    assert found == {of_gradients}
    assert measure.types(after) == measure.types(state)
    assert measure.bases(state)['up'].dtype == case.basis_dtype


def test_float64_loses_nothing_to_bases_of_float32():
  """P P^T G and W + P B in float64, for the P that is stored."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    w, g = (jnp.asarray(rng.standard_normal((2, 8, 12))) for _ in range(2))
    tx = so.subspace(so.SubspaceSpec(3), projectors.svd(1), optax.identity())
    update, state = jax.jit(tx.update)({'w': g}, jax.jit(tx.init)({'w': w}))
    p = measure.bases(state)['w']
    assert p.dtype == jnp.float32
    kept = measure.project_state(state).subspaces
    for values in (kept.captured_energy, kept.orthogonality_error, kept.drift):
      assert values['w'].dtype == jnp.float32
    p = np.asarray(p, np.float64)
    wanted = p @ (np.swapaxes(p, 1, 2) @ np.asarray(g))
    np.testing.assert_allclose(update['w'], wanted, rtol=1e-12, atol=1e-13)

    rso = so.rso.subproblems(so.SubspaceSpec(3, side='in'), optax.sgd(1.0))
    state = jax.jit(rso.init)({'w': w})
    p = np.asarray(jax.jit(rso.bases)({'w': w}, state)['w'], np.float64)
    b = rng.standard_normal((2, 3, 12))
    state = state._replace(coords={'w': jnp.asarray(b)})
    merged = jax.jit(rso.merged)({'w': w}, state)
    np.testing.assert_allclose(merged['w'], w + p @ b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize('transport', ['keep', 'first', 'reset'])
def test_dtypes_of_basis_and_moments_are_their_own(transport):
  spec = so.SubspaceSpec(3, basis_dtype=jnp.bfloat16, moment_dtype=jnp.float16)
  tx = so.subspace(
    spec, projectors.svd(2), optax.scale_by_adam(), transport=transport
  )
  params = cases.tree(cases.SMALL)
  small = measure.compiled(tx)
  _, state, updates = small.run([params] * 3)[-1]
  assert measure.types(state) == measure.types(small.init()[1])
  moments = [x for x in jax.tree.leaves(state) if x.shape == (3, 3, 12)]
  assert [x.dtype for x in moments] == [jnp.float16] * 2
  assert measure.bases(state)['up'].dtype == jnp.bfloat16
  for x in jax.tree.leaves(updates):
    assert x.dtype == jnp.float32
    assert np.isfinite(np.asarray(x)).all()
  p = np.asarray(measure.bases(state)['up'], np.float32)
  eye = np.broadcast_to(np.eye(3), (3, 3, 3))
  np.testing.assert_allclose(np.swapaxes(p, 1, 2) @ p, eye, atol=2e-2)


# Random bases hardly see a gradient.
@pytest.mark.parametrize(
  'name',
  ['galore', pytest.param('golore_late', marks=pytest.mark.full), 'online'],
)
def test_gradients_of_half_precision_give_nearly_the_same_steps(name):
  small = measure.small(name)
  gradients = [cases.tree(cases.SMALL, 90 + t) for t in range(5)]
  # The same numbers, since bfloat16 rounds once only.
  half = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), g) for g in gradients]
  rounded = [jax.tree.map(lambda x: x.astype(jnp.float32), g) for g in half]
  wanted = small.run(rounded)
  got = measure.compiled(small.tx).run(half)
  for (params, state, _), (wanted_params, wanted_state, _) in zip(
    got, wanted, strict=True
  ):
    p = np.asarray(measure.bases(state)['up'])
    q = np.asarray(measure.bases(wanted_state)['up'])
    # Random and learned bases hardly notice; singular vectors come from the
    # same numbers.
    np.testing.assert_allclose(p, q, atol=2e-2)
    measure.assert_trees_close(params, wanted_params, atol=2e-2)
