"""Optimizers on meshes of mixed axis types, and inside of `jax.shard_map`."""

import functools
import itertools

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
import measure
import references as ref
import subspace_optax as so
from subspace_optax import projectors
from subspace_optax import residuals

STEPS = 3
SPEC = so.SubspaceSpec(2)


def ready_made(name, **kwargs):
  if so.optimizers.takes(getattr(so, name), 'update_proj_gap'):
    kwargs = {'update_proj_gap': 2} | kwargs
  return cases.ready_made(name, rank=2)(0.1, **kwargs)


MADE = {name: functools.partial(ready_made, name) for name in cases.READY_MADE}
# Each other place with a branch or a loop.
PIECES = {
  'both, rotated': lambda: so.subspace(
    SPEC,
    projectors.svd(2, 'randomized'),
    optax.scale_by_adam(),
    transport=so.transports.both(0.9, 0.999),
  ),
  'reset, every_k': lambda: so.subspace(
    SPEC,
    projectors.gaussian(1),
    optax.scale_by_adam(),
    transport='reset',
    every_k=2,
  ),
  'error_feedback': lambda: so.subspace(
    SPEC,
    projectors.power_iteration(2),
    optax.ema(0.9),
    residual=residuals.error_feedback(),
  ),
  'int8': lambda: so.subspace(
    so.SubspaceSpec(2, basis_dtype='int8'),
    projectors.svd(2, stagger=True),
    so.scale_by_adam8bit(),
  ),
  'online_pca': lambda: so.subspace(
    SPEC,
    projectors.online_pca(optax.sgd(0.1), init='svd', update_every=2),
    optax.scale_by_adam(),
  ),
  'tracking, lion8bit': lambda: so.subspace(
    SPEC,
    projectors.grassmann_tracking(2),
    so.scale_by_lion8bit(),
    plain=optax.scale_by_lion(),
  ),
  'switch': lambda: so.subspace(
    SPEC,
    projectors.switch(
      {0: projectors.svd(1), 2: projectors.online_pca(optax.sgd(0.1))}
    ),
    optax.scale_by_adam(),
  ),
  'compensated': lambda: optax.chain(
    MADE['golore'](), so.round_updates('compensated')
  ),
}
# Only these run by default. Tracing the others already shows a type that varies
# where it must not, and every collective.
COMPARED = ('golore', 'ldadamw', 'subspace_muon')
# On meshes of one type too, where the steps are compiled again.
SHARDED = ('ldadamw', 'subspace_muon')


def normal(seed, *shape):
  return jnp.asarray(ref.normal(seed, shape), jnp.float32)


def parameters(seed):
  return {
    'w': normal(seed, 8, 12),
    'stack': {'up': normal(seed + 1, 3, 12, 8), 'norm': normal(seed + 2, 3, 8)},
  }


def steps(tx, params, state, seed):
  """Returns what is left after a scan over steps."""

  def one(carry, t):
    params, state = carry
    gradients = jax.tree.map(lambda x: jnp.sin((t + seed) * x), params)
    updates, state = tx.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), None

  ts = jnp.arange(1.0, STEPS + 1)
  return lax.scan(one, (params, state), ts)[0]


SEEDS = jnp.array([1.0, 2.0])


def starts_of(name):
  """One optimizer has a stack and a matrix, others the stack."""
  starts = [parameters(0), parameters(7)]
  if name == 'golore':
    return starts
  return [{'stack': start['stack']} for start in starts]


@functools.cache
def ends_alone(name):
  """Returns what is left of each replica after the steps."""
  tx = (MADE | PIECES)[name]()

  @cases.jit
  def alone(params, seed):
    return steps(tx, params, tx.init(params), seed)

  return [*map(alone, starts_of(name), SEEDS)]


def replicas_of(name):
  """Returns steps of two replicas that differ, one a device."""
  tx = (MADE | PIECES)[name]()
  mesh = jax.make_mesh((2,), ('replica',), axis_types=(AxisType.Auto,))

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=P('replica'),
    out_specs=P('replica'),
  )
  def replicas(params, seeds):
    params = jax.tree.map(lambda x: x[0], params)
    left = steps(tx, params, tx.init(params), seeds[0])
    return jax.tree.map(lambda x: x[None], left)

  return replicas, jax.tree.map(lambda *x: jnp.stack(x), *starts_of(name))


