"""Measures, within an hour, what only a machine with a GPU or a TPU can tell.

  python -m benchmarks.accelerator

Pieces run one after another, the most valuable first, each in a process of its
own that has the device to itself. A process starts no new work after
`--seconds`, nine minutes. The next call continues where this one stopped and
repeats nothing. `large` is one unit of work and needs some minutes.
Results are in results/<device>/, with a table in README.md there:

  tests   those whose results depend on the backend
  step    a step of each ready-made optimizer over one of AdamW, in one run
  large   50 steps of a 7B model layer by layer, in at most 24 GB
  pareto  tuned loss against bytes, of models that a CPU is too slow for
"""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import accelerator_page
from benchmarks import harness
from benchmarks import pareto
from benchmarks import plan_check
from benchmarks import programs
from benchmarks import step
from benchmarks.harness import GB
import recipes
import subspace_optax as so

TESTS = ('galore', 'dct', 'newton_schulz', 'normuon', 'svd_methods', 'linalg')
TESTS += ('quantize_moments', 'round_updates', 'layerwise', 'host_memory')


@dataclasses.dataclass(frozen=True)
class Args:
  """What runs, and for how long; see the module."""

  only: tuple[str, ...] = ()  # pieces; all by default
  piece: str = ''  # that this process runs; by default it starts them all
  device: str = ''  # its kind; the process that starts others sets it
  platform: str = ''  # its name in jax; set likewise
  seconds: float = 540.0  # of one call
  models: tuple[str, ...] = ('llama_60m', 'llama_350m')  # of `step`
  names: tuple[str, ...] = ()  # of the optimizers in `step`; all by default
  steps: int = 41  # of each optimizer in `step`; the first is left out
  tests: tuple[str, ...] = TESTS
  large: str = 'llama_7b'
  large_method: str = 'subspace_muon8bit'
  large_rank: int = 1024
  large_steps: int = 50
  large_gigabytes: float = 24.0  # that the process may take of the device's
  seq: int = 2048
  sizes: tuple[str, ...] = ('10M',)  # of `pareto`; 30M where that is minutes
  methods: tuple[str, ...] = (
    *('adamw', 'muon', 'muon_8bit', 'subspace_muon_8bit', 'normuon_8bit'),
    *('scale', 'adamw_8bit', 'subspace_muon'),
  )
  batch: int = 64
  out: str = str(harness.RESULTS)


class Late(Exception):
  """The time of this call is over; what is known has been written."""


class Clock:
  """Raises when there is no time for one more unit of work."""

  def __init__(self, seconds: float):
    self.end, self.longest = time.monotonic() + seconds, 0.0
    self.before = time.monotonic()

  def check(self) -> None:
    """To be called between units, which are expected to be alike."""
    now = time.monotonic()
    self.longest, self.before = max(self.longest, now - self.before), now
    if now + self.longest > self.end:
      raise Late


def folder(args: Args) -> pathlib.Path:
  """Of this device's results."""
  name = re.sub(r'[^a-z0-9]+', '-', args.device.lower()).strip('-')
  path = pathlib.Path(args.out) / name
  path.mkdir(parents=True, exist_ok=True)
  return path


# --- Pieces ------------------------------------------------------------------


