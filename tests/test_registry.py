"""One row in the registry of ready-made optimizers is all that one needs."""

import inspect
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import errors
import subspace_optax as so

ROOT = pathlib.Path(__file__).parents[1]
KEYWORDS = (
  'update_proj_gap',
  'scale',
  'inner',
  'plain',
  'weight_decay',
  'mask',
  'every_k',
  'stagger',
  'moment_bits',
  'seed',
  'spec',
)
PARAMS = {
  'up': jnp.ones((128, 256)),
  'bias': jnp.ones(256),
  'lm_head': jnp.ones((64, 128)),
}


@pytest.mark.parametrize('name', cases.READY_MADE)
def test_signatures_are_alike(name):
  """(learning_rate, rank, *, keywords in one order), `galore` as contrib's.

  Without a rank where there is no subspace.
  """
  make = so.optimizers.READY_MADE[name]
  assert getattr(so, name) is make
  arguments = inspect.signature(make).parameters
  kinds = [x.kind for x in arguments.values()]
  by_position = ['learning_rate', *(['rank'] if 'rank' in arguments else [])]
  first = 8 if name == 'galore' else len(by_position)
  assert kinds[:first] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * first
  assert set(kinds[first:]) == {inspect.Parameter.KEYWORD_ONLY}
  assert list(arguments)[: len(by_position)] == by_position
  if name == 'galore':
    contrib = inspect.signature(optax.contrib.galore).parameters
    assert list(arguments)[:8] == list(contrib)[:8]
  shared = [k for k in arguments if k in KEYWORDS]
  always = {'scale', 'plain', 'weight_decay', 'mask', 'moment_bits', 'seed'}
  assert always | {'spec'} <= set(shared)
  if name != 'galore':
    assert shared == [k for k in KEYWORDS if k in shared]


@pytest.mark.parametrize('name', cases.READY_MADE)
def test_moments_in_8_bits(name):
  """Of every one: few floats left, and the same step at first."""
  states, updates = [], []
  for bits in (32, 8):
    tx = cases.ready_made(name, rank=32)(0.1, moment_bits=bits)
    state = tx.init(PARAMS)
    gradient = jax.tree.map(
      lambda x: jax.random.normal(jax.random.key(x.ndim), x.shape), PARAMS
    )
    update, state = cases.jit(tx.update)(gradient, state, PARAMS)
    updates.append(update)
    states.append(state)
  dtypes = {x.dtype for x in jax.tree.leaves(states[1])}
  assert jnp.dtype('int8') in dtypes
  assert jnp.dtype('int8') not in {x.dtype for x in jax.tree.leaves(states[0])}
  error = np.linalg.norm(updates[1]['up'] - updates[0]['up'])
  assert error <= 0.1 * np.linalg.norm(updates[0]['up'])


@pytest.mark.parametrize('name', cases.READY_MADE)
def test_first_moments_in_4_bits(name):
  """Of every one; two steps, since the first has no codes to read."""
  tx = cases.ready_made(name, rank=32)(0.1, moment_bits=4)
  state, update = tx.init(PARAMS), cases.jit(tx.update)
  before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for _ in range(2):
    updates, state = update(PARAMS, state, PARAMS)
  assert before == jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert jnp.dtype('int4') in {x.dtype for x in jax.tree.leaves(state)}
  jax.tree.map(lambda x: np.testing.assert_(np.isfinite(x).all()), updates)


@pytest.mark.parametrize('name', sorted(set(cases.READY_MADE) - {'galore'}))
def test_arguments_by_position_name_the_optimizer(name):
  with errors.raises(TypeError, f'{name}: too many positional arguments'):
    so.optimizers.READY_MADE[name](1e-3, 8, 200)
  with errors.raises(TypeError, f"{name}: missing a required argument: 'lear"):
    so.optimizers.READY_MADE[name]()


@pytest.mark.parametrize('bits', [2, 16, None, '8'])
def test_other_moment_bits(bits):
  with errors.raises(ValueError, 'moment_bits', repr(bits)):
    so.golore(1e-3, moment_bits=bits)


DUMMY = """
import sys
for folder in ('', 'examples', 'tests'):
  sys.path.append({root!r} + '/' + folder)
import jax.numpy as jnp
import subspace_optax as so

def dummy(learning_rate, rank=8, *, update_proj_gap=10, seed=0, spec=None):
  spec = spec or so.SubspaceSpec(rank, seed=seed, allow_empty=True)
  return so.golore(learning_rate, update_proj_gap=update_proj_gap, spec=spec)

def whole(learning_rate, *, seed=0, spec=None):
  return dummy(learning_rate, seed=seed, spec=spec)

so.optimizers.READY_MADE |= dict(dummy=dummy, whole=whole)
import cases, recipes, settings
from benchmarks import contenders
from subspace_optax import plan
for name in ('dummy', 'whole'):
  assert name in cases.READY_MADE
  cases.ready_made(name, 4)(1e-3).init({{'w': jnp.ones((16, 32))}})
  method = contenders.CONTENDERS[name]
  assert method.ours
  method.make(1e-3, 0.1).init({{'w': jnp.ones((16, 32))}})
  plan.optimizer(name, rank=4).init({{'w': jnp.ones((16, 32))}})
  made = recipes.make(settings.Config(optimizer=name, rank=4))
  made.init({{'kernel': jnp.ones((16, 32))}})
"""


def test_a_new_row_is_known_everywhere():
  """To tests, benchmarks, the planner and the example trainer."""
  program = DUMMY.format(root=str(ROOT))
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
