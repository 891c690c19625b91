"""`quantize_moments`: any optimizer whose moments are registered, in 8 bits."""

from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import optax.contrib
import pytest

import cases
import errors
import grid
import subspace_optax as so

PARAMS = {'w': jnp.zeros((64, 128)), 'bias': jnp.zeros(128)}
INNERS = {
  'adam': optax.scale_by_adam(),
  'trace': optax.trace(0.9),
  'rms': optax.scale_by_rms(0.9),
  'belief': optax.scale_by_belief(),
  'ema': optax.ema(0.9),
  'chain': optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.ema(0.5)),
  'injected': optax.inject_hyperparams(optax.scale_by_adam)(b1=0.8),
  'adamw': optax.adamw(0.1, weight_decay=0.1),
}


def normal(t: int) -> Any:
  rng = np.random.default_rng(t)
  shapes = {'w': (64, 128), 'bias': (128,)}
  return {k: np.float32(rng.standard_normal(x)) for k, x in shapes.items()}


def run(tx: Any, params: Any = PARAMS) -> tuple[Any, Any]:
  """Returns the last updates and the state after six steps."""
  state, update = tx.init(params), cases.jit(tx.update)
  for t in range(6):
    gradients = {k: normal(t)[k] for k in params}
    updates, state = update(gradients, state, params)
  assert update._cache_size() == 1
  return updates, state


# Wrapped ones are those of which they are made.
@pytest.mark.parametrize(
  'name',
  grid.but(INNERS, ('ema', 'adamw')),
)
def test_steps_are_nearly_those_of_the_optimizer(name):
  """Moments within a code of 4 %, and no float matrix left in the state."""
  inner = INNERS[name]
  updates, state = run(so.quantize_moments(inner))
  wanted, own = run(inner)
  np.testing.assert_allclose(updates['bias'], wanted['bias'], rtol=1e-5)
  error = np.linalg.norm(updates['w'] - wanted['w'])
  assert error < 0.06 * np.linalg.norm(wanted['w'])
  kinds = {x.dtype.name for x in jax.tree.leaves(state) if x.size == 64 * 128}
  assert kinds and kinds <= {'int8', 'uint8'}
  sizes = [sum(x.nbytes for x in jax.tree.leaves(s)) for s in (state, own)]
  assert sizes[0] < 0.4 * sizes[1]


def muon_of(**kwargs: Any) -> optax.GradientTransformation:
  axes = {'w': optax.contrib.MuonDimensionNumbers()}
  return optax.contrib.scale_by_muon(weight_dimension_numbers=axes, **kwargs)


def test_adam_lion_and_muon_in_8_bits_are_it():
  for named, inner in (
    (so.scale_by_adam8bit(0.8, 0.9, seed=3), optax.scale_by_adam(0.8, 0.9)),
    (so.scale_by_lion8bit(0.8, 0.9, seed=3), optax.scale_by_lion(0.8, 0.9)),
  ):
    found = run(named), run(so.quantize_moments(inner, seed=3))
    jax.tree.map(np.testing.assert_array_equal, *found)
  matrix, spec = {'w': PARAMS['w']}, so.SubspaceSpec(1, seed=3)
  muon = so.scale_by_normuon(spec, b=0.9, b2=None)
  found = [
    run(tx, matrix)
    for tx in (
      so.scale_by_muon8bit(spec, b=0.9),
      so.quantize_moments(muon, seed=3),
    )
  ]
  jax.tree.map(np.testing.assert_array_equal, *found)


def test_muon_in_8_bits_is_for_matrices():
  with errors.raises(ValueError, "'bias'", '(128,)', 'optax.partition'):
    so.scale_by_muon8bit().init(PARAMS)
  masked = optax.masked(so.scale_by_muon8bit(), {'w': True, 'bias': False})
  updates, _ = run(masked)
  assert np.isfinite(updates['w']).all()


def test_muon_in_8_bits_is_nearly_muon():
  """Of momentum within a code's 4 %, singular values as far from 1 as ever."""
  matrix = {'w': PARAMS['w']}
  updates, state = run(so.scale_by_muon8bit(), matrix)
  wanted, own = run(muon_of(), matrix)
  assert state.coded.trace['w'].dtype == jnp.int8
  inputs, outputs = PARAMS['w'].shape
  wanted = max(1, outputs / inputs) ** 0.5 * wanted['w']
  error = np.linalg.norm(updates['w'] - wanted)
  assert error < 0.1 * np.linalg.norm(wanted)
  bytes_of = lambda s: sum(x.nbytes for x in jax.tree.leaves(s))
  assert bytes_of(state) < 0.27 * bytes_of(own)


