# SPDX-License-Identifier: Apache-2.0
"""Bases from columns of the cosine transform: no factorisation, no storage.

Modoranu et al., `FFT-based Dynamic Subspace Selection for Low-Rank Adaptive
Optimization of Large Language Models <https://arxiv.org/abs/2505.17967>`_,
2025. With D the orthonormal DCT of the projected side, a basis consists of the
r columns of D along which the gradient is largest:

  S = D^T G,   P = D[:, k_1 ... k_r],   R = P^T G = S[k_1 ... k_r].

Since all bases take their columns from one orthonormal matrix, C = P_n^T P_o is
a partial permutation: each coordinate moves to the new place of its column.

The randomised form is ours: P = diag(s) D[:, k_1 ... k_r] with random signs s
and a random subset of columns. P^T P = I, and since each column is in the
subset with probability r / m for any signs,

  E[P P^T | s] = diag(s) D (r / m) I D^T diag(s) = (r / m) I.

The proofs of GoLore (Lemma 5), subspace gradient descent and RSO require
nothing else of a random basis. To get the same, a Haar basis needs mr normal
numbers and a factorisation. Signs are drawn again with each subset: with the
same signs, all subsets would come from one basis forever, and toy problems
converge more slowly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax._matrix import _cosines
from subspace_optax._matrix import _projected
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.projectors import _base
from subspace_optax.projectors import _gap
from subspace_optax.projectors import _periodic

SELECTIONS = ('l1', 'l2', 'random')


class DctState(NamedTuple):
  """State of `dct`; trees with one leaf per projected leaf."""

  owed: Any  # leaf shape=(*batch,), dtype=bool: choose at next good G
  schedule: Any  # see `_gap`
  columns: Any  # leaf shape=(*batch, r), dtype=int32, in ascending order


def dct(
  update_proj_gap: Any = 200,
  select: str = 'l1',
  *,
  stagger: bool = False,
) -> _base.Projector:
  """Columns of the cosine transform, chosen at steps 0, T, 2T and so on.

  It stores no basis and factorises nothing. The state holds the indices of r
  columns, or the period of a random choice; from these, every step recomputes
  the basis, which is mr cosines.

  Args:
    update_proj_gap: T, steps between choices, or a `LazyGap`.
    select: 'l1' or 'l2' takes the columns along which the gradient has the
      largest norm, at the cost of one transform of the gradient; 'random' takes
      a random subset of columns, with random signs of the rows, and needs no
      gradient.
    stagger: whether matrices take turns within each T steps, so that no step
      chooses columns for all of them. They start from random columns.

  Returns:
    A projector with orthonormal bases. If columns are chosen by a norm,
    transports carry moments by moving their rows, without a product.

  Raises:
    TypeError: the gap is not an int.
    ValueError: the gap is below 1; an unknown selection; at `init`, a projected
      side longer than 2^20.

  References:
    Modoranu et al., `FFT-based Dynamic Subspace Selection
    <https://arxiv.org/abs/2505.17967>`_, 2025

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> tx = so.project(so.SubspaceSpec(rank=1), so.projectors.dct())
    >>> params = {'w': jnp.ones((8, 16))}
    >>> _, state = jax.jit(tx.update)(params, tx.init(params))
    >>> print(state.projector.columns['w'])  # a constant is column 0
    [0]

    DCT-AdamW, with its optional error feedback. For such bases `both` is a
    permutation, by which second moments follow their columns, too:

    >>> import optax
    >>> tx = so.subspace(
    ...   so.SubspaceSpec(rank=128),
    ...   so.projectors.dct(update_proj_gap=200),
    ...   optax.scale_by_adam(b1=0.9, b2=0.999),
    ...   transport=so.transports.both(b1=0.9, b2=0.999),
    ...   residual=so.residuals.error_feedback(b1=0.0),
    ... )
  """
  if select not in SELECTIONS:
    raise ValueError(f'select must be one of {SELECTIONS}, got {select!r}.')
  name = _base.call(
    'dct', update_proj_gap=update_proj_gap, select=select, stagger=stagger
  )
  if select == 'random':
    projector = _periodic.periodic(
      name,
      _draw,
      update_proj_gap,
      stagger=stagger,
      uses_gradient=False,
      regenerate=True,
    )
  else:
    projector = _by_norm(name, select, update_proj_gap, stagger)
  return projector._replace(most_rows=_cosines.MOST_ROWS)


def _draw(matrix: _base.Matrix, basis: Any, period: jax.Array) -> jax.Array:
  """Returns randomised bases for all matrices of a leaf."""
  del basis
  return _cosines.draw_basis(matrix.layout, matrix.like, matrix.seed, period)


def _by_norm(
  name: str, select: str, update_proj_gap: Any, stagger: bool
) -> _base.Projector:
  """Returns the rule that takes columns along which the gradient is largest."""
  gap = _gap.schedule(update_proj_gap, stagger)
  measure = jnp.abs if select == 'l1' else jnp.square

  def init(subspaces: _base.Subspaces, matrices: Any) -> DctState:
    per_matrix = subspaces.captured_energy
    owed = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.bool_), per_matrix)
    columns = jax.tree.map(_first_columns, matrices)
    return DctState(owed, gap.init(per_matrix), columns)

  def refresh(context, matrices, subspaces, state):
    due, _, schedule = gap.due(context, state.owed, state.schedule)

    def one(basis, matrix, drift, owed, due, columns):
      wanted = (due | (owed & context.active)) & matrix.ok
      old = new = _Chosen(columns, drift, _stay(columns))
      if matrix.gradient is not None:  # else nothing is due: `needs_gradient`
        new = _varying.cond(
          jnp.any(wanted),
          lambda: _move(measure, matrix, wanted, old),
          lambda: old,
        )
      move = _projected.Move(wanted, _projected.Selection(new.source))
      each = matrix.layout.batch_axes
      owed = matrix.at_home((owed | due) & ~wanted, each)
      columns = matrix.at_home(new.columns, f'{each}x')
      # After the branch, so that a step makes one basis, moved or not.
      basis = _sharding.like(_make_basis(matrix, columns), basis)
      return basis, new.drift, owed, columns, move

    basis, drift, owed, columns, moves = _tree.map_unzip(
      one,
      5,
      subspaces.basis,
      matrices,
      subspaces.drift,
      state.owed,
      due,
      state.columns,
    )
    state = DctState(owed, gap.after(schedule, moves, drift), columns)
    return subspaces._replace(basis=basis, drift=drift), moves, state

  def rebuild(matrices, state):
    _check_ranks(matrices, state.columns)
    return jax.tree.map(_make_basis, matrices, state.columns)

  def needs_gradient(context, state):
    _gap.check_not_traced(update_proj_gap)
    return _gap.any_due(gap, context, state.owed, state.schedule)

  return _base.Projector(
    name,
    init,
    refresh,
    _base.no_track,
    rebuild=rebuild,
    needs_gradient=needs_gradient,
  )


def _check_ranks(matrices: Any, columns: Any) -> None:
  """Raises if the state has another rank."""
  known = dict(_tree.flatten(columns)[0])
  for path, matrix in _tree.flatten(matrices)[0]:
    if _tree.is_masked(matrix):
      continue
    found, rank = known[path].shape[-1], matrix.layout.rank
    if found != rank:
      raise ValueError(
        f'gradient {path!r} needs the numbers of {rank} columns, but init '
        f'chose {found}; convert a state of another rank with '
        'subspace_optax.resize_rank.'
      )


class _Chosen(NamedTuple):
  """The fields of one leaf that a refresh changes."""

  columns: jax.Array  # shape=(*batch, r), dtype=int32
  drift: jax.Array  # shape=(*batch,), dtype=float32
  source: jax.Array  # shape=(*batch, r), dtype=int32; see `Selection`


def _move(
  measure: Callable[[jax.Array], jax.Array],
  matrix: _base.Matrix,
  wanted: jax.Array,
  old: _Chosen,
) -> _Chosen:
  """Chooses columns for the matrices that need new ones."""
  columns = _cosines.largest(_norms(matrix, measure), matrix.layout.rank)
  columns = matrix.at_home(columns, f'{matrix.layout.batch_axes}x')
  columns = jnp.where(wanted[..., None], columns, old.columns)
  columns = _sharding.with_whole_rank(columns, f'{matrix.layout.batch_axes}y')
  source = _projected.select_columns(columns, old.columns).source
  kept = jnp.mean(source < columns.shape[-1], axis=-1, dtype=jnp.float32)
  new = _Chosen(
    columns,
    # Chordal distance of the two subspaces, relative to the largest possible.
    jnp.where(wanted, jnp.sqrt(1.0 - kept), old.drift),
    source,
  )
  return jax.tree.map(_sharding.like, new, old)


def _stay(columns: jax.Array) -> jax.Array:
  """Returns the sources of columns that do not move."""
  last = columns.ndim - 1
  places = lax.broadcasted_iota(jnp.int32, columns.shape, last)
  return _sharding.like(places, columns)


def _make_basis(matrix: _base.Matrix, columns: jax.Array) -> jax.Array:
  return _cosines.make_basis(matrix.layout, matrix.like, columns)


def _first_columns(matrix: _base.Matrix) -> jax.Array:
  """Returns random columns, for matrices that still wait for their turn."""
  static, args = (matrix.layout,), (matrix.seed,)
  return matrix.layout.place_numbers(
    _cosines.draw_columns, static, args, matrix.like
  )


def _norms(matrix: _base.Matrix, measure: Any) -> jax.Array:
  """Returns the norm of every row of D^T G / ||G||, (*batch, m).

  A fast transform computes them if a device has all of G; otherwise, products
  with r columns of D at a time, so that only arrays of width r cross devices.
  """
  layout, r = matrix.layout, matrix.layout.rank
  if layout.axis_name is None and not _sharding.is_sharded(matrix.like):
    unit = matrix.tall() * lax.rsqrt(matrix.energy)[..., None, None]
    whole = jax.scipy.fft.dct(unit, axis=-2, norm='ortho')
    return jnp.sum(measure(whole), axis=-1)
  chunks = -(-layout.m // r)

  def some(k: jax.Array) -> jax.Array:
    shape = (*layout.batch_shape, r)
    numbers = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    numbers = jnp.minimum(k * r + numbers, layout.m - 1)
    coords = matrix.unit_coordinates(_make_basis(matrix, numbers))
    axes = layout.coords_axes(), f'{layout.batch_axes}y'
    return jnp.einsum(f'{axes[0]}->{axes[1]}', measure(coords))

  norms = lax.map(some, jnp.arange(chunks))
  norms = jnp.moveaxis(norms, 0, -2).reshape(*norms.shape[1:-1], chunks * r)
  return norms[..., : layout.m]
