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
  assert report.state == sum(report[4:]) and min(report) >= 0
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


PARAMS = {
  'embed': jnp.zeros((100, 64)),
  'mlp': {'up': jnp.zeros((3, 64, 96)), 'bias': jnp.zeros((3, 96))},
}
UP, REST = ['up'], ['embed', 'bias']


def _of(tree, names):
  """Bytes of the arrays of a tree like the parameters that have these names."""
  pairs = jax.tree.leaves_with_path(tree)
  last = lambda path: getattr(path[-1], 'key', None)  # no field of a state
  return sum(x.nbytes for path, x in pairs if last(path) in names)


def _galore8bit(state):
  (project, inner, *_), *_ = state
  assert project.subspaces.basis['mlp']['up'].shape == (3, 96, 8)
  coded = inner.inner
  trees = [coded.coded.mu, coded.coded.nu, *coded.scales.values()]
  return {
    'bases': _nbytes((project.subspaces.basis, project.projector)),
    'moments': sum(_of(tree, UP) for tree in trees),
    'residual': 0,
    'plain': sum(_of(tree, REST) for tree in trees),
  }


def _subspace_muon(state):
  (project, inner, left), *_ = state
  both = inner.inner
  assert project.subspaces.basis == ()  # drawn at every step
  return {
    'bases': _nbytes(project.projector),
    'moments': _of(both.projected, UP),
    'residual': _nbytes(left.residual),
    'plain': _of(both.plain, REST),
  }


def _fira(state):
  (project, inner, left), *_ = state
  adam = inner.inner
  return {
    'bases': _nbytes((project.subspaces.basis, project.projector)),
    'moments': _of((adam.mu, adam.nu), UP),
    'residual': _nbytes(left.residual),
    'plain': _of((adam.mu, adam.nu), REST),
  }


@pytest.mark.parametrize(
  'tx, count',
  [
    (so.galore(1e-3, rank=8, moment_bits=8), _galore8bit),
    (so.subspace_muon(1e-3, rank=8), _subspace_muon),
    (so.fira_adamw(1e-3, rank=8), _fira),
  ],
  ids=['galore8bit', 'subspace_muon', 'fira'],
)
def test_each_part_is_that_of_its_fields(tx, count):
  state = tx.init(PARAMS)
  wanted = count(state)
  report = so.memory_report(tx, PARAMS)
  found = report._asdict()
  assert {name: found[name] for name in wanted} == wanted
  assert wanted['moments'] > 1000 and wanted['plain'] > 10_000
  assert report.counters == _nbytes(state) - sum(wanted.values())
  # Four numbers for each of the three matrices, and counters of steps.
  assert 0 < report.counters <= 4 * (4 * 3 + 8)
  lines = {line.split()[0]: line for line in str(report).splitlines()}
  for name, size in wanted.items():
    assert (name in lines) == bool(size)
  assert max(map(len, lines.values())) < 80


def test_parts_of_whole_optimizers_steps_and_sums():
  part = lambda tx: so.memory_report(tx, PARAMS)._asdict()
  adam = part(optax.adam(1e-3))
  assert adam['plain'] == 2 * _nbytes(PARAMS) and adam['counters'] == 4
  rso = part(
    so.rso.subproblems(so.SubspaceSpec(8, side='in'), optax.adam(1e-3))
  )
  coords = 3 * 4 * 3 * 8 * 96  # B and two moments
  assert rso['moments'] == coords and rso['bases'] == 0
  assert rso['plain'] == 2 * _of(PARAMS, REST)
  one, many = (part(so.galore(1e-3, rank=8, every_k=k)) for k in (1, 4))
  assert many['moments'] * 2 == one['moments'] * 3
  assert many['plain'] * 2 == one['plain'] * 3


def test_parts_of_a_layerwise_step():
  params = {
    'blocks': {'w': jnp.zeros((4, 32, 64)), 'bias': jnp.zeros((4, 64))},
    'embed': jnp.zeros((50, 32)),
  }
  tx = so.golore(1e-3, rank=4)
  step = so.layerwise(
    tx,
    embed=lambda rest, x: rest['embed'][x],
    block=lambda layer, x, _: x,
    head=lambda rest, x, _: jnp.mean(x),
  )
  one, other = (so.memory_report(x, params)._asdict() for x in (tx, step))
  for name in ('moments', 'plain'):
    assert other[name] == one[name] > 0
  assert other['state'] == sum([*other.values()][4:])
