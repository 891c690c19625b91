"""`memory_report`: the bytes of the arrays themselves, and the formulas'."""

from flax.core import meta
import jax
import jax.numpy as jnp
import optax
import pytest

import cases
import measure
import subspace_optax as so


def _nbytes(tree):
  return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize('name', cases.CASES)
def test_state_is_counted_exactly_and_by_formula(name):
  tx = cases.CASES[name].make(cases.SMALL)
  params = cases.tree(cases.SMALL)
  report = so.memory_report(tx, params)
  assert report.params == report.gradients == _nbytes(params)
  assert report.adam == _nbytes(optax.adam(1.0).init(params))
  assert report.state == _nbytes(measure.small(name).init()[1])
  assert report.state == cases.state_bytes(name, cases.SMALL)
  # The tree of every layout, and of bfloat16.
  tx = cases.CASES[name].make(cases.LEAVES)
  shapes = jax.eval_shape(lambda: cases.tree(cases.LEAVES))
  report = so.memory_report(tx, shapes)
  assert report.state == cases.state_bytes(name, cases.LEAVES)
  assert report.state < report.adam + 17 * 20


@pytest.mark.parametrize(
  'factory, per_matrix',
  [
    # m the short side 64, n the long one 256, r 8.
    (so.golore, 64 * 8 + 2 * 8 * 256),
    (so.online_subspace_descent, 3 * 64 * 8 + 2 * 8 * 256),
    # The basis spans the long side.
    (so.galore, 256 * 8 + 2 * 8 * 64),
  ],
)
@pytest.mark.parametrize('layers', [1, 5])
def test_readme_formulas(factory, per_matrix, layers):
  params = {'w': jax.ShapeDtypeStruct((layers, 64, 256), jnp.float32)}
  report = so.memory_report(factory(1e-3, rank=8), params)
  assert report.adam == 2 * 4 * layers * 64 * 256 + 4
  assert report.params == report.gradients == 4 * layers * 64 * 256
  # Seed, metrics and flags, at most 20 bytes a matrix, and three counters.
  assert 0 <= report.state - 4 * layers * per_matrix <= 20 * layers + 12


def test_basis_and_moment_dtypes_are_counted():
  params = {'w': jax.ShapeDtypeStruct((64, 256), jnp.float32)}
  state = lambda **kwargs: (
    so.memory_report(
      so.golore(1e-3, spec=so.SubspaceSpec(8, **kwargs)), params
    ).state
  )
  whole = state()
  assert whole - state(basis_dtype=jnp.bfloat16) == 2 * 64 * 8
  assert whole - state(moment_dtype=jnp.bfloat16) == 2 * 2 * 8 * 256


def test_any_optimizer_and_boxed_parameters_are_counted():
  params = {'w': jnp.ones((8, 12)), 'b': jnp.ones(12, jnp.bfloat16)}
  boxed = jax.tree.map(lambda x: meta.Partitioned(x, (None,) * x.ndim), params)
  for tx in (optax.sgd(0.1, momentum=0.9), so.galore(1e-3, rank=2)):
    report = so.memory_report(tx, boxed)
    assert report == so.memory_report(tx, params)
    assert report.state == _nbytes(tx.init(params))
    assert report.params == 8 * 12 * 4 + 12 * 2


def test_nothing_is_allocated_and_it_reads_well():
  # Eighty terabytes.
  params = {'w': jax.ShapeDtypeStruct((50, 640_000, 640_000), jnp.float32)}
  report = so.memory_report(so.golore(1e-3, rank=128), params)
  assert report.params == 4 * 50 * 640_000**2
  text = str(report)
  for word in ('params', 'gradients', 'state', 'adam', 'GiB'):
    assert word in text
  ratio = report.state / report.adam
  assert f'{ratio:.3f}' in text


def test_gradients_of_coordinates():
  params = {'w': jnp.zeros((8, 24), jnp.bfloat16), 'bias': jnp.zeros(24)}
  of_coords = 4 * 2 * 24 + 4 * 24  # float32
  tx = so.golore(1e-3, rank=2)
  assert so.memory_report(tx, params).gradients == 2 * 8 * 24 + 4 * 24
  report = so.memory_report(so.rso.compressed_step(jnp.sum, tx), params)
  assert report.gradients == of_coords
  rso = so.rso.subproblems(so.SubspaceSpec(2, side='in'), optax.adam(1e-3))
  report = so.memory_report(rso, params)
  assert report.gradients == of_coords
  # B and two moments of each matrix, counters and seeds.
  assert report.state - 3 * 4 * 2 * 24 - 2 * 4 * 24 < 32
