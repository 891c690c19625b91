"""Configures jax before any test, or any doctest, starts its backend."""

import ctypes
import gc
import importlib.metadata
import os
import pathlib
import resource
import sys

# Tests must not depend on an accelerator, nor take one that is in use, unless
# `benchmarks.accelerator` says so.
os.environ['JAX_PLATFORMS'] = os.environ.get(
  'SUBSPACE_OPTAX_TEST_PLATFORM', 'cpu'
)

# Threads of XLA, whatever the number of cores: a collective keeps one until all
# devices have come to it, and with too few they wait for ever.
os.environ['NPROC'] = os.environ['PJRT_NPROC'] = '32'

import hypothesis
import pytest

# Most of the time of the tests is XLA's, and these options halve it. The last
# one is gone from jaxlib 0.11 on, which stops at an option unknown to it.
_FLAGS = [
  '--xla_backend_optimization_level=0',
  '--xla_llvm_disable_expensive_passes=true',
  # Programs are small: one module each, not one for every kernel.
  '--xla_cpu_parallel_codegen_split_count=1',
]
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  _FLAGS.append('--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([*_FLAGS, os.environ.get('XLA_FLAGS', '')])

import jax  # noqa: E402

# Enough devices for a 2 x 2 mesh on any machine.
jax.config.update('jax_num_cpu_devices', 4)

# References are float64: no rounding of factors to fewer bits than float32 has.
if os.environ['JAX_PLATFORMS'] != 'cpu':
  jax.config.update('jax_default_matmul_precision', 'highest')

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
    help='run every point of every test, not only those chosen for speed',
  )


def pytest_collection_modifyitems(config, items):
  if config.getoption('full'):
    return
  more = [x for x in items if x.get_closest_marker('full')]
  config.hook.pytest_deselected(items=more)
  items[:] = [x for x in items if not x.get_closest_marker('full')]


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers():
  """For `-n auto`: as many processes as cores, if each can have 3 GB."""
  cores = yield
  memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  return max(1, min(cores, memory // 3_000_000_000))


def pytest_collection_finish():
  """Lets the garbage collector forget what stays, and look less often.

  Tracing makes many objects and few cycles: a tenth of the time went there.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


def _memory():
  """Returns the bytes that this process has, or has had where none tells."""
  try:
    pages = pathlib.Path('/proc/self/statm').read_text().split()[1]
  except OSError:
    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return int(pages) * os.sysconf('SC_PAGE_SIZE')


def _return_memory():
  """Gives the system what is free: glibc keeps nearly all of it."""
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
  if trim:
    trim(0)


@pytest.fixture(scope='module', autouse=True)
def forget_programs():
  """Drops compiled programs between files once the process has grown.

  A program takes 2.6 MB, however small. In a process with thousands of them jax
  at times keeps none of the newest in the cache that tests of recompilation
  count. But what is dropped must be lowered again and read, in 8 ms each.
  """
  yield
  if _memory() > 1_500_000_000:
    jax.clear_caches()
    gc.collect()
    _return_memory()


@pytest.fixture(scope='session')
def compiled_folder(tmp_path_factory):
  """A folder of compiled programs that all test processes share.

  Of this run alone, unless JAX_COMPILATION_CACHE_DIR names one that stays.
  """
  if kept := os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return pathlib.Path(kept)
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  return folder / 'compiled'


@pytest.fixture(scope='session', autouse=True)
def compile_once(compiled_folder):
  """What one file, process or run of a trainer has compiled, others read.

  A third of all programs are compiled more than once: tests of one rule share
  its trees, and `forget_programs` drops what the next file needs again.
  """
  jax.config.update('jax_compilation_cache_dir', str(compiled_folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
