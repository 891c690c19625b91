"""`transports.both`: second moments by LDAdam's rule, in float64 loops.

The loops are given the bases; with m^ and v^ debiased,

  m <- C m,   v^ <- |C^2 (v^ - m^^2) + (C m^)^2|,

or v <- C^2 v where there is no mean to take off.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import errors
import references as ref
import subspace_optax as so

SPEC = so.SubspaceSpec(ref.RANK)
VIEWS = ref.KERNELS
GAP, STEPS = 3, 8
STIEFEL = so.projectors.stiefel(GAP)
ADAM = ref.Adam(0.8, 0.95)


def gradients(t):
  """A mean that stays, so that variances are not second moments, and noise."""
  mean, noise = ref.like(VIEWS, 100), ref.like(VIEWS, t)
  grads = {k: mean[k] + 0.5 * noise[k] for k in VIEWS}
  return grads | {'vec': ref.normal(t, (5,))}


def run(inner, projector=STIEFEL, grads=None, **kwargs):
  """Returns gradients, updates and states, the first state from `init`."""
  both = so.transports.both(ADAM.b1, ADAM.b2)
  tx = so.subspace(SPEC, projector, inner, transport=both, **kwargs)
  return run_tx(tx, grads)


def run_tx(tx, grads=None, change=None):
  update = ref.jit(tx.update)
  grads = grads or [gradients(t) for t in range(STEPS)]
  updates, states = [], [tx.init(grads[0])]
  for t, g in enumerate(grads):
    state = states[-1]
    if change and t in change:
      state = change[t](state)
    u, state = update(g, state)
    updates.append(u)
    states.append(state)
  return grads, updates, states


class Both(ref.BothInSubspace):
  """Whatever the optimizer, whose own `carry` knows its moments."""

  def carry(self, c, state):
    return self.inner.carry(c, state)


def assert_equals(dense, results, inner=None, moved_after=False):
  """Compares updates with dense loops, one for each leaf.

  Args:
    dense: from path to loop.
    results: of `run`.
    inner: from a step on, the loop's optimizer.
    moved_after: whether bases move at a step's end.
  """
  grads, updates, states = results
  bases = [
    {k: v.bases(ref.bases(s)[k]) for k, v in VIEWS.items()} for s in states
  ]
  for k, own in dense.items():
    for t, g in enumerate(grads):
      own.inner = (inner or {}).get(t, own.inner)
      old, new = bases[t][k], bases[t + 1][k]
      which = () if moved_after else np.flatnonzero((old != new).any((1, 2)))
      own.move(old if moved_after else new, which)
      np.testing.assert_allclose(
        own.view.matrices(updates[t][k]),
        own.step(g[k]),
        rtol=2e-4,
        atol=2e-4,
        err_msg=f'{k} at step {t}',
      )
      if moved_after:
        own.move(new)


def assert_moments(dense, states, fields):
  """Compares the last moments; `fields` goes from theirs to the loop's."""
  found = ref.find(states[-1], 'inner').inner
  for k, own in dense.items():
    for field, mine in fields.items():
      expected = np.stack([s[mine] for s in own.states])
      x = own.view.coords(getattr(found, field)[k], ref.RANK)
      np.testing.assert_allclose(
        x, expected, rtol=1e-4, atol=1e-5, err_msg=f'{field} of {k}'
      )


def loops(make, inner):
  return {k: make(v, inner) for k, v in VIEWS.items()}


def adam(b1=ADAM.b1, b2=ADAM.b2):
  return optax.scale_by_adam(b1=b1, b2=b2)


@pytest.mark.parametrize('per_matrix', [False, True])
def test_adam(per_matrix):
  """With one count for all, or one for each matrix."""
  results = run(adam(), per_matrix=per_matrix)
  dense = loops(ref.BothInSubspace, ADAM)
  assert_equals(dense, results)
  assert_moments(dense, results[2], {'mu': 'm', 'nu': 'v'})
  plain, state = ADAM, ADAM.start((5,))
  for g, u in zip(*results[:2], strict=True):
    expected, state = plain.update(np.asarray(g['vec'], np.float64), state)
    np.testing.assert_allclose(u['vec'], expected, rtol=1e-4, atol=1e-5)


def test_bases_that_move_after_the_step():
  """C = P_{t+1}^T P_t (P_t^T P_t)^-1 of online PCA's bases."""
  projector = so.projectors.online_pca(optax.adam(0.1))
  dense = loops(ref.BothInSubspace, ADAM)
  assert_equals(dense, run(adam(), projector), moved_after=True)


def test_only_the_matrix_that_moves_is_touched():
  """Layer 1 has no gradient at the refresh, and so moves a step later."""
  grads = [gradients(t) for t in range(STEPS)]
  grads[GAP]['stack'] = grads[GAP]['stack'].at[1].set(0)
  results = run(adam(), so.projectors.svd(GAP, 'gram'), grads=grads)
  assert_equals(loops(ref.BothInSubspace, ADAM), results)
  bases = [VIEWS['stack'].bases(ref.bases(s)['stack']) for s in results[2]]
  moves = [(bases[t + 1] != bases[t]).any((1, 2)).tolist() for t in (3, 4)]
  assert moves == [[True, False], [False, True]]


