# SPDX-License-Identifier: Apache-2.0
"""NorMuon: Muon with updates of equal size for all output neurons.

Li et al., `NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025, Algorithm 1.
With O the orthogonalised G + b M of a matrix,

  M <- b M + G,   v <- b2 v + (1 - b2) mean_in(O^2),
  W <- W - lr sqrt(max(1, out / in)) c O / (sqrt(v) + eps),

with one v per output, and c such that the update has the norm of O. Without v
it is Muon. Without M, O is the orthogonalised G and the state is v alone.
"""

import functools
from typing import Any, NamedTuple

import jax
import optax

from subspace_optax._chain import _check_matches
from subspace_optax._chain import _describe
from subspace_optax._chain import _first_states
from subspace_optax._chain import _match_updates
from subspace_optax._chain import _matrices
from subspace_optax._chain import _spec
from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _orthogonalize
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _tree
from subspace_optax.transports import _moments
from subspace_optax.whole import _with_plain


class NorMuonState(NamedTuple):
  """State of `scale_by_normuon`; `MaskedNode` for leaves that stay plain."""

  # tree, leaf shape=the leaf's: momentum; `EmptyState` without b
  trace: Any
  # tree, leaf shape=the leaf's with 1 for the inputs' axes, dtype=float32 or
  # wider: mean squares of orthogonalised momentum; `EmptyState` without b2
  nu: Any


_moments.register_moments(NorMuonState, [], {'nu': None}, sums=['trace'])


def scale_by_normuon(
  spec: _spec.SubspaceSpec | None = None,
  *,
  b: Any = 0.95,
  b2: Any = 0.95,
  eps: Any = 1e-8,
  steps: int = 5,
  ns_coeffs: Any = 'standard',
  preconditioning: str = 'frobenius',
) -> optax.GradientTransformationExtraArgs:
  """Orthogonalised momentum, with output neurons brought to one size.

  The momentum is that of `optax.trace(b, nesterov=True)`, as in the authors'
  code. The paper uses a mean without Nesterov's look-ahead; the factor between
  sum and mean does not change the orthogonalised matrix. Matrices are scaled
  back to their norm, as in that code, and by Muon's sqrt(max(1, out / in)), so
  that learning rates are those of `optax.contrib.muon`.

  Args:
    spec: which leaves are matrices, and their axes; `SubspaceSpec(1)` by
      default. Its rank, side and bases do not matter. Heads as a stack and
      fused kernels as blocks are separate matrices; see `DimensionNumbers`.
      Other leaves pass unchanged.
    b: decay rate of the momentum; None keeps no momentum, and orthogonalises
      gradients.
    b2: decay rate of the mean squares; None keeps none, as in Muon.
    eps: added to the square roots of the mean squares.
    steps: see `residuals.orthogonal`.
    ns_coeffs: see `residuals.orthogonal`.
    preconditioning: see `residuals.orthogonal`.

  Returns:
    A transformation for whole leaves. `spec` sets the dtype of its momentum,
    and `quantize_moments` accepts it. A gradient with NaN stays in the
    momentum, as in optax.

  Raises:
    ValueError: b or b2 outside [0, 1), or both None; arguments that
      `residuals.orthogonal` rejects; at `init`, a tree without matrices, unless
      `spec` allows it.
    TypeError: `spec` is not a `SubspaceSpec`; b or b2 is not a number; `steps`
      is not an int.

  References:
    Li et al., `NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025, Algorithm 1

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> tx = so.scale_by_normuon()
    >>> state = tx.init({'up': jnp.ones((16, 64)), 'norm': jnp.ones(16)})
    >>> state.trace['up'].shape, state.nu['up'].shape
    ((16, 64), (1, 64))
  """
  spec = _with_plain.whole_spec(_spec.SubspaceSpec(1) if spec is None else spec)
  if b is None and b2 is None:
    raise ValueError('b=None keeps mean squares alone, but b2 is None, too.')
  for name, decay in {'b': b, 'b2': b2}.items():
    if decay is not None:
      _arguments.check_decay(decay, name)
  _arguments.check_static(steps, 'steps')
  rule = _orthogonalize.make_rule(ns_coeffs, steps, preconditioning, b2, eps)

  def init(params):
    matches = spec.match(params)
    _check_matches.check_matches(spec, matches)
    _match_updates.remember_names(params)
    _describe.record_whole('normuon', matches, _tell)
    make = functools.partial(_first_state, spec, rule, b is not None)
    return _first_states.make_state(spec, make, params)

  def update(updates, state, params=None, **extra_args):
    del params, extra_args
    _check_kept(state, b, b2)
    made = []
    if b2 is not None:
      made += [('mean squares', state.nu, _orthogonalize.squares_shape)]
    if b is not None:
      made += [('momentum', state.trace, lambda layout: layout.shape)]
    matches = _match_updates.match_to_state(spec, updates, *made)
    layouts = {x.path: x.layout for x in matches if x and x.layout}
    entries = dict(_tree.flatten(updates)[0])
    ahead = {path: _linalg.widen(entries[path]) for path in layouts}
    trace = state.trace
    if b is not None:
      ahead, trace = _accumulate(b, ahead, trace)
    directions, nu = _direct(rule, layouts, ahead, state.nu)
    for path, x in directions.items():
      entries[path] = _sharding.like(x, entries[path])
    updates = _tree.replace_entries(updates, list(entries.values()))
    return updates, NorMuonState(trace, nu)

  return optax.GradientTransformationExtraArgs(init, _boxes.bare(update))


