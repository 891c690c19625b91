"""Residual rules against dense float64 loops, which are given the bases.

`rules` has the formulas. Error feedback, whose state is a matrix, has its loop
here: E + b1 / (1 - b1) (P_o M_o - P M) is added to the next G.
"""

import functools
import math

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
from subspace_optax import projectors
from subspace_optax import residuals

# Stacked, with the columns projected; and with two free axes.
VIEWS = {'stack': ref.view((2, 12, 8)), 'query/kernel': ref.QUERY}
SPEC = so.SubspaceSpec(ref.RANK)
SCALE, STEPS = 0.25, 8
ADAM = ref.Adam()
# Bases that move before the coordinates are taken, after it, and such that are
# not orthonormal.
PROJECTORS = {
  'stiefel': projectors.stiefel(3),
  'gaussian': projectors.gaussian(3, regenerate=False),
  'online_pca': projectors.online_pca(optax.sgd(0.5)),
}


def gradients(t, views=VIEWS):
  """Norms that jump up and down, so that the limiter has work."""
  jump = (1.0, 3.0, 0.5, 2.0, 2.0, 8.0, 0.1, 1.0)[t]
  grads = jax.tree.map(lambda x: jump * x, ref.like(VIEWS, t))
  return {k: grads[k] for k in views}


def of_residual(projector, residual, **options):
  return so.subspace(
    SPEC,
    PROJECTORS[projector],
    optax.scale_by_adam(),
    residual=residual,
    scale=SCALE,
    **options,
  )


@functools.cache
def compiled(projector, rule, transport, shapes):
  """Returns the optimizer of a rule by its name, and its update on a tree."""
  del shapes
  tx = of_residual(projector, ALL_RULES[rule][0], transport=transport)
  return tx, ref.jit(tx.update)


def run(projector, rule, grads, transport='keep'):
  """Returns updates and states, the first state from `init`."""
  tx, update = compiled(projector, rule, transport, tuple(grads[0]))
  updates, states = [], [tx.init(grads[0])]
  for g in grads:
    u, state = update(g, states[-1])
    updates.append(u)
    states.append(state)
  assert update._cache_size() == 1
  return updates, states


RULES = {
  'fira': (residuals.fira(), rules.Fira),
  'unlimited': (residuals.fira(limiter=None), rules.Unlimited),
  'official': (residuals.fira(official_betas=(0.9, 0.999)), rules.OfficialFira),
  'apollo': (residuals.apollo(), rules.Apollo),
  'apollo_mini': (residuals.apollo('tensor'), rules.ApolloMini),
  'sign': (residuals.sign(0.3), functools.partial(rules.Sign, strength=0.3)),
  'orthogonal': (
    residuals.orthogonal(1.5),
    functools.partial(rules.Orthogonal, weight=1.5),
  ),
  'normuon': (
    residuals.orthogonal(1.5, b2=0.8),
    functools.partial(rules.NorMuon, weight=1.5, b2=0.8),
  ),
}
ALL_RULES = RULES | {
  'error_feedback': (residuals.error_feedback(0.9), None),
}
# The stack narrows, from 12 to 8; the query widens, from 9 to 3 x 4.
WIDENING = {'stack': 8 / 12, 'query/kernel': 12 / 9}


# Where P^T P matters, with bases that are not orthonormal, too. One view each:
# a rule sees matrices alone, but those that look at which side is the output's.
POINTS = [
  ('fira', 'stiefel', 'stack'),
  ('unlimited', 'stiefel', 'query/kernel'),
  ('official', 'stiefel', 'stack'),
  ('apollo', 'stiefel', 'query/kernel'),
  ('apollo_mini', 'stiefel', 'stack'),
  ('sign', 'stiefel', 'query/kernel'),
  ('orthogonal', 'stiefel', 'query/kernel'),
  ('normuon', 'stiefel', 'both'),
  ('fira', 'gaussian', 'query/kernel'),
  ('fira', 'online_pca', 'stack'),
  ('official', 'gaussian', 'query/kernel'),
]


def views_of(which):
  return VIEWS if which == 'both' else {which: VIEWS[which]}


# Whose programs other tests take, too.
AT_STIEFEL = {rule: of for rule, name, of in POINTS if name == 'stiefel'} | {
  'error_feedback': 'query/kernel'
}


