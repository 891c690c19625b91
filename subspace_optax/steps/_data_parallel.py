# SPDX-License-Identifier: Apache-2.0
"""Data parallelism that averages coordinates instead of gradients.

Under `jax.jit`, the compiler averages the gradient of a replicated parameter
before it can be projected. Here every device projects its own gradient, and the
average is over r (m + n) numbers for an m x n matrix.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
import optax

from subspace_optax._chain import _projection
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.steps import _train_step


def data_parallel_step(
  loss: Callable[[Any, Any], jax.Array],
  tx: optax.GradientTransformation,
  mesh: Mesh,
  axis_name: str | tuple[str, ...] = 'data',
  *,
  check_vma: bool = True,
) -> _train_step.TrainStep:
  """Makes a training step that moves coordinates between devices.

  Every device computes the gradient of its part of the batch. For leaves that
  `tx` projects, `project` averages the coordinates; this step averages all
  other gradients. Residual rules need the mean gradient, which moves whole
  gradients between devices. So do refreshes by `importance_svd` and by `svd`
  with method 'gram' or 'exact', which 'auto' chooses here except on TPUs.

  The norm of the mean gradient is not known. `online_pca` divides by the norm
  of the devices' own gradients, which is larger by up to the square root of the
  number of devices. This does not affect Adam for the bases, but SGD needs a
  learning rate larger by the same factor, and `captured_energy` is a lower
  bound. `grassmann_tracking` divides by the square of that norm: its basis
  turns by up to the number of devices less, so raise its `step_size`.

  Args:
    loss: (params, batch) -> the mean loss of a batch, a scalar.
    tx: the optimizer. Transformations before `project` see one device's
      gradient: put clipping into the optimizer of coordinates, and use
      `every_k` for accumulation. `optax.MultiSteps` and `apply_if_finite`
      around `tx` fail.
    mesh: its axis `axis_name` divides the first axis of all arrays in a batch
      that have axes. Scalars, such as a key of `jax.random.key`, are the same
      on all devices; fold `jax.lax.axis_index(axis_name)` into a key.
      Other mesh axes may shard parameters and state automatically. Along
      `axis_name` both are replicated: place the state by the step's own
      `state_sharding(params)`.
    axis_name: one or several mesh axes along which devices have different parts
      of a batch.
    check_vma: passed to `jax.shard_map`. Use False for losses that it rejects,
      such as those with Pallas kernels or scans that start from constants.

  Returns:
    A `TrainStep`, (params, state, batch) -> (params, state, loss). Jit it.

  Raises:
    ValueError: the mesh lacks this axis, or has explicit axes.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, for the
    projected gradients that are averaged

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> from jax.sharding import AxisType
    >>> mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,))
    >>> loss = lambda params, x: jnp.mean((x @ params['w']) ** 2)
    >>> tx = so.golore(1e-3, rank=2)
    >>> step = jax.jit(so.data_parallel_step(loss, tx, mesh))
    >>> params = {'w': jnp.ones((8, 16))}
    >>> params, state, value = step(params, tx.init(params), jnp.ones((4, 8)))
    >>> print(value)
    64.0
  """
  devices = Devices.along(mesh, axis_name)
  tx = optax.with_extra_args_support(tx)

  def local_step(params, state, batch):
    value, gradients = jax.value_and_grad(loss)(devices.own(params), batch)
    updates, state = devices.update(tx, gradients, state, params)
    params = optax.apply_updates(params, updates)
    return params, state, devices.mean(value)

  step = devices.map(local_step, check_vma)
  return _train_step.TrainStep(
    tx.init, step, replicated=devices.names, mesh=mesh
  )


class Devices(NamedTuple):
  """Devices that have different parts of a batch.

  Attributes:
    mesh: their mesh; None for one device, or if the compiler sums gradients.
    names: mesh axes along which their parts differ.
  """

  mesh: Mesh | None = None
  names: tuple[str, ...] = ()

  @classmethod
  def along(cls, mesh: Mesh, axis_name: str | tuple[str, ...]) -> 'Devices':
    """Returns the devices along axes of a mesh, or raises."""
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if not set(names) <= set(mesh.axis_names):
      raise ValueError(
        f'axis_name={axis_name!r} is none of the mesh axes {mesh.axis_names}.'
      )
    if mesh.explicit_axes:
      raise ValueError(
        f'mesh axes {mesh.explicit_axes} are explicit; make the mesh with '
        'axis_types=(AxisType.Auto, ...).'
      )
    return cls(mesh, names)

  def map(self, step: Callable[..., Any], check_vma: bool) -> Callable:
    """Maps a step over the devices; its results are the same on all of them."""
    if self.mesh is None:
      return step
    same, parts = PartitionSpec(), PartitionSpec(self.names)

    def mapped(params, state, batch):
      of_batch = jax.tree.map(lambda x: parts if jnp.ndim(x) else same, batch)
      return jax.shard_map(
        step,
        mesh=self.mesh,
        in_specs=(same, same, of_batch),
        out_specs=(same, same, same),
        axis_names=set(self.names),
        check_vma=check_vma,
      )(params, state, batch)

    return mapped

  def own(self, params: Any) -> Any:
    """Returns parameters whose gradients are each device's own.

    jax sums the gradient of a replicated array over devices right away.
    """
    if not self.names:
      return params
    return jax.tree.map(lambda x: _varying.vary_along(x, self.names), params)

  def mean(self, x: Any) -> Any:
    """Returns the mean over the devices."""
    return lax.pmean(x, self.names) if self.names else x

  def update(
    self, tx: Any, gradients: Any, state: Any, params: Any, **extra: Any
  ) -> tuple[Any, Any]:
    """Returns the updates by `tx` for the mean gradient, and the new state."""
    if not self.names:
      return tx.update(gradients, state, params, **extra)
    gradients = self._mean_of_rest(gradients, state)
    given = _projection.Given(axis_name=self.names)
    return tx.update(gradients, state, params, given=given, **extra)

  def _mean_of_rest(self, gradients: Any, state: Any) -> Any:
    """Returns gradients in which those that are not projected are averaged."""
    projected = _projected_paths(state)
    pairs, _ = _tree.flatten(gradients)
    entries = [x if p in projected else self.mean(x) for p, x in pairs]
    return _tree.replace_entries(gradients, entries)


def _projected_paths(state: Any) -> set[str]:
  """Returns the paths of the leaves that a state has bases or seeds for."""
  states = _tree.find(state, _projection.ProjectState)
  return {path for _, x in states for path in _projection.paths(x)}