def _check_kept(state: NorMuonState, b: Any, b2: Any) -> None:
  """Raises unless the state has exactly the fields for these decay rates."""
  for name, decay, tree in (('b', b, state.trace), ('b2', b2, state.nu)):
    if (decay is None) != isinstance(tree, optax.EmptyState):
      raise ValueError(
        f'the state is of an optimizer {"with" if decay is None else "without"}'
        f' {name}, and here {name}={decay!r}; call init of this optimizer.'
      )


def matrices_in(state: Any) -> Any:
  """Returns a tree of the matrices' states, from the state of a chain."""
  _, own = _tree.find(state, NorMuonState)[0]
  return own.nu if isinstance(own.trace, optax.EmptyState) else own.trace


def _tell(match: _spec.Match) -> tuple[str, str, str] | None:
  """Returns what `describe` shows of a leaf; None for one that stays plain."""
  if match.layout is None:
    return None
  return match.matrices, str(match.layout.inputs), 'orthogonal'


def _first_state(
  spec: _spec.SubspaceSpec,
  rule: _orthogonalize.Rule,
  with_momentum: bool,
  params: Any,
  matches: list[_spec.Match | None],
  treedef: Any,
) -> NorMuonState:
  del params

  def zeros(path: str, leaf: Any, layout: _layout.Layout) -> jax.Array:
    del path
    dtype = spec.dtype_of_moments(leaf.dtype)
    return layout.zeros(layout.leaf_axes, leaf, dtype)

  def squares(path: str, leaf: Any, layout: _layout.Layout) -> jax.Array:
    del path
    return _orthogonalize.first_squares(layout, leaf)

  make = functools.partial(_matrices.per_matrix, matches, treedef)
  return NorMuonState(
    make(zeros) if with_momentum else optax.EmptyState(),
    optax.EmptyState() if rule.b2 is None else make(squares),
  )


def _accumulate(
  b: Any, gradients: dict[str, jax.Array], momentum: Any
) -> tuple[dict[str, jax.Array], Any]:
  """Returns G + b M for the new momentum M, by path, and the tree of M."""
  pairs, treedef = _tree.flatten(momentum)
  trace, ahead = dict(pairs), {}
  for path, g in gradients.items():
    new = b * _linalg.widen(trace[path]) + g
    ahead[path], trace[path] = g + b * new, _sharding.like(new, trace[path])
  return ahead, treedef.unflatten(trace.values())


def _direct(
  rule: _orthogonalize.Rule,
  layouts: dict[str, _layout.Layout],
  leaves: dict[str, Any],
  squares: Any,
) -> tuple[dict[str, jax.Array], Any]:
  """Returns directions by path, and the tree of new mean squares."""
  pairs, treedef = _tree.flatten(squares)
  nu = dict(pairs)
  directions, news = _orthogonalize.orthogonalize(
    rule,
    list(layouts.values()),
    list(leaves.values()),
    [nu.get(path) for path in layouts],
  )
  directions = dict(zip(layouts, directions, strict=True))
  if rule.b2 is None:
    return directions, squares
  nu |= dict(zip(layouts, news, strict=True))
  return directions, treedef.unflatten(nu.values())
