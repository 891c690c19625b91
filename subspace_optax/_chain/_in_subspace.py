# SPDX-License-Identifier: Apache-2.0
"""The inner optimizer on coordinates: the piece that owns its state."""

from collections.abc import Iterable
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _dtypes
from subspace_optax._chain import _per_matrix
from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _sign
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

  The inner optimizer sees one tree: coordinates in place of projected leaves,
  everything else as it is. Its state has the dtype that `spec.moment_dtype`
  says, float32 or wider by default. Its arithmetic on coordinates is float32 or
  wider, and on other leaves that of the gradient and the moments.

  Args:
    inner: any optax transformation.
    spec: the one given to `project`.
    transport: what happens to the inner state when a basis moves, from
      `subspace_optax.transports`, or 'keep', 'first' or 'reset'. Moments are
      known for Adam, Lion, momentum, RMSProp and others; see
      `register_moments`.
    params: 'coordinates' hands `inner` the coordinates of the parameters,
      (P^T P)^-1 P^T W, for weight decay or trust ratios in the subspace, at
      2mnr FLOPs a step. Its `init` sees zeros.
    per_matrix: whether `inner` sees one matrix at a time, each with a state of
      its own, counters included: for rules that look at a whole matrix, such
      as Muon, LAMB or Adafactor, where leaves are stacks of matrices.
    plain: optimizer of the leaves that are not projected, `inner` by default.

  Returns:
    A transformation whose state is the inner optimizer's.

  Raises:
    ValueError: an unknown transport or `params`; at `init`, an inner optimizer
      that needs params without them or keeps a copy of them, or one whose
      moments `transport` does not know; at `update`, gradients that `project`
      has not seen, or params that are missing.
    TypeError: `inner` or `plain` is no optimizer.

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
  """The phases of `in_subspace`: `carry`, `run`, and `carry` once more.

  Moments are carried along where a basis moved before the coordinates, then the
  inner optimizer runs, then they are carried where one moved behind it. Takes
  the arguments of `in_subspace`.
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
    _sign.require_optimizer(inner, 'inner')
    if plain is not None:
      _sign.require_optimizer(plain, 'plain')
    self.inner = optax.with_extra_args_support(inner)
    self.spec, self.plain = spec, plain
    self.transport = _rules.as_transport(transport)
    self.each = per_matrix or self.transport.resets
    self.takes_params = params is not None

  def init(self, params: Any) -> Any:
    """Returns the first state, boxed as the parameters are."""
    return _boxes.box_state(self._first_state, params)

  def _first_state(self, params: Any) -> InSubspaceState:
    matches = self.spec.match(params)
    _, treedef = _tree.flatten(params)
    templates = treedef.unflatten(
      [_template(self.spec, match) for match in matches]
    )
    layouts = {m.path: m.layout for m in matches if m and m.layout}
    batch_axes = {path: x.coords_batch for path, x in layouts.items()}
    mine = templates if self.plain is None else _split(templates, layouts)[0]
    _check_params(self._alone(batch_axes), mine, self.takes_params)
    if not self.each:
      _check_trees(self.inner, mine, layouts, batch_axes)
    state = self._runner(batch_axes).init(templates)
    if self.transport.move is not None:
      what = f'transport={self.transport.name!r}'
      _moments.check_registered(self._of_inner(state), what)
    state = _sharding.on_mesh_of([m.leaf for m in matches if m], state)
    return InSubspaceState(state)

  def update(
    self, updates: Any, state: InSubspaceState, params: Any = None, **extra: Any
  ) -> tuple[Any, InSubspaceState]:
    """Gives every node its direction: all phases, one after the other."""
    own = self.carry_before(updates, state)
    directions, new = self.run(updates, own, params, **extra)
    return self.carry_after(updates, state, own, directions, new)

  def carry_before(self, updates: Any, state: InSubspaceState) -> Any:
    """Returns the inner state in the bases of this step's coordinates."""
    pairs, _ = _tree.flatten(updates)
    _check_projected(self.spec, updates, pairs)
    nodes = _nodes(pairs)
    moves = {path: (x, x.before) for path, x in nodes.items() if x.before}
    return self._carry(updates, state.inner, moves)

  def run(
    self, updates: Any, own: Any, params: Any, **extra_args: Any
  ) -> tuple[Any, Any]:
    """Returns directions, and the inner state, whose dtypes stay."""
    pairs, treedef = _tree.flatten(updates)
    runner = self._runner(_batch_axes(_nodes(pairs)))
    coords, weights = self._coords(updates), None
    if self.takes_params or (self.plain is not None and params is not None):
      entries = _param_coords(pairs, params, self.takes_params)
      weights = treedef.unflatten(entries)
    try:
      directions, new = runner.update(coords, own, weights, **extra_args)
    except (TypeError, ValueError):
      if not self.each:
        _check_moments(runner, own, coords)
      raise
    return directions, jax.tree.map(_sharding.like, new, own)

  def rest(
    self, updates: Any, own: Any, params: Any, **extra_args: Any
  ) -> tuple[Any, Any]:
    """Returns what `run` does where it does not run: zeros, and the state."""
    run = functools.partial(self.run, updates, params=params, **extra_args)
    directions, _ = _sharding.result_types(run, own)
    return jax.tree.map(_sharding.zeros, directions), own

  def carry_after(
    self,
    updates: Any,
    state: InSubspaceState,
    own: Any,
    directions: Any,
    new: Any,
  ) -> tuple[Any, InSubspaceState]:
    """Returns nodes with directions, and the state in the bases that follow.

    Args:
      updates: the nodes.
      state: as it was before the step.
      own: of `carry_before`.
      directions: of `run`, as the next.
      new: the inner state after it.
    """
    pairs, _ = _tree.flatten(updates)
    nodes = _nodes(pairs)
    moves = {path: (x, x.after) for path, x in nodes.items() if x.after}
    old_means, means = (
      _means_of(self._of_inner(x), nodes, self.each) for x in (state.inner, own)
    )
    new = self._carry(updates, new, moves)
    entries = [
      _with_direction(entry, direction, old_means.get(path), means.get(path))
      for (path, entry), (_, direction) in zip(
        pairs, _tree.flatten(directions)[0], strict=True
      )
    ]
    return _tree.replace_entries(updates, entries), InSubspaceState(new)

  def _carry(self, updates: Any, state: Any, moves: _base.Moves) -> Any:
    if not moves or not (self.transport.move or self.transport.resets):
      return state
    own = self._of_inner(state)
    if self.transport.resets:
      coords = self._coords(updates)
      coords = coords if self.plain is None else _split(coords, moves)[0]
      own = _per_matrix.restart(self.inner, own, coords, moves)
    else:
      own = _base.carry(self.transport, own, moves, per_matrix=self.each)
    return own if self.plain is None else state._replace(projected=own)

  def _coords(self, updates: Any) -> Any:
    pairs, treedef = _tree.flatten(updates)
    return treedef.unflatten([_coords(self.spec, x) for _, x in pairs])

  def _alone(self, batch_axes: _per_matrix.BatchAxes) -> Any:
    if not self.each:
      return self.inner
    return _per_matrix.per_matrix(self.inner, batch_axes)

  def _runner(self, batch_axes: _per_matrix.BatchAxes) -> Any:
    """Returns the inner optimizer, and beside it that of plain leaves."""
    run = self._alone(batch_axes)
    if self.plain is None:
      return run
    return _beside(self.plain, run, batch_axes, self.takes_params)

  def _of_inner(self, state: Any) -> Any:
    return state if self.plain is None else state.projected