@pytest.mark.parametrize(
  'rule, projector, of',
  [
    *POINTS,
    # What is outside of such bases, as for `fira`.
    pytest.param('sign', 'gaussian', 'stack', marks=pytest.mark.full),
    pytest.param('orthogonal', 'stiefel', 'stack', marks=pytest.mark.full),
  ],
)
def test_equals_dense_loop(rule, projector, of):
  make = RULES[rule][1]
  views = views_of(of)
  grads = [gradients(t, views) for t in range(STEPS)]
  updates, states = run(projector, rule, grads)
  for k, view in views.items():
    if rule in ('orthogonal', 'normuon'):
      make = functools.partial(make, widening=WIDENING[k])
    if rule == 'normuon':  # whose inputs the basis spans, if it is on the left
      make = functools.partial(make, outputs_last=view.left)
    dense = [make(SCALE) for _ in range(view.count)]
    inner = [ADAM.start((ref.RANK, view.n)) for _ in range(view.count)]
    for t, g in enumerate(grads):
      at = t if projector == 'online_pca' else t + 1
      bases = view.bases(ref.bases(states[at])[k])
      wanted = []
      for i, (p, one) in enumerate(
        zip(bases, view.matrices(g[k]), strict=True)
      ):
        n, inner[i] = ADAM.update(p.T @ one, inner[i])
        wanted.append(dense[i](p, one, p.T @ one, n))
      np.testing.assert_allclose(
        view.matrices(updates[t][k]),
        np.stack(wanted),
        rtol=2e-3,
        atol=2e-5,
        err_msg=f'{k} step {t}',
      )


@pytest.mark.parametrize(
  'projector, transport, of',
  [
    ('stiefel', 'keep', 'query/kernel'),
    ('stiefel', 'reset', 'query/kernel'),
    ('gaussian', 'first', 'query/kernel'),
    ('online_pca', 'keep', 'stack'),
    # Of bases for which C is P_n^T P_o alone.
    pytest.param('stiefel', 'first', 'stack', marks=pytest.mark.full),
  ],
)
def test_error_feedback_equals_dense_loop(projector, transport, of):
  tracked = projector == 'online_pca'
  views = views_of(of)
  grads = [gradients(t, views) for t in range(STEPS)]
  updates, states = run(projector, 'error_feedback', grads, transport)
  for k, view in views.items():
    dense = ref.InSubspace(view, ADAM, transport)
    dense.move(view.bases(ref.bases(states[0])[k]))
    error = np.zeros((view.count, view.m, view.n))
    for t, g in enumerate(grads):
      fed = view.matrices(g[k]) + error
      error, old, lost = fed.copy(), dense.bases.copy(), []
      if not tracked:
        new = view.bases(ref.bases(states[t + 1])[k])
        means = [s['m'] for s in dense.states]
        dense.move(new, np.flatnonzero((old != new).any((1, 2))))
        for p_old, p, m, s in zip(old, new, means, dense.states, strict=True):
          # The smallest matrices that have these coordinates.
          lift = lambda p, m: np.linalg.pinv(p).T @ m
          lost.append(9.0 * (lift(p_old, m) - lift(p, s['m'])))
      update = SCALE * dense.step(view.leaf(fed))
      np.testing.assert_allclose(
        view.matrices(updates[t][k]),
        update,
        rtol=2e-3,
        atol=2e-5,
        err_msg=f'{k} step {t}',
      )
      error = np.stack(list(map(rules.outside, dense.bases, fed)))
      error += np.stack(lost) if lost else 0.0
      found = ref.find(states[t + 1], 'residual').residual[k]
      np.testing.assert_allclose(
        view.matrices(found), error, rtol=2e-3, atol=1e-4, err_msg=k
      )
      if tracked:
        dense.move(view.bases(ref.bases(states[t + 1])[k]))


def test_feedback_returns_what_was_left_out():
  # A gradient outside the fixed basis moves nothing, but adds up.
  p = np.linalg.qr(np.asarray(ref.normal(0, (8, 8))))[0]
  spec = so.SubspaceSpec(ref.RANK)
  tx = so.subspace(
    spec,
    projectors.stiefel(2),
    optax.identity(),
    residual=residuals.error_feedback(b1=0.0),
  )
  g = {'w': jnp.asarray(p[:, :1] @ np.ones((1, 12)), jnp.float32)}
  state, total = tx.init(g), np.zeros((8, 12))
  update = ref.jit(tx.update)
  for _ in range(40):
    u, state = update(g, state)
    total += np.asarray(u['w'])
  left = ref.find(state, 'residual').residual['w']
  np.testing.assert_allclose(total + left, 40 * np.asarray(g['w']), rtol=1e-3)
  # Without it, a basis that sees r / m of the gradient loses the rest.
  assert np.linalg.norm(left) < 0.3 * np.linalg.norm(total)