@pytest.mark.parametrize(
  'name', [x for x in MADE | PIECES if x not in COMPARED]
)
def test_nothing_crosses_devices(name):
  """Nor does a branch or a loop mix what varies with what does not."""
  replicas, both = replicas_of(name)
  traced = jax.make_jaxpr(replicas)(both, SEEDS)
  axes = {
    (eqn.primitive.name, str(axis))
    for eqn, _ in measure.equations(traced.jaxpr)
    for key in ('axes', 'axis_name')
    for axis in np.atleast_1d(eqn.params.get(key, ()))
    if eqn.primitive.name not in ('pvary', 'pcast')
  }
  assert not {x for x in axes if x[1] == 'replica'}


@pytest.mark.parametrize(
  'name',
  grid.only(MADE | PIECES, COMPARED),
)
def test_every_device_has_a_state_of_its_own(name):
  """The replicas take the steps that each would take alone."""
  replicas, both = replicas_of(name)
  replicas = cases.jit(replicas)
  found = replicas(both, SEEDS)
  for i, wanted in enumerate(ends_alone(name)):
    for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
      close = np.testing.assert_allclose
      if jnp.issubdtype(x.dtype, jnp.integer):
        close(x[i].astype(jnp.int32), y.astype(jnp.int32), atol=1)
      else:
        close(x[i], y, rtol=1e-4, atol=1e-4)


def test_every_device_has_subproblems_of_its_own():
  rso = so.rso.subproblems(
    so.SubspaceSpec(2, side='in'), optax.adam(0.1), update_proj_gap=2
  )
  mesh = jax.make_mesh((2,), ('replica',), axis_types=(AxisType.Auto,))
  step = rso.step(lambda p, x: jnp.mean((so.rso.dot(x, p['w']) - 1.0) ** 2))

  def train(w, x):
    params = {'w': w}
    state = rso.init(params)
    values = []
    for _ in range(STEPS):
      params, state, value = step(params, state, x)
      values.append(value)
    return params['w'], state.coords['w'], jnp.stack(values)

  @cases.jit
  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=P('replica'), out_specs=P('replica')
  )
  def replicas(*args):
    left = train(*(x[0] for x in args))
    return jax.tree.map(lambda x: x[None], left)

  ws, xs = normal(0, 2, 8, 12), normal(1, 2, 4, 8)
  found, alone = replicas(ws, xs), cases.jit(train)
  for i in range(2):
    for x, y in zip(found, alone(ws[i], xs[i]), strict=True):
      np.testing.assert_allclose(x[i], y, rtol=1e-4, atol=1e-4)


def test_state_that_has_lost_its_explicit_axes():
  """Of a stack, said before anything is compiled."""
  mesh = jax.make_mesh((4,), ('x',), axis_types=(AxisType.Explicit,))
  tx = so.golore(0.1, rank=4)
  with jax.set_mesh(mesh):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params = {'stack': put(normal(0, 4, 8, 16), P('x'))}
    at = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    shapes = jax.eval_shape(tx.init, params)
    state = jax.tree.map(lambda x: at(x, NamedSharding(mesh, P())), shapes)
    with pytest.raises(ValueError, match=r"'stack' .* axis 0 .*\('x',\)"):
      jax.eval_shape(tx.update, params, state, params)
    state = jax.tree.map(at, shapes, so.state_sharding(tx, params))
    jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize(
  'name, kind',
  grid.cover(SHARDED, [AxisType.Auto, AxisType.Explicit], of=2),
)
def test_replicas_whose_parameters_are_sharded(name, kind):
  """One axis is manual, the other one is left to the compiler or explicit."""
  tx = MADE[name]()
  mesh = jax.make_mesh((2, 2), ('replica', 'fsdp'), axis_types=(kind,) * 2)
  specs = {
    'w': P('replica', None, 'fsdp'),
    'stack': {
      'up': P('replica', None, 'fsdp', None),
      'norm': P('replica', None, None),
    },
  }
  both = jax.tree.map(lambda *x: jnp.stack(x), *starts_of(name))
  replicas = functools.partial(
    jax.shard_map, out_specs=P('replica'), axis_names={'replica'}
  )

  squeeze = lambda tree: jax.tree.map(lambda x: jnp.squeeze(x, 0), tree)

  def update(params, state, seeds):
    left = steps(tx, *squeeze((params, state, seeds)))
    return jax.tree.map(lambda x: x[None], left[0])

  def init(params):
    return jax.tree.map(lambda x: x[None], tx.init(squeeze(params)))

  with jax.set_mesh(mesh):
    params = jax.tree.map(
      lambda x, s: jax.device_put(x, NamedSharding(mesh, s)),
      both,
      {key: specs[key] for key in both},
    )
    state = cases.jit(replicas(init, in_specs=P('replica')))(params)
    seeds = jax.device_put(SEEDS, NamedSharding(mesh, P('replica')))
    step = cases.jit(replicas(update, in_specs=P('replica')))
    found = jax.device_get(step(params, state, seeds))
  for i, (wanted, _) in enumerate(ends_alone(name)):
    for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
      np.testing.assert_allclose(x[i], y, rtol=1e-4, atol=1e-4)


