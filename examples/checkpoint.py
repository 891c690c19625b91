"""Checkpoints by Orbax v1: written in the background, complete or absent."""

from collections.abc import Callable
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp


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


def by_name(state: Any) -> dict[str, Any]:
  """The leaves of `state` by path, but the empty ones, which Orbax refuses."""
  leaves, _ = jax.tree.flatten_with_path(state)
  return {_name(path): x for path, x in leaves if x.size}


def shapes(make: Callable, *args: Any) -> Any:
  """What `make` would return, as shapes on the first device."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(shape, jax.eval_shape(make, *args))


def save(
  checkpointer: ocp.training.Checkpointer, step: int, state: Any, **notes: Any
) -> None:
  """Starts to write `state`; it is copied now, so it may be donated next."""
  checkpointer.wait()  # a save still under way would make Orbax skip this one
  checkpointer.save_async(step, by_name(state), custom_metadata=notes)


def notes(checkpointer: ocp.training.Checkpointer) -> dict[str, Any]:
  """What was noted with the newest complete checkpoint, if there is one."""
  newest = checkpointer.latest
  if newest is None:
    return {}
  noted: Any = checkpointer.metadata(newest.step).custom_metadata
  return noted or {}


def restore(
  checkpointer: ocp.training.Checkpointer, like: Any
) -> tuple[int, Any]:
  """(step, state) of the newest complete checkpoint, or (0, `like`).

  The state has the shardings of `like`, of arrays or `jax.ShapeDtypeStruct`s,
  on whatever mesh and by however many processes it was saved.
  """
  if checkpointer.latest is None:
    return 0, like
  step = checkpointer.latest.step
  loaded = checkpointer.load(step, jax.tree.map(_abstract, by_name(like)))
  pick = lambda path, x: loaded[_name(path)] if x.size else _empty(x)
  return step, jax.tree.map_with_path(pick, like)


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _empty(x: Any) -> jax.Array:
  return jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
