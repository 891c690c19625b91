"""The training loop: from the newest checkpoint to the last step."""

from collections.abc import Callable
import pathlib
import shlex
import sys
from typing import Any, NamedTuple

import jax

import checkpoint
import interrupt
import mesh
import report
import settings


class Job(NamedTuple):
  """What a loop runs."""

  tx: Any  # the optimizer or step whose state it is
  like: Any  # the state, or its shapes and shardings
  init: Callable  # () -> the state to begin with
  compiled: Callable  # () -> ((state, batch) -> (state, metrics))
  batches: Callable  # step -> the batches of the steps from this one on
  rate: Callable  # step -> learning rate
  validate: Callable  # state -> metrics
  unit: str = 'nats/token'  # of the loss


def beginning(tx: Any, start: Callable) -> Callable:
  """(parameters of a model) -> the state, whose parameters `start` makes."""

  def begin(params):
    own = start(params)
    return {'params': own, 'opt_state': jax.jit(tx.init)(own)}

  return begin


class Ended(NamedTuple):
  """Where a loop has ended."""

  step: int
  state: Any
  speed: float  # steps a second, of the training alone
  signal: int  # that ended it; 0: none


def run(c: settings.Config, job: Job) -> Ended:
  """Goes on from the newest checkpoint in the run's folder, if there is one."""
  out = pathlib.Path(c.out)
  with checkpoint.open_folder(out / 'checkpoints') as saved:
    newest = saved.latest.step if saved.latest else 0
    mesh.check_agree(f'checkpoint {newest}')  # before all wait for all
    start, state, changes = restore(c, job, saved)
    state = state if start else job.init()
    if c.resume:
      report.say(f'{out}: going on after step {start}')
    for change in changes:
      report.say(f'{out}: {change}')
    if start >= c.steps:
      return Ended(start, state, 0.0, 0)
    return run_steps(c, job, saved, start, state)


def restore(c: settings.Config, job: Job, saved) -> checkpoint.Restored:
  """The newest checkpoint, taken over to this run."""
  try:
    return checkpoint.restore(saved, job.tx, job.like)
  except ValueError as error:
    raise ValueError(
      f'the run in out={c.out!r} cannot go on with optimizer={c.optimizer!r} '
      f'and rank={c.rank}: {error}'
    ) from error


def numbers(row: dict) -> dict:
  """A row of metrics as Python numbers."""
  return {k: v if k == 'step' else float(v) for k, v in row.items()}


def run_steps(c: settings.Config, job: Job, saved, start: int, state) -> Ended:
  log = report.Metrics(c, start)
  line = report.LiveLine(c.optimizer, start, c.steps, job.unit)
  done, stopped = start, 0
  due = lambda every: done % every == 0 or done == c.steps
  with log, line, interrupt.Stop() as stop:
    step = line.compile(job.compiled)
    meter = report.Meter(start)
    for done, batch in enumerate(job.batches(start), start + 1):
      state, metrics = step(state, batch)
      line.advance(done)
      if due(c.log_every):  # the only place that waits for the device
        row = {'step': done, 'lr': job.rate(done - 1)} | metrics
        row = numbers(row)
        row['steps_per_second'] = meter.read(done)
        row['tokens_per_second'] = row['steps_per_second'] * c.batch * c.seq
        log.write(row)
        line.show(row)
      if due(c.eval_every):
        row = numbers({'step': done} | job.validate(state))
        log.write(row)
        line.show(row)
        meter.restart(done)
      if due(c.log_every) or jax.process_count() == 1:  # else it waits
        stopped = mesh.greatest(stop.signal)
      if due(c.save_every) or stopped:
        checkpoint.save(saved, job.tx, state, done)
      if stopped:
        break
  return Ended(done, state, meter.mean, stopped)


def leave(c: settings.Config, ended: Ended):
  """Ends a run that was asked to stop; its checkpoint is written by now."""
  words = [word for word in sys.argv if word != '--resume']
  report.say(
    f'stopped and saved after step {ended.step} of {c.steps}; to go on:\n'
    f'  python {shlex.join(words)} --resume'
  )
  raise SystemExit(128 + ended.signal)
