# SPDX-License-Identifier: Apache-2.0
"""`subspace`: the three pieces, chained."""

from collections.abc import Callable
import dataclasses
from typing import Any

import optax

from subspace_optax._chain import _dtypes
from subspace_optax._chain import _every_k
from subspace_optax._chain import _in_subspace
from subspace_optax._chain import _projection
from subspace_optax._chain import _spec
from subspace_optax._chain import _unproject
from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _sign
from subspace_optax._matrix import _tree
from subspace_optax.projectors import _base
from subspace_optax.residuals import _base as _residual
from subspace_optax.transports import _base as _transport


def subspace(
  spec: _spec.SubspaceSpec,
  projector: _base.Projector,
  inner: optax.GradientTransformation,
  *,
  transport: str | _transport.Transport = 'keep',
  params: str | None = None,
  per_matrix: bool = False,
  plain: optax.GradientTransformation | None = None,
  residual: _residual.Residual | None = None,
  scale: Any = 1.0,
  every_k: int = 1,
  after: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Chains `project`, `in_subspace` and `unproject`.

  A residual rule with feedback, such as `residuals.error_feedback`, adds the
  residual of one step to the next gradient, before `project`.

  Args:
    spec: which leaves to project, as which matrices, at which rank. If its
      `only_if_smaller` is True and the projector stores no basis, the basis is
      not counted.
    projector: how to find and move bases.
    inner: the optimizer that runs on coordinates. With a residual, it must
      return directions along the gradient, as `optax.scale_by_adam` does.
    transport: see `in_subspace`.
    params: see `in_subspace`.
    per_matrix: see `in_subspace`.
    plain: see `in_subspace`.
    residual: see `unproject`.
    scale: see `unproject`.
    every_k: k, the number of micro-steps per step. Every micro-step adds its
      coordinates to a mean of rank r. The last one runs the inner optimizer,
      `unproject` and `after` on the mean; the other k - 1 updates are zero.
      Bases do not move within a step: its first gradient, or
      `refresh_gradients`, refreshes them, and its last gradient tracks them.
      Gaps count steps. (`optax.MultiSteps` as `inner` also keeps means of rank
      r, but then bases may move between micro-steps, and transformations
      chained after it run at every micro-step.)
    after: a transformation of whole updates, such as weight decay and learning
      rate. It runs once every k micro-steps; transformations chained after
      `subspace` run at every one, and schedules of `optax.inject_hyperparams`
      count all of them.

  Returns:
    A transformation from gradients to updates of the same dtypes, without
    learning rate. Updates are float32 or wider until `after` has run.

  Raises:
    ValueError: see the three pieces; `every_k` below 1; `every_k` above 1 with
      a residual, which needs gradients that accumulation does not keep; at
      `init`, an inner optimizer that steps against the gradient although there
      is a residual, or `inner` and `plain` that step in opposite directions
      relative to the gradient.
    TypeError: see the three pieces; `every_k` is not an int.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, and Liang
    et al., `Online Subspace Descent <https://arxiv.org/abs/2408.12857>`_, 2024

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = optax.chain(
    ...   so.subspace(
    ...     so.SubspaceSpec(rank=0.25),
    ...     so.projectors.stiefel(update_proj_gap=200),
    ...     optax.scale_by_adam(),
    ...     transport='first',
    ...   ),
    ...   optax.add_decayed_weights(0.01),
    ...   optax.scale_by_learning_rate(1e-3),
    ... )
  """
  _arguments.check_static(every_k, 'every_k')
  if every_k > 1 and residual is not None:
    raise ValueError(
      f'every_k={every_k} keeps coordinates of the gradients, not what a '
      'residual rule needs; wrap the optimizer in optax.MultiSteps.'
    )
  with_params = params is not None
  if plain is not None:
    plain = _sign.require_same_side(plain, inner, with_params=with_params)
  if residual is not None:
    name = f'inner beside residual {residual.name!r}'
    inner = _sign.require_along(inner, name, with_params=with_params)
  if after is not None:
    inner = _sign.require_one_turn(inner, after, with_params=with_params)
  project = _projection.Projection(
    spec,
    projector,
    keep_gradient=residual is not None,
    keep_wide=True,
    hand_out=residual is not None and residual.together is not None,
  )
  spec = _count_stored(project)
  project = dataclasses.replace(project, spec=spec)
  in_subspace = _in_subspace.InSubspace(
    inner, spec, transport, params, per_matrix, plain
  )
  unproject = _unproject.unproject_any(scale, residual, spec, allow_empty=True)
  if every_k > 1:
    rest = unproject if after is None else optax.chain(unproject, after)
    tx = _every_k.every_k(every_k, spec, project, in_subspace, rest)
    return _dtypes.round_last(tx)
  feedback = None if residual is None else residual.feedback
  tx = _chain_stages(project, in_subspace, unproject, feedback)
  return _dtypes.round_last(tx if after is None else optax.chain(tx, after))


def _count_stored(project: _projection.Projection) -> _spec.SubspaceSpec:
  """Returns a spec that counts no basis if the projector stores none."""
  spec = project.spec
  if spec.only_if_smaller is True and project.projector.rebuild is not None:
    return dataclasses.replace(spec, only_if_smaller='moments')
  return spec


def _chain_stages(
  project: _projection.Projection,
  in_subspace: _in_subspace.InSubspace,
  unproject: optax.GradientTransformationExtraArgs,
  feedback: Callable | None,
) -> optax.GradientTransformationExtraArgs:
  """Runs the stages one after the other.

  With `feedback`, the residual of one step is added to the next gradient.
  """

  def init(params):
    return tuple(x.init(params) for x in (project, in_subspace, unproject))

  def update(updates, state, params=None, **extra_args):
    if not isinstance(state, tuple) or len(state) != 3:
      raise ValueError(
        'the state is not one of `subspace`; call init of this optimizer.'
      )
    bases, inner, left = state
    if feedback is not None:
      updates = _add_left_over(feedback, updates, left.residual)
    nodes, bases = project.update(updates, bases, params, **extra_args)
    nodes, inner = in_subspace.update(nodes, inner, params, **extra_args)
    updates, left = unproject.update(nodes, left)
    return updates, (bases, inner, left)

  return optax.GradientTransformationExtraArgs(init, _boxes.bare(update))


def _add_left_over(feedback: Callable, gradients: Any, left_over: Any) -> Any:
  """Returns the gradients plus the residuals that the last step kept."""
  known = dict(_tree.flatten(left_over)[0])

  def add(path: str, gradient: Any) -> Any:
    state = known.get(path)  # `project` checks the tree
    if state is None or _tree.is_masked(gradient) or _tree.is_masked(state):
      return gradient
    if gradient.shape != state.shape:
      raise ValueError(
        f'gradient {path!r} has shape {gradient.shape}, its parameter had '
        f'{state.shape} at init.'
      )
    return feedback(gradient, state)

  return _tree.map_entries(add, gradients)
