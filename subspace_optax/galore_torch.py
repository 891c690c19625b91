# SPDX-License-Identifier: Apache-2.0
"""Conversion of states of the PyTorch package `galore-torch`.

Its AdamW keeps 'step', 'exp_avg' and 'exp_avg_sq' for each parameter and, if it
projects the parameter, a 'projector' with the basis in 'ortho_matrix'. It
refreshes the basis at step 0 and at all multiples of the gap; Zhao et al.,
`GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2.
"""

from collections.abc import Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _describe
from subspace_optax._chain import _projection
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _tree
from subspace_optax.low_precision import _coded_state
from subspace_optax.state import _galore_torch


def from_torch(
  tx: optax.GradientTransformation,
  state: Mapping[Any, Any],
  params: Any,
  names: Mapping[str, Any],
  *,
  transpose: str | None = r'(^|/)kernel$',
) -> Any:
  """Returns a state for `tx` from a state of `galore-torch`'s `GaLoreAdamW`.

  Training continues as it would in PyTorch, up to rounding, until bases are
  next refreshed. The refresh finds the same subspaces, but singular vectors may
  have other signs, as on another machine in PyTorch. All counters, including
  those of schedules, start at the step of the state. Moments in 8 or 4 bits
  (`moment_bits`) are rounded to the nearest code.

  Pass to `tx` what the state does not contain: learning rate, betas, epsilon
  and `scale`. docs/migrate.md shows how to write the state to a file, and how
  epsilon and weight decay differ.

  Args:
    tx: an optimizer from `from_hf` or `galore`, with the ranks, gap and sides
      of the state. For 'std', `galore` needs `spec=SubspaceSpec(rank)`.
    state: maps parameter names, or the numbers of `state_dict()`, to the
      entries of each: arrays, or values that `numpy.asarray` converts. A
      projector is a dict of its attributes, or an object with them. Or pass all
      of `state_dict()`.
    params: the parameters.
    names: maps the path of each leaf to its key in `state`; for a stack of
      layers, to a list of keys, one per matrix.
    transpose: a regular expression for paths whose matrices are (in, out) here
      and (out, in) in PyTorch, as flax's kernels are; None for no path.

  Returns:
    A state with the structure, dtypes and shardings of `tx.init(params)`.

  Raises:
    ValueError: a leaf without a key, or a key without a leaf; a state with
      8-bit codes, a `proj_type` other than 'std' or tensors with more axes; a
      rank, gap, side, shape or step that differs from `tx`, `params` or another
      parameter; a `tx` without SVD or without Adam.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2

  Example:
    >>> import jax.numpy as jnp, numpy as np, subspace_optax as so
    >>> tx = so.from_hf(1e-3, 'galore_adamw', 'rank=2', ['mlp'])
    >>> params = {'mlp': {'up': {'kernel': jnp.ones((4, 6))}}}
    >>> projector = {
    ...   'rank': 2,
    ...   'update_proj_gap': 200,
    ...   'scale': 0.25,
    ...   'proj_type': 'std',
    ...   'ortho_matrix': np.eye(2, 4),
    ... }
    >>> state = {
    ...   'mlp.up.weight': {
    ...     'step': 300,
    ...     'projector': projector,
    ...     'exp_avg': np.ones((6, 2)),
    ...     'exp_avg_sq': np.ones((6, 2)),
    ...   }
    ... }
    >>> names = {'mlp/up/kernel': 'mlp.up.weight'}
    >>> state = so.from_torch(tx, state, params, names)
    >>> print(state[0][1].inner.mu['mlp']['up']['kernel'].shape)
    (2, 6)
  """
  if set(state) == {'state', 'param_groups'}:
    state = state['state']
  layouts, gap = _layouts_and_gap(tx, params)
  start = tx.init(params)
  wide = _coded_state.all_decoded(start)
  shapes = _shapes_of_moments(wide)
  step = _galore_torch.check_states(state, names, shapes)
  leaves = {
    path: _galore_torch.read_leaf(
      _galore_torch.Source(path, names[path], state, transpose),
      layouts,
      shape,
      gap,
    )
    for path, shape in shapes.items()
  }
  fill = lambda x: _FILLS[type(x)](x, leaves) if type(x) in _FILLS else x
  new = jax.tree.map(fill, wide, is_leaf=lambda x: type(x) in _FILLS)
  new = jax.tree.map_with_path(
    lambda path, x: jnp.full_like(x, step) if _is_count(path) else x, new
  )
  return _coded_state.all_encoded(new, start)


