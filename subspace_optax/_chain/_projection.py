# SPDX-License-Identifier: Apache-2.0
"""The phases of `project`: refresh, coordinates, track.

Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Eq. (9). Steps
that are more than `project`, `in_subspace`, `unproject` in a row compose them.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_optax import bases
from subspace_optax._chain import _check_matches
from subspace_optax._chain import _describe
from subspace_optax._chain import _dtypes
from subspace_optax._chain import _matrices
from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.projectors import _base


class Given(NamedTuple):
  """What the caller of an optimizer's `update` does in the place of `project`.

  Steps that compose the phases of `project` hand it down the chain as the extra
  argument `given`.

  Attributes:
    axis_name: a mapped axis along which coordinates are to be averaged; plain
      leaves are averages already.
    refreshed: by the paths of its leaves, what each `project` makes of its
      bases in this step. Updates are coordinates then.
  """

  axis_name: Any = None
  refreshed: Mapping[tuple[str, ...], 'Refreshed'] | None = None


class Refreshed(NamedTuple):
  """What a refresh makes of a state; trees like those in it."""

  old_basis: Any  # before the refresh
  subspaces: _base.Subspaces  # after it
  moves: Any  # from one to the other; None if the rule makes none
  own: Any  # the projector's own state
  stored: Any  # the basis as it is kept


class Seen(NamedTuple):
  """What the gradients of a step are, once their coordinates are taken."""

  matches: list[_spec.Match | None]
  matrices: Any
  coords: Any
  refreshed: Refreshed


class ProjectState(NamedTuple):
  """State of `project`; trees have the parameters' structure."""

  count: jax.Array  # shape=(), dtype=int32
  seed: Any  # tree, leaf shape=(*batch,), dtype=uint32
  subspaces: _base.Subspaces
  projector: Any  # the projector's own state


