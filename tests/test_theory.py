"""What GoLore's paper proves, on the library's own optimizers, in float64.

Every claim is held to its rate, from both sides, so that neither plain SGD nor
a basis that stays would pass. Stacks of matrices stand for repetitions: each
has its own bases and noise. Lemma 5 is in `test_stiefel` and `test_dct`: it is
all that the proofs ask of random bases, and so what holds for Haar samples must
hold for random columns of the cosine transform.
"""

import functools
import math

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so
from subspace_optax import theorem_parameters


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def spec(rank):
  return so.SubspaceSpec(
    rank, side='in', only_if_smaller=False, basis_dtype=jnp.float64
  )


def msgd(b1):
  """Returns m <- (1 - b1) m + b1 g, the momentum of GoLore's theorems."""
  return optax.chain(optax.scale(b1), optax.trace(1 - b1))


def descend(tx, w, steps, gradient, measure):
  """Returns what `measure(w)` gives before every step and after the last.

  `gradient(w, key)` returns the gradient, and extra arguments of the update.
  """

  def step(carry, key):
    w, state = carry
    grad, extra = gradient(w, key)
    updates, state = tx.update({'w': grad}, state, {'w': w}, **extra)
    return (optax.apply_updates(w, updates['w']), state), measure(w)

  @ref.jit
  def run(w):
    keys = jax.random.split(jax.random.key(0), steps)
    (w, _), measured = lax.scan(step, (w, tx.init({'w': w})), keys)
    return jnp.concatenate([measured, measure(w)[None]])

  measured = np.asarray(run(jnp.asarray(w)))
  assert measured.dtype == np.float64
  return measured


# The counter-example of GoLore, Eq. (1): f(X) = ||X_top + [D, 0]||^2 / 2 up to
# a constant, and noise of +-sigma on r entries of the other r rows. There the
# noise is all that the SVD sees once the signal is below sigma.

N, R, SIGMA, COUNT = 10, 4, 1.0, 8
TOP = N - R
LR, GAP, STEPS, BATCH = 2e-3, 5, 3000, 100
RNG = np.random.default_rng(0)
D = np.pad(RNG.normal(size=(COUNT, TOP, TOP)), ((0, 0), (0, 0), (0, R)))
START = np.concatenate(
  [
    np.broadcast_to(SIGMA / 2 * np.eye(TOP, N), (COUNT, TOP, N)),
    RNG.normal(size=(COUNT, R, N)),
  ],
  axis=1,
)
VALUES = np.linalg.svd(START[:, :TOP] + D, compute_uv=False)


def stall(sigma):
  """Returns the f - f* at which GaLore gets stuck, per matrix."""
  return np.sum(np.minimum(VALUES, sigma) ** 2, axis=1) / 2


def noisy(x, sign):
  noise = jnp.asarray(np.eye(R, N, TOP) * SIGMA)
  return jnp.concatenate([x[:, :TOP] + D, sign[:, None, None] * noise[None]], 1)


def gaps(tx, batch=0, steps=STEPS):
  """Returns (steps + 1, COUNT) values of f - f*."""

  def gradient(x, key):
    sign = lambda key, *shape: jax.random.rademacher(key, shape, jnp.float64)
    extra = {}
    if batch:
      mean = sign(jax.random.fold_in(key, 1), batch, COUNT).mean(0)
      extra = {'refresh_gradients': {'w': noisy(x, mean)}}
    return noisy(x, sign(key, COUNT)), extra

  measure = lambda x: jnp.sum((x[:, :TOP] + D) ** 2, (1, 2)) / 2
  return descend(tx, START, steps, gradient, measure)


def golore(inner, random_from=0, regenerate=False, rate=LR, gap=GAP):
  return so.golore(
    rate,
    update_proj_gap=gap,
    random_from=random_from,
    regenerate=regenerate,
    inner=inner,
    spec=spec(R),
  )


def galore(inner):
  projector = so.projectors.svd(GAP)
  tx = so.subspace(spec(R), projector, inner, transport='first')
  return optax.chain(tx, optax.scale(-LR))


