# SPDX-License-Identifier: Apache-2.0
"""The phases of `project`: refresh, coordinates, track.

Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Eq. (9). Steps
that do more than chain `project`, `in_subspace` and `unproject` compose them.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from subspace_optax import bases
from subspace_optax._chain import _check_matches
from subspace_optax._chain import _describe
from subspace_optax._chain import _dtypes
from subspace_optax._chain import _first_states
from subspace_optax._chain import _match_updates
from subspace_optax._chain import _matrices
from subspace_optax._chain import _refresh_bases
from subspace_optax._chain import _spec
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.projectors import _base


class Given(NamedTuple):
  """Work that a training step does, so that `project` does not repeat it.

  The step passes it to an optimizer's `update` as the extra argument `given`.

  Attributes:
    axis_name: a mapped axis along which to average coordinates; plain leaves
      are averaged already.
    refreshed: the refreshed bases of each `project`, by the paths of its
      leaves. Updates are then coordinates.
  """

  axis_name: Any = None
  refreshed: Mapping[tuple[str, ...], _refresh_bases.Refreshed] | None = None


class Seen(NamedTuple):
  """The matrices of a step's gradients, and their coordinates."""

  matrices: Any
  coords: Any
  refreshed: _refresh_bases.Refreshed


class ProjectState(NamedTuple):
  """State of `project`; trees have the parameters' structure."""

  count: jax.Array  # shape=(), dtype=int32
  seed: Any  # tree, leaf shape=(*batch,), dtype=uint32
  subspaces: _base.Subspaces
  projector: Any  # the projector's own state