@dataclasses.dataclass(frozen=True)
class Projection:
  """The phases of `project`: `refresh`, `coordinates`, `track`.

  Attributes:
    spec: see `project`, as the next three.
    projector: how bases are found and moved.
    keep_gradient: whether nodes carry the gradient.
    axis_name: of a mapped axis, along which plain leaves are averaged, too.
    keep_wide: whether updates come back in float32 or wider, and plain leaves
      in the dtype of their moments, to be rounded behind all that follows.
  """

  spec: _spec.SubspaceSpec
  projector: _base.Projector
  keep_gradient: bool = False
  axis_name: Any = None
  keep_wide: bool = False

  def __post_init__(self):
    _spec.check_spec(self.spec)
    if not isinstance(self.projector, _base.Projector):
      raise TypeError(
        'projector must come from subspace_optax.projectors, got '
        f'{self.projector!r}.'
      )

  @property
  def storage(self) -> bases.Storage:
    """How bases live between steps."""
    return bases.storage(self.spec.basis_dtype, self.projector)

  def init(self, params: Any) -> Any:
    """Returns the first state, boxed as the parameters are."""
    matches = self.spec.match(params)
    _check_matches.check_matches(self.spec, matches)
    if not _describe.is_asked():
      _matrices.remember_names(params)
    _ = self.storage  # which raises for what it can't hold
    _describe.record(self.spec, matches, self.projector, self.keep_gradient)
    return _boxes.box_state(self._first_state, params)

  def _first_state(self, params: Any) -> ProjectState:
    spec, projector, storage = self.spec, self.projector, self.storage
    matches = spec.match(params)
    _, treedef = _tree.flatten(params)
    make = functools.partial(_matrices.per_matrix, matches, treedef)
    subspaces = _base.Subspaces(
      basis=(
        make(functools.partial(_first_basis, spec, projector, storage.first))
        if storage.first
        else ()
      ),
      captured_energy=make(_zero),
      orthogonality_error=make(_zero),
      drift=make(_zero),
    )
    state = ProjectState(
      count=jnp.zeros((), jnp.int32),
      seed=make(functools.partial(seeds_of, spec)),
      subspaces=subspaces,
      # Whether a basis moves may depend on the gradient, and so what counts it.
      projector=_varying.vary_as_any(
        projector.init(subspaces, functools.partial(make, _zero_coords)),
        [m.leaf for m in matches if m],
      ),
    )
    return _sharding.on_mesh_of([m.leaf for m in matches if m], state)

  def update(
    self,
    updates: Any,
    state: ProjectState,
    params: Any = None,
    *,
    refresh_gradients: Any = None,
    given: Given | None = None,
    **extra_args: Any,
  ) -> tuple[Any, ProjectState]:
    """Takes gradients to nodes: all phases, one after the other."""
    del extra_args
    given = given or Given()
    always = jnp.array(True)
    seen = self.see(updates, state, params, refresh_gradients, given, always)
    return self.track(updates, state, seen, given)

  def see(
    self,
    updates: Any,
    state: ProjectState,
    params: Any,
    refresh_gradients: Any,
    given: Given,
    active: jax.Array,
  ) -> Seen:
    """Refreshes bases and takes coordinates of the gradients.

    Args:
      updates: gradients; or coordinates, if `given.refreshed`.
      state: of `init`.
      params: the parameters, if they are known.
      refresh_gradients: see `project`.
      given: what the caller does itself.
      active: a boolean scalar: whether bases may be refreshed.
    """
    if given.refreshed is not None:
      return self._see_coordinates(
        updates, state, params, refresh_gradients, given
      )
    _matrices.check_shapes(updates, params, 'its parameter')
    axis_name = self._averaged(given)
    matches, matrices = self._matrices(state, updates, axis_name)
    sources = matrices
    if refresh_gradients is not None:
      _matrices.check_shapes(updates, refresh_gradients, 'refresh_gradients')
      shown = _matrices.masked_like(updates, refresh_gradients)
      _, sources = self._matrices(state, shown, axis_name)
    refreshed = self.refresh(state, matrices, sources, active)
    return self.coordinates(matches, matrices, refreshed)

  def refresh(
    self, state: ProjectState, matrices: Any, sources: Any, active: jax.Array
  ) -> Refreshed:
    """Moves the bases that are due, if `active`, by the gradients `sources`."""
    return _refresh(self.spec, self.projector, state, active, matrices, sources)

  def refresh_without_gradients(
    self, state: ProjectState, params: Any, active: jax.Array
  ) -> Refreshed:
    """Does so where no rule looks at a gradient in this step."""
    matches = _matrices.matches_of(self.spec, state, params)
    matrices = _matrices.without_gradients(state, matches, params)
    return self.refresh(state, matrices, matrices, active)

  def coordinates(
    self, matches: list[_spec.Match | None], matrices: Any, refreshed: Refreshed
  ) -> Seen:
    """Takes P^T G of every matrix, and notes how much of G that is."""
    basis = refreshed.subspaces.basis
    coords = jax.tree.map(_coords, basis, matrices)
    captured = jax.tree.map(
      _captured, refreshed.subspaces.captured_energy, matrices, coords, basis
    )
    subspaces = refreshed.subspaces._replace(captured_energy=captured)
    refreshed = refreshed._replace(subspaces=subspaces)
    return Seen(matches, matrices, coords, refreshed)

  def track(
    self,
    updates: Any,
    state: ProjectState,
    seen: Seen,
    given: Given,
    active: jax.Array | None = None,
  ) -> tuple[Any, ProjectState]:
    """Moves the bases behind the coordinates; returns nodes and the state.

    Args:
      updates: the gradients, whose plain leaves pass.
      state: as it was before the step.
      seen: of `see`.
      given: what the caller does itself.
      active: a boolean scalar: whether bases move and the step counts; None
        for always.
    """
    projector, refreshed = self.projector, seen.refreshed
    move = projector.track if active is None else _base.resting(projector.track)
    active = jnp.array(True) if active is None else active
    context = _base.Context(state.count, active, refreshed.moves)
    subspaces, after, own = move(
      context, seen.matrices, seen.coords, refreshed.subspaces, refreshed.own
    )
    if self.storage.write is not None:
      subspaces = subspaces._replace(basis=refreshed.stored)
    own = jax.tree.map(_varying.vary_as, own, state.projector)
    steps = optax.safe_increment(state.count)
    count = jnp.where(active, steps, state.count)
    new_state = ProjectState(count, state.seed, subspaces, own)
    return self._nodes(updates, seen, after, given), new_state

  def _nodes(self, updates: Any, seen: Seen, after: Any, given: Given) -> Any:
    """Returns gradients with a node in the place of every projected leaf."""
    refreshed = seen.refreshed
    basis = refreshed.subspaces.basis
    nothing = jax.tree.map(lambda _: None, basis)
    nodes = jax.tree.map(
      functools.partial(_node, self),
      basis,
      refreshed.old_basis,
      seen.matrices,
      seen.coords,
      nothing if refreshed.moves is None else refreshed.moves,
      nothing if after is None else after,
    )

    def plain(x: Any) -> Any:
      if self.axis_name is not None and given.axis_name is None:
        x = lax.pmean(x, self.axis_name)
      return x

    widen = _dtypes.widen if self.keep_wide else lambda spec, x: x
    entries = [
      node
      if match and match.layout
      else widen(self.spec, plain(entry) if match else entry)
      for match, (_, entry), (_, node) in zip(
        seen.matches,
        _tree.flatten(updates)[0],
        _tree.flatten(nodes)[0],
        strict=True,
      )
    ]
    return _tree.replace_entries(updates, entries)

  def _see_coordinates(
    self,
    updates: Any,
    state: ProjectState,
    params: Any,
    refresh_gradients: Any,
    given: Given,
  ) -> Seen:
    _matrices.check_coordinates(params, self.keep_gradient, refresh_gradients)
    matches = _matrices.matches_of(self.spec, state, params)
    matrices = _matrices.without_gradients(
      state, matches, params, self._averaged(given)
    )
    coords, matrices = _matrices.given_coords(updates, matrices)
    refreshed = (given.refreshed or {}).get(paths(state))
    if refreshed is None:
      active = jnp.array(True)
      refreshed = self.refresh(state, matrices, matrices, active)
    return Seen(matches, matrices, coords, refreshed)

  def _matrices(
    self, state: ProjectState, gradients: Any, axis_name: Any
  ) -> tuple[list[_spec.Match | None], Any]:
    matches = _matrices.matches_of(self.spec, state, gradients)
    matrices = _matrices.of_gradients(
      state, matches, axis_name, self.keep_gradient, gradients
    )
    return matches, matrices

  def _averaged(self, given: Given) -> Any:
    """Returns the mapped axis along which coordinates are averaged."""
    if None not in (given.axis_name, self.axis_name):
      raise ValueError(
        f'`project` averages along axis_name={self.axis_name!r} already; leave '
        'it out inside `data_parallel_step`.'
      )
    return given.axis_name or self.axis_name


