"""The folder of a run: earlier runs are kept, and continued only as begun."""

import dataclasses
import itertools
import json
import pathlib

import report
from settings import Config

# Fields that may differ between a run and its continuation. Checkpoints note
# their rank.
_FREE = """compare data out export resume tensorboard wandb log_every
    eval_every eval_batches final_eval_batches save_every mesh coordinator
    processes process rank""".split()


def is_taken(c: Config) -> bool:
  """Whether `out` holds an earlier run."""
  out = pathlib.Path(c.out)
  if c.resume or not out.exists() or not any(out.iterdir()):
    return False
  if not [*out.glob('config.json'), *out.glob('*/config.json')]:
    raise ValueError(f'out={c.out!r} is a folder of something else')
  return True


def make_room(c: Config):
  """Moves an earlier run out of the way; nothing is ever overwritten."""
  if not is_taken(c):
    return
  out = pathlib.Path(c.out)
  names = (pathlib.Path(f'{out}.{i}') for i in itertools.count(1))
  spare = next(path for path in names if not path.exists())
  report.say(f'{out} is there already: moved to {spare}')
  out.rename(spare)


def check_same_run(c: Config, sha256: str):
  """Compares with the configuration that `out` was begun with, or saves it."""
  path = pathlib.Path(c.out, 'config.json')
  given = dataclasses.asdict(c) | {'sha256': sha256}
  saved = json.loads(path.read_text()) if path.exists() else given
  other = [k for k in given if k not in _FREE and saved.get(k) != given[k]]
  if other:
    show = lambda run: ', '.join(f'{k}={run.get(k)!r}' for k in other)
    raise ValueError(
      f'{show(given)}, but the run in out={c.out!r} has {show(saved)}'
      + (f' (data={c.data!r} is another text)' if 'sha256' in other else '')
      + '; to go on give these, or begin another run with another out'
    )
  report.write_json(path, given)