# --- The settings of tx ------------------------------------------------------


def _layouts_and_gap(
  tx: Any, params: Any
) -> tuple[dict[str, _layout.Layout], int]:
  """Returns the layouts of projected matrices, and T of the SVDs."""
  layouts, gap = {}, 0
  for record in _describe.records_of(tx, params):
    name = record.projector.name
    found = re.match(r'svd\(update_proj_gap=(\d+)', name)
    if not found or 'stagger' in name:
      raise ValueError(
        f'tx finds its bases by {name}, and galore-torch by an SVD of all '
        'matrices at every so many steps; make tx by so.from_hf or so.galore, '
        f'not staggered, {_galore_torch.ANEW}.'
      )
    gap = int(found[1])
    if not jnp.issubdtype(record.spec.basis_dtype, jnp.floating):
      raise ValueError(
        f'basis_dtype={record.spec.basis_dtype!r} of the spec would round the '
        "bases of the state; give basis_dtype='float32'."
      )
    matches = [m for m in record.matches if m and m.layout]
    layouts |= {match.path: match.layout for match in matches}
  return layouts, gap


def _shapes_of_moments(state: Any) -> dict[str, tuple[int, ...]]:
  """Returns the shape of Adam's moments of each leaf."""
  nodes = _tree.find(state, optax.ScaleByAdamState)
  if not nodes:
    raise ValueError(
      'tx keeps no state of optax.scale_by_adam, as GaLoreAdamW does; '
      f'{_galore_torch.ANEW}.'
    )
  return {
    path: x.shape
    for _, node in nodes
    for path, x in _tree.flatten(node.mu)[0]
    if not _tree.is_masked(x)
  }


def _is_count(path: tuple[Any, ...]) -> bool:
  """Whether an array of a state counts steps."""
  return any(getattr(key, 'name', None) == 'count' for key in path)


# --- Writing into the state --------------------------------------------------


def _fill_adam(
  state: optax.ScaleByAdamState, leaves: Mapping[str, _galore_torch.Leaf]
) -> optax.ScaleByAdamState:
  mean = lambda path, x: _put(path, leaves[path].mean, x)
  square = lambda path, x: _put(path, leaves[path].square, x)
  return state._replace(
    mu=_map_leaves(mean, state.mu), nu=_map_leaves(square, state.nu)
  )


def _fill_project(
  state: _projection.ProjectState, leaves: Mapping[str, _galore_torch.Leaf]
) -> _projection.ProjectState:
  basis = lambda path, x: _put(path, leaves[path].basis, x)
  subspaces = state.subspaces
  return state._replace(
    subspaces=subspaces._replace(basis=_map_leaves(basis, subspaces.basis))
  )


_FILLS = {
  optax.ScaleByAdamState: _fill_adam,
  _projection.ProjectState: _fill_project,
}


def _map_leaves(f: Any, tree: Any) -> Any:
  keep = lambda path, x: x if _tree.is_masked(x) else f(path, x)
  return _tree.map_entries(keep, tree)


def _put(path: str, x: Any, like: jax.Array) -> jax.Array:
  """Returns an array with the dtype and placement of one in the state."""
  if x.shape != like.shape:
    raise ValueError(
      f'tx keeps an array of shape {like.shape} of leaf {path!r}, where the '
      f"state's is {x.shape}; make tx without per_matrix and 'reset', "
      f'{_galore_torch.ANEW}.'
    )
  array = jnp.asarray(x, like.dtype)
  return jax.device_put(array, like.sharding) if like.committed else array