def paths(state: ProjectState) -> tuple[str, ...]:
  """Returns the paths of the leaves that a state has bases for."""
  pairs, _ = _tree.flatten(state.seed)
  return tuple(path for path, seed in pairs if not _tree.is_masked(seed))


def _refresh(
  spec: _spec.SubspaceSpec,
  projector: _base.Projector,
  state: ProjectState,
  active: jax.Array,
  matrices: Any,
  sources: Any,
) -> Refreshed:
  """Refreshes the bases that are due, if `active`."""
  storage = bases.storage(spec.basis_dtype, projector)
  stored = state.subspaces.basis
  basis = storage.read(matrices, stored, state.projector)
  subspaces = state.subspaces._replace(basis=basis)
  context = _base.Context(state.count, active)
  subspaces, moves, own = projector.refresh(
    context, sources, subspaces, state.projector
  )
  if storage.write is not None and moves is not None:
    stored, subspaces, moves = storage.write(
      matrices, stored, basis, subspaces, moves
    )
  return Refreshed(basis, subspaces, moves, own, stored)


def _zero(path: str, leaf: Any, layout: _layout.Layout) -> jax.Array:
  """Returns a float32 zero per matrix."""
  del path
  return layout.place_values(jnp.zeros, (layout.batch_shape,), (), leaf)


def _zero_coords(path: str, leaf: Any, layout: _layout.Layout) -> jax.Array:
  del path
  static = (layout.coords_shape, jnp.dtype(jnp.float32))
  return layout.place_coords(jnp.zeros, static, (), leaf)


def seeds_of(
  spec: _spec.SubspaceSpec, path: str, leaf: Any, layout: _layout.Layout
) -> jax.Array:
  """Returns a seed per matrix: the same on every host and after a resume."""
  # crc32, since Python's hash of a string differs between processes.
  group = spec.key_group(path) if spec.key_group else path
  path_hash = np.uint32(zlib.crc32(group.encode()))
  static = (spec.seed, layout.batch_shape)
  return layout.place_values(_linalg.seeds, static, (path_hash,), leaf)


def _first_basis(
  spec: _spec.SubspaceSpec,
  projector: _base.Projector,
  first: Callable[..., Any],
  path: str,
  leaf: Any,
  layout: _layout.Layout,
) -> Any:
  seed = seeds_of(spec, path, leaf, layout)
  return first(projector.sample, seed, layout, leaf)


def _coords(basis: jax.Array, matrix: _base.Matrix) -> jax.Array:
  coords = matrix.layout.project(matrix.gradient, basis)
  return matrix.layout.settle_coords(coords, matrix.gradient)


def _captured(
  last: jax.Array, matrix: _base.Matrix, coords: jax.Array, basis: jax.Array
) -> jax.Array:
  """Returns ||P^T G||^2 / ||G||^2, or the last value where G tells nothing.

  For P with columns of length 1 on average, whatever its scale.
  """
  layout = matrix.layout
  scale = layout.basis_energy(_linalg.widen(basis)) / layout.rank
  ratio = layout.coords_energy(coords) / (matrix.energy * scale)
  return jnp.where(matrix.ok, ratio.astype(last.dtype), last)


def _node(
  phases: Projection, basis, old_basis, matrix, coords, before, after
) -> _projected.Projected:
  dtype = matrix.like.dtype
  wide = jnp.promote_types(dtype, jnp.float32)
  return _projected.Projected(
    coords=coords,
    basis=basis,
    before=before,
    after=after,
    gradient=matrix.gradient if phases.keep_gradient else None,
    old_basis=old_basis if phases.keep_gradient else None,
    old_mean=None,
    mean=None,
    direction=None,
    seal=_projected.seal(),
    layout=dataclasses.replace(matrix.layout, axis_name=None),
    orthonormal=phases.projector.orthonormal,
    dtype=dtype,
    update_dtype=wide if phases.keep_wide else dtype,
    sharding=_sharding.explicit(matrix.like),
  )
