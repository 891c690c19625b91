"""The ready-made optimizers with residuals, in dense float64 loops.

Bases are those of the state, or of the same projector with bases that are
stored; `test_power` and others check them. Weight decay is 0.1 of the weights
before the step, at a learning rate of 0.05.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import errors
import grid
import references as ref
import rules
import subspace_optax as so

VIEW = ref.view((2, 12, 8))
SPEC = so.SubspaceSpec(ref.RANK, allow_empty=True)
LR, DECAY, GAP, STEPS = 0.05, 0.1, 3, 7
PARAMS = {'w': ref.normal(99, VIEW.shape), 'bias': ref.normal(98, (5,))}


class Nesterov:
  """R + b M after M <- b M + R."""

  def start(self, shape):
    return {'m': np.zeros(shape)}

  def update(self, r, s):
    m = 0.95 * s['m'] + r
    return r + 0.95 * m, {'m': m}


# The optimizer, the projector where its bases are not stored, the transport,
# the inner optimizer and the residual rule.
MADE = {
  'fira_adamw': (None, 'keep', ref.Adam(), lambda: rules.Fira(0.25)),
  'apollo_adamw': (
    so.projectors.gaussian(GAP),
    'keep',
    ref.Adam(),
    lambda: rules.Apollo(1.0),
  ),
  'subspace_adamw': (
    so.projectors.dct(GAP, 'random'),
    'first',
    ref.Adam(),
    lambda: rules.Fira(1.0),
  ),
  'subspace_muon': (
    so.projectors.dct(GAP, 'random'),
    'first',
    Nesterov(),
    lambda: rules.NorMuon(8.0, 1.95, 0.95, 8 / 12, outputs_last=False),
  ),
}


def make(name, **options):
  gap = {} if name == 'ldadamw' else {'update_proj_gap': GAP}
  return getattr(so, name)(LR, ref.RANK, weight_decay=DECAY, **gap, **options)


def gradients():
  grads = []
  for t in range(STEPS):
    g = ref.normal(1, VIEW.shape) + 0.5 * ref.normal(10 + t, VIEW.shape)
    grads.append({'w': g, 'bias': ref.normal(50 + t, (5,))})
  return grads


def run(tx):
  """Returns updates and states; params stay where they are."""
  state, update, updates = tx.init(PARAMS), ref.jit(tx.update), []
  states = [state]
  for g in gradients():
    u, state = update(g, state, PARAMS)
    updates.append(u)
    states.append(state)
  assert update._cache_size() == 1
  return updates, states


def all_bases(projector, states):
  """Returns the bases that each step used, (count, m, r)."""
  if projector is None:
    return [VIEW.bases(ref.bases(s)['w']) for s in states[1:]]
  tx, used = so.project(SPEC, projector), []
  state, update = tx.init(PARAMS), ref.jit(tx.update)
  for g in gradients():
    nodes, state = update(g, state, PARAMS)
    used.append(VIEW.bases(nodes['w'].basis))
  return used


def assert_update(update, direction, t):
  """Checks -lr (direction + decay W), and Adam on the bias."""
  w = np.asarray(PARAMS['w'], np.float64)
  wanted = -LR * (VIEW.leaf(direction) + DECAY * w)
  np.testing.assert_allclose(
    update['w'], wanted, rtol=2e-3, atol=2e-5, err_msg=f'step {t}'
  )


@pytest.mark.parametrize('name', MADE)
def test_equals_dense_loop(name):
  projector, transport, inner, rule = MADE[name]
  updates, states = run(make(name))
  dense = [rule() for _ in range(VIEW.count)]
  loop = ref.InSubspace(VIEW, inner, transport)
  adam, bias = ref.Adam(), ref.Adam().start((5,))
  old = None
  for t, (g, p) in enumerate(
    zip(gradients(), all_bases(projector, states), strict=True)
  ):
    moved = None if old is None else np.flatnonzero((p != old).any((1, 2)))
    loop.move(p, moved)
    old, direction = p, []
    for i, one in enumerate(VIEW.matrices(g['w'])):
      r = p[i].T @ one
      n, loop.states[i] = inner.update(r, loop.states[i])
      direction.append(dense[i](p[i], one, r, n))
    assert_update(updates[t], np.stack(direction), t)
    n, bias = adam.update(np.asarray(g['bias'], np.float64), bias)
    wanted = -LR * (n + DECAY * np.asarray(PARAMS['bias'], np.float64))
    np.testing.assert_allclose(updates[t]['bias'], wanted, rtol=1e-4)


@pytest.mark.parametrize('feedback', [True, False])
def test_ldadamw_equals_dense_loop(feedback):
  updates, states = run(make('ldadamw', error_feedback=feedback))
  b1, adam = 0.908, ref.Adam(0.908, 0.99)
  loop = ref.BothInSubspace(VIEW, adam)
  loop.move(VIEW.bases(ref.bases(states[0])['w']))
  mean = np.zeros((VIEW.count, ref.RANK, VIEW.n))
  error = np.zeros((VIEW.count, VIEW.m, VIEW.n))
  for t, g in enumerate(gradients()):
    fed, old = VIEW.matrices(g['w']) + error, loop.bases.copy()
    debiased = mean / (1 - b1**t if t else 1.0)
    bases = np.stack(list(map(ref.power_step, old, debiased, fed, [b1] * 2)))
    means = [s['m'] for s in loop.states]
    loop.move(bases)
    carried = [s['m'] for s in loop.states]
    assert_update(updates[t], loop.step(VIEW.leaf(fed)), t)
    for i, p in enumerate(bases):
      r, c = p.T @ fed[i], p.T @ old[i]
      mean[i] = b1 * c @ mean[i] + (1 - b1) * r
      lost = b1 / (1 - b1) * (old[i] @ means[i] - p @ carried[i])
      error[i] = fed[i] - p @ r + lost if feedback else 0.0


# Floats of state per 12 x 8 matrix, m = 8, r = 3, but for single numbers.
FLOATS = {
  'fira_adamw': 8 * 3 + 2 * 3 * 12,
  'apollo_adamw': 2 * 3 * 12,
  'ldadamw': 8 * 3 + 3 * 3 * 12 + 8 * 12,
  'subspace_adamw': 2 * 3 * 12,
  'subspace_muon': 3 * 12 + 8,
}


@pytest.mark.parametrize('name', FLOATS)
def test_state(name):
  state = jax.eval_shape(make(name).init, {'w': PARAMS['w']})
  sizes = [x.size for x in jax.tree.leaves(state)]
  assert sum(size for size in sizes if size > 2) == 2 * FLOATS[name]
  assert all(sizes)


@pytest.mark.parametrize('name', FLOATS)
def test_takes_schedules_masks_specs_and_trees_without_matrices(name):
  schedule = optax.linear_schedule(0.1, 0.0, 10)
  tx = getattr(so, name)(schedule, weight_decay=0.1, mask={'bias': True})
  params = {'bias': jnp.ones((3,))}
  jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
  with errors.raises(ValueError, 'include', 'nothing'):
    spec = so.SubspaceSpec(2, include='nothing')
    getattr(so, name)(0.1, spec=spec).init(PARAMS)


def derivatives(tx, state, params, gradient):
  """Returns those of the squares of a step's updates."""

  def squares(gradient):
    updates, _ = tx.update(gradient, state, params)
    return sum(jnp.vdot(u, u) for u in jax.tree.leaves(updates))

  return jax.grad(squares)(gradient)