def test_in_a_subspace_moments_are_carried_along():
  tx = so.subspace(
    so.SubspaceSpec(48, only_if_smaller=False),
    so.projectors.stiefel(2),
    so.quantize_moments(optax.scale_by_rms(0.9)),
    transport=so.transports.both(0.9, 0.9),
  )
  updates, state = run(tx)
  assert state[1].inner.coded.nu['w'].dtype == jnp.uint8
  assert np.isfinite(updates['w']).all()


class Unheard(NamedTuple):
  velocity: Any


def test_moments_that_nobody_registered():
  inner = optax.GradientTransformation(
    lambda p: Unheard(jax.tree.map(jnp.zeros_like, p)), lambda g, s, p: (g, s)
  )
  with errors.raises(ValueError, 'quantize_moments', 'Unheard', 'register_mom'):
    so.quantize_moments(inner).init(PARAMS)
  with errors.raises(ValueError, 'quantize_moments finds no moments'):
    so.quantize_moments(optax.identity()).init(PARAMS)


@pytest.mark.parametrize('bits', [0, 16, 32, '8'])
def test_other_bits(bits):
  with errors.raises(ValueError, 'bits', repr(bits)):
    so.quantize_moments(optax.scale_by_adam(), bits)


def test_what_is_no_optimizer():
  with errors.raises(TypeError, 'inner', 'optax optimizer'):
    so.quantize_moments(optax.scale_by_adam)


@pytest.mark.parametrize(
  'inner', [optax.scale_by_rms(initial_scale=1.0), optax.scale_by_yogi()]
)
def test_moments_that_do_not_start_at_zero(inner):
  with errors.raises(ValueError, 'must start at zero'):
    so.quantize_moments(inner).init(PARAMS)


class Averaged(NamedTuple):
  mu: Any
  z: Any


class Counted(NamedTuple):
  mu: Any
  seen: Any


def test_other_arrays_of_the_parameters_shapes():
  zeros = lambda p: jax.tree.map(jnp.zeros_like, p)
  so.register_moments(Averaged, ['mu'])
  so.register_moments(Counted, ['mu'])
  count = lambda p: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), p)
  for init in (
    lambda p: Averaged(zeros(p), p),
    lambda p: Counted(zeros(p), count(p)),
  ):
    inner = optax.GradientTransformation(init, lambda g, s, p: (g, s))
    with errors.raises(ValueError, 'no registered moment names'):
      so.quantize_moments(inner).init(PARAMS)


@pytest.mark.parametrize(
  'inner',
  [
    optax.masked(optax.scale_by_adam(), {'w': True, 'bias': False}),
    optax.partition(
      {'a': optax.scale_by_adam(), 'b': optax.trace(0.9)},
      {'w': 'a', 'bias': 'b'},
    ),
    optax.MultiSteps(optax.scale_by_adam(), 2).gradient_transformation(),
  ],
  ids=['masked', 'partition', 'MultiSteps'],
)
def test_optimizers_that_hide_leaves_or_wait(inner):
  updates, state = run(so.quantize_moments(inner))
  wanted, _ = run(inner)
  np.testing.assert_allclose(updates['bias'], wanted['bias'], rtol=1e-5)
  error = np.linalg.norm(updates['w'] - wanted['w'])
  assert error < 0.06 * np.linalg.norm(wanted['w'])


def test_optimizers_that_read_params_in_boxes():
  tx = so.quantize_moments(optax.adamw(0.1, weight_decay=0.1))
  box = lambda x: nn.Partitioned(x, (None,) * x.ndim)
  params = jax.tree.map(lambda x: x + 1.0, PARAMS)
  boxed = jax.tree.map(box, params)
  update = cases.jit(tx.update)
  found, _ = update(jax.tree.map(box, normal(0)), tx.init(boxed), boxed)
  wanted, _ = update(normal(0), tx.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, nn.unbox(found), wanted)


def test_what_has_its_moments_in_8_bits_already():
  with errors.raises(ValueError, 'already'):
    so.quantize_moments(so.scale_by_adam8bit()).init(PARAMS)


@pytest.mark.parametrize('inner', [so.scale_by_adam8bit(), optax.identity()])
def test_moment_bits_of_what_has_none_in_32(inner):
  updates = []
  for bits in (8, 32):
    tx = so.golore(0.1, 48, inner=inner, moment_bits=bits)
    update = cases.jit(tx.update)
    updates.append(update(normal(0), tx.init(PARAMS), PARAMS)[0])
  jax.tree.map(np.testing.assert_array_equal, *updates)


def test_a_state_of_32_bits():
  inner = optax.scale_by_adam()
  with errors.raises(ValueError, 'ScaleByAdamState', '8 bits'):
    so.quantize_moments(inner).update(normal(0), inner.init(PARAMS), PARAMS)


