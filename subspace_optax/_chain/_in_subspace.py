# SPDX-License-Identifier: Apache-2.0
"""`in_subspace`: the inner optimizer on coordinates, and its state."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _beside
from subspace_optax._chain import _check_inner
from subspace_optax._chain import _dtypes
from subspace_optax._chain import _first_states
from subspace_optax._chain import _per_matrix
from subspace_optax._chain import _spec
from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax.transports import _base
from subspace_optax.transports import _moments
from subspace_optax.transports import _rules


class InSubspaceState(NamedTuple):
  """State of `in_subspace`."""

  inner: Any  # the inner optimizer's state, moments in coords' shape


def in_subspace(
  inner: optax.GradientTransformation,
  spec: _spec.SubspaceSpec,
  *,
  transport: str | _base.Transport = 'keep',
  params: str | None = None,
  per_matrix: bool = False,
  plain: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Runs an optimizer on coordinates, as if they were the gradients.

  The inner optimizer sees one tree, with coordinates in place of projected
  leaves and all other leaves unchanged. `spec.moment_dtype` sets the dtype of
  its state, float32 or wider by default. On coordinates it computes in float32
  or wider, on other leaves in the wider dtype of gradient and moments.

  Args:
    inner: any optax transformation.
    spec: the spec passed to `project`.
    transport: what happens to the inner state when a basis moves: 'keep',
      'first' or 'reset', or a transport from `subspace_optax.transports`.
      Moments of Adam, Lion, momentum, RMSProp and others are registered; see
      `register_moments`.
    params: 'coordinates' passes `inner` the coordinates of the parameters,
      (P^T P)^-1 P^T W, for weight decay or trust ratios in the subspace. That
      costs 2mnr FLOPs per step. `inner.init` gets zeros.
    per_matrix: whether `inner` runs on one matrix at a time, each with its own
      state and counters. Rules that look at a whole matrix, such as Muon, LAMB
      or Adafactor, need this if leaves are stacks of matrices. An `inner` with
      extra arguments gets `layer`, a number for each matrix of a stack, by
      which its random rounding differs.
    plain: optimizer for leaves that are not projected, `inner` by default.

  Returns:
    A transformation whose state is the inner optimizer's.

  Raises:
    ValueError: an unknown transport or `params`; at `init`, an inner optimizer
      that needs params but gets none, that keeps a copy of params, or whose
      moments are not registered although `transport` needs them; at `update`,
      gradients that `project` has not seen, or missing params.
    TypeError: `inner` or `plain` is not an optimizer.

  References:
    He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024; Robert et
    al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024

  Example:
    >>> import optax, subspace_optax as so
    >>> spec = so.SubspaceSpec(rank=128)
    >>> lion = so.in_subspace(optax.scale_by_lion(), spec, transport='first')
    >>> muon = so.in_subspace(
    ...   optax.contrib.scale_by_muon(),
    ...   spec,
    ...   per_matrix=True,
    ...   plain=optax.scale_by_adam(),
    ... )
  """
  phases = InSubspace(inner, spec, transport, params, per_matrix, plain)
  update = _boxes.bare(phases.update)
  return optax.GradientTransformationExtraArgs(phases.init, update)


