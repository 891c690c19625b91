"""Configures jax before any test, or any doctest, starts its backend."""

import importlib.metadata
import os

# Tests must not depend on an accelerator, nor take one that is in use.
os.environ['JAX_PLATFORMS'] = 'cpu'

# Threads of XLA, whatever the number of cores: a collective keeps one until all
# devices have come to it, and with too few they wait for ever.
os.environ['NPROC'] = os.environ['PJRT_NPROC'] = '32'

import hypothesis
import pytest

# Most of the time of the tests is XLA's. These options take a third of it; the
# last one is gone from jaxlib 0.11 on, which stops at an option unknown to it.
_FLAGS = [
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
]
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([*_FLAGS, os.environ.get('XLA_FLAGS', '')])

import jax  # noqa: E402

# Enough devices for a 2 x 2 mesh on any machine.
jax.config.update('jax_num_cpu_devices', 4)

# A (n,) added to a (m, n) is more often a mistake than meant.
jax.config.update('jax_numpy_rank_promotion', 'raise')

# No deadline, and nothing is too slow: the first example of a property also
# pays for compilation, and other programs may be running.
# Derandomized: the same commit gives the same result everywhere.
hypothesis.settings.register_profile(
  'default',
  deadline=None,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile('default')


def pytest_addoption(parser):
  parser.addoption(
    '--full',
    action='store_true',
    help='test every point of the grid, not only a cover of all pairs',
  )


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Drops the compiled programs of a file when its tests have ended.

  In a process with thousands of programs jax at times keeps none of the newest
  in the cache that tests of recompilation count, and memory goes to gigabytes.
  """
  yield
  jax.clear_caches()
