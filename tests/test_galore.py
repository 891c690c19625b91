"""`galore` beside `optax.contrib.galore` and beside its paper's Algorithm 2.

On trees of 2-D kernels the two take the same steps to float32 rounding; on
stacked and attention kernels, which optax's can't take, Algorithm 2 runs in
dense float64. Then dtypes, and what holds for any projection.
"""

import functools
import inspect

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import references as ref
import subspace_optax as so

GLDN = optax.contrib.GaLoreDimensionNumbers
SHAPES = {'tall': (16, 10), 'wide': (8, 14), 'square': (12, 12), 'vec': (9,)}
ATTENTION = {'in': (12, 4, 3), 'out': (4, 3, 10), 'plain': (7, 5)}
OUT_DIMS = {'out': GLDN((0, 1), 2), 'plain': None}
ATTENTION_DIMS = {'in': GLDN(0, (1, 2)), 'out': GLDN((0, 1), 2), 'plain': None}


def quadratic(shapes):
  """Returns params and a loss whose gradients depend on them."""
  params, terms = {}, {}
  for i, (name, shape) in enumerate(shapes.items()):
    params[name] = ref.normal(3 * i, shape)
    mixing = ref.normal(3 * i + 1, (shape[0], shape[0]), shape[0] ** -0.5)
    terms[name] = mixing, ref.normal(3 * i + 2, shape)

  def loss(p):
    residual = lambda name, a, t: jnp.tensordot(a, p[name], 1) - t
    return sum(
      jnp.sum(jnp.square(residual(name, *at))) / 2 for name, at in terms.items()
    )

  return params, loss


def trajectory(tx, params, loss, steps):
  """Returns the params after every step."""

  def step(carry, _):
    p, state = carry
    updates, state = tx.update(jax.grad(loss)(p), state, p)
    p = optax.apply_updates(p, updates)
    return (p, state), p

  scan = lambda p, s: lax.scan(step, (p, s), None, steps)[1]
  return ref.jit(scan)(params, tx.init(params))


def assert_same_steps(shapes, *args, **kwargs):
  """Runs both for 20 steps across five refreshes."""
  params, loss = quadratic(shapes)
  kwargs = {'update_proj_gap': 4, **kwargs} if len(args) < 3 else kwargs
  ours = trajectory(so.galore(*args, **kwargs), params, loss, 20)
  theirs = optax.contrib.galore(*args, **kwargs)
  theirs = trajectory(theirs, params, loss, 20)
  for name in shapes:
    # A few units in the last place of params of size 1 to 3.
    np.testing.assert_allclose(
      ours[name], theirs[name], rtol=2e-6, atol=2e-6, err_msg=name
    )
    assert np.abs(ours[name][-1] - params[name]).max() > 0.01


BF16 = jnp.bfloat16
SCHEDULE = optax.cosine_decay_schedule(0.02, 25)


@pytest.mark.parametrize(
  'kwargs',
  [
    {},
    {
      'learning_rate': SCHEDULE,
      'scale': 0.25,
      'weight_decay': 0.1,
      'mask': {'tall': True, 'wide': False, 'vec': True},
    },
    {
      'base_optimizer': optax.scale_by_lion(),
      'weight_decay': 0.3,
      'mask': lambda p: jax.tree.map(lambda x: x.ndim == 2, p),
    },
    pytest.param(
      {'base_optimizer': optax.scale_by_rms(), 'weight_decay': 0.2},
      marks=pytest.mark.full,
    ),
    {'base_optimizer': optax.trace(0.9), 'scale': 2.0},
  ],
  ids=['adam', 'decay', 'lion', 'rms', 'momentum'],
)
def test_equals_contrib(kwargs):
  # All of these take long to compile.
  few = ['tall', 'vec']
  names = few if 'base_optimizer' in kwargs else [*few, 'wide']
  if 'mask' in kwargs and isinstance(kwargs['mask'], dict):
    names = kwargs['mask']
  kwargs = {'learning_rate': 0.01, 'rank': 4, **kwargs}
  assert_same_steps({k: SHAPES[k] for k in names}, **kwargs)


