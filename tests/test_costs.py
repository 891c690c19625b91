"""What a step costs by XLA's own count: FLOPs, temporary memory, state bytes.

XLA counts the costliest branch of a `cond`, whether it is taken or not, and
factorisations as nothing. So a step between refreshes is compiled with the
state's integers as constants, a count of 1 and no refresh owed: the predicate
folds and the branch goes, which the test checks. Everything else, gradients,
params, bases and moments, stays an argument.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

M, N, R = 256, 704, 64
SPEC = so.SubspaceSpec(R)


def core(projector, **kwargs):
  return so.subspace(SPEC, projector, optax.scale_by_adam(), **kwargs)


DECAY = {'weight_decay': 0.1}
GALORE = {
  'galore': so.galore(1e-3, R, **DECAY),
  'galore_short': so.galore(1e-3, spec=SPEC, **DECAY),
  'golore': so.golore(1e-3, R, **DECAY),
  'golore_switch': so.golore(1e-3, R, random_from=1000, **DECAY),
  'svd_core': core(so.projectors.svd()),
  'stiefel_core': core(so.projectors.stiefel(), transport='first'),
}
# A residual costs no product with a basis, but with `sign` and error feedback.
RESIDUALS = {
  'fira': (so.fira_adamw(1e-3, R, **DECAY), 4),
  'apollo': (core(so.projectors.gaussian(), residual=so.residuals.apollo()), 2),
  'sign': (core(so.projectors.svd(), residual=so.residuals.sign()), 6),
}
OSD = {
  'osd': so.online_subspace_descent(1e-3, R, **DECAY),
  'osd_sgd': so.online_subspace_descent(
    1e-3, R, basis_optimizer=optax.sgd(5e-3), **DECAY
  ),
  'osd_core': core(so.projectors.online_pca(optax.adam(5e-3))),
}


def compiled(tx, params, apply_updates=False, donate=False, options=None):
  """Compiles a step that does not refresh, as the module's docstring says."""
  state = jax.eval_shape(tx.init, params)
  leaves, treedef = jax.tree.flatten(state)
  is_moment = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
  constant = lambda x: np.full(x.shape, x.dtype == jnp.int32, x.dtype)
  constants = [constant(x) for x in leaves]

  def step(params, moments, grads):
    moments = iter(moments)
    state = treedef.unflatten(
      next(moments) if moving else value
      for moving, value in zip(is_moment, constants, strict=True)
    )
    updates, state = tx.update(grads, state, params)
    if apply_updates:
      updates = optax.apply_updates(params, updates)
    leaves = jax.tree.leaves(state)
    return updates, [x for x, k in zip(leaves, is_moment, strict=True) if k]

  moments = [x for x, k in zip(leaves, is_moment, strict=True) if k]
  step = jax.jit(step, donate_argnums=(0, 1) if donate else ())
  step = step.lower(params, moments, params).compile(options)
  text = step.as_text()
  assert ' conditional(' not in text
  assert 'custom_call_target="lapack' not in text
  return step


def matrices(*shapes):
  return {
    f'w{i}': jax.ShapeDtypeStruct(shape, jnp.float32)
    for i, shape in enumerate(shapes)
  }


@pytest.mark.parametrize(
  'name',
  [
    # The ready-made ones are made of these.
    pytest.param(x, marks=pytest.mark.full if x.endswith('core') else ())
    for x in [*GALORE, *OSD]
  ],
)
def test_flops(name):
  """At most 1.1 times 4mnr for GaLore and GoLore, 6mnr + 8mr^2 for OSD."""
  tx = (GALORE | OSD)[name]
  flops = compiled(tx, matrices((M, N), (N, M))).cost_analysis()['flops']
  floor = 4 * M * N * R if name in GALORE else 6 * M * N * R + 8 * M * R * R
  # Less than the products themselves would mean that XLA's count misses some.
  assert 1 <= flops / (2 * floor) <= 1.1


@pytest.mark.parametrize('name', RESIDUALS)
def test_flops_of_residuals(name):
  tx, products = RESIDUALS[name]
  flops = compiled(tx, matrices((M, N), (N, M))).cost_analysis()['flops']
  # APOLLO's few operations on each element are a tenth of its one product.
  assert 1 <= flops / (2 * products * M * N * R) <= 1.15


@pytest.mark.parametrize('name', ['galore', 'golore', 'osd'])
def test_flops_of_a_stack_are_those_of_its_matrices(name):
  tx = (GALORE | OSD)[name]
  flops = compiled(tx, matrices((3, M, N))).cost_analysis()['flops']
  floor = 4 * M * N * R if name in GALORE else 6 * M * N * R + 8 * M * R * R
  assert 1 <= flops / (3 * floor) <= 1.1


MANY = matrices(*[(M, N), (N, M)] * 2, (2, M, N), (N,))
# Adam on the bases has more to hold than SGD.
MEMORY = [
  *('galore', 'osd'),
  pytest.param('osd_sgd', marks=pytest.mark.full),
  # Between refreshes its step is that of `galore`.
  pytest.param('golore', marks=pytest.mark.full),
]


