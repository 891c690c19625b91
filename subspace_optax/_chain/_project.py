# SPDX-License-Identifier: Apache-2.0
"""From gradients to coordinates: the piece that owns the bases."""

import dataclasses
import functools
from typing import Any, NamedTuple
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_optax._chain import _check_matches
from subspace_optax._chain import _describe
from subspace_optax._chain import _matrices
from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.bases import _quantized_basis
from subspace_optax.projectors import _base


class Window(NamedTuple):
  """Where a micro-step stands among those that are accumulated."""

  first: jax.Array  # shape=(), dtype=bool: bases may be refreshed
  last: jax.Array  # shape=(), dtype=bool: bases may be tracked, the step ends


class Refreshed(NamedTuple):
  """What a refresh makes of a state; trees like those in it."""

  old_basis: Any  # before the refresh
  subspaces: _base.Subspaces  # after it
  moves: Any  # from one to the other; None if the rule makes none
  own: Any  # the projector's own state
  stored: Any  # the basis as it is kept


class ProjectState(NamedTuple):
  """State of `project`; trees have the parameters' structure."""

  count: jax.Array  # shape=(), dtype=int32
  seed: Any  # tree, leaf shape=(*batch,), dtype=uint32
  subspaces: _base.Subspaces
  projector: Any  # the projector's own state


