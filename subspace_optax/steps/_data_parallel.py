# SPDX-License-Identifier: Apache-2.0
"""Data parallelism that averages coordinates in the place of gradients.

Under `jax.jit` the compiler averages the gradient of a replicated parameter
before anyone can project it. Here every device projects its own gradient, and
what is averaged has r (m + n) numbers for a matrix of m x n.
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

  Every device computes the gradient of its part of the batch. Of leaves that
  `tx` projects, `project` averages the coordinates; all others are averaged
  here. A residual rule needs the mean gradient, and makes it as large as ever;
  so do refreshes by `svd('exact')`, which is 'auto' here but on TPUs, by
  `svd('gram')` and by `importance_svd`.

  Nothing knows the norm of the mean gradient. `online_pca` divides by that of
  the devices' own, up to the square root of their number larger: Adam for the
  bases does not mind, SGD needs a rate as many times larger, and
  `captured_energy` is a lower bound.

  Args:
    loss: (params, batch) -> the mean loss of a batch, a scalar.
    tx: the optimizer. What stands before `project` sees one device's gradient:
      put clipping into the optimizer of coordinates, and accumulation into
      `every_k`: `optax.MultiSteps` and `apply_if_finite` around `tx` fail.
    mesh: its axis `axis_name` divides the first axis of all arrays of a batch
      that have one. Others, as a key of `jax.random.key`, are the same on all
      devices: fold `jax.lax.axis_index(axis_name)` into it.
      Other mesh axes may shard parameters and state, automatically. Along
      `axis_name` both are the same: place state by the step's own
      `state_sharding(params)`.
    axis_name: along which devices have different parts of a batch, one name or
      several.
    check_vma: as of `jax.shard_map`; False for losses that it refuses, such as
      those with Pallas kernels or scans that start from constants.

  Returns:
    A `TrainStep`, (params, state, batch) -> (params, state, loss), to be
    jitted.

  Raises:
    ValueError: the mesh has no such axis, or explicit ones.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, whose
    gradients these coordinates are

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
    mesh: that they are on; None for one alone, or for what the compiler sums.
    names: of the axes along which they differ.
  """

  mesh: Mesh | None = None
  names: tuple[str, ...] = ()

  @classmethod
  def along(cls, mesh: Mesh, axis_name: str | tuple[str, ...]) -> 'Devices':
    """Returns those along axes of a mesh, or raises."""
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
    """Returns (params, state, batch) -> three trees, the same everywhere."""
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

    That of what is the same everywhere is summed at once.
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
    """Returns what `tx` makes of the mean of gradients, and its state."""
    if not self.names:
      return tx.update(gradients, state, params, **extra)
    gradients = self._mean_of_rest(gradients, state)
    given = _projection.Given(axis_name=self.names)
    return tx.update(gradients, state, params, given=given, **extra)

  def _mean_of_rest(self, gradients: Any, state: Any) -> Any:
    """Returns gradients with the mean in place of those nobody projects."""
    projected = _projected_paths(state)
    pairs, _ = _tree.flatten(gradients)
    entries = [x if p in projected else self.mean(x) for p, x in pairs]
    return _tree.replace_entries(gradients, entries)


def _projected_paths(state: Any) -> set[str]:
  """Returns the paths of the leaves that a state has bases or seeds for."""
  states = _tree.find(state, _projection.ProjectState)
  return {path for _, x in states for path in _projection.paths(x)}