@pytest.mark.parametrize('name', MEMORY)
def test_temporary_memory_of_an_update(name):
  """At most as much as the updates that it returns."""
  tx = (GALORE | OSD)[name]
  memory = compiled(tx, MANY).memory_analysis()
  assert memory.temp_size_in_bytes <= size(MANY)


# By default XLA's CPU compiler schedules for concurrency, all products first,
# and holds one and a half sets of updates; this is how others schedule.
FOR_MEMORY = {'xla_cpu_scheduler_type': 'CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED'}


@pytest.mark.parametrize('name', MEMORY)
def test_temporary_memory_of_a_step(name):
  """At most one set of updates above params, state and gradients."""
  tx = (GALORE | OSD)[name]
  step = compiled(tx, MANY, True, True, FOR_MEMORY)
  memory = step.memory_analysis()
  kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
  assert kept < 1e-3 * size(MANY)  # Params and state are updated in place.
  assert memory.temp_size_in_bytes + kept <= size(MANY)


def size(tree):
  """Returns the bytes of all arrays."""
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


VIEWS = {'tall': ref.TALL, 'stack': ref.STACK}
SCHEDULE = optax.constant_schedule(1e-3)
ADAM_ON_P, SGD_ON_P = optax.adam(1e-3), optax.sgd(1e-3)
# Bytes of bookkeeping: per matrix a seed and three metrics, 4 each, and 1 for
# every flag; per tree a count of 4 for project, for Adam, for Adam on the bases
# and for every schedule.
PER_MATRIX, COUNT = 16, 4


def small(projector, moment_dtype=None, basis_dtype=jnp.float32, **kwargs):
  spec = so.SubspaceSpec(
    ref.RANK, moment_dtype=moment_dtype, basis_dtype=basis_dtype
  )
  return so.subspace(spec, projector, optax.scale_by_adam(), **kwargs)


STATES = {
  # (optimizer, arrays of the basis's size, flags per matrix, counts)
  'galore': (so.galore(1e-3, ref.RANK), 1, 1, 2),
  'galore_schedule': (so.galore(SCHEDULE, ref.RANK), 1, 1, 3),
  'golore': (so.golore(1e-3, ref.RANK), 1, 1, 2),
  'golore_switch': (so.golore(1e-3, ref.RANK, random_from=9), 1, 2, 2),
  'osd': (so.online_subspace_descent(1e-3, ref.RANK), 3, 0, 3),
  'osd_sgd': (
    so.online_subspace_descent(1e-3, ref.RANK, basis_optimizer=SGD_ON_P),
    1,
    0,
    2,
  ),
  'osd_svd': (small(so.projectors.online_pca(ADAM_ON_P, init='svd')), 3, 1, 3),
}


def expected(params, copies, flags, counts, long=False, basis=4, moment=None):
  """mr per array of the basis's size, 2nr of moments, and bookkeeping."""
  total = COUNT * counts
  for name, x in params.items():
    moment_size = moment or max(x.dtype.itemsize, 4)
    if name not in VIEWS:
      total += 2 * x.size * moment_size
      continue
    v = VIEWS[name]._replace(left=VIEWS[name].left != long)
    per_matrix = (
      copies * v.m * ref.RANK * basis + 2 * v.n * ref.RANK * moment_size
    )
    total += v.count * (per_matrix + PER_MATRIX + flags)
  return total


def params_of(dtype):
  views = VIEWS | {'vec': ref.View((5,), (), (), True)}
  return {k: jax.ShapeDtypeStruct(v.shape, dtype) for k, v in views.items()}


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('name', STATES)
def test_state_bytes(name, dtype):
  tx, copies, flags, counts = STATES[name]
  params = params_of(dtype)
  long = name.startswith('galore')
  report = so.memory_report(tx, params)
  assert report.state == expected(params, copies, flags, counts, long)
  assert report.params == report.gradients == size(params)
  assert report.adam == 2 * size(params) + 4


@pytest.mark.parametrize('dtype', ['parameter', jnp.bfloat16])
def test_state_bytes_in_other_dtypes(dtype):
  tx = small(so.projectors.stiefel(), dtype, jnp.bfloat16)
  params = params_of(jnp.bfloat16)
  found = so.memory_report(tx, params).state
  assert found == expected(params, 1, 1, 2, basis=2, moment=2)


def test_state_bytes_of_a_state_per_matrix():
  """Reset needs a count per matrix and plain leaf in place of Adam's one."""
  tx = small(so.projectors.stiefel(), transport='reset')
  params = params_of(jnp.float32)
  counts = sum(v.count for v in VIEWS.values()) + 1
  found = so.memory_report(tx, params).state
  assert found == expected(params, 1, 1, 1 + counts)


@pytest.mark.parametrize('name', ['galore', 'golore', 'osd'])
def test_reported_bytes_are_those_of_the_arrays(name):
  """At init and after a step."""
  tx = STATES[name][0]
  params = params_of(jnp.float32)
  state = jax.eval_shape(tx.init, params)
  _, after = jax.eval_shape(tx.update, params, state, params)
  for s in (state, after):
    assert so.memory_report(tx, params).state == size(s)
    assert all(x.size for x in jax.tree.leaves(s))
