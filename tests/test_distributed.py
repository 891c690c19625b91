"""The example trainer on meshes and in two real processes, killed and not."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import checkpoint
import mesh
import pretrain
import report
import small_llama

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ROOT, ROOT / 'examples', ROOT / 'tests'

# Far more than any process takes, however busy the machine: a guard only.
SECONDS = 900

# Notes the state at a step and which rows it has read; process 1 dies by
# SIGKILL in the save of another.
# What Python prints goes to a file of its own: native libraries write to the
# same stdout, in the middle of lines.
CHILD = """
import json, os, pathlib, signal, sys, threading

noted, fatal = int(sys.argv.pop(1)), int(sys.argv.pop(1))
sys.stdout = open(sys.argv.pop(1), 'w', buffering=1)
import checkpoint, data, jax, pretrain, flags, settings, small_llama

small_llama.install()
save, reader = checkpoint.save, data.reader
rows = set()

def new_reader(*args):
  read = reader(*args)
  def noted(index):
    rows.add(index[1].indices(args[1][1])[:2])
    return read(index)
  return noted

def die_at_half(*_):
  if any('tmp' in name for name in os.listdir(config.out + '/checkpoints')):
    os.kill(os.getpid(), signal.SIGKILL)

def new_save(checkpointer, tx, state, done):
  if (done, jax.process_index()) == (fatal, 1):
    # Dies at the first call, in any thread, that finds a folder half written:
    # process 0 cannot end what process 1 has no part in.
    threading.setprofile(die_at_half)
    sys.setprofile(die_at_half)
  save(checkpointer, tx, state, done)
  if done != fatal:
    checkpointer.wait()
  if done == noted:
    found = {'rows': sorted(rows), 'state': pretrain.digest(state)}
    name = f'process{jax.process_index()}.json'
    pathlib.Path(config.out, name).write_text(json.dumps(found))

