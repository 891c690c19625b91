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
import grid
import measure
import references as ref
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
# A matrix alone where there are moments of it, so that programs are small.
PARAMS = {'up': jnp.ones((128, 128))}
HEAD = {'lm_head': jnp.ones((64, 128))}


def params_of(name):
  return PARAMS | HEAD if name in ('scale', 'dion', 'trion') else PARAMS


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


@pytest.mark.parametrize(
  'name, few', grid.cover(cases.READY_MADE, [8, 4], of=2)
)
def test_moments_in_few_bits(name, few):
  """Of every one, and only if that is asked for."""
  params = PARAMS | HEAD
  for bits in (32, few):
    tx = cases.ready_made(name, rank=32)(0.1, moment_bits=bits)
    state = jax.eval_shape(tx.init, params)
    found = {x.dtype.name for x in jax.tree.leaves(state)}
    coded = found & {'int8', 'uint8', 'int4'}
    assert coded if bits < 32 else not coded
    assert ('int4' in found) == (bits == 4)
  updates, after = jax.eval_shape(tx.update, params, state, params)
  assert measure.types(after) == measure.types(state)
  assert measure.types(updates) == measure.types(params)


# One of each inner optimizer, transport and way to name them.
_STEPPED = ('galore', 'subspace_muon', 'dion', 'scale')


@pytest.mark.parametrize(
  'name',
  grid.only(cases.READY_MADE, _STEPPED),
)
def test_steps_with_moments_in_8_bits(name):
  """They are those of float32, in every leaf; the second reads codes."""
  updates, params = [], params_of(name)
  for bits in (32, 8):
    tx = cases.ready_made(name, rank=32)(0.1, moment_bits=bits)
    state, update = tx.init(params), cases.jit(tx.update)
    for seed in range(2):
      gradient = {k: ref.normal(seed, x.shape) for k, x in params.items()}
      found, state = update(gradient, state, params)
      updates.append(found)
  for wanted, found in zip(updates[:2], updates[2:], strict=True):
    for name in params:
      error = np.linalg.norm(found[name] - wanted[name])
      assert error <= 0.1 * np.linalg.norm(wanted[name]), name


@pytest.mark.parametrize(
  'name',
  [
    'golore',
    'ldadamw',
    *(
      pytest.param(x, marks=pytest.mark.full)
      for x in ('subspace_muon', 'scale')
    ),
  ],
)
def test_steps_with_first_moments_in_4_bits(name):
  """Of other inner optimizers, transports and none; the second reads codes."""
  tx = cases.ready_made(name, rank=32)(0.1, moment_bits=4)
  params = params_of(name)
  state, update = tx.init(params), cases.jit(tx.update)
  for _ in range(2):
    updates, state = update(params, state, params)
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