def _nodes(pairs: list) -> dict[str, _projected.Projected]:
  return {path: node for path, node in pairs if _is_projected(node)}


def _batch_axes(
  nodes: dict[str, _projected.Projected],
) -> _per_matrix.BatchAxes:
  return {path: x.layout.coords_batch for path, x in nodes.items()}


class BesideState(NamedTuple):
  """State of two optimizers that share a tree."""

  projected: Any  # of `inner`; `MaskedNode` for plain leaves
  plain: Any  # of `plain`; `MaskedNode` for projected leaves


def _beside(
  plain: optax.GradientTransformation,
  run: Any,
  projected: Iterable[str],
  takes_params: bool,
) -> Any:
  """Returns `run` on leaves with paths in `projected`, `plain` on the rest."""
  plain = optax.with_extra_args_support(plain)

  def init(params):
    mine, rest = _split(params, projected)
    return BesideState(run.init(mine), plain.init(rest))

  def update(updates, state, params=None, **extra_args):
    mine, rest = _split(updates, projected)
    params = (None, None) if params is None else _split(params, projected)
    weights = params[0] if takes_params else None
    mine, a = run.update(mine, state.projected, weights, **extra_args)
    rest, b = plain.update(rest, state.plain, params[1], **extra_args)
    merge = lambda x, y: y if _tree.is_masked(x) else x
    both = jax.tree.map(merge, mine, rest, is_leaf=_tree.is_masked)
    return both, BesideState(a, b)

  return optax.GradientTransformationExtraArgs(init, update)