checkpoint.save, data.reader = new_save, new_reader
config = flags.parse(pretrain.Config, '', settings.PRETRAINING)
pretrain.main(config)
"""


@pytest.fixture(scope='module', autouse=True)
def fast_compilation(compile_once):
  options = mesh.compiler_options() | {'xla_backend_optimization_level': 0}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(mesh, 'compiler_options', lambda: options)
    small_llama.install_in(patch)
    yield


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  """Four steps on one device; matrix products only, no LAPACK."""
  text = tmp_path_factory.mktemp('text') / 'a.txt'
  words = np.random.default_rng(0).choice('the cat sat on a mat'.split(), 2000)
  text.write_text(' '.join(words))
  return pretrain.Config(
    model='llama_test', data=(str(text),), rank=small_llama.RANK, batch=4,
    seq=16, steps=4,
    log_every=1, eval_every=2, save_every=2, eval_batches=2,
    final_eval_batches=4, out=str(tmp_path_factory.mktemp('runs') / 'one'),
  )  # fmt: skip


def losses(config) -> list[float]:
  rows = report.read_rows(pathlib.Path(config.out, 'metrics.jsonl'))
  found = [row for row in rows if 'loss' in row]
  assert [row['step'] for row in found] == [1, 2, 3, 4]
  return [row['loss'] for row in found]


@pytest.fixture(scope='module')
def alone(config):
  """Losses of the run on one device."""
  pretrain.main(config)
  return losses(config)


def in_folder(config, folder, **changes):
  return dataclasses.replace(config, out=str(folder), **changes)


# --- Two processes -----------------------------------------------------------


def flags(config) -> list[str]:
  words = ['--data', *config.data]
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if type(value) in (int, str) and value != '':
      words += [f'--{field.name.replace("_", "-")}', str(value)]
  return words


def free_port() -> int:
  """A port that nobody gets who asks for any, until the processes take it."""
  for port in random.Random(os.getpid()).sample(range(20_000, 32_000), 100):
    with socket.socket() as s, contextlib.suppress(OSError):
      s.bind(('127.0.0.1', port))
      return port
  raise OSError('no free port')


def slurm(process: int, port: int) -> dict[str, str]:
  """What Slurm tells two tasks of one machine."""
  return {
    'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2', 'SLURM_STEP_NUM_TASKS': '2',
    'SLURM_PROCID': str(process), 'SLURM_LOCALID': '0',
    'JAX_COORDINATOR_PORT': str(port),
  }  # fmt: skip


def file_of(config, process, suffix) -> pathlib.Path:
  return pathlib.Path(f'{config.out}.{process}.{suffix}')


def printed(config) -> list[str]:
  """What the program has printed, by process."""
  return [file_of(config, i, 'txt').read_text() for i in range(2)]


def logs(config) -> list[str]:
  """All else that was written to stdout and stderr, to say why one failed."""
  return [file_of(config, i, 'log').read_text() for i in range(2)]


def start(config, compiled_folder, process, port, noted, fatal, launcher, more):
  said = str(file_of(config, process, 'txt'))
  command = [sys.executable, '-c', CHILD, str(noted), str(fatal), said]
  command += flags(config)
  environment = {
    'PATH': '', 'PYTHONPATH': ':'.join(map(str, FOLDERS)),
    'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2',
    'JAX_COMPILATION_CACHE_DIR': str(compiled_folder),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    'XLA_FLAGS': os.environ['XLA_FLAGS'],  # to compile sooner
  }  # fmt: skip
  if launcher:
    environment |= slurm(process, port)
  else:
    command += ['--coordinator', f'127.0.0.1:{port}', '--processes', '2']
    command += ['--process', str(process)]
  with file_of(config, process, 'log').open('w') as log:
    return subprocess.Popen(
      [*command, *more], env=environment, stdout=log, stderr=subprocess.STDOUT
    )


def start_two(config, compiled_folder, noted, fatal, *more, launcher=False):
  port = free_port()
  begin = lambda i: start(
    config, compiled_folder, i, port, noted, fatal, launcher, more
  )
  return [begin(0), begin(1)]


def finish(processes):
  """Waits for each of them; none outlives this."""
  try:
    for p in processes:
      p.wait(timeout=SECONDS)
  finally:
    for p in processes:
      p.kill()
      p.wait()


def finish_killed(config, processes):
  """The same when process 1 dies and a launcher, seeing that, kills 0."""
  try:
    finish(processes[1:])
  finally:
    processes[0].kill()
    processes[0].wait()
  assert processes[1].returncode == -signal.SIGKILL, logs(config)


def checkpoints(config) -> set[str]:
  folder = pathlib.Path(config.out, 'checkpoints')
  return {path.name for path in folder.iterdir()} if folder.exists() else set()


def notes(config) -> list[dict]:
  """What the processes have noted of the rows that they read and the state."""
  names = [f'process{i}.json' for i in range(2)]
  return [json.loads(pathlib.Path(config.out, x).read_text()) for x in names]


def copied(config, folder, **changes):
  """The same run in a folder of its own."""
  shutil.copytree(config.out, folder)
  return in_folder(config, folder, **changes)


@pytest.fixture(scope='module')
def killed(config, compiled_folder, tmp_path_factory):
  """A run of two processes of two devices each, killed in its last save."""
  folder = tmp_path_factory.mktemp('runs') / 'two'
  two = in_folder(config, folder, mesh='fsdp=2,tensor=2')
  finish_killed(two, start_two(two, compiled_folder, 2, 4, launcher=True))
  return two


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(alone, killed):
  np.testing.assert_allclose(losses(killed), alone, rtol=1e-5)


@pytest.mark.slow
def test_each_process_reads_its_own_rows(killed):
  assert [x['rows'] for x in notes(killed)] == [[[0, 2]], [[2, 4]]]


@pytest.mark.slow
def test_one_process_prints_and_writes(killed):
  said = printed(killed)
  assert 'loss' in said[0] and said[1] == ''
  saved = json.loads(pathlib.Path(killed.out, 'config.json').read_text())
  assert saved['process'] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
  'text',
  [
    '',
    # As the run that goes on below, on a mesh of its own.
    pytest.param('fsdp=4', marks=pytest.mark.full),
    pytest.param('data=2,tensor=2', marks=pytest.mark.full),
  ],
)
def test_restored_bit_by_bit_on_other_meshes(killed, text, tmp_path):
  """State and parameters, in one process with one device or four."""
  saved_in = pathlib.Path(copied(killed, tmp_path / 'run').out, 'checkpoints')
  run = pretrain.plan(pretrain.for_optimizer(killed, killed.optimizer), 256,
                      mesh.make(text))  # fmt: skip
  with checkpoint.open_folder(saved_in) as saved:
    step, state, changes = checkpoint.restore(saved, run.tx, run.like)
  assert step == 2 and not changes
  assert mesh.shardings(state) == mesh.shardings(run.like)
  assert [pretrain.digest(state)] * 2 == [x['state'] for x in notes(killed)]


@pytest.mark.slow
def test_killed_in_mid_save_one_process_goes_on(killed, alone, tmp_path):
  """On four devices of another mesh."""
  half = checkpoints(killed) - {'2'}
  assert len(half) == 1 and '4' not in half
  mesh = 'data=2,fsdp=-1'
  one = copied(killed, tmp_path / 'run', mesh=mesh, resume=True)
  pretrain.main(one)
  assert checkpoints(one) == {'2', '4'}
  np.testing.assert_allclose(losses(one), alone, rtol=1e-5)


@pytest.mark.slow
def test_killed_in_mid_save_two_processes_go_on(
  killed, compiled_folder, alone, tmp_path
):
  """Joined by flags this time, to the end."""
  two = copied(killed, tmp_path / 'run')
  processes = start_two(two, compiled_folder, 4, 0, '--resume')
  finish(processes)
  assert [p.returncode for p in processes] == [0, 0], logs(two)
  said = printed(two)
  assert 'going on after step 2' in said[0] and 'everything is in' in said[0]
  assert said[1] == ''
  assert checkpoints(two) == {'2', '4'}
  np.testing.assert_allclose(losses(two), alone, rtol=1e-5)


# --- One process -------------------------------------------------------------


@functools.cache
def sharding(text, optimizer='online_subspace_descent'):
  """The plan of a run on a mesh of four devices, by path."""
  config = pretrain.Config(model='llama_test', optimizer=optimizer, rank=4)
  run = pretrain.plan(config, 256, mesh.make(text))
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): x
    for path, x in jax.tree.leaves_with_path(run.like)
  }


def test_parameters_and_state_are_cut_as_in_megatron():
  found = sharding('fsdp=2,tensor=2')
  spec = lambda name: found[name].sharding.spec
  layers = 'params.blocks.attention.'
  assert spec(layers + 'wq.kernel') == P(None, 'fsdp', 'tensor')
  assert spec(layers + 'wo.kernel') == P(None, 'tensor', 'fsdp')
  assert spec('params.embed.embedding') == P('tensor', 'fsdp')
  assert spec('params.lm_head.kernel') == P('fsdp', 'tensor')
  assert spec('params.final_norm.scale') == P()


@pytest.mark.parametrize('text', ['fsdp=4', 'fsdp=2,tensor=2'])
def test_bytes_on_a_device_fall_with_the_mesh(text):
  part = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  found = sharding(text).values()
  total = sum(x.size * x.dtype.itemsize for x in found)
  assert sum(map(part, found)) < 1.2 * total / 4


def test_what_does_not_divide_is_not_cut_and_said_in_one_line(capsys):
  found = sharding.__wrapped__('tensor=3')  # what is cached says nothing
  (line,) = capsys.readouterr().out.splitlines()
  assert line.startswith('not divisible, so not cut: blocks/attention/')
  assert 'lm_head/kernel (tensor=3 of 256)' in line
  assert all(x.sharding.spec == P() for x in found.values())


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('pipeline=2', "mesh='pipeline=2': expected sizes of some of"),
    ('fsdp=2,fsdp=2', 'expected sizes of some of'),
    ('fsdp', 'expected sizes of some of'),
    ('fsdp=x', 'expected sizes of some of'),
    ('fsdp=0', 'one size may be -1'),
    ('fsdp=-1,data=-1', 'one size may be -1'),
    ('data=3,fsdp=-1', 'the others must divide the 4 devices'),
    ('data=4,fsdp=2', "mesh='data=4,fsdp=2' has 8 devices, but 4 are here"),
  ],
)
def test_bad_meshes(text, message):
  with pytest.raises(ValueError, match=message):
    mesh.make(text)


def test_rows_that_do_not_divide(config):
  bad = dataclasses.replace(config, mesh='fsdp=4', accumulation=2)
  with pytest.raises(ValueError, match='batch=4: its 2 microbatches of 2 rows'):
    pretrain.main(bad)


@pytest.mark.parametrize(
  ('coordinator', 'processes', 'process', 'message'),
  [
    ('', 2, 0, "coordinator='', processes=2: give both"),
    ('host:1', 1, 0, "coordinator='host:1', processes=1: give both"),
    ('host:1', 2, 2, 'process=2, processes=2: expected a process from 0'),
  ],
)
def test_bad_process_flags(coordinator, processes, process, message):
  with pytest.raises(ValueError, match=message):
    mesh.join(coordinator, processes, process)
