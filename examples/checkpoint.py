"""Checkpoints by `so.checkpoint`: complete or absent, in the background."""

from collections.abc import Callable
import pathlib
from typing import Any, NamedTuple
import warnings

import jax
from orbax.checkpoint import v1 as ocp

import mesh
import subspace_optax as so


def open_folder(
  folder: pathlib.Path, keep: int = 2
) -> ocp.training.Checkpointer:
  """A checkpointer that keeps the newest ones and removes unfinished ones."""
  newest: Any = ocp.training.preservation_policies.LatestN(keep)
  return ocp.training.Checkpointer(
    str(folder.absolute()),
    preservation_policy=newest,
    cleanup_tmp_directories=True,
  )


def shapes(make: Callable, *args: Any) -> Any:
  """What `make` would return, as shapes on the first device."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(shape, jax.eval_shape(make, *args))


def save(
  checkpointer: ocp.training.Checkpointer, tx: Any, state: dict, step: int
) -> None:
  """Starts to write `state`; it is copied now, so it may be donated next."""
  so.checkpoint.save(
    checkpointer, tx, state['params'], state['opt_state'], step
  )


class Restored(NamedTuple):
  """The newest complete checkpoint."""

  step: int  # 0 if there is none
  state: dict[str, Any]
  changes: tuple[str, ...]  # what differs from the run that was saved


def restore(
  checkpointer: ocp.training.Checkpointer, tx: Any, like: dict
) -> Restored:
  """The newest checkpoint, for `tx` and on the mesh of `like`.

  `like` is the state, or its shapes. Where there is no checkpoint it is
  returned as it is, at step 0.
  """
  if checkpointer.latest is None:
    return Restored(0, like, ())
  places = mesh.shardings(like['opt_state'])
  with warnings.catch_warnings():
    # The caller says what has changed.
    warnings.filterwarnings('ignore', 'the checkpoint was saved by another')
    run = so.checkpoint.restore(
      checkpointer, tx, like['params'], shardings=places
    )
  state = {'params': run.params, 'opt_state': run.state}
  return Restored(run.step, state, run.changes)