def in_bfloat16(tx):
  """Returns the updates of six steps."""
  params = {'tall': jnp.ones((16, 10), BF16), 'wide': jnp.ones((8, 24), BF16)}
  grads = [
    {
      k: ref.normal(10 * t + i, x.shape).astype(BF16)
      for i, (k, x) in enumerate(params.items())
    }
    for t in range(6)
  ]
  state, update, found = tx.init(params), ref.jit(tx.update), []
  for g in grads:
    updates, state = update(g, state, params)
    found.append(updates)
  return found


@functools.cache
def contrib_in_bfloat16():
  return in_bfloat16(optax.contrib.galore(1.0, rank=4, update_proj_gap=4))


@pytest.mark.parametrize('moment_dtype', [None, 'parameter'])
def test_close_to_contrib_in_bfloat16(moment_dtype):
  """Contrib keeps its bases and moments in bfloat16, and rounds on the way."""
  spec = so.SubspaceSpec(
    4, side='long', only_if_smaller=False, moment_dtype=moment_dtype
  )
  ours = in_bfloat16(so.galore(1.0, update_proj_gap=4, spec=spec))
  theirs = contrib_in_bfloat16()
  for x, y in zip(ours, theirs, strict=True):
    for name in x:
      assert x[name].dtype == y[name].dtype == BF16
      x_, y_ = (np.asarray(z[name], np.float64) for z in (x, y))
      assert np.linalg.norm(x_ - y_) < 0.02 * np.linalg.norm(y_), name


def test_equals_contrib_at_a_rank_above_the_short_side():
  assert_same_steps({'tall': (16, 10)}, 0.01, 11)


@pytest.mark.parametrize(
  'shapes, dims',
  [
    # On a square kernel, rows for columns changes the projected side.
    ({'square': (12, 12)}, GLDN(1, 0)),
    ({k: ATTENTION[k] for k in ('out', 'plain')}, OUT_DIMS),
    (
      {k: ATTENTION[k] for k in ('in', 'plain')},
      lambda tree: {
        name: ATTENTION_DIMS[name] if x.ndim == 3 else GLDN()
        for name, x in tree.items()
      },
    ),
  ],
  ids=['single', 'tree', 'callable'],
)
def test_equals_contrib_on_dimension_numbers(shapes, dims):
  assert_same_steps(shapes, 0.01, 4, weight_dimension_numbers=dims)


def test_takes_contribs_arguments_in_contribs_order():
  ours = inspect.signature(so.galore).parameters.values()
  theirs = inspect.signature(optax.contrib.galore).parameters.values()
  ours = [p for p in ours if p.kind is not p.KEYWORD_ONLY]
  assert [(p.name, p.default) for p in ours] == [
    (p.name, p.default) for p in theirs
  ]
  shapes = {'tall': (16, 10), 'square': (12, 12)}
  mask = {'tall': True, 'square': False}
  dims = {'tall': GLDN(), 'square': GLDN(1, 0)}
  inner = optax.scale_by_adam(b1=0.8)
  assert_same_steps(shapes, 0.01, 4, 5, 0.5, inner, 0.1, mask, dims)


def leading_bases(view, grad, found):
  """Returns U[:, :r] of every matrix, with the signs of the found ones."""
  # Singular vectors have no sign of their own.
  us = [ref.svd_basis(g, ref.RANK) for g in view.matrices(grad)]
  pairs = zip(us, view.bases(found), strict=True)
  return np.stack([u * np.sign(np.sum(u * p, 0)) for u, p in pairs])


