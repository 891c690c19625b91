# SPDX-License-Identifier: Apache-2.0
"""Data parallelism that averages coordinates in the place of gradients.

Under `jax.jit` the compiler averages the gradient of a replicated parameter
before anyone can project it. Here every device projects its own gradient, and
what is averaged has r (m + n) numbers for a matrix of m x n.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec
import optax

from subspace_optax._chain import _projection
from subspace_optax._matrix import _tree
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
    mesh: its axis `axis_name` divides the first axis of all arrays of a batch.
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
  axis_names = (axis_name,) if isinstance(axis_name, str) else axis_name
  if not set(axis_names) <= set(mesh.axis_names):
    raise ValueError(
      f'axis_name={axis_name!r} is none of the mesh axes {mesh.axis_names}.'
    )
  if mesh.explicit_axes:
    raise ValueError(
      f'mesh axes {mesh.explicit_axes} are explicit; make the mesh with '
      'axis_types=(AxisType.Auto, ...).'
    )
  update = optax.with_extra_args_support(tx).update

  def local_step(params, state, batch):
    # Otherwise the gradient of what is the same everywhere is summed at once.
    mine = jax.tree.map(lambda x: lax.pcast(x, axis_name, to='varying'), params)
    value, gradients = jax.value_and_grad(loss)(mine, batch)
    gradients = _mean_of_rest(gradients, state, axis_names)
    given = _projection.Given(axis_name=axis_names)
    updates, state = update(gradients, state, params, given=given)
    params = optax.apply_updates(params, updates)
    return params, state, lax.pmean(value, axis_names)

  same, parts = PartitionSpec(), PartitionSpec(tuple(axis_names))
  step = jax.shard_map(
    local_step,
    mesh=mesh,
    in_specs=(same, same, parts),
    out_specs=(same, same, same),
    axis_names=set(axis_names),
    check_vma=check_vma,
  )
  return _train_step.TrainStep(
    tx.init, step, replicated=tuple(axis_names), mesh=mesh
  )


def _mean_of_rest(
  gradients: Any, state: Any, axis_name: tuple[str, ...]
) -> Any:
  """Returns gradients with the mean in place of those nobody projects."""
  projected = _projected_paths(state)
  pairs, _ = _tree.flatten(gradients)
  entries = [
    x if path in projected else lax.pmean(x, axis_name) for path, x in pairs
  ]
  return _tree.replace_entries(gradients, entries)


def _projected_paths(state: Any) -> set[str]:
  """Returns the paths of the leaves that a state has bases or seeds for."""
  is_ours = lambda x: isinstance(x, _projection.ProjectState)
  states = filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours))
  return {path for x in states for path in _projection.paths(x)}
