# SPDX-License-Identifier: Apache-2.0
"""Steps of a projecting optimizer that compute projected gradients directly.

For y = x W, the projected gradient P^T G is (x P)^T dy, so G is not needed
between refreshes of the bases. He et al., `Subspace Optimization for Large
Language Models with Convergence Guarantees
<https://arxiv.org/abs/2410.11289>`_, 2024, train x (W + P B) and merge P B at
every refresh. Here every step is merged, so that B is 0 whenever a gradient is
computed, and costs no products.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _describe
from subspace_optax._chain import _every_k
from subspace_optax._chain import _projection
from subspace_optax._chain import _refresh_bases
from subspace_optax._chain import _spec
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.lifted import _trees
from subspace_optax.projectors import _base
from subspace_optax.steps import _train_step


def compressed_step(
  loss: Callable[..., jax.Array],
  tx: optax.GradientTransformation,
  *,
  value_and_grad: _train_step.Differentiate = jax.value_and_grad,
) -> _train_step.TrainStep:
  """Makes a training step that computes projected gradients directly.

  Parameters, state and steps are those of `tx`, up to rounding. For b inputs of
  an m x n layer, m the projected side, gradient and step cost 4bmn + 2brm +
  2brn + 2rmn FLOPs instead of 6bmn + 4rmn. If the inputs are projected, the
  backward pass keeps x P, of r columns, instead of x. Data parallelism moves rn
  numbers instead of mn.

  If a refresh needs the gradient, as every `update_proj_gap`-th step with
  `projectors.svd`, the step computes whole gradients. Transformations before
  `project` in `tx` see coordinates instead of gradients:
  `optax.clip_by_global_norm` clips the norm of P^T G. Wrappers that make
  updates of the gradients' shapes fail: put `optax.apply_if_finite` around the
  inner optimizer, and use `every_k` for accumulation. `captured_energy` keeps
  its value from the last whole gradient.

  Args:
    loss: (params, *args) -> the mean loss. Params are plain or lifted; see
      `nnx_merge`, `linen_apply` and `dot`. The loss must use lifted params only
      in their layers: their gradient from anywhere else, such as a sum of
      squares over all params, is silently lost. Let `tx` decay weights.
    tx: the optimizer, with `project` in it and no residual.
    value_and_grad: differentiates a function by its first argument; pass one,
      for example, that accumulates over microbatches.

  Returns:
    A `TrainStep`, (params, state, *args) -> (params, state, value). Jit it.

  Raises:
    ValueError: when called: a projector that looks at every gradient, such as
      `online_pca`; a residual rule; no `project` in `tx`; a lifted parameter in
      a layer that can't use it.

  References:
    He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> loss = lambda params, x: jnp.mean(so.rso.dot(x, params['w']) ** 2)
    >>> tx = so.golore(1e-3, rank=2)
    >>> step = jax.jit(so.rso.compressed_step(loss, tx))
    >>> params = {'w': jnp.ones((8, 16))}
    >>> params, state, value = step(params, tx.init(params), jnp.ones((4, 8)))
    >>> print(value)
    64.0
  """

  def step(params, state, *args):
    found = _projections(tx, params, state)
    needs = _needs_gradient(found)
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
      raise ValueError(
        'tx must accept extra arguments, by which it gets coordinates; use '
        '`every_k` instead of `optax.MultiSteps`.'
      )

    def take(f, at, state, **kwargs):
      value, gradients = value_and_grad(f)(at, *args)
      updates, state = tx.update(gradients, state, params, **kwargs)
      return optax.apply_updates(params, updates), state, value

    def compressed(state):
      refreshed = [_refresh(one, params) for one in found]
      matches, bases = _bases(found, refreshed, params)
      f, at = _trees.split(loss, matches, params, bases, None)
      # Pass the refreshed bases, so that `project` does not compute them again.
      known = {
        one.paths: new for one, new in zip(found, refreshed, strict=True)
      }
      return take(f, at, state, given=_projection.Given(refreshed=known))

    if needs is False:
      return compressed(state)
    whole = functools.partial(take, loss, params)
    return _varying.cond(needs, whole, compressed, state)

  of_coords = lambda params, state: _gradients_like(tx, params)
  return _train_step.TrainStep(tx.init, step, gradients=of_coords)


def _gradients_like(tx: Any, params: Any) -> Any:
  """Returns the shapes of the gradients of a compressed step."""
  shapes = {
    path: jax.ShapeDtypeStruct(
      match.layout.coords_shape,
      jnp.promote_types(match.leaf.dtype, jnp.float32),
    )
    for record in _describe.records_of(tx, params)
    for path, match in _projected(record).items()
  }
  take = lambda path, leaf: shapes.get(path, leaf)
  return _tree.map_entries(take, params)


def _projected(record: _describe.Record) -> dict[str, Any]:
  """Returns the matches of a `project`'s leaves, by path."""
  return {m.path: m for m in record.matches if m and m.layout}