E, A = AxisType.Explicit, AxisType.Auto
MIXED = {
  'layers': ((E,), P('x', None, None)),
  'layers and rows': ((E, E), P('x', 'y', None)),
  'layers over both': ((E, E), P(('x', 'y'), None, None)),
  'explicit layers beside auto': ((E, A), P('x', None, None)),
  'explicit columns beside auto': ((E, A), P(None, None, 'x')),
  'explicit rows beside auto': ((A, E), P(None, 'y', None)),
  'auto rows beside explicit layers': ((E, A), P('x', 'y')),
}


def stacked(seed):
  return {'w': normal(seed, 4, 8, 12), 'bias': normal(seed, 12)}


def updates_of(name, state, params, gradients):
  """Returns those of some steps, and how many programs ran."""
  update, found = cases.jit(MADE[name]().update), []
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    found.append(np.asarray(updates['w']))
  return found, update._cache_size()


@functools.cache
def wanted(name):
  """The first state, and updates on one device, or one mesh for other SVDs."""
  params, *gradients = map(stacked, (9, *range(STEPS)))
  first = cases.jit(MADE[name]().init)(params)
  if name not in ('galore', 'fira_adamw'):
    return first, updates_of(name, first, params, gradients)[0]
  # These find singular vectors in another way where a gradient is sharded.
  return first, on_mesh(name, first, (E,), P(None, None, 'x'))[0]


def put_on(kinds, spec):
  """Returns a mesh, and params and gradients that are placed there."""
  names = ('x', 'y')[: len(kinds)]
  mesh = jax.make_mesh((4 // len(kinds),) * len(kinds), names, axis_types=kinds)
  place = {'w': NamedSharding(mesh, spec), 'bias': NamedSharding(mesh, P(None))}
  put = lambda seed: jax.device_put(stacked(seed), place)
  return mesh, put(9), [*map(put, range(STEPS))]


def on_mesh(name, first, kinds, spec):
  mesh, params, gradients = put_on(kinds, spec)
  with jax.set_mesh(mesh):
    state = jax.device_put(first, so.state_sharding(MADE[name](), params))
    return updates_of(name, state, params, gradients)


# One optimizer on every mesh: bases of any kind, and two that see whole
# matrices. All of them on meshes of one type: tests/test_sharding.py.
ON_MIXED = {
  'golore': 'auto rows beside explicit layers',
  'online_subspace_descent': 'explicit rows beside auto',
  'apollo_adamw': 'explicit columns beside auto',
  'subspace_muon': 'layers and rows',
}
# Where all axes are explicit, that is decided once a step is traced.
TRACED = [
  ('galore', 'layers'),
  ('ldadamw', 'layers over both'),
  ('fira_adamw', 'explicit layers beside auto'),
  ('switch', 'explicit columns beside auto'),
]


@pytest.mark.parametrize(
  'name, mixed',
  [
    pytest.param(
      *point, marks=() if point in ON_MIXED.items() else pytest.mark.full
    )
    for point in itertools.product(MADE, MIXED)
  ],
)
def test_steps_on_meshes_of_mixed_types(name, mixed):
  """Steps are those on one device, and the state's types stay."""
  first, updates = wanted(name)
  found, programs = on_mesh(name, first, *MIXED[mixed])
  assert programs == 1
  np.testing.assert_allclose(found, updates, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name, mixed', TRACED)
def test_types_stay_on_meshes_of_mixed_types(name, mixed):
  tx = (MADE | PIECES)[name]()
  spelled = functools.partial(
    jax.tree.map, lambda x: (str(jax.typeof(x)), jax.typeof(x).sharding.spec)
  )

  def check(params):
    state = tx.init(params)
    updates, after = tx.update(params, state, params)
    assert spelled(after) == spelled(state)
    assert spelled(updates) == spelled(params)

  mesh, params, _ = put_on(*MIXED[mixed])
  with jax.set_mesh(mesh):
    jax.eval_shape(check, params)


def test_state_sharding_on_a_mesh_of_mixed_types():
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(E, A))
  w = jax.device_put(normal(0, 4, 8, 16), NamedSharding(mesh, P('x')))
  tx = so.golore(0.1, rank=4)
  with jax.set_mesh(mesh):
    state, places = tx.init({'w': w}), so.state_sharding(tx, {'w': w})
  for x, place in zip(*map(jax.tree.leaves, (state, places)), strict=True):
    assert x.sharding.is_equivalent_to(place, x.ndim)