def project(
  spec: _spec.SubspaceSpec,
  projector: _base.Projector,
  *,
  keep_gradient: bool = False,
  axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
  """Takes gradients to the coordinates of their subspaces.

  A leaf that `spec` selects becomes a `Projected` node with R = P^T G; others
  pass unchanged. The bases start as random samples and move as `projector`
  says; no basis is made from a gradient that is zero or not finite.

  `update` takes `refresh_gradients`, a tree like the gradients: what refreshed
  bases are made from in place of them, such as the gradients of a larger batch
  at every T-th step (large-batch GaLore).

  With `axis_name` gradients are those of a part of the batch each, and
  coordinates are averaged in their place: data parallelism that moves r (m + n)
  numbers of a matrix at most. Rules that factorise the gradient average it when
  they do; plain leaves are averaged as always. Where the norm of the mean is
  wanted, as in `captured_energy`, the mean of the squared norms stands for its
  square: an upper bound, so that `captured_energy` is a lower one. Refresh
  gradients are averaged likewise. See `data_parallel_step`; it gives `update`
  the name as `coordinates_axis_name`, and averages the plain leaves itself.

  With `coordinates=True`, `update` takes P^T G itself of the leaves that are
  projected, and needs params: see `rso.compressed_step`. The projector must not
  look at gradients in this step; `captured_energy` stays as it is.

  Args:
    spec: which leaves, as which matrices, at which rank.
    projector: how bases are found and moved, from `subspace_optax.projectors`.
    keep_gradient: whether the gradient travels along, for a residual rule,
      which then costs averaging all of it.
    axis_name: the name of a mapped axis, as `jax.shard_map` has, or a tuple.

  Returns:
    A transformation whose state holds the bases, (*batch and projected axes,
    r) in `spec.basis_dtype`, and a few numbers per matrix. Of integers, codes
    with their scales in a `QuantizedBasis`: a basis that moves is rounded, made
    orthonormal again, and used so from the same step on.

  Raises:
    ValueError: at `init`, what `SubspaceSpec.match` raises; bases in integers
      for a projector that moves them by small steps, or draws them again at
      every step; at `update`, a tree
      unlike that at `init`, of refresh gradients too, or gradients that are
      already projected; coordinates without params or of other shapes, with
      refresh gradients or for a residual rule.
    TypeError: `spec` or `projector` is something else.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Eq. (9)

  Example:
    >>> import jax.numpy as jnp, optax, subspace_optax as so
    >>> spec = so.SubspaceSpec(rank=2)
    >>> tx = optax.chain(
    ...   so.project(spec, so.projectors.svd(200)),
    ...   so.in_subspace(optax.scale_by_adam(), spec),
    ...   so.unproject(),
    ...   optax.scale_by_learning_rate(1e-3),
    ... )
    >>> params = {'w': jnp.ones((8, 16)), 'bias': jnp.ones(16)}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> print(updates['w'].shape, state[0].subspaces.basis['w'].shape)
    (8, 16) (8, 2)
  """
  _spec.check_spec(spec)
  if not isinstance(projector, _base.Projector):
    raise TypeError(
      f'projector must come from subspace_optax.projectors, got {projector!r}.'
    )

  def init(params):
    matches = spec.match(params)
    _check_matches.check_matches(spec, matches)
    if not _describe.is_asked():
      _matrices.remember_names(params)
    _quantized_basis.check(spec.basis_dtype, projector)
    _describe.record(spec, matches, projector, keep_gradient)
    return _boxes.box_state(first_state, params)

  def first_state(params):
    matches = spec.match(params)
    _, treedef = _tree.flatten(params)
    make = functools.partial(_matrices.per_matrix, matches, treedef)
    subspaces = _base.Subspaces(
      basis=make(functools.partial(_first_basis, spec, projector.sample)),
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
    if projector.rebuild:
      state = state._replace(subspaces=subspaces._replace(basis=()))
    return _sharding.on_mesh_of([m.leaf for m in matches if m], state)

  def update(
    updates,
    state,
    params=None,
    *,
    refresh_gradients=None,
    window=None,
    coordinates_axis_name=None,
    coordinates=False,
    refreshed=None,  # by paths, what `compressed_step` has refreshed already
    **extra_args,
  ):
    del extra_args
    if None not in (coordinates_axis_name, axis_name):
      raise ValueError(
        f'`project` averages along axis_name={axis_name!r} already; leave it '
        'out inside `data_parallel_step`.'
      )
    averaged = coordinates_axis_name or axis_name
    matrices_of = functools.partial(
      _matrices.of_gradients, spec, state, averaged, keep_gradient
    )
    if coordinates:
      _matrices.check_coordinates(params, keep_gradient, refresh_gradients)
      # A stand-in, of the gradients' shapes and shardings.
      matches, matrices = matrices_of(params)
      coords, matrices = _matrices.given_coords(updates, matrices)
    else:
      _matrices.check_shapes(updates, params, 'its parameter')
      matches, matrices = matrices_of(updates)
    sources = matrices
    if refresh_gradients is not None:
      _matrices.check_shapes(updates, refresh_gradients, 'refresh_gradients')
      shown = _matrices.masked_like(updates, refresh_gradients)
      _, sources = matrices_of(shown)
    track = (
      projector.track if window is None else _base.resting(projector.track)
    )
    yes = jnp.array(True)
    window = Window(yes, yes) if window is None else window

    found = (refreshed or {}).get(paths(state))
    if found is None:
      found = _refresh(spec, projector, state, window.first, matrices, sources)
    old_basis, subspaces, before, own, stored = found
    basis = subspaces.basis
    if not coordinates:
      coords = jax.tree.map(_coords, basis, matrices)
      captured = jax.tree.map(
        _captured, subspaces.captured_energy, matrices, coords, basis
      )
      subspaces = subspaces._replace(captured_energy=captured)
    context = _base.Context(state.count, window.last, before)
    subspaces, after, own = track(context, matrices, coords, subspaces, own)

    nothing = jax.tree.map(lambda _: None, basis)
    nodes = jax.tree.map(
      functools.partial(_node, keep_gradient, projector.orthonormal),
      basis,
      old_basis,
      matrices,
      coords,
      nothing if before is None else before,
      nothing if after is None else after,
    )
    plain = lambda x: x
    if axis_name is not None and coordinates_axis_name is None:
      plain = lambda x: lax.pmean(x, axis_name)
    entries = [
      plain(entry) if match and not match.layout else node
      for match, (_, entry), (_, node) in zip(
        matches, _tree.flatten(updates)[0], _tree.flatten(nodes)[0], strict=True
      )
    ]
    count = jnp.where(
      window.last, optax.safe_increment(state.count), state.count
    )
    if projector.rebuild:
      subspaces = subspaces._replace(basis=())
    if _quantized_basis.is_quantized(spec.basis_dtype):
      subspaces = subspaces._replace(basis=stored)
    own = jax.tree.map(_varying.vary_as, own, state.projector)
    new_state = ProjectState(count, state.seed, subspaces, own)
    return _tree.replace_entries(updates, entries), new_state

  return optax.GradientTransformationExtraArgs(init, _boxes.bare(update))


def paths(state: ProjectState) -> tuple[str, ...]:
  """Returns the paths of the leaves that a state has bases for."""
  pairs, _ = _tree.flatten(state.seed)
  return tuple(path for path, seed in pairs if not _tree.is_masked(seed))


def refresh_without_gradient(
  spec: _spec.SubspaceSpec,
  projector: _base.Projector,
  params: Any,
  state: ProjectState,
  first: jax.Array,
) -> Refreshed:
  """Returns what the next step refreshes, if that depends on no gradient."""
  _, matrices = _matrices.of_gradients(spec, state, None, False, params)
  return _refresh(spec, projector, state, first, matrices, matrices)


def _refresh(
  spec: _spec.SubspaceSpec,
  projector: _base.Projector,
  state: ProjectState,
  active: jax.Array,
  matrices: Any,
  sources: Any,
) -> Refreshed:
  """Refreshes the bases that are due, if `active`."""
  subspaces = state.subspaces
  stored = subspaces.basis
  read = functools.partial(_quantized_basis.read, projector.orthonormal)
  if projector.rebuild:
    basis = projector.rebuild(matrices, state.projector)
    basis = jax.tree.map(
      functools.partial(_place_rebuilt, spec.basis_dtype), basis, matrices
    )
  else:
    basis = jax.tree.map(read, matrices, stored)
  subspaces = subspaces._replace(basis=basis)
  context = _base.Context(state.count, active)
  subspaces, moves, own = projector.refresh(
    context, sources, subspaces, state.projector
  )
  if _quantized_basis.is_quantized(spec.basis_dtype) and moves is not None:
    subspaces, moves, stored = _store(
      projector, matrices, stored, basis, subspaces, moves
    )
  return Refreshed(basis, subspaces, moves, own, stored)


def _store(
  projector: _base.Projector,
  matrices: Any,
  stored: Any,
  old: Any,
  subspaces: _base.Subspaces,
  moves: Any,
) -> tuple[_base.Subspaces, Any, Any]:
  """Returns the bases that codes can hold, their moves, and the codes."""
  codes, basis, error, drift, transition = _tree.map_unzip(
    functools.partial(_quantized_basis.store, projector.orthonormal),
    5,
    matrices,
    stored,
    old,
    subspaces.basis,
    subspaces.orthogonality_error,
    subspaces.drift,
    moves,
  )
  subspaces = subspaces._replace(
    basis=basis, orthogonality_error=error, drift=drift
  )
  replace = lambda _, move, c: _projected.Move(move.moved, c)
  return subspaces, jax.tree.map(replace, matrices, moves, transition), codes


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
  sample: _base.Sample,
  path: str,
  leaf: Any,
  layout: _layout.Layout,
) -> Any:
  seed = seeds_of(spec, path, leaf, layout)
  if _quantized_basis.is_quantized(spec.basis_dtype):
    static = (sample, layout, jnp.dtype(jnp.float32))
    return _quantized_basis.first(
      spec.basis_dtype, _sample_at_init, static, (seed,), layout, leaf
    )
  static = (sample, layout, jnp.dtype(spec.basis_dtype))
  return layout.place_basis(_sample_at_init, static, (seed,), leaf)


def _sample_at_init(
  sample: _base.Sample, layout: _layout.Layout, dtype: Any, seed: jax.Array
) -> jax.Array:
  return sample(layout, seed, _base.AT_INIT).astype(dtype)


def _place_rebuilt(
  dtype: Any, basis: jax.Array, matrix: _base.Matrix
) -> jax.Array:
  """Returns a basis as it would have come from the state."""
  return matrix.layout.settle_basis(basis.astype(dtype), matrix.gradient)


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
  keep_gradient, orthonormal, basis, old_basis, matrix, coords, before, after
):
  return _projected.Projected(
    coords=coords,
    basis=basis,
    before=before,
    after=after,
    gradient=matrix.gradient if keep_gradient else None,
    old_basis=old_basis if keep_gradient else None,
    old_mean=None,
    mean=None,
    direction=None,
    intact=jnp.array(True),
    layout=dataclasses.replace(matrix.layout, axis_name=None),
    orthonormal=orthonormal,
    dtype=matrix.gradient.dtype,
    update_dtype=matrix.gradient.dtype,
    sharding=_sharding.explicit(matrix.gradient),
  )