def speed(gap, since=0):
  """Returns the exponent of the decay of f - f* over that of gradient flow."""
  time = LR * (STEPS - since)
  return np.mean(np.log(gap[since] / gap[-1]) / (2 * time))


def test_full_rank_sgd_converges():
  np.testing.assert_allclose(speed(gaps(optax.sgd(LR))), 1, rtol=LR)


@pytest.mark.parametrize(
  'b1',
  [
    0.2,
    # So does GoLore@75% until its turn.
    pytest.param(1.0, marks=pytest.mark.full),
  ],
)
def test_galore_stalls(b1):
  """At sum_i min(s_i, sigma)^2 / 2, less at most what one period adds."""
  gap = gaps(galore(msgd(b1)))
  np.testing.assert_allclose(gap[-1], stall(SIGMA), rtol=2 * GAP * LR)
  np.testing.assert_allclose(gap[-1], gap[STEPS // 2], rtol=1e-6)


@pytest.mark.parametrize(
  'setting, regenerate',
  [
    pytest.param(setting, regenerate, marks=() if runs else pytest.mark.full)
    for setting in [(1.0, 'first'), (0.2, 'first'), (0.2, 'keep')]
    for regenerate in [False, True]
    # Without momentum, GoLore@75% converges so from its turn on.
    for runs in [setting[0] < 1 and regenerate == (setting[1] == 'first')]
  ],
)
def test_golore_converges_at_the_rate_of_its_rank(setting, regenerate):
  """At r/n of full SGD's rate, less what momentum loses when bases move.

  Momentum projection leaves r/n of the momentum, in the mean, and none is left
  where it keeps its coordinates; the rest builds up again within the period.
  """
  b1, transport = setting
  share = R / N
  kept = share if transport == 'first' else 0.0
  old = (1 - b1) ** GAP  # what is left of a period's first momentum at its end
  lost = (1 - kept) / (1 - kept * old) * (1 - old) * (1 - b1) / b1
  tx = golore(msgd(b1), regenerate=regenerate)
  if transport == 'keep':
    rule = so.projectors.stiefel(GAP)
    if regenerate:
      rule = so.projectors.dct(GAP, 'random')
    tx = so.subspace(spec(R), rule, msgd(b1))
    tx = optax.chain(tx, optax.scale(-LR))
  found = speed(gaps(tx))
  np.testing.assert_allclose(found, share * (1 - lost / GAP), rtol=0.015)


def test_golore_75_converges_once_random():
  """GoLore@75%: as GaLore for a quarter of the run, then as GoLore."""
  turn = STEPS // 4
  gap = gaps(golore(optax.identity(), random_from=turn))
  np.testing.assert_array_less(stall(SIGMA) * (1 - 2 * GAP * LR), gap[turn])
  np.testing.assert_allclose(gap[turn], stall(SIGMA), rtol=0.2)
  np.testing.assert_allclose(speed(gap, since=turn), R / N, rtol=0.015)


def test_large_batch_galore_converges():
  """A batch for the refreshes alone takes the stall to sigma / sqrt(B).

  And somewhat below, at refreshes at which the batch's noise is small.
  """
  gap = gaps(galore(optax.identity()), batch=BATCH)
  ratio = gap[-1] / stall(SIGMA / math.sqrt(BATCH))
  np.testing.assert_array_less(ratio, 1)
  np.testing.assert_array_less(0.1, ratio)


def test_adam_in_the_counter_example():
  """GaLore stalls with Adam, too, and GoLore@50% does not."""
  # Adam's steps do not shrink with the gradient, so its rate is smaller.
  turn, inner = STEPS, optax.scale_by_adam()
  tx = golore(inner, random_from=turn, rate=LR / 2, gap=2 * GAP)
  gap = gaps(tx, steps=2 * STEPS)
  np.testing.assert_allclose(gap[turn], stall(SIGMA), rtol=0.05)
  np.testing.assert_array_less(gap[-1], 0.002 * stall(SIGMA))


# Subspace gradient descent, on f(W) = <W, scale * W> / 2, and Theorem 4.

M, RANK, MANY, SMOOTHNESS = 8, 2, 400, 3.0


def squared_gradients(curvature, w, steps):
  """Returns sum_t E||grad f||^2 for W <- W - P P^T grad f / L, exactly.

  From E[P P^T] = (r/m) I and E[Q A Q] = a A + b (A + tr(A) I) for symmetric A
  and Q = P P^T, where Q I Q = Q and tr(Q) = r give a and b.
  """
  share, eye = RANK / M, np.eye(M)
  a, b = np.linalg.solve([[1, M + 1], [M, 2]], [share, RANK * share])
  total, second = 0.0, w @ w.T
  for _ in range(steps + 1):
    g = curvature[:, None] * second / SMOOTHNESS
    gg = g * curvature / SMOOTHNESS
    total += SMOOTHNESS**2 * np.trace(gg)
    second = second - share * (g + g.T) + (a + b) * gg + b * np.trace(gg) * eye
  return total


RULES = {
  'haar': so.projectors.stiefel(1),
  'dct': so.projectors.dct(1, 'random'),
}
LEAST = {'equal': SMOOTHNESS, 'others': SMOOTHNESS / 10}
SUBSPACE_STEPS = 20


def curvatures(name):
  return np.geomspace(LEAST[name], SMOOTHNESS, M)


@functools.cache
def descended(rule):
  """Returns ||grad f||^2 of every step, for each of the curvatures."""
  scale = np.concatenate(
    [np.broadcast_to(curvatures(k)[:, None], (MANY, M, 3)) for k in LEAST]
  )
  tx = so.subspace(spec(RANK), RULES[rule], optax.identity())
  squares = descend(
    optax.chain(tx, optax.scale(-1 / SMOOTHNESS)),
    np.broadcast_to(FROM, scale.shape),
    SUBSPACE_STEPS,
    lambda w, key: (scale * w, {}),
    lambda w: jnp.sum((scale * w) ** 2, (1, 2)),
  )
  return dict(zip(LEAST, np.split(squares, len(LEAST), axis=1), strict=True))


FROM = np.cos(np.arange(3.0 * M)).reshape(M, 3)


@pytest.mark.parametrize('least', LEAST)
@pytest.mark.parametrize('rule', RULES)
def test_subspace_gradient_descent_meets_its_bound(rule, least):
  """(1/(T+1)) sum E||grad f||^2 <= 2 m L (f_0 - f*) / (r (T+1)), gamma = 1/L.

  With equal curvatures every step leaves 1 - r/m of the squared gradient, and
  the bound holds with equality but for what is left of it after T steps. Else
  the sum depends on fourth moments of P, which are known of Haar samples.
  """
  curvature = curvatures(least)
  found = descended(rule)[least].sum(0)
  bound = 2 * M * SMOOTHNESS / RANK * np.sum(curvature[:, None] * FROM**2) / 2
  expected = squared_gradients(curvature, FROM, SUBSPACE_STEPS)
  tight = 1 - (1 - RANK / M) ** (SUBSPACE_STEPS + 1)
  error = found.std() / math.sqrt(MANY)
  assert error < 0.02 * expected
  if least == 'equal':
    np.testing.assert_allclose(expected, tight * bound)
  else:
    assert found.mean() + 5 * error < bound
  if least == 'equal' or rule == 'haar':
    np.testing.assert_allclose(found.mean(), expected, rtol=0, atol=5 * error)


def test_golore_follows_theorem_4():
  """With its parameters, the mean falls with T as the theorem's rate does.

  On ||W||^2 / 2, sum ||grad f||^2 comes to Delta / (delta eta), and to a share
  of (1 - delta) eta tau more, since P stays for tau steps.
  """
  share, noise = 0.5, 0.1
  w = np.broadcast_to(np.cos(np.arange(24.0)).reshape(4, 6), (20, 4, 6))
  gap = float(np.sum(w[0] ** 2) / 2)

  def gradient(w, key):
    sign = jax.random.rademacher(key, w.shape, jnp.float64)
    return w + noise * sign / math.sqrt(24), {}

  means, rates = [], []
  for steps in 4000, 8000:
    p = theorem_parameters(
      'golore', smoothness=1.0, gap=gap, noise=noise, share=share, steps=steps
    )
    eta, tau = p.learning_rate, p.update_proj_gap
    inner = msgd(p.b1)
    tx = so.golore(eta, update_proj_gap=tau, inner=inner, spec=spec(share))
    measure = lambda w: jnp.mean(jnp.sum(w**2, (1, 2)))[None]
    means.append(descend(tx, w, steps, gradient, measure)[:-1].mean())
    rates.append(p.rate)
    expected = gap / (share * eta * steps) * (1 + (1 - share) * eta * tau)
    np.testing.assert_allclose(means[-1], expected, rtol=0.05)
  fall = lambda pair: pair[1] / pair[0]
  np.testing.assert_allclose(fall(means), fall(rates), rtol=0.05)


# Worked by hand. Without noise, tau = 64 and 1 / eta = 2 (4 + sqrt(80)
# + sqrt(80 64^2) + sqrt(16 64 / 3)). With it, 1 / b1 = 11, which is
# 1 + sqrt(4 3200 / 8 / 16), tau = ceil(938.67), B = 4 11, and the rate
# 16 32 / 3200 + sqrt(16 4 128 / 3200); 1 / eta = 2 (4 + sqrt(320 / 3) 11 + ...)
# where, for large batches, sqrt(160) 939 + sqrt(32 939 11 / 3) comes last, and
# else sqrt(320 / 3) 939 + sqrt(16 939 11 / 3).
EXACT = dict(smoothness=2.0, gap=1.0, share=1 / 3, steps=1000)
NOISY = dict(smoothness=2.0, gap=8.0, noise=2.0, share=0.25, steps=3200)
WORKED = {
  'galore': (EXACT, (1.0, 64, 8.28016250765e-4, 1, 0.0311769145362)),
  'large_batch_galore': (NOISY, (1 / 11, 939, 4.05612044811e-5, 44, 1.76)),
  'golore': (NOISY, (1 / 11, 939, 4.97499263237e-5, 1, 1.76)),
}
SHORTEST = {'galore': 64, 'large_batch_galore': 1083, 'golore': 1083}


@pytest.mark.parametrize('theorem', WORKED)
def test_theorem_parameters(theorem):
  values, expected = WORKED[theorem]
  p = theorem_parameters(theorem, **values)
  np.testing.assert_allclose(p, expected, rtol=1e-11)
  assert isinstance(p.update_proj_gap, int) and isinstance(p.batch_size, int)


@pytest.mark.parametrize('theorem', WORKED)
def test_theorem_parameters_fit_the_least_run(theorem):
  """The theorem holds from the T that is named on, and that is tau or more."""
  values, least = dict(WORKED[theorem][0]), SHORTEST[theorem]
  values['steps'] = least
  assert theorem_parameters(theorem, **values).update_proj_gap <= least
  values['steps'] = least - 1
  with pytest.raises(ValueError, match=f'steps .* {least} .* {least - 1};'):
    theorem_parameters(theorem, **values)


@pytest.mark.parametrize(
  'name, value, fix',
  [
    ('smoothness', 0.0, 'upper bound'),
    ('smoothness', math.nan, 'upper bound'),
    ('gap', -1.0, 'upper bound'),
    ('gap', math.inf, 'upper bound'),
    ('noise', -1.0, 'give 0'),
    ('noise', math.nan, 'give 0'),
    ('share', 0.0, 'smallest'),
    ('share', 1.5, 'smallest'),
    ('steps', 0, 'train for longer'),
    ('steps', math.nan, 'train for longer'),
  ],
)
def test_theorem_parameters_names_what_is_wrong(name, value, fix):
  with pytest.raises(ValueError, match=f'^{name} must .* {value}.*{fix}'):
    theorem_parameters('golore', **NOISY | {name: value})


def test_theorem_parameters_knows_what_is_proven():
  with pytest.raises(ValueError, match="^theorem must .*'golore'.*'adam'"):
    theorem_parameters('adam', **NOISY)
  with pytest.raises(ValueError, match='^noise must .* 2.0: .*large_batch'):
    theorem_parameters('galore', **NOISY)