# APOLLO's limiter is that of Fira.
@pytest.mark.parametrize(
  'rule',
  ['fira', pytest.param('apollo', marks=pytest.mark.full), 'official'],
)
def test_norms_grow_by_one_percent_at_most(rule):
  tx = so.subspace(
    SPEC,
    projectors.svd(4, 'gram'),
    optax.scale_by_adam(),
    residual=RULES[rule][0],
    scale=0.0 if rule == 'fira' else 1.0,
  )
  key = {'w': ref.decaying(0, ref.STACK)}
  state, update, norms = tx.init(key), ref.jit(tx.update), []
  rng = np.random.default_rng(0)
  for t in range(30):
    jump = np.exp(2 * rng.normal(size=(2, 1, 1)))
    g = ref.decaying(t, ref.STACK) * jnp.asarray(jump, jnp.float32)
    u, state = update({'w': g}, state)
    found = np.linalg.norm(np.asarray(u['w'], np.float64), axis=(1, 2))
    kept = np.asarray(ref.find(state, 'residual').residual['w'])
    if rule != 'official':  # which counts norms before the bias is corrected
      np.testing.assert_allclose(found, kept, rtol=1e-3)
    norms.append(kept)
  ratio = np.array(norms[1:]) / np.array(norms[:-1])
  np.testing.assert_array_less(ratio, 1.01 * (1 + 1e-6))
  assert (ratio > 1.0099).any() and (ratio < 0.9).any()


@pytest.mark.parametrize(
  'rule', ['fira', 'apollo', 'sign', 'error_feedback', 'normuon']
)
def test_nothing_is_remembered_of_bad_gradients(rule):
  views = views_of(AT_STIEFEL[rule])
  good = [gradients(t, views) for t in range(2)]
  bad = jax.tree.map(lambda x: x.at[..., 0].set(jnp.nan), good[0])
  zero = jax.tree.map(jnp.zeros_like, good[0])
  updates, states = run('stiefel', rule, [good[0], bad, zero, good[1]])
  for k in views:
    assert np.isnan(updates[1][k]).any()  # as optax: it shows
  if rule == 'sign':  # which keeps nothing
    return
  kept = [ref.find(s, 'residual').residual for s in states]
  for k in views:
    assert np.isfinite(kept[4][k]).all()
    np.testing.assert_array_equal(kept[2][k], kept[1][k])
    # Adam's direction is not zero where the gradient is.
    if rule not in ('error_feedback', 'normuon'):
      np.testing.assert_array_equal(kept[3][k], kept[1][k])


@pytest.mark.parametrize(
  'rule, moment_dtype',
  [
    *grid.cover(RULES, ['parameter', None], of=2),
    ('error_feedback', 'parameter'),
    ('error_feedback', None),
  ],
)
def test_dtypes(rule, moment_dtype):
  residual = ALL_RULES[rule][0]
  params = {'w': jnp.ones((2, 24, 32), jnp.bfloat16), 'b': jnp.ones((3,))}
  tx = so.subspace(
    so.SubspaceSpec(3, moment_dtype=moment_dtype),
    projectors.stiefel(2),
    optax.scale_by_adam(),
    residual=residual,
  )
  state = jax.eval_shape(tx.init, params)
  updates, new = jax.eval_shape(tx.update, params, state, params)
  types = lambda x: [
    (v.shape, v.dtype, v.weak_type) for v in jax.tree.leaves(x)
  ]
  assert types(new) == types(state)
  assert types(updates) == types(params)
  if rule == 'error_feedback':
    dtype = ref.find(state, 'residual').residual['w'].dtype
    assert dtype == (jnp.bfloat16 if moment_dtype else jnp.float32)


def _pieces(residual, own=SPEC, **of_unproject):
  return optax.chain(
    so.project(own, PROJECTORS['stiefel'], keep_gradient=True),
    so.in_subspace(optax.scale_by_adam(), own),
    so.unproject(scale=SCALE, residual=residual, **of_unproject),
  )


@pytest.mark.parametrize('rule', ['fira', 'sign'])
def test_pieces_take_the_same_steps(rule):
  views = views_of(AT_STIEFEL[rule])
  grads = [gradients(t, views) for t in range(4)]
  updates, _ = run('stiefel', rule, grads)
  tx = _pieces(RULES[rule][0])
  state, update = tx.init(grads[0]), ref.jit(tx.update)
  for g, wanted in zip(grads, updates, strict=True):
    u, state = update(g, state)
    for k in views:
      np.testing.assert_allclose(u[k], wanted[k], rtol=1e-4, atol=1e-6)