_ADAM = optax.scale_by_adam(eps_root=0.01)
_ROOTS = {
  'galore': {'base_optimizer': _ADAM},
  'golore': {'inner': _ADAM},
  'online_subspace_descent': {
    'inner': _ADAM,
    'basis_optimizer': optax.adam(1e-3, eps_root=0.01),
  },
  'fira_adamw': {'eps_root': 0.01},
  'apollo_adamw': {'eps_root': 0.01},
  'ldadamw': {'eps_root': 0.01},
  'subspace_adamw': {'eps_root': 0.01},
  'subspace_muon': {'plain': _ADAM},
  'normuon': {'plain': _ADAM},
}


# The others' rules are some of these: one for each projector that reads the
# gradient, residual, transport and assembly.
_DERIVED = ('galore', 'online_subspace_descent', 'apollo_adamw', 'ldadamw')
_DERIVED += ('subspace_adamw', 'subspace_muon')


@pytest.mark.parametrize(
  'name',
  grid.only(_ROOTS, _DERIVED),
)
def test_derivatives_are_finite_where_gradients_are_zero(name):
  # One matrix: what loops over a stack has no derivative.
  params = {'w': PARAMS['w'][0], 'bias': PARAMS['bias']}
  gradient = jax.tree.map(jnp.cos, params)
  gradient['bias'] = gradient['bias'].at[1:].set(0.0)
  tx = cases.ready_made(name, ref.RANK)(1.0, **_ROOTS[name])
  state = tx.init(params)
  of = ref.jit(functools.partial(derivatives, tx))
  for k, x in of(state, params, gradient).items():
    assert np.isfinite(x).all(), k
    assert np.abs(x[0]).max() > 1e-6, k
  zero = gradient | {'w': jnp.zeros_like(gradient['w'])}
  for k, x in of(state, params, zero).items():
    assert np.isfinite(x).all(), k