class InSubspace:
  """The phases of `in_subspace`: `carry_before`, `run` and `carry_after`.

  `carry_before` carries moments to the bases that moved before the coordinates
  were computed. `run` runs the inner optimizer. `carry_after` carries moments
  to the bases that moved afterwards. The arguments are those of `in_subspace`.
  """

  def __init__(
    self,
    inner: optax.GradientTransformation,
    spec: _spec.SubspaceSpec,
    transport: str | _base.Transport = 'keep',
    params: str | None = None,
    per_matrix: bool = False,
    plain: optax.GradientTransformation | None = None,
  ):
    _spec.check_spec(spec)
    if params not in (None, 'coordinates'):
      raise ValueError(f"params must be None or 'coordinates', got {params!r}.")
    _arguments.require_optimizer(inner, 'inner')
    if plain is not None:
      _arguments.require_optimizer(plain, 'plain')
    self.inner = optax.with_extra_args_support(inner)
    self.spec, self.plain = spec, plain
    self.transport = _rules.as_transport(transport)
    self.each = per_matrix or self.transport.resets
    self.takes_params = params is not None

  def init(self, params: Any) -> Any:
    """Returns the first state, boxed as the parameters are."""
    return _first_states.make_state(self.spec, self._first_state, params)

  def _first_state(
    self, params: Any, matches: list[_spec.Match | None], treedef: Any
  ) -> InSubspaceState:
    del params
    templates = treedef.unflatten(
      [_make_template(self.spec, match) for match in matches]
    )
    batch_axes = {
      m.path: m.layout.coords_batch for m in matches if m and m.layout
    }
    matrices, _ = _beside.split(templates, batch_axes)
    _check_inner.check_runs(
      self.inner,
      templates if self.plain is None else matrices,
      matrices,
      batch_axes,
      takes_params=self.takes_params,
      per_matrix=self.each,
    )
    state = self._make_runner(batch_axes).init(templates)
    if self.transport.move is not None:
      what = f'transport={self.transport.name!r}'
      _moments.check_registered(self._inner_state(state), what)
    return InSubspaceState(state)

  def update(
    self, updates: Any, state: InSubspaceState, params: Any = None, **extra: Any
  ) -> tuple[Any, InSubspaceState]:
    """Adds its direction to every node: all phases, one after the other."""
    own = self.carry_before(updates, state)
    directions, new = self.run(updates, own, params, **extra)
    new = jax.tree.map(_sharding.like, new, own)
    return self.carry_after(updates, state, own, directions, new)

  def carry_before(self, updates: Any, state: InSubspaceState) -> Any:
    """Returns the inner state in the bases of this step's coordinates."""
    _check_projected(self.spec, updates)
    nodes = _find_nodes(updates)
    moves = {path: (x, x.before) for path, x in nodes.items() if x.before}
    return self._carry_moments(updates, state.inner, moves)

  def run(
    self, updates: Any, own: Any, params: Any, **extra_args: Any
  ) -> tuple[Any, Any]:
    """Returns directions, and the inner state after them."""
    nodes = _find_nodes(updates)
    runner = self._make_runner(
      {p: x.layout.coords_batch for p, x in nodes.items()}
    )
    coords = self._show_updates(updates)
    weights = self._show_params(updates, params)
    try:
      return runner.update(coords, own, weights, **extra_args)
    except (TypeError, ValueError):
      if not self.each:
        _check_inner.check_moments(runner, own, coords)
      raise

  def carry_after(
    self,
    updates: Any,
    state: InSubspaceState,
    own: Any,
    directions: Any,
    new: Any,
  ) -> tuple[Any, InSubspaceState]:
    """Returns nodes with directions, and the state in the next bases.

    Args:
      updates: the nodes.
      state: the state before the step.
      own: the result of `carry_before`.
      directions: the directions from `run`.
      new: the inner state from `run`.
    """
    nodes = _find_nodes(updates)
    moves = {path: (x, x.after) for path, x in nodes.items() if x.after}
    old_means, means = (
      _find_means(self._inner_state(x), nodes, self.each)
      for x in (state.inner, own)
    )
    new = self._carry_moments(updates, new, moves)
    direct = lambda path, entry, direction: _add_direction(
      entry, direction, old_means.get(path), means.get(path)
    )
    nodes = _tree.map_entries(direct, updates, directions)
    return nodes, InSubspaceState(new)

  def _carry_moments(self, updates: Any, state: Any, moves: _base.Moves) -> Any:
    if not moves or not (self.transport.move or self.transport.resets):
      return state
    own = self._inner_state(state)
    if self.transport.resets:
      coords = self._show_updates(updates)
      coords = coords if self.plain is None else _beside.split(coords, moves)[0]
      own = _per_matrix.restart(self.inner, own, coords, moves)
    else:
      own = _base.carry(self.transport, own, moves, per_matrix=self.each)
    return own if self.plain is None else state._replace(projected=own)

  def _show_updates(self, updates: Any) -> Any:
    """Returns the tree that the inner optimizer sees as gradients."""

    def see(path: str, entry: Any) -> Any:
      del path
      if _is_projected(entry):
        return entry.coords
      return _dtypes.widen(self.spec, entry)

    return _tree.map_entries(see, _tree.unbox(updates))

  def _show_params(self, updates: Any, params: Any) -> Any:
    """Returns the tree that optimizers see as params; None for none."""
    if params is None and self.takes_params:
      raise ValueError(
        "params='coordinates' needs the parameters: call update(gradients, "
        'state, params).'
      )
    if params is None or not (self.takes_params or self.plain):
      return None

    def see(path: str, entry: Any, param: Any) -> Any:
      del path
      if not _is_projected(entry):
        return param
      if not self.takes_params:
        return optax.MaskedNode()
      return _linalg.coordinates(entry.layout, param, entry.basis)

    return _tree.map_entries(see, _tree.unbox(updates), params)

  def _make_runner(self, batch_axes: _per_matrix.BatchAxes) -> Any:
    """Returns the inner optimizer, combined with that of plain leaves."""
    run: Any = self.inner
    if self.each:
      run = _per_matrix.per_matrix(run, batch_axes)
    if self.plain is None:
      return run
    return _beside.run_beside(self.plain, run, batch_axes, self.takes_params)

  def _inner_state(self, state: Any) -> Any:
    return state if self.plain is None else state.projected