class _Found(NamedTuple):
  """A `project` in the optimizer."""

  record: _describe.Record  # its arguments
  paths: tuple[str, ...]  # paths of its leaves
  state: _projection.ProjectState
  first: jax.Array  # shape=(), dtype=bool: whether it may refresh now


def _projections(tx: Any, params: Any, state: Any) -> list[_Found]:
  """Returns every `project` in `tx` that has leaves, with its state."""
  states = {
    _projection.paths(x): (x, first) for x, first in _states(_tree.unbox(state))
  }
  found = []
  for record in _describe.records_of(tx, params):
    paths = tuple(_projected(record))
    if not paths:
      continue
    if paths not in states:
      raise ValueError(
        f'state has no bases for {sorted(paths)}; it must be that of `tx.init`.'
      )
    found.append(_Found(record, paths, *states[paths]))
  return found


def _states(state: Any) -> list[tuple[_projection.ProjectState, jax.Array]]:
  """Returns the states of all `project`s, and whether they may refresh."""
  windows = (_projection.ProjectState, _every_k.EveryKState)
  return [
    (x.project, x.micro_step == 0)
    if isinstance(x, _every_k.EveryKState)
    else (x, jnp.array(True))
    for _, x in _tree.find(state, *windows)
  ]


def _needs_gradient(found: list[_Found]) -> Any:
  """Returns whether the next step looks at gradients: False, or traced."""
  needs: Any = False
  for record, _, state, first in found:
    context = _base.Context(state.count, first)
    of_one = record.projector.needs_gradient(context, state.projector)
    if of_one is True or record.keep_gradient:
      who = 'the residual rule' if record.keep_gradient else ''
      raise ValueError(
        f'{who or record.projector.name} looks at every gradient, so that none '
        'of them can be compressed; take `tx.update`.'
      )
    needs = of_one if needs is False else needs | of_one
  return needs


def _refresh(one: _Found, params: Any) -> _refresh_bases.Refreshed:
  """Returns what one `project` refreshes in the next step."""
  phases = _projection.Projection(one.record.spec, one.record.projector)
  params = _hide_from(one, params)
  return phases.refresh_without_gradients(one.state, params, one.first)


def _hide_from(one: _Found, params: Any) -> Any:
  """Returns `params` with what wrappers hide from a `project` masked."""
  seen = {match.path for match in one.record.matches if match}
  # A wrapper hides a subtree as a whole, or leaf by leaf.
  hidden = {path for path, _ in _tree.flatten(one.state.seed)[0]} - seen
  is_hidden = lambda path, _: _tree.path_str(path) in hidden
  mask = lambda path, x: optax.MaskedNode() if is_hidden(path, x) else x
  return jax.tree.map_with_path(
    mask, params, is_leaf=is_hidden, is_leaf_takes_path=True
  )


def _bases(
  found: list[_Found], refreshed: list[_refresh_bases.Refreshed], params: Any
) -> tuple[list[_spec.Match | None], Any]:
  """Returns the matches and bases of all leaves in the next step."""
  matches: dict[str, _spec.Match] = {}
  bases: dict[str, Any] = {}
  for one, new in zip(found, refreshed, strict=True):
    matches |= _projected(one.record)
    drawn, _ = _tree.flatten(new.subspaces.basis)
    bases |= {path: x for path, x in drawn if not _tree.is_masked(x)}
  pairs, treedef = _tree.flatten(params)
  every = [bases.get(path, optax.MaskedNode()) for path, _ in pairs]
  return [matches.get(path) for path, _ in pairs], treedef.unflatten(every)