def test_algorithm_2_on_stacked_and_attention_kernels():
  """Short sides, weight decay and a gap of 3."""
  views = {'stack': ref.STACK, 'layers/out/kernel': ref.OUT}
  tx = so.galore(
    0.05,
    update_proj_gap=3,
    scale=0.5,
    weight_decay=0.1,
    spec=so.SubspaceSpec(ref.RANK),
  )
  params = ref.like(views)
  state = tx.init(params)
  dense = {k: ref.InSubspace(v, ref.Adam()) for k, v in views.items()}
  weights = {k: v.matrices(params[k]) for k, v in views.items()}
  step = ref.jit(tx.update)
  for t in range(8):
    grads = {k: ref.decaying(t, v, 0.5) for k, v in views.items()}
    updates, state = step(grads, state, params)
    params = optax.apply_updates(params, updates)
    for k, v in views.items():
      if t % 3 == 0:
        found = ref.bases(state)[k]
        dense[k].move(leading_bases(v, grads[k], found))
      n = dense[k].step(grads[k])
      weights[k] = weights[k] - 0.05 * (0.5 * n + 0.1 * weights[k])
      np.testing.assert_allclose(
        v.matrices(params[k]), weights[k], 1e-5, 1e-5, err_msg=f'{k} at {t}'
      )


@pytest.mark.parametrize(
  'param_dtype, grad_dtype',
  [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)],
  ids=['bfloat16-params', 'bfloat16-gradients'],
)
def test_dtypes(param_dtype, grad_dtype):
  """Updates in the gradients' dtype, state's as at init, values close."""
  tx = so.galore(-1.0, update_proj_gap=2, spec=so.SubspaceSpec(ref.RANK))
  narrow = param_dtype == jnp.bfloat16
  views = {'wide': ref.WIDE} if narrow else {'tall': ref.TALL}
  params = {k: jnp.ones(v.shape, param_dtype) for k, v in views.items()}
  state = tx.init(params)
  dtypes = jax.tree.map(lambda x: x.dtype, state)
  dense = {k: ref.InSubspace(v, ref.Adam()) for k, v in views.items()}
  step = ref.jit(tx.update)
  for t in range(5):
    grads = {
      k: ref.decaying(t, v, 0.5).astype(grad_dtype) for k, v in views.items()
    }
    updates, state = step(grads, state, params)
    assert jax.tree.map(lambda x: x.dtype, state) == dtypes
    for k, v in views.items():
      assert updates[k].dtype == grad_dtype
      if t % 2 == 0:
        found = ref.bases(state)[k]
        dense[k].move(leading_bases(v, grads[k], found))
      expected = dense[k].step(grads[k])
      error = np.linalg.norm(v.matrices(updates[k]) - expected)
      # bfloat16 has 8 bits: 0.4 % a rounding, and there are several.
      assert error < 0.02 * np.linalg.norm(expected), (k, t, error)


@pytest.mark.parametrize('recipe', ['galore', 'golore'])
def test_full_rank_sgd_is_sgd(recipe):
  """P P^T = I, whichever the basis."""
  params = ref.like({'tall': ref.TALL})
  loss = lambda p: sum(jnp.sum(jnp.cos(x)) for x in p.values())
  spec = so.SubspaceSpec(1.0, only_if_smaller=False)
  make = getattr(so, recipe)
  tx = make(
    0.1,
    update_proj_gap=2,
    spec=spec,
    **{cases.inner_of(recipe): optax.identity()},
  )
  ours = trajectory(tx, params, loss, 6)
  sgd = trajectory(optax.sgd(0.1), params, loss, 6)
  for name in params:
    np.testing.assert_allclose(ours[name], sgd[name], rtol=0, atol=3e-6)


@pytest.mark.parametrize(
  'tx',
  [
    so.galore(1.0, ref.RANK, 2),
    so.golore(1.0, ref.RANK, update_proj_gap=2),
    so.online_subspace_descent(1.0, ref.RANK, alpha=0.01),
  ],
  ids=['galore', 'golore', 'online_subspace_descent'],
)
def test_updates_have_the_rank_at_every_step(tx):
  views = {'stack': ref.STACK}
  params = ref.like(views)
  state = tx.init(params)
  step = ref.jit(tx.update)
  for t in range(4):
    updates, state = step(ref.like(views, t + 1), state, params)
    for name, v in views.items():
      for update in v.matrices(updates[name]):
        assert np.isfinite(update).all(), (name, t)
        assert np.linalg.matrix_rank(update, tol=1e-4) == ref.RANK, (name, t)