def test_pieces_with_other_matrices_need_the_spec():
  params = {'w': jnp.ones((8, 2, 12))}
  spec = so.SubspaceSpec(
    3, weight_dimension_numbers={'w': so.DimensionNumbers((0,), (2,))}
  )
  tx = _pieces(residuals.fira(), spec)
  state = jax.eval_shape(tx.init, params)
  with errors.raises(ValueError, "'w'", '(2,)', '(8,)', 'spec'):
    jax.eval_shape(tx.update, params, state)
  tx = _pieces(residuals.fira(), spec, spec=spec)
  jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params))


def test_feedback_comes_too_late_for_unproject():
  with errors.raises(ValueError, 'error_feedback', '`subspace_optax.subspace`'):
    so.unproject(residual=residuals.error_feedback())


def test_unknown_momentum_is_named():
  tx = so.subspace(
    SPEC,
    PROJECTORS['stiefel'],
    optax.identity(),
    residual=residuals.error_feedback(),
  )
  params = jax.eval_shape(lambda: ref.like(VIEWS))
  state = jax.eval_shape(tx.init, params)
  with errors.raises(ValueError, 'register_moments', 'b1=0'):
    jax.eval_shape(tx.update, params, state)


@pytest.mark.parametrize(
  'make, argument',
  [
    (lambda: residuals.fira(limiter=0.99), 'limiter'),
    (lambda: residuals.fira(rounding=-0.1), 'rounding'),
    (lambda: residuals.fira(rounding=1.0), 'rounding'),
    (lambda: residuals.fira(rounding=math.nan), 'rounding'),
    (lambda: residuals.apollo(limiter=0.0), 'limiter'),
    (lambda: residuals.apollo('row'), 'granularity'),
    (lambda: residuals.error_feedback(b1=1.0), 'b1'),
    (lambda: residuals.error_feedback(b1=-0.1), 'b1'),
    (lambda: residuals.orthogonal(steps=0), 'steps'),
  ],
)
def test_bad_arguments(make, argument):
  with errors.raises(ValueError, argument):
    make()


@pytest.mark.parametrize('inner', [optax.adam(0.1), optax.sgd(0.1)])
def test_inner_with_its_own_learning_rate_is_refused(inner):
  params, options = {'w': jnp.ones((8, 12))}, {'residual': residuals.fira()}
  with errors.raises(ValueError, 'fira', 'learning rate', 'scale_by_adam'):
    so.subspace(SPEC, PROJECTORS['stiefel'], inner, **options).init(params)
  so.subspace(SPEC, PROJECTORS['stiefel'], inner).init(params)


def test_rounding_that_is_no_number():
  with errors.raises(TypeError, 'rounding', 'None', "'x'"):
    residuals.fira(rounding='x')


def test_what_is_no_rule():
  with errors.raises(TypeError, 'residual', 'subspace_optax.residuals'):
    so.unproject(residual=residuals.fira)


def test_a_rule_names_the_arguments_of_its_init():
  rule = residuals.Residual(
    'last gradient',
    lambda node, scale, count, last: (node.gradient, node.gradient),
    lambda layout, leaf, of_moments: jnp.zeros_like(leaf, of_moments),
  )
  tx = so.subspace(SPEC, PROJECTORS['stiefel'], optax.identity(), residual=rule)
  params = {'w': jnp.ones((8, 12))}
  state = jax.eval_shape(tx.init, params)
  jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize(
  'dtype',
  ['float32', 'bfloat16', pytest.param('float16', marks=pytest.mark.full)],
)
def test_fira_forgets_the_rounding_of_a_gradient_inside_its_basis(dtype):
  """Its norm is no norm of a residual that may grow by a hundredth a step."""
  normal = lambda i, *shape: 1e-2 * jax.random.normal(jax.random.key(i), shape)
  params = {'w': jnp.zeros((32, 48), dtype)}
  low = {'w': (10 * normal(1, 32, 4) @ normal(2, 4, 48)).astype(dtype)}
  tx = so.fira_adamw(1.0, 8)
  update = cases.jit(tx.update)

  def norm_of_second(first):
    _, state = update(first, tx.init(params), params)
    high = {'w': normal(3, 32, 48).astype(dtype)}
    updates, _ = update(high, state, params)
    return jnp.linalg.norm(updates['w'])

  unlimited = norm_of_second(params)
  assert norm_of_second(low) > 0.7 * unlimited


def test_fira_takes_no_column_that_overflows_for_rounding():
  """The norm of the other columns alone would be remembered."""
  params = {'w': jnp.zeros((32, 48))}
  gradient = jax.random.normal(jax.random.key(0), (32, 48))
  tx = so.fira_adamw(1.0, 8)
  bad = {'w': gradient.at[3, 5].set(3e19)}  # its square is infinite
  _, state = cases.jit(tx.update)(bad, tx.init(params), params)
  np.testing.assert_array_equal(state[0][2].residual['w'], 0.0)