def _split(tree: Any, projected: Iterable[str]) -> tuple[Any, Any]:
  """Returns the tree without plain leaves, and that without projected ones."""
  pairs, treedef = _tree.flatten(tree)
  hide = optax.MaskedNode()
  mine = [x if path in projected else hide for path, x in pairs]
  rest = [hide if path in projected else x for path, x in pairs]
  return treedef.unflatten(mine), treedef.unflatten(rest)


def _means_of(
  state: Any, nodes: dict[str, _projected.Projected], per_matrix: bool
) -> dict[str, jax.Array]:
  """Returns means of gradients by path, for leaves that carry their gradients.

  The first that are found, where a state holds several; none if none is known.
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


def _param_coords(pairs: list, params: Any, projected: bool) -> list[Any]:
  """Returns the coordinates of parameters, if wanted, and plain ones as is."""
  if params is None:
    raise ValueError(
      "params='coordinates' needs the parameters: call update(gradients, "
      'state, params).'
    )
  return [
    param
    if not _is_projected(entry)
    else _linalg.coordinates(entry.layout, param, entry.basis)
    if projected
    else optax.MaskedNode()
    for (_, entry), (_, param) in zip(
      pairs, _tree.flatten(params)[0], strict=True
    )
  ]


def _template(spec: _spec.SubspaceSpec, match: _spec.Match | None) -> Any:
  """Returns what stands for a parameter when the inner state is made."""
  if match is None:
    return optax.MaskedNode()
  layout, dtype = match.layout, spec.dtype_of_moments(match.leaf.dtype)
  if layout is None:
    leaf = match.leaf
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)
  static = (layout.coords_shape, dtype)
  return layout.place_coords(jnp.zeros, static, (), match.leaf)


def _works(run: Any, tree: Any, params: Any) -> bool:
  """Whether an optimizer takes a step on a tree, as far as types tell."""
  try:
    jax.eval_shape(lambda u, p: run.update(u, run.init(u), p), tree, params)
    return True
  except Exception:  # for any reason: an extra argument may be missing, too
    return False


def _check_trees(
  inner: Any, templates: Any, layouts: Any, batch_axes: _per_matrix.BatchAxes
) -> None:
  """Raises if the inner optimizer can only see one matrix at a time."""
  if _works(inner, templates, None) or _works(inner, templates, templates):
    return
  alone = _per_matrix.per_matrix(inner, batch_axes)
  matrices = _split(templates, layouts)[0]
  if jax.tree.leaves(matrices) and _works(alone, matrices, None):
    raise ValueError(
      'inner fails on a tree of coordinates and works on one matrix at a time, '
      'as Muon does: so.subspace(..., per_matrix=True, plain='
      'optax.scale_by_adam()) gives it one.'
    )


def _check_params(run: Any, templates: Any, takes_params: bool) -> None:
  """Raises if the inner optimizer needs params that it does not get."""
  if not jax.tree.leaves(templates):
    return
  works = functools.partial(_works, run, templates)
  if not takes_params and not works(None) and works(templates):
    raise ValueError(
      "inner needs params: so.subspace(..., params='coordinates') gives it "
      'their coordinates in the subspace, which no ready-made optimizer does. '
      'For weight decay of the whole matrix, use `weight_decay` of the '
      'ready-made optimizers or chain `optax.add_decayed_weights` after '
      '`unproject`, with `optax.scale_by_adam` in place of `optax.adamw` here.'
    )
  if takes_params and _copies_params(run, templates):
    raise ValueError(
      'inner keeps a copy of the params in its state, which would go stale '
      'whenever a basis moves; wrap it around the whole optimizer instead.'
    )


def _copies_params(run: Any, templates: Any) -> bool:
  """Whether the initial state depends on the values of the params."""

  def depends(value: float) -> Any:
    tiny = lambda x: jnp.full((1,) * len(x.shape), value, x.dtype)
    return run.init(jax.tree.map(tiny, templates))

  try:
    with jax.ensure_compile_time_eval():  # under jit, too
      zeros, ones = (jax.tree.leaves(depends(value)) for value in (0.0, 1.0))
      return any(
        bool(jnp.any(x != y)) for x, y in zip(zeros, ones, strict=True)
      )
  except Exception:  # a rule for matrices of a certain size
    return False


def _check_projected(spec: Any, updates: Any, pairs: list) -> None:
  """Raises where `project` should have been, and was not."""
  if any(_is_projected(entry) for _, entry in pairs):
    for path, entry in pairs:
      if _is_projected(entry) and entry.direction is not None:
        raise ValueError(
          f'gradient {path!r} went through `in_subspace` already; chain '
          '`project`, `in_subspace` and `unproject` in this order, once.'
        )
    return
  bare = [m.path for m in spec.match(updates) if m and m.layout]
  if bare:
    raise ValueError(
      f'gradient {bare[0]!r} is not projected; chain `project` before '
      '`in_subspace`.'
    )


def _check_moments(runner: Any, state: Any, coords: Any) -> None:
  """Raises for the leaf whose moments don't fit its coordinates, if any."""
  pairs, treedef = _tree.flatten(coords)
  paths = treedef.unflatten([path for path, _ in pairs])

  def check(moment: Any, coord: Any, path: str) -> None:
    if _tree.is_masked(moment) or moment.ndim != coord.ndim:
      return
    if moment.shape != coord.shape:
      raise ValueError(
        f'gradient {path!r} has coordinates of shape {coord.shape}, but init '
        f'made moments of shape {moment.shape}; give update the tree that init '
        'was given, or take a state of another rank over by '
        'subspace_optax.resize_rank.'
      )

  optax.tree.map_params(
    runner, check, state, coords, paths, is_leaf=_tree.is_masked
  )


def _is_projected(entry: Any) -> bool:
  return isinstance(entry, _projected.Projected)


def _coords(spec: _spec.SubspaceSpec, entry: Any) -> Any:
  return entry.coords if _is_projected(entry) else _dtypes.widen(spec, entry)


def _with_direction(
  entry: Any, direction: Any, old_mean: Any, mean: Any
) -> Any:
  if _tree.is_masked(entry):
    return direction
  if not _is_projected(entry):
    return direction.astype(entry.dtype)
  return dataclasses.replace(
    entry, direction=direction, old_mean=old_mean, mean=mean
  )