def _find_nodes(updates: Any) -> dict[str, _projected.Projected]:
  """Returns the nodes of a tree by path."""
  pairs, _ = _tree.flatten(updates)
  return {path: node for path, node in pairs if _is_projected(node)}


def _find_means(
  state: Any, nodes: dict[str, _projected.Projected], per_matrix: bool
) -> dict[str, jax.Array]:
  """Returns means of gradients by path, for leaves that carry their gradients.

  If a state holds several, it returns the first; if it holds none, an empty
  dict.
  """
  wanted = {p: x.layout for p, x in nodes.items() if x.gradient is not None}
  known = _moments.moments_in(state) if wanted else []
  means = next((m.tree for m in known if m.kind == 'mean'), None)
  if means is None:
    return {}

  def in_place(layout: Any, x: jax.Array) -> jax.Array:
    batch = layout.coords_batch
    return jnp.moveaxis(x, range(len(batch)), batch) if per_matrix else x

  return {
    path: in_place(wanted[path], x)
    for path, x in _tree.flatten(means)[0]
    if path in wanted and not _tree.is_masked(x)
  }


def _make_template(spec: _spec.SubspaceSpec, match: _spec.Match | None) -> Any:
  """Returns the stand-in for a parameter when the inner state is made."""
  if match is None:
    return optax.MaskedNode()
  layout, leaf = match.layout, match.leaf
  if layout is None:
    return _first_states.plain_template(spec, leaf)
  dtype = spec.dtype_of_moments(leaf.dtype)
  return _first_states.zero_coords(layout, leaf, dtype)


def _check_projected(spec: _spec.SubspaceSpec, updates: Any) -> None:
  """Raises if `project` did not run before."""
  nodes = _find_nodes(updates)
  for path, node in nodes.items():
    if node.direction is not None:
      raise ValueError(
        f'gradient {path!r} went through `in_subspace` already; chain '
        '`project`, `in_subspace` and `unproject` in this order, once.'
      )
  if nodes:
    return
  bare = [m.path for m in spec.match(updates) if m and m.layout]
  if bare:
    raise ValueError(
      f'gradient {bare[0]!r} is not projected; chain `project` before '
      '`in_subspace`.'
    )


def _is_projected(entry: Any) -> bool:
  return isinstance(entry, _projected.Projected)


def _add_direction(entry: Any, direction: Any, old_mean: Any, mean: Any) -> Any:
  if _tree.is_masked(entry):
    return direction
  if not _is_projected(entry):
    return direction.astype(entry.dtype)
  return dataclasses.replace(
    entry, direction=direction, old_mean=old_mean, mean=mean
  )