def test_bits_that_are_traced():
  tx = optax.inject_hyperparams(so.quantize_moments)(optax.scale_by_adam())
  with errors.raises(TypeError, 'bits must be static', 'static_args'):
    jax.eval_shape(tx.init, PARAMS)


def test_moment_bits_of_an_optimizer_of_certain_trees():
  """Nothing is known of it before `init`, which must not fail."""
  inner = optax.masked(optax.scale_by_adam(), {'w': True, 'bias': False})
  tx = so.golore(0.1, 48, inner=inner, moment_bits=8)
  dtypes = {x.dtype for x in jax.tree.leaves(tx.init(PARAMS))}
  assert jnp.dtype('int8') in dtypes


def test_optimizers_are_made_without_arrays():
  """A program may build its optimizer before it starts its devices."""
  seen = []

  def init(params):
    seen.append(jax.tree.leaves(params))
    return optax.scale_by_adam().init(params)

  inner = optax.GradientTransformation(init, optax.scale_by_adam().update)
  so.golore(0.1, 8, inner=inner, moment_bits=8)
  (leaves,) = seen
  assert all(isinstance(x, jax.core.Tracer) for x in leaves)


class Odd(NamedTuple):
  mu: Any
  n: Any


def test_moments_in_numpy_and_numbers_of_python():
  so.register_moments(Odd, ['mu'])
  zeros = lambda p: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), p)
  made = lambda init: optax.GradientTransformation(init, lambda g, s, p: (g, s))
  inner = made(lambda p: Odd(zeros(p), 0))
  for init in (jax.jit, lambda f: f):
    state = init(so.quantize_moments(inner).init)(PARAMS)
    assert state.coded.mu['w'].dtype == jnp.int8
  spec = so.SubspaceSpec(4, only_if_smaller=False)
  tx = so.subspace(spec, so.projectors.stiefel(2), inner, transport='first')
  cases.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
  copied = made(lambda p: Odd(p, jnp.zeros(())))
  with errors.raises(ValueError, "'mu'", 'must start at zero'):
    so.quantize_moments(copied).init(PARAMS)


def test_whole_moments_are_never_in_memory_at_init():
  """Nor where an optimizer has other arrays, whose values are needed."""
  params = {'w': jnp.zeros((2048, 2048))}
  inner = optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(abs))
  init = so.quantize_moments(inner).init
  memory = jax.jit(init).lower(params).compile().memory_analysis()
  assert memory.temp_size_in_bytes < params['w'].nbytes / 100


def test_several_patterns_exclude_leaves():
  params = {
    'norm': {'scale': jnp.ones((4, 1024))},
    'q': {'kernel': jnp.ones((64, 64)), 'bias': jnp.ones((4, 512))},
    'embed': jnp.ones((64, 64)),
  }
  names = {
    'auto': {'q/kernel', 'embed'},
    ('auto', 'embed'): {'q/kernel'},
    ('embed', 'kernel'): {'norm/scale', 'q/bias'},
    None: {'norm/scale', 'q/kernel', 'q/bias', 'embed'},
  }
  for exclude, wanted in names.items():
    tx = so.quantize_moments(optax.scale_by_adam(), exclude=exclude)
    mu = jax.tree_util.tree_leaves_with_path(tx.init(params).coded.mu)
    path = lambda p: jax.tree_util.keystr(p, simple=True, separator='/')
    assert {path(p) for p, x in mu if x.dtype == jnp.int8} == wanted
  for bad in (3, b'em', ('auto', None)):
    with pytest.raises(TypeError, match='exclude must be .*got'):
      so.quantize_moments(optax.scale_by_adam(), exclude=bad)
  with pytest.raises(ValueError, match=r"exclude must be .*'\('"):
    so.quantize_moments(optax.scale_by_adam(), exclude=('auto', '('))


def test_explicit_axes_need_no_mesh_around_init():
  """As those of 32 bits, whose first state is made of the parameters."""
  mesh = jax.make_mesh((2, 2), ('a', 'b'), axis_types=(AxisType.Explicit,) * 2)
  place = NamedSharding(mesh, P('a', 'b'))
  params = {'w': jax.device_put(jnp.ones((64, 64)), place)}
  kinds = lambda tree: jax.tree.map(lambda x: (x.dtype, x.sharding), tree)
  tx = so.galore(1e-2, 8, moment_bits=8)
  state = tx.init(params)
  with jax.set_mesh(mesh):
    wanted = tx.init(params)
    jax.jit(lambda: tx.init(params))()
  assert kinds(state) == kinds(wanted)
  old = so.galore(1e-2, 4, moment_bits=8)
  assert kinds(so.resize_rank(tx, old.init(params), params)) == kinds(state)