@pytest.mark.parametrize(
  'name, rates',
  [
    ('fira_adamw', {'b2': 0.999}),
    ('apollo_adamw', {'b2': 0.999}),
    ('subspace_adamw', {'b2': 0.999}),
    ('subspace_muon', {'b': 0.999}),
    ('subspace_muon', {'b2': 0.999}),
    ('normuon', {'b2': 0.999}),
  ],
)
def test_decay_rates_that_are_one_in_bfloat16_are_warned_of(name, rates):
  # Of no matrix, whose update takes a program for each of its operations.
  params = {'bias': PARAMS['bias'].astype(jnp.bfloat16)}
  optimizer = functools.partial(getattr(so, name), spec=SPEC)
  make = functools.partial(optax.inject_hyperparams, optimizer)
  tx = make()(learning_rate=0.1, **rates)
  with pytest.warns(UserWarning) as found:
    tx.update(params, tx.init(params), params)  # which makes it again
  message, (rate,) = str(found[0].message), rates
  assert len(found) == 1 and 'hyperparam_dtype=jnp.float32' in message
  assert f'{rate} is 1 in bfloat16' in message and f'1 - {rate}:' in message
  wide = make(hyperparam_dtype=jnp.float32)(learning_rate=0.1, **rates)
  wide.init(params)
  optimizer(0.1, **rates).init(params)


@pytest.mark.parametrize('name', ['ldadamw', 'subspace_muon'])
def test_decay_rates_that_are_below_one_in_bfloat16_are_taken(name):
  params = {'w': PARAMS['w'][0].astype(jnp.bfloat16)}
  optimizer = functools.partial(getattr(so, name), spec=SPEC)
  tx = optax.inject_hyperparams(optimizer)(learning_rate=0.1)
  updates, _ = ref.jit(tx.update)(params, tx.init(params), params)
  assert np.isfinite(updates['w'].astype(jnp.float32)).all()


@pytest.mark.parametrize('name', cases.READY_MADE)
def test_leaves_of_none_stay_none(name):
  """As in what equinox filters."""
  tx = cases.ready_made(name, ref.RANK)(0.1)
  params = {'w': PARAMS['w'][0], 'bias': PARAMS['bias']}
  with_none = params | {'activation': None, 'rest': {'buffer': None}}
  state, other = (jax.eval_shape(tx.init, x) for x in (with_none, params))
  kinds = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
  assert kinds(state) == kinds(other)
  updates, _ = jax.eval_shape(tx.update, with_none, state, with_none)
  assert jax.tree.structure(updates) == jax.tree.structure(with_none)


def test_muon_refuses_a_bad_decay():
  with errors.raises(ValueError, 'b must', '1.0'):
    so.subspace_muon(1e-3, b=1.0)