class ClippedAdam(ref.Adam):
  def update(self, g, s):
    return super().update(np.clip(g, -0.5, 0.5), s)


def test_adam_in_a_chain_with_hyperparameters_that_change():
  """The decay in the state counts, not the one that it began with."""

  def make(b1, b2):
    inner = optax.chain(optax.clip(0.5), optax.scale_by_adam(b1=b1, b2=b2))
    both = so.transports.both(b1, b2)
    return so.subspace(SPEC, STIEFEL, inner, transport=both)

  def set_b2(state):
    old = state.hyperparams
    return state._replace(
      hyperparams=old | {'b2': jnp.full_like(old['b2'], 0.7)}
    )

  tx = optax.inject_hyperparams(make)(b1=ADAM.b1, b2=ADAM.b2)
  results = run_tx(tx, change={4: set_b2})
  dense = loops(ref.BothInSubspace, ClippedAdam(*ADAM))
  assert_equals(dense, results, inner={4: ClippedAdam(ADAM.b1, 0.7)})


class RMSProp(ref.RMSProp):
  def carry(self, c, state):
    return {'v': c**2 @ state['v']}


def test_rmsprop():
  results = run(optax.scale_by_rms(0.9))
  dense = loops(Both, RMSProp())
  assert_equals(dense, results)
  assert_moments(dense, results[2], {'nu': 'v'})


class EveryOther(NamedTuple):
  """Adam on the mean of two gradients, and zeros in between."""

  adam: Any

  def start(self, shape):
    return {'adam': self.adam.start(shape), 'sum': np.zeros(shape), 'n': 0}

  def update(self, g, s):
    total, n = s['sum'] + g / 2, s['n'] + 1
    if n < 2:
      return 0 * g, s | {'sum': total, 'n': n}
    u, own = self.adam.update(total, s['adam'])
    return u, {'adam': own, 'sum': 0 * g, 'n': 0}

  def carry(self, c, s):
    own = ref.carry_both(c, s['adam'], self.adam.b1, self.adam.b2)
    return s | {'adam': own, 'sum': c @ s['sum']}


def test_multi_steps_inside():
  """Sums of gradients follow, too, and the count is of Adam's own steps."""
  inner = optax.MultiSteps(adam(), 2, use_grad_mean=True)
  results = run(inner.gradient_transformation())
  assert_equals(loops(Both, EveryOther(ADAM)), results)


class Known(NamedTuple):
  """A state that the library has not heard of."""

  count: jax.Array
  mean: Any
  square: Any


def renamed_adam(state_type):
  own = adam()

  def init(params):
    return state_type(*own.init(params))

  def update(updates, state, params=None):
    updates, new = own.update(updates, optax.ScaleByAdamState(*state), params)
    return updates, state_type(*new)

  return optax.GradientTransformation(init, update)


def test_register_moments():
  so.register_moments(Known, ['mean'], {'square': 'mean'})
  results = run(renamed_adam(Known))
  assert_equals(loops(ref.BothInSubspace, ADAM), results)


class Uncentred(NamedTuple):
  count: jax.Array
  mean: Any
  square: Any


class UncentredAdam(ref.Adam):
  def carry(self, c, state):
    return state | {'m': c @ state['m'], 'v': c**2 @ state['v']}


def test_register_moments_without_a_mean():
  so.register_moments(Uncentred, ['mean'], {'square': None})
  results = run(renamed_adam(Uncentred))
  assert_equals(loops(Both, UncentredAdam(*ADAM)), results)


class Unknown(NamedTuple):
  count: jax.Array
  mean: Any
  square: Any


@pytest.mark.parametrize('transport', ['first', so.transports.both(0.9, 0.999)])
def test_unknown_moments_raise(transport):
  tx = so.subspace(SPEC, STIEFEL, renamed_adam(Unknown), transport=transport)
  with pytest.raises(ValueError, match='does not know the moments .*Unknown'):
    tx.init(ref.like(VIEWS))


@pytest.mark.parametrize(
  'first, second',
  [(['velocity'], None), ([], {'v': None}), ([], {'square': 'm'})],
)
def test_register_moments_raises(first, second):
  with pytest.raises(ValueError, match='has no field'):
    so.register_moments(Unknown, first, second)


@pytest.mark.parametrize('rates', [(1.0, 0.9), (0.9, -0.1), (0.9, 1.5)])
def test_rates_outside_of_their_range(rates):
  with errors.raises(ValueError, 'must lie in [0, 1)'):
    so.transports.both(*rates)


@pytest.mark.parametrize(
  'transport', ['both', 'second', None, so.transports.first]
)
def test_what_is_no_transport(transport):
  with errors.raises(ValueError, 'transports.both(b1=0.9, b2=0.999)'):
    so.in_subspace(optax.scale_by_adam(), SPEC, transport=transport)