@dataclasses.dataclass(frozen=True)
class Projection:
  """The phases of `project`: `refresh`, `take_coordinates`, `track_bases`.

  Attributes:
    spec: see `project`.
    projector: see `project`.
    keep_gradient: see `project`.
    axis_name: see `project`.
    keep_wide: whether updates come back in float32 or wider, and plain leaves
      in the dtype of their moments, to be rounded after all transformations.
    hand_out: whether each device gets its own matrices in the step, for a
      residual rule that needs whole ones.
  """

  spec: _spec.SubspaceSpec
  projector: _base.Projector
  keep_gradient: bool = False
  axis_name: Any = None
  keep_wide: bool = False
  hand_out: bool = False

  def __post_init__(self):
    _spec.check_spec(self.spec)
    if not isinstance(self.projector, _base.Projector):
      raise TypeError(
        'projector must come from subspace_optax.projectors, got '
        f'{self.projector!r}.'
      )

  @property
  def storage(self) -> bases.Storage:
    """How bases are stored between steps."""
    return bases.storage(self.spec.basis_dtype, self.projector)

  def init(self, params: Any) -> Any:
    """Returns the first state, boxed as the parameters are."""
    matches = self.spec.match(params)
    _check_matches.check_matches(self.spec, matches)
    _check_matches.check_sides(self.projector, matches)
    _match_updates.remember_names(params)
    _ = self.storage  # raises for bases that it can't hold
    _describe.record(self.spec, matches, self.projector, self.keep_gradient)
    return _first_states.make_state(self.spec, self._first_state, params)

  def _first_state(
    self, params: Any, matches: list[_spec.Match | None], treedef: Any
  ) -> ProjectState:
    make = functools.partial(_matrices.per_matrix, matches, treedef)
    first = functools.partial(
      _first_states.make_basis, self.spec, self.projector.sample, self.storage
    )
    subspaces = _base.Subspaces(
      make(first) if self.storage.first else (),
      make(_zero),
      make(_zero),
      make(_zero),
    )
    seed = make(functools.partial(_first_states.make_seeds, self.spec))
    matrices = _matrices.wrap_parameters(seed, matches, params)
    state = ProjectState(
      count=jnp.zeros((), jnp.int32),
      seed=seed,
      subspaces=subspaces,
      # Moves may depend on the gradient, so counters of moves vary like it.
      projector=_varying.vary_as_any(
        self.projector.init(subspaces, matrices),
        [m.leaf for m in matches if m],
      ),
    )
    return state

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
    """Maps gradients to nodes: all phases, one after the other."""
    del extra_args
    given = given or Given()
    always = jnp.array(True)
    seen = self.refresh_and_project(
      updates, state, params, refresh_gradients, given, always
    )
    return self.track_bases(updates, state, seen, given)

  def refresh_and_project(
    self,
    updates: Any,
    state: ProjectState,
    params: Any,
    refresh_gradients: Any,
    given: Given,
    active: jax.Array,
  ) -> Seen:
    """Refreshes bases and computes coordinates of the gradients.

    Args:
      updates: gradients; or coordinates, if `given.refreshed`.
      state: the state of `project`.
      params: the parameters, if they are known.
      refresh_gradients: see `project`.
      given: work that the caller does.
      active: a boolean scalar: whether bases may be refreshed.
    """
    axis_name = self._averaged_axis(given)
    if given.refreshed is not None:
      self._check_compressed(params, refresh_gradients)
      return self._take_given(
        updates, state, params, given.refreshed, axis_name
      )
    _match_updates.check_shapes(updates, params, 'its parameter')
    matrices = sources = self._matrices(state, updates, axis_name)
    if refresh_gradients is not None:
      _match_updates.check_shapes(
        updates, refresh_gradients, 'refresh_gradients'
      )
      shown = _match_updates.mask_like(updates, refresh_gradients)
      sources = self._matrices(state, shown, axis_name)
    refreshed = self.refresh(state, matrices, sources, active)
    return self.take_coordinates(matrices, refreshed)

  def refresh(
    self, state: ProjectState, matrices: Any, sources: Any, active: jax.Array
  ) -> _refresh_bases.Refreshed:
    """Moves bases that are due, if `active`, by the gradients in `sources`."""
    return _refresh_bases.refresh_bases(
      self.storage, self.projector, state, matrices, sources, active
    )

  def refresh_without_gradients(
    self, state: ProjectState, params: Any, active: jax.Array
  ) -> _refresh_bases.Refreshed:
    """Moves bases that are due in a step without gradients."""
    matches = _match_updates.match_as_at_init(self.spec, state, params)
    matrices = _matrices.wrap_parameters(state.seed, matches, params)
    return self.refresh(state, matrices, matrices, active)

  def take_coordinates(
    self, matrices: Any, refreshed: _refresh_bases.Refreshed
  ) -> Seen:
    """Computes P^T G of every matrix, and records how much of G it captures."""
    basis = refreshed.subspaces.basis
    coords = jax.tree.map(_matrices.project, matrices, basis)
    captured = jax.tree.map(
      _matrices.captured_energy,
      matrices,
      coords,
      basis,
      refreshed.subspaces.captured_energy,
    )
    # Under automatic sharding, only constraints on results set their placement.
    home = functools.partial(jax.tree.map, _matrices.value_at_home, matrices)
    subspaces = _base.Subspaces(
      basis,
      home(captured),
      home(refreshed.subspaces.orthogonality_error),
      home(refreshed.subspaces.drift),
    )
    refreshed = refreshed._replace(subspaces=subspaces)
    return Seen(matrices, coords, refreshed)

  def track_bases(
    self,
    updates: Any,
    state: ProjectState,
    seen: Seen,
    given: Given,
    active: jax.Array | None = None,
  ) -> tuple[Any, ProjectState]:
    """Moves bases after the coordinates; returns nodes and the new state.

    Args:
      updates: the gradients, whose plain leaves pass.
      state: the state before the step.
      seen: the result of `refresh_and_project`.
      given: work that the caller does.
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
    seed = jax.tree.map(_matrices.value_at_home, seen.matrices, state.seed)
    new_state = ProjectState(count, seed, subspaces, own)
    return self._make_nodes(updates, seen, after, given), new_state

  def _make_nodes(
    self, updates: Any, seen: Seen, after: Any, given: Given
  ) -> Any:
    """Returns gradients with every projected leaf replaced by a node."""
    refreshed = seen.refreshed
    basis = refreshed.subspaces.basis
    nothing = jax.tree.map(lambda _: None, basis)
    nodes = jax.tree.map(
      self._make_node,
      basis,
      refreshed.old_basis,
      seen.matrices,
      seen.coords,
      nothing if refreshed.moves is None else refreshed.moves,
      nothing if after is None else after,
    )
    choose = lambda path, entry, node: (
      self._pass_plain(entry, given) if _tree.is_masked(node) else node
    )
    return _tree.map_entries(choose, updates, nodes)

  def _make_node(
    self, basis, old_basis, matrix, coords, before, after
  ) -> _projected.Projected:
    dtype = matrix.like.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    return _projected.Projected(
      coords=coords,
      basis=basis,
      before=before,
      after=after,
      gradient=matrix.gradient if self.keep_gradient else None,
      home=matrix.home,
      old_basis=old_basis if self.keep_gradient else None,
      layout=dataclasses.replace(matrix.layout, axis_name=None),
      orthonormal=self.projector.orthonormal,
      dtype=dtype,
      update_dtype=wide if self.keep_wide else dtype,
      sharding=_sharding.explicit(matrix.like),
    )

  def _pass_plain(self, gradient: Any, given: Given) -> Any:
    """Returns the output for a leaf that is not projected."""
    if _tree.is_masked(gradient):
      return gradient
    if self.axis_name is not None and given.axis_name is None:
      gradient = lax.pmean(gradient, self.axis_name)
    return _dtypes.widen(self.spec, gradient) if self.keep_wide else gradient

  def _take_given(
    self,
    updates: Any,
    state: ProjectState,
    params: Any,
    refreshed: Mapping[tuple[str, ...], _refresh_bases.Refreshed],
    axis_name: Any,
  ) -> Seen:
    matches = _match_updates.match_as_at_init(self.spec, state, params)
    matrices = _matrices.wrap_parameters(state.seed, matches, params, axis_name)
    coords, matrices = _matrices.take_coordinates(updates, matrices)
    known = refreshed.get(paths(state)) or self.refresh(
      state, matrices, matrices, jnp.array(True)
    )
    return Seen(matrices, coords, known)

  def _check_compressed(self, params: Any, refresh_gradients: Any) -> None:
    """Raises if coordinates alone are not enough."""
    if params is None:
      raise ValueError(
        'a compressed step needs params, for the shapes of the gradients.'
      )
    if self.keep_gradient or refresh_gradients is not None:
      what = 'a residual rule' if self.keep_gradient else 'refresh_gradients'
      raise ValueError(
        f'a compressed step has no gradients, and {what} needs them.'
      )

  def _matrices(
    self, state: ProjectState, gradients: Any, axis_name: Any
  ) -> Any:
    matches = _match_updates.match_as_at_init(self.spec, state, gradients)
    # Stored bases lie where the leaf lies.
    hand_out = self.hand_out and self.projector.rebuild is not None
    return _matrices.wrap_gradients(
      state, matches, axis_name, self.keep_gradient, hand_out, gradients
    )

  def _averaged_axis(self, given: Given) -> Any:
    """Returns the mapped axis along which coordinates are averaged."""
    if None not in (given.axis_name, self.axis_name):
      raise ValueError(
        f'`project` averages along axis_name={self.axis_name!r} already; leave '
        'it out inside `data_parallel_step`.'
      )
    return given.axis_name or self.axis_name


def paths(state: ProjectState) -> tuple[str, ...]:
  """Returns the paths of the leaves for which a state has bases."""
  pairs, _ = _tree.flatten(state.seed)
  return tuple(path for path, seed in pairs if not _tree.is_masked(seed))


def _zero(path: str, leaf: Any, layout: _layout.Layout) -> jax.Array:
  """Returns a float32 zero per matrix."""
  del path
  return layout.zeros(layout.batch_axes, leaf)