def tests(args: Args, out: pathlib.Path, clock: Clock) -> None:
  """Runs test files on the backend, a process each; notes what failed."""
  results = harness.load_results(out / 'tests.json')
  found = results.setdefault('files', {})
  for name in args.tests:
    if name in found:
      continue
    clock.check()
    run = subprocess.run(
      [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider']
      + [f'tests/test_{name}.py'],
      cwd=harness.ROOT,
      env=os.environ | {'SUBSPACE_OPTAX_TEST_PLATFORM': args.platform},
      capture_output=True,
      text=True,
      check=False,
    )
    lines = run.stdout.splitlines()
    if run.returncode not in (0, 1):  # they did not run
      print(name, run.stdout[-2000:], run.stderr[-2000:], flush=True)
      continue
    failed = [x.split(' - ')[0] for x in lines if x.startswith('FAILED')]
    found[name] = {'summary': lines[-1]}
    found[name] |= {'failed': failed} if failed else {}
    print(name, found[name], flush=True)
    harness.save_results(out / 'tests.json', results)


def optimizers(width: int) -> dict[str, Callable[[], Any]]:
  """Every ready-made optimizer, and what they are compared with."""
  axes = recipes.matrix_axes(optax.contrib.MuonDimensionNumbers)
  found: dict[str, Callable[[], Any]] = {
    'optax.contrib.muon': lambda: optax.contrib.muon(
      1e-3, muon_weight_dimension_numbers=axes
    ),
    'optax.adafactor': lambda: optax.adafactor(1e-3),
    'so.scale_by_adam8bit': lambda: optax.chain(
      so.scale_by_adam8bit(), optax.scale(-1e-3)
    ),
  }
  for name, make in so.optimizers.READY_MADE.items():
    make = so.optimizers.with_rank(make, width // 4)
    found[f'so.{name}'] = lambda make=make: make(1e-3)
    if so.optimizers.takes(make, 'moment_bits'):
      found[f'so.{name}, 8 bits'] = lambda make=make: make(1e-3, moment_bits=8)
  return found


def steps(args: Args, out: pathlib.Path, clock: Clock) -> None:
  """Times steps of an optimizer and of AdamW in turns."""
  path = out / 'step.json'
  results = harness.load_results(path, settings={'steps': args.steps})
  for model in args.models:
    rows = results.setdefault('rows', {}).setdefault(model, {})
    params = step.parameters(model, stacked=True)
    width = params['final_norm']['scale'].size
    for name, make in optimizers(width).items():
      if name not in rows and name in (args.names or [name]):
        clock.check()
        rows[name] = _in_turns(make(), params, args.steps)
        print(model, name, f'{rows[name]["over_adamw"]:.2f}', flush=True)
        harness.save_results(path, results)
        jax.clear_caches()


def _in_turns(tx: Any, params: Any, count: int) -> dict[str, float]:
  gradients = jax.tree.map(lambda x: x[..., ::-1], params)
  pair = [('adamw', optax.adamw(1e-3)), ('own', tx)]
  runners = [step.Optimizer(name, one, params) for name, one in pair]
  for _ in range(count):
    for runner in runners:
      runner.step(gradients)
  adamw, own = (np.array(runner.times[1:]) for runner in runners)
  row = runners[1].row()
  return {
    'over_adamw': float(np.median(own / adamw)),
    'median_seconds': float(np.median(own)),
    'adamw_seconds': float(np.median(adamw)),
    'state_bytes': row['state_bytes'],
    'adam_state_bytes': row['adam_state_bytes'],
    'temporary_bytes': row['temporary_bytes'],
    'compile_seconds': row['compile_seconds'],
  }


def large(args: Args, out: pathlib.Path, clock: Clock) -> None:
  """Trains a large model layer by layer on random tokens."""
  del clock  # one unit of work
  path = out / 'large.json'
  results = harness.load_results(path)
  key = f'{args.large}, {args.large_method}, rank {args.large_rank}'
  if key in results.setdefault('rows', {}):
    return
  row = plan_check.Row(
    args.large, args.large_method, args.large_rank, 'layerwise', 1, 'default'
  )
  mesh = programs.make_mesh(jax.devices(), fsdp=1)
  with jax.set_mesh(mesh):
    results['rows'][key] = _trained(args, *plan_check.layerwise_step(mesh, row))
  harness.save_results(path, results)
  print(key, results['rows'][key], flush=True)


def _trained(args: Args, made: so.TrainStep, shapes: Any) -> dict[str, Any]:
  """Steps on one batch of random tokens."""
  params = jax.tree.map_with_path(_draw, shapes)
  state = jax.jit(made.init, out_shardings=made.state_sharding(params))(params)
  tokens = jax.random.randint(jax.random.key(0), (1, args.seq), 0, 256)
  update = jax.jit(made.step, donate_argnums=(0, 1))
  compile_seconds, program = harness.time_call(
    lambda: update.lower(params, state, tokens).compile()
  )
  losses, times = [], []
  for _ in range(args.large_steps):
    seconds, (params, state, metrics) = harness.time_call(
      program, params, state, tokens
    )
    losses.append(float(metrics.loss))
    times.append(seconds)
  memory = jax.devices()[0].memory_stats() or {}
  return {
    'seq': args.seq,
    'compile_seconds': compile_seconds,
    'tokens_per_second': args.seq / float(np.median(times)),
    'peak_bytes': memory.get('peak_bytes_in_use'),  # None on CPUs
    'predicted_bytes': programs.count_bytes(program).peak,
    'losses': losses,
  }


def _draw(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns random weights where a shape says; those of norms are 1."""
  name = jax.tree_util.keystr(path)

  def draw(key: jax.Array) -> jax.Array:
    if 'norm' in name:
      return jnp.ones(x.shape, x.dtype)
    return (0.02 * jax.random.normal(key, x.shape)).astype(x.dtype)

  key = jax.random.key(zlib.crc32(name.encode()))
  return jax.jit(draw, out_shardings=x.sharding)(key)


def losses(args: Args, out: pathlib.Path, clock: Clock) -> None:
  """Runs the Pareto benchmark size by size, a point of each method first."""
  for most, seeds in ((1, 1), (5, 1), (5, 3), (14, 5)):
    for size in args.sizes:
      clock.check()
      chosen = pareto.Args(
        size=size,
        batch=args.batch,
        seq=256,
        methods=args.methods,
        most=most,
        seeds=seeds,
        # The last run that begins needs time, too.
        seconds=max(1.0, 0.6 * (clock.end - time.monotonic())),
        out=str(out / 'pareto.json'),
        runs=str(out / 'runs'),
      )
      pareto.main(chosen)
      # It looks at the time by itself.
      clock.longest, clock.before = 0.0, time.monotonic()


PIECES: dict[str, Callable[[Args, pathlib.Path, Clock], None]] = {
  'tests': tests,
  'step': steps,
  'large': large,
  'pareto': losses,
}


# --- Processes ---------------------------------------------------------------


def run_piece(args: Args) -> None:
  """Runs one piece in this process, and writes the page."""
  out = folder(args)
  try:
    PIECES[args.piece](args, out, Clock(args.seconds))
    print(f'{args.piece}: done', flush=True)
  except Late:
    print(f'{args.piece}: more to do; run this again', flush=True)
  if any(out.glob('*.json')):
    (out / 'README.md').write_text(accelerator_page.page(out))


def start_pieces(args: Args, command: list[str]) -> None:
  """Starts the pieces one by one, while there is time."""
  end = time.monotonic() + args.seconds
  device, platform, total = _ask()
  print(f'{device} ({platform})', flush=True)
  command = [*command, '--device', device, '--platform', platform]
  for name in args.only or PIECES:
    left = end - time.monotonic()
    if left < 5:
      print(f'{name}: no time left; run this again')
      return
    env = dict(os.environ)
    if name == 'large' and total:
      share = min(0.95, args.large_gigabytes * GB / total)
      env['XLA_PYTHON_CLIENT_MEM_FRACTION'] = f'{share:.3f}'
    if name == 'tests':  # the device is for those that it starts
      env['JAX_PLATFORMS'] = 'cpu'
    done = subprocess.run(
      [*command, '--piece', name, '--seconds', str(left)], env=env, check=False
    )
    if done.returncode:
      print(f'{name}: failed with {done.returncode}', flush=True)


_ASK = """
import jax
one = jax.devices()[0]
stats = one.memory_stats() or {}
print(one.device_kind)
print(one.client.platform)
print(stats.get('bytes_limit', 0))
"""


def _ask() -> tuple[str, str, float]:
  """Returns the device's kind, its platform, and its bytes, 0 if unknown.

  A process of its own asks, and leaves the device to others.
  """
  env = os.environ | {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.95'}
  found = subprocess.run(
    [sys.executable, '-c', _ASK],
    capture_output=True,
    text=True,
    check=True,
    env=env,
  )
  kind, platform, size = found.stdout.splitlines()[-3:]
  names = {'gpu': 'cuda'}  # of the kind that jax calls by two names
  return kind, names.get(platform, platform), float(size) / 0.95


def main(args: Args) -> None:
  """Runs a piece, or starts all."""
  if args.piece:
    run_piece(args)
  else:
    start_pieces(args, [sys.executable, '-m', __spec__.name, *sys.argv[1:]])


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
