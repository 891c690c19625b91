"""TensorBoard and Weights & Biases, imported only when they are asked for."""

import dataclasses
import importlib
import pathlib
from typing import Any

_MODULES = {'tensorboard': 'tensorboardX', 'wandb': 'wandb'}


def _module(name: str) -> Any:
  try:
    return importlib.import_module(_MODULES[name])
  except ImportError as error:
    raise ValueError(
      f'{name}=True needs `pip install {_MODULES[name]}`: {error}'
    ) from error


def check(c: Any):
  """Raises if what is asked for is not installed."""
  for name in _MODULES:
    if getattr(c, name):
      _module(name)


class TensorBoard:
  """Event files in a folder beside the run's others."""

  def __init__(self, c: Any, start: int):
    folder = pathlib.Path(c.out, 'tensorboard')
    # What came behind the checkpoint that a run goes on from is left out.
    self._writer = _module('tensorboard').SummaryWriter(
      str(folder), purge_step=start + 1
    )

  def write(self, step: int, numbers: dict[str, float]):
    for name, value in numbers.items():
      self._writer.add_scalar(name, value, step)

  def close(self):
    self._writer.close()


class WandB:
  """A run of the project subspace_optax, which a resumed run goes on with."""

  def __init__(self, c: Any):
    path = pathlib.Path(c.out, 'wandb_id')
    self._run = _module('wandb').init(
      project='subspace_optax',
      name=str(c.out),
      dir=str(c.out),
      config=dataclasses.asdict(c),
      id=path.read_text() if path.exists() else None,
      resume='allow',
    )
    path.write_text(self._run.id)

  def write(self, step: int, numbers: dict[str, float]):
    self._run.log(numbers, step=step)

  def close(self):
    self._run.finish()


def make(c: Any, start: int) -> list[Any]:
  """Those that the configuration asks for, to go on from a step."""
  kinds = {'tensorboard': lambda c: TensorBoard(c, start), 'wandb': WandB}
  return [kind(c) for name, kind in kinds.items() if getattr(c, name)]
