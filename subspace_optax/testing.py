# SPDX-License-Identifier: Apache-2.0
"""Checks for rules written outside this package.

Each check trains a small tree with the rule: a matrix, a stack of matrices
along a middle axis, and a vector. It raises an AssertionError that names the
property which does not hold.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_optax import projectors
from subspace_optax import residuals
from subspace_optax import transports
from subspace_optax._chain import _projection
from subspace_optax._chain import _spec
from subspace_optax._chain import _subspace
from subspace_optax._matrix import _tree
from subspace_optax.projectors import _periodic
from subspace_optax.transports import _rules

_STEPS = 6
_SPEC = _spec.SubspaceSpec(
  3,
  weight_dimension_numbers={
    'matrix': _spec.DimensionNumbers(0, 1),
    'stack': _spec.DimensionNumbers(0, 2),
    'vector': None,
  },
  only_if_smaller=False,
)
_SHAPES = {'matrix': (8, 12), 'stack': (12, 2, 8), 'vector': (12,)}


def check_projector(projector: projectors.Projector) -> None:
  """Checks that a projector is fit for a training run.

  The state must keep its structure, shapes and dtypes through jitted steps
  without a second compilation. `jax.lax.scan` must give the same steps in
  float32. Bases must stay finite, and orthonormal if the projector says so,
  with zero, NaN or bfloat16 gradients. Every matrix of a stack must get a
  basis, and no basis that the rule draws may be rejected as not orthonormal.
  Compiling takes most of a minute.

  Args:
    projector: the rule, for example from `subspace_optax.projectors.periodic`.

  Raises:
    AssertionError: a property does not hold.

  Example:
    >>> import subspace_optax as so
    >>> so.testing.check_projector(so.projectors.svd(2))
  """
  inner = optax.scale_by_adam()
  tx = _subspace.subspace(_SPEC, projector, inner, transport='first')
  all_updates, states = _run_finitely(tx, jnp.float32)
  _check_bases(projector, states)
  _check_bases(projector, _run_finitely(tx, jnp.bfloat16)[1])
  _check_scan(tx, all_updates)


def check_residual(residual: residuals.Residual) -> None:
  """Checks that a residual rule is fit for a training run.

  Updates and state must keep their structure, shapes and dtypes through jitted
  steps without a second compilation. `jax.lax.scan` must give the same steps in
  float32. A zero gradient must make a finite update, and a NaN gradient must
  not stay in the updates of other matrices.

  Args:
    residual: the rule.

  Raises:
    AssertionError: a property does not hold.

  Example:
    >>> import subspace_optax as so
    >>> def update(node, scale, count, state):
    ...   inside = node.combine(scale * node.direction)
    ...   return inside + 0.1 * node.outside(), state
    >>> so.testing.check_residual(so.residuals.Residual('descent', update))
  """
  wide, narrow = (
    _subspace.subspace(
      _SPEC, projector, optax.scale_by_adam(), residual=residual
    )
    for projector in (projectors.gaussian(2), projectors.stiefel(2))
  )
  all_updates, _ = _run_finitely(wide, jnp.float32)
  _run_finitely(narrow, jnp.bfloat16)
  _check_scan(wide, all_updates)


def check_transport(transport: transports.Transport) -> None:
  """Checks that a transport is fit for a training run.

  Moments must keep their structure, shapes and dtypes through jitted steps
  without a second compilation, also if each matrix has its own state; then
  `jax.lax.scan` must give the same steps. Nothing may change while no basis
  moves.

  Args:
    transport: the rule, or its name.

  Raises:
    AssertionError: a property does not hold.

  Example:
    >>> import subspace_optax as so
    >>> def move(moment):
    ...   return 0.5 * moment.mix(moment.transition, moment.value)
    >>> shrunk = so.transports.Transport('shrunk', move, ('mean', 'sum'))
    >>> so.testing.check_transport(shrunk)
  """
  transport = _rules.as_transport(transport)

  def make(gap: int, transport: Any, per_matrix: bool) -> Any:
    return _subspace.subspace(
      _SPEC,
      projectors.stiefel(gap),
      optax.scale_by_adam(),
      transport=transport,
      per_matrix=per_matrix,
    )

  if not transport.resets:  # else there is one state per matrix in any case
    _run_finitely(make(2, transport, False), jnp.float32)
  tx = make(2, transport, True)
  _check_scan(tx, _run_finitely(tx, jnp.float32)[0])
  resting = [
    jax.tree.leaves(_run(make(99, x, transport.resets), jnp.float32)[0])
    for x in (transport, 'keep')
  ]
  for found, wanted in zip(*resting, strict=True):
    np.testing.assert_allclose(
      np.asarray(found, np.float32),
      np.asarray(wanted, np.float32),
      rtol=1e-5,
      atol=1e-6,
      err_msg='moments change where no basis moves',
    )


def _gradients(step: int, dtype: Any) -> Any:
  """Returns gradients, once zero and once NaN in one matrix of the stack."""
  rng = np.random.default_rng(step)
  made = {k: rng.standard_normal(shape) for k, shape in _SHAPES.items()}
  if step == 2:
    made['matrix'] *= 0.0
    made['stack'][:, 1] = np.nan
  return {k: jnp.asarray(x, dtype) for k, x in made.items()}


def _run(tx: Any, dtype: Any) -> tuple[list[Any], list[Any]]:
  """Returns the updates and states of a few jitted steps."""
  params = jax.tree.map(jnp.zeros_like, _gradients(0, dtype))
  state, traces = tx.init(params), []
  all_updates, states = [], []

  @jax.jit
  def update(gradients: Any, state: Any) -> tuple[Any, Any]:
    traces.append(None)
    return tx.update(gradients, state, params)

  for t in range(_STEPS):
    gradients = _gradients(t, dtype)
    kinds = _kinds(state)
    updates, state = update(gradients, state)
    assert _kinds(state) == kinds, (
      f'the state changes structure, shape or dtype in step {t}: from {kinds} '
      f'to {_kinds(state)}'
    )
    assert _kinds(updates) == _kinds(gradients), (
      f'updates are {_kinds(updates)} for gradients of {_kinds(gradients)}'
    )
    all_updates.append(updates)
    states.append(state)
  assert len(traces) == 1, f'{len(traces)} programs are compiled for one step'
  return all_updates, states


def _run_finitely(tx: Any, dtype: Any) -> tuple[list[Any], list[Any]]:
  """Like `_run`, and checks that updates are finite."""
  all_updates, states = _run(tx, dtype)
  for t, updates in enumerate(all_updates):
    for name, x in updates.items():
      x = np.asarray(x, np.float32)
      x = x[:, :1] if name == 'stack' else x
      assert np.isfinite(x).all(), f'the update of {name} is not finite in {t}'
  return all_updates, states


def _check_scan(tx: Any, all_updates: list[Any]) -> None:
  """Checks that a scan takes the steps whose updates are given, in float32."""

  def step(state: Any, gradients: Any) -> tuple[Any, Any]:
    updates, state = tx.update(gradients, state, params)
    return state, updates

  gradients = [_gradients(t, jnp.float32) for t in range(_STEPS)]
  params = jax.tree.map(jnp.zeros_like, gradients[0])
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
  _, scanned = jax.jit(lambda s: jax.lax.scan(step, s, stacked))(
    tx.init(params)
  )
  for name in _SHAPES:
    found = np.asarray(scanned[name], np.float32)
    wanted = np.stack([np.asarray(x[name], np.float32) for x in all_updates])
    np.testing.assert_allclose(
      found,
      wanted,
      0.02,
      0.02,
      err_msg=f'jax.lax.scan takes other steps: {name}',
    )


def _check_taken(own: Any) -> None:
  """Raises if a rule that is called every T steps still owes a basis."""
  if not isinstance(own, _periodic.PeriodicState):
    return
  for path, owed in _tree.flatten(own.owed)[0]:
    assert _tree.is_masked(owed) or not np.any(owed), (
      f'the basis that draw returned for {path} was refused: it must be finite '
      'and have orthonormal columns, P^T P = I to 0.5; orthogonalise it, or '
      'say orthonormal=False'
    )


def _kinds(tree: Any) -> Any:
  shapes = [(x.shape, x.dtype.name) for x in jax.tree.leaves(tree)]
  return jax.tree.structure(tree), shapes


def _check_bases(projector: projectors.Projector, states: list[Any]) -> None:
  for state in states:
    ((_, own),) = _tree.find(state, _projection.ProjectState)
    if int(own.count) != 3:  # after gradients that are zero or NaN
      _check_taken(own.projector)
    if projector.rebuild:  # not in the state
      continue
    for path, basis in _tree.flatten(own.subspaces.basis)[0]:
      if _tree.is_masked(basis):
        continue
      p = np.asarray(basis, np.float64)
      assert np.isfinite(p).all(), f'a basis of {path} is not finite'
      # (8, 3), and (12, 2, 3) or (2, 8, 3), whose axis of layers is the short
      # one.
      layers = [p] if p.ndim == 2 else np.moveaxis(p, p.shape.index(2), 0)
      for one in layers if projector.orthonormal else ():
        np.testing.assert_allclose(
          one.T @ one, np.eye(3), atol=1e-3, err_msg=f'P^T P of {path} is not I'
        )
