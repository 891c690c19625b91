# SPDX-License-Identifier: Apache-2.0
"""Randomized subspace optimization: subproblems in B, with P not stored.

Chen et al., `A Memory Efficient Randomized Subspace Optimization Method for
Training Large Language Models <https://arxiv.org/abs/2502.07222>`_, 2025,
Algorithm 1. With W^k and a fresh P^k, any optimizer takes tau steps on

  min_B f(W^k + P^k B) + |B|^2 / (2 eta),   from B = 0;   W^{k+1} = W^k + P^k B.

Gradients are those of B, (*batch, r, n); those of W are not needed.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _check_matches
from subspace_optax._chain import _describe
from subspace_optax._chain import _dtypes
from subspace_optax._chain import _first_states
from subspace_optax._chain import _in_subspace
from subspace_optax._chain import _matrices
from subspace_optax._chain import _spec
from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _sharding
from subspace_optax._matrix import _sign
from subspace_optax._matrix import _tree
from subspace_optax._matrix import _varying
from subspace_optax.bases import _quantized_basis
from subspace_optax.lifted import _trees
from subspace_optax.steps import _subproblem
from subspace_optax.steps import _train_step
from subspace_optax.transports import _base as _transport
from subspace_optax.transports import _rules


class SubproblemState(NamedTuple):
  """State of `subproblems`; trees have the parameters' structure and boxes.

  `MaskedNode` stands for leaves that are not lifted.
  """

  count: jax.Array  # shape=(), dtype=int32, inner steps so far
  seed: Any  # tree, leaf shape=(*batch,), dtype=uint32
  coords: Any  # B: tree, leaf shape=the coordinates', float32 or wider
  inner: Any  # state of the optimizer of B and of plain leaves
  # Rounding errors of merged weights narrower than float32: tree, leaf
  # shape=the leaf's, dtype=the leaf's; () without compensation
  lost: Any


class Subproblems(NamedTuple):
  """The functions of a training loop over subproblems.

  Attributes:
    init: params -> state.
    step: (loss, value_and_grad=jax.value_and_grad) -> a `TrainStep`, (params,
      state, *args) -> (params, state, value). Jit it. The loss takes (params,
      *args), where some of the params are lifted; see `nnx_merge`,
      `linen_apply` and `dot`. It must use lifted params only in their layers:
      a sum of squares over all params, for example, would sum those of W, P and
      B. `value_and_grad` differentiates a function by its first argument; pass
      one, for example, that accumulates over microbatches.
    bases: (params, state) -> P of every lifted leaf, for the next gradient.
    update: (gradients, state, params) -> (params, state): one inner step, and
      the merge after the last step of a subproblem. Gradients of lifted leaves
      are those of B; all others are the usual ones.
    lifted: (params, state) -> the params that the loss gets: W, P and B.
    merged: (params, state) -> W + P B, as plain parameters.
    gradients: (params, state) -> a tree with the gradients' shapes: B for
      lifted leaves, and all other leaves.
  """

  init: Callable[[Any], SubproblemState]
  step: Callable[..., _train_step.TrainStep]
  bases: Callable[[Any, SubproblemState], Any]
  update: Callable[[Any, SubproblemState, Any], tuple[Any, SubproblemState]]
  lifted: Callable[[Any, SubproblemState], Any]
  merged: Callable[[Any, SubproblemState], Any]
  gradients: Callable[[Any, SubproblemState], Any]


def subproblems(
  spec: _spec.SubspaceSpec,
  inner: optax.GradientTransformation,
  *,
  update_proj_gap: int = 200,
  sample: str = 'dct',
  eta: Any = None,
  transport: str | _transport.Transport = 'reset',
  rounding: str = 'nearest',
  schedule: optax.Schedule | None = None,
  plain: optax.GradientTransformation | None = None,
) -> Subproblems:
  """Trains B in W + P B, with a fresh P for every subproblem.

  Args:
    spec: which leaves to lift, as which matrices, at which rank; `side='in'`.
      For bfloat16 weights, `basis_dtype='bfloat16'` halves the memory of P.
    inner: the optimizer of B and of plain leaves, with learning rate and sign,
      such as `optax.adam(1e-3)`. If moments are reset, so are its counters, so
      that its schedules span one subproblem. It does not see W, so it can't
      decay weights.
    update_proj_gap: tau, inner steps per subproblem.
    sample: how to draw P, again at every step. 'dct' takes random columns of
      the cosine transform with random signs of rows, and costs mr cosines;
      'haar' costs mr random numbers and about 8mr^2 FLOPs; 'gaussian', with
      N(0, 1 / r) entries, costs mr random numbers. The first two have P^T P =
      (m / r) I, all E[P P^T] = I.
    eta: eta of the proximal term |B|^2 / (2 eta): a number, a function of the
      number of the subproblem, or None for no such term.
    transport: what happens to the optimizer's moments when P changes; see
      `in_subspace`.
    rounding: how to round merged weights that are narrower than float32.
      'nearest'; 'stochastic', for bfloat16, which is right on average;
      'compensated', which keeps the rounding error in an array of the leaf's
      shape and dtype. Leaves that are not lifted are rounded to the nearest;
      keep them float32.
    schedule: a factor for all steps, of B and of plain leaves, as a function of
      the number of inner steps since the first subproblem began.
    plain: optimizer for leaves that are not lifted, `inner` by default.

  Returns:
    The functions of a training loop.

  Raises:
    ValueError: a side other than 'in'; an unknown sample or rounding; arguments
      that `in_subspace` rejects; at `init`, float16 with stochastic rounding,
      more than 2^20 inputs for the cosine transform, or an optimizer that steps
      along the gradient.
    TypeError: a gap that is not an int.

  References:
    Chen et al., `RSO <https://arxiv.org/abs/2502.07222>`_, 2025, Algorithm 1

  Example:
    >>> import jax, jax.numpy as jnp, optax, subspace_optax as so
    >>> spec = so.SubspaceSpec(rank=2, side='in')
    >>> rso = so.rso.subproblems(spec, optax.sgd(0.1), update_proj_gap=2)
    >>> loss = lambda params, x: jnp.mean(so.rso.dot(x, params['w']) ** 2)
    >>> step = jax.jit(rso.step(loss))
    >>> params = {'w': jnp.ones((8, 16))}
    >>> state = rso.init(params)
    >>> params, state, value = step(params, state, jnp.ones((4, 8)))
    >>> print(value, params['w'].sum(), state.coords['w'].shape)
    64.0 128.0 (2, 16)
  """
  _check(spec, update_proj_gap, sample, rounding)
  transport = _rules.as_transport(transport)
  inner = _sign.require_against(inner, 'inner')
  plain = None if plain is None else _sign.require_against(plain, 'plain')
  directions = _in_subspace.in_subspace(
    inner, spec, transport=transport, plain=plain
  )
  rule = _subproblem.Rule(
    update_proj_gap, sample, eta, transport, rounding, spec.basis_dtype
  )

  def init(params):
    matches = spec.match(params)
    _check_matches.check_matches(spec, matches)
    drawn: dict[str, dict[str, Any]] = {}
    for match in matches:
      if match and _is_lifted(match):
        rule.check(match)
        group = _spec.group_of(spec, match.path)
        drawn[match.path] = rule.settings(match, group)
    _describe.record_drawn(drawn)
    return _first_states.make_state(spec, first_state, params)

  def first_state(params, matches, treedef):
    make = functools.partial(_matrices.per_matrix, matches, treedef)
    return SubproblemState(
      count=jnp.zeros((), jnp.int32),
      seed=make(functools.partial(_first_states.make_seeds, spec)),
      coords=make(_trees.zero_coords),
      inner=directions.init(params),
      lost=make(_nothing_lost) if rounding == 'compensated' else (),
    )

  def bases(params, state):
    seeds = dict(_tree.flatten(state.seed)[0])
    _, treedef = _tree.flatten(params)
    k = state.count // update_proj_gap
    drawn: dict[Any, jax.Array] = {}

    def draw(path, leaf, layout):
      # One array per group, so that query, key and value share one x P.
      key = (
        _spec.group_of(spec, path),
        layout.basis_shape,
        layout.rows,
        _sharding.explicit(leaf),
      )
      if key not in drawn:
        drawn[key] = rule.draw(layout, leaf, seeds[path], k)
      return drawn[key]

    return _matrices.per_matrix(spec.match(params), treedef, draw)

  def update(gradients, state, params):
    bare = _boxes.unbox(state)
    params, new = update_bare(gradients, bare, params)
    boxed = jax.tree.structure(state)
    return params, boxed.unflatten(jax.tree.leaves(new))

  def update_bare(gradients, state, params):
    matches = spec.match(params)

    def node(match, gradient, seeds, coords):
      if _is_lifted(match):
        return rule.node(match, state.count, gradient, seeds, coords)
      return _dtypes.widen(spec, gradient)

    nodes = _map(node, matches, gradients, state.seed, state.coords)
    nodes, own = directions.update(nodes, state.inner, params)
    factor = 1.0 if schedule is None else schedule(state.count)
    params, coords = _step(matches, factor, nodes, params, state.coords)
    count = jnp.asarray(optax.safe_increment(state.count))
    merge = functools.partial(_merge, rule, matches, nodes, state.seed, count)
    params, coords, lost = _varying.cond(
      count % update_proj_gap == 0,
      merge,
      lambda *args: args,
      params,
      coords,
      state.lost,
    )
    return params, SubproblemState(count, state.seed, coords, own, lost)

  def lifted(params, state):
    return _trees.lift(params, bases(params, state), state.coords, spec)

  def merged(params, state):
    def whole(match, w, p, b):
      if not _is_lifted(match):
        return w
      return _subproblem.add_step(match, w, p, b).astype(w.dtype)

    drawn = bases(params, state)
    return _map(whole, spec.match(params), params, drawn, state.coords)

  def step(loss, value_and_grad=jax.value_and_grad):
    def run(params, state, *args):
      drawn = bases(params, state)
      f, at = _trees.split(loss, spec, params, drawn, state.coords)
      value, gradients = value_and_grad(f)(at, *args)
      return *update(gradients, state, params), value

    return _train_step.TrainStep(init, run, merged, gradients_like, bases=bases)

  def gradients_like(params, state):
    return _trees.trained(params, state.coords)

  return Subproblems(init, step, bases, update, lifted, merged, gradients_like)


def _check(spec, gap, sample, rounding) -> None:
  """Raises for arguments from which no subproblem can be made."""
  _spec.check_spec(spec)
  if spec.side != 'in':
    raise ValueError(
      f"spec must have side='in', got {spec.side!r}: P acts on the inputs of "
      'a layer, whatever side is short.'
    )
  if _quantized_basis.is_quantized(spec.basis_dtype):
    raise ValueError(
      f'basis_dtype={jnp.dtype(spec.basis_dtype).name!r} is for stored bases, '
      'but subproblems draw theirs again at every step; use a float dtype.'
    )
  if sample not in _subproblem.SAMPLES:
    raise ValueError(
      f'sample must be one of {_subproblem.SAMPLES}, got {sample!r}.'
    )
  if rounding not in _subproblem.ROUNDING:
    raise ValueError(
      f'rounding must be one of {_subproblem.ROUNDING}, got {rounding!r}.'
    )
  _arguments.check_static(gap, 'update_proj_gap')


def _is_lifted(match: _spec.Match | None) -> bool:
  return match is not None and match.layout is not None


def _entries(tree: Any) -> list[Any]:
  return [entry for _, entry in _tree.flatten(tree)[0]]


def _map(f: Callable[..., Any], matches: list, tree: Any, *rest: Any) -> Any:
  """Maps f(match, *entries) over trees; returns one like the first, boxed."""
  columns = map(_entries, (tree, *rest))
  entries = [f(*row) for row in zip(matches, *columns, strict=True)]
  return _tree.replace_entries(tree, entries)


def _nothing_lost(path: str, leaf: Any, layout: _layout.Layout) -> Any:
  del path
  if jnp.finfo(leaf.dtype).bits >= 32:
    return optax.MaskedNode()
  return layout.zeros(layout.leaf_axes, leaf, leaf.dtype)


def _step(
  matches: list, factor: Any, nodes: Any, params: Any, coords: Any
) -> tuple[Any, Any]:
  """Adds directions to plain leaves, and to B of lifted ones."""

  def step_plain(match, w, node):
    if match is None or _is_lifted(match):
      return w
    return _sharding.like(w + factor * node, w)

  def step_lifted(match, b, node):
    if not _is_lifted(match):
      return b
    return _sharding.like(b + factor * node.direction, b)

  params = _map(step_plain, matches, params, nodes)
  return params, _map(step_lifted, matches, coords, nodes)


def _merge(
  rule: _subproblem.Rule,
  matches: list,
  nodes: Any,
  seeds: Any,
  count: jax.Array,
  params: Any,
  coords: Any,
  lost: Any,
) -> tuple[Any, Any, Any]:
  """Returns W + P B, B = 0, and the rounding errors."""
  keeps = rule.rounding == 'compensated'
  rests = _entries(lost) if keeps else [None] * len(matches)
  columns = map(_entries, (params, nodes, seeds, coords))
  merged = [
    rule.merge(match, w, node.basis, b, rest, seed, count)
    if _is_lifted(match)
    else (w, rest)
    for match, w, node, seed, b, rest in zip(
      matches, *columns, rests, strict=True
    )
  ]
  params = _tree.replace_entries(params, [w for w, _ in merged])
  if keeps:
    lost = _tree.replace_entries(lost, [rest for _, rest in merged])
  return params, jax.tree.map(jnp.zeros_like, coords), lost
