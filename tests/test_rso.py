"""Subproblems of RSO in dense float64 loops."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import errors
import grid
import measure
import references as ref
import subspace_optax as so

LEAVES = {
  'up': cases.Leaf((3, 8, 12), jnp.float32, (1,), (2,)),
  'query': cases.Leaf((9, 3, 4), jnp.float32, (0,), (1, 2)),
  'bias': cases.Leaf((12,), jnp.float32),
}
RANK, GAP, STEPS = 3, 3, 8


# Of what is alike for all leaves, these.
STACK = {path: LEAVES[path] for path in ('up', 'bias')}


def _spec(leaves=LEAVES):
  numbers = cases.dimension_numbers(leaves)
  return so.SubspaceSpec(RANK, side='in', weight_dimension_numbers=numbers)


def _loss(params):
  """A sum in which no two entries are alike."""
  weights = lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape)
  one = lambda x: jnp.sum(jnp.sin(x) + 0.1 * x**2 * weights(x))
  return sum(map(one, jax.tree.leaves(params)))


def _slope(x):
  """Returns the derivative of `_loss` by one leaf."""
  return np.cos(x) + 0.2 * x * np.cos(np.arange(x.size)).reshape(x.shape)


def _gradients(rso, params, state, bases):
  """Returns the gradients of B and of plain leaves, by the chain rule."""
  whole = jax.grad(_loss)(rso.merged(params, state))
  found = dict(whole)
  for path, g in whole.items():
    if path != 'bias':
      p = bases[path]
      eq = 'bmr,bmn->brn' if path == 'up' else 'mr,mhn->rhn'
      found[path] = jnp.einsum(eq, p.astype(g.dtype), g, precision='highest')
  return found


def _run(rso, params, steps=STEPS):
  """Returns params, state and bases before and after every step."""
  state = ref.jit(rso.init)(params)

  @ref.jit
  def step(params, state):
    bases = rso.bases(params, state)
    gradients = _gradients(rso, params, state, bases)
    return (params, state, bases), rso.update(gradients, state, params)

  history = []
  for _ in range(steps + 1):
    before, (params, state) = step(params, state)
    history.append(before)
  assert step._cache_size() == 1
  return history


def _matrices(path, x):
  """Returns a leaf, its coordinates or its bases as (count, rows, columns)."""
  x = np.asarray(x, np.float64)
  if path == 'up':
    return x
  return x.reshape(1, x.shape[0], -1)


@pytest.mark.parametrize(
  'sample, eta',
  grid.cover(
    ['dct', 'haar', 'gaussian'], [None, 0.5, lambda k: 1.0 / (1.0 + k)], of=3
  ),
)
def test_equals_dense_loop(sample, eta):
  lr, leaves = 0.05, LEAVES if sample == 'dct' else STACK
  rso = so.rso.subproblems(
    _spec(leaves), optax.sgd(lr), update_proj_gap=GAP, sample=sample, eta=eta
  )
  params = cases.tree(leaves)
  history = _run(rso, params)
  dense = {k: _matrices(k, x) for k, x in params.items() if k != 'bias'}
  coords = {k: np.zeros((len(x), RANK, x.shape[2])) for k, x in dense.items()}
  bias = np.asarray(params['bias'], np.float64)
  for t, (_, _, bases) in enumerate(history[:-1]):
    bases = {k: _matrices(k, bases[k]) for k in dense}
    for k in dense:
      whole = dense[k] + bases[k] @ coords[k]
      g = _slope(whole.reshape(params[k].shape)).reshape(whole.shape)
      down = np.swapaxes(bases[k], 1, 2) @ g
      if eta is not None:
        down = down + coords[k] / (eta(t // GAP) if callable(eta) else eta)
      coords[k] = coords[k] - lr * down
      if (t + 1) % GAP == 0:
        dense[k] = dense[k] + bases[k] @ coords[k]
        coords[k] = np.zeros_like(coords[k])
    bias = bias - lr * _slope(bias)
    after, state, _ = history[t + 1]
    for k in dense:
      np.testing.assert_allclose(
        _matrices(k, after[k]), dense[k], rtol=1e-4, atol=1e-4
      )
      np.testing.assert_allclose(
        _matrices(k, state.coords[k]), coords[k], rtol=1e-4, atol=1e-4
      )
    np.testing.assert_allclose(after['bias'], bias, rtol=1e-5)


@pytest.mark.parametrize('sample', ['dct', 'haar', 'gaussian'])
def test_bases_have_the_paper_s_scale(sample):
  spec = so.SubspaceSpec(16, side='in')
  rso = so.rso.subproblems(spec, optax.sgd(0.1), sample=sample)
  params = {'w': jnp.zeros((40, 256, 64))}
  bases = ref.jit(lambda params: rso.bases(params, rso.init(params)))
  p = np.asarray(bases(params)['w'])
  gram = np.swapaxes(p, 1, 2) @ p
  size = 256 / 16
  wanted = np.broadcast_to(size * np.eye(16), gram.shape)
  if sample != 'gaussian':
    np.testing.assert_allclose(gram, wanted, atol=1e-4 * size)
  np.testing.assert_allclose(gram.mean(0), wanted[0], atol=0.1 * size)
  # E[P P^T] = I.
  np.testing.assert_allclose(np.mean(np.sum(p**2, axis=2)), 1.0, rtol=0.02)


@pytest.mark.parametrize(
  'transport',
  [
    so.transports.both(0.9, 0.999),
    # It reads no bases.
    pytest.param('reset', marks=pytest.mark.full),
  ],
)
def test_narrow_bases(transport):
  rng = np.random.default_rng(0)
  params = {'w': jnp.asarray(rng.standard_normal((16, 24)), jnp.bfloat16)}
  target = jnp.asarray(rng.standard_normal((16, 24)), jnp.float32)
  spec = so.SubspaceSpec(8, side='in', basis_dtype='bfloat16')
  rso = so.rso.subproblems(
    spec, optax.adam(0.05), update_proj_gap=4, transport=transport
  )
  x = jnp.asarray(rng.standard_normal((64, 16)), jnp.bfloat16)

  def loss(params, x):
    y = so.rso.dot(x, params['w']).astype(jnp.float32)
    return jnp.mean((y - x.astype(jnp.float32) @ target) ** 2)

  state = ref.jit(rso.init)(params)
  step, losses = cases.jit(rso.step(loss)), []
  first = measure.types(state)
  bases = jax.eval_shape(rso.bases, params, state)
  assert bases['w'].dtype == jnp.bfloat16
  for _ in range(60):
    params, state, value = step(params, state, x)
    losses.append(value)
  assert measure.types(state) == first and step._cache_size() == 1
  assert losses[-1] < 0.2 * losses[0]


def test_a_group_has_one_basis():
  group = lambda path: 'qkv' if path in ('q', 'k', 'v') else path
  spec = so.SubspaceSpec(RANK, side='in', key_group=group)
  rso = so.rso.subproblems(spec, optax.sgd(0.1))
  params = {k: jnp.zeros((16, 24)) for k in ('q', 'k', 'o')}
  params['v'] = jnp.zeros((16, 12))  # as with fewer heads of keys and values

  @ref.jit
  def draw(params):
    bases = rso.bases(params, rso.init(params))
    assert bases['q'] is bases['k'] and bases['q'] is bases['v']
    return bases

  bases = draw(params)
  assert (bases['q'] != bases['o']).any()


def test_schedules_of_both_loops_and_another_optimizer_of_plain_leaves():
  # Of unit gradients: B moves by what the two schedules say.
  inner = optax.sgd(optax.piecewise_constant_schedule(1.0, {2: 0.5}))
  outer = lambda t: 1.0 / (1 + t)
  rso = so.rso.subproblems(
    _spec(STACK),
    inner,
    update_proj_gap=3,
    schedule=outer,
    plain=optax.sgd(7.0),
  )
  params = cases.tree(STACK)
  update, coords, biases = ref.jit(rso.update), [], []
  state = ref.jit(rso.init)(params)
  gradients = jax.tree.map(jnp.ones_like, state.coords)
  gradients['bias'] = jnp.ones_like(params['bias'])
  for _ in range(6):
    before = params['bias'], state.coords['up']
    params, state = update(gradients, state, params)
    biases.append(float((params['bias'] - before[0])[0]))
    coords.append(float((state.coords['up'] - before[1])[0, 0, 0]))
  factors = 1 / np.arange(1, 7)
  np.testing.assert_allclose(biases, -7 * factors, rtol=1e-5)
  # Steps 2 and 5 are followed by a merge; the counters of `inner` start anew.
  for t, rate in ((0, 1.0), (1, 1.0), (3, 1.0), (4, 1.0)):
    np.testing.assert_allclose(coords[t], -rate * factors[t], rtol=1e-5)
  one = so.rso.subproblems(_spec(STACK), inner, update_proj_gap=9)
  state, update = ref.jit(one.init)(params), ref.jit(one.update)
  for _ in range(4):
    params, state = update(gradients, state, params)
  np.testing.assert_allclose(state.coords['up'], -3.0, rtol=1e-6)


def test_step_is_bases_gradient_and_update():
  params, x = {'w': ref.normal(0, (8, 12))}, ref.normal(1, (5, 8))
  rso = so.rso.subproblems(_spec_of_one(), optax.adam(0.1), update_proj_gap=3)
  loss = lambda params, x: jnp.mean(jnp.sin(so.rso.dot(x, params['w'])))
  double = lambda f: (
    lambda *args: jax.tree.map(lambda v: 2 * v, jax.value_and_grad(f)(*args))
  )
  step = ref.jit(rso.step(loss, double))

  @ref.jit
  def by_hand(params, state):
    whole = rso.merged(params, state)['w']
    g = 2 * x.T @ (jnp.cos(x @ whole) / (5 * 12))
    g = rso.bases(params, state)['w'].T @ g
    return whole, *rso.update({'w': g}, state, params)

  taken = mine = params
  state = own = ref.jit(rso.init)(params)
  for _ in range(5):
    taken, state, value = step(taken, state, x)
    whole, mine, own = by_hand(mine, own)
    np.testing.assert_allclose(
      value, 2 * np.mean(np.sin(x @ whole)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(taken['w'], mine['w'], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      state.coords['w'], own.coords['w'], rtol=1e-4, atol=1e-5
    )


def _spec_of_one():
  return so.SubspaceSpec(RANK, side='in')


# Of the same mean and size; that of 'dct' is tested above.
@pytest.mark.parametrize(
  'sample', [pytest.param('dct', marks=pytest.mark.full), 'haar']
)
def test_the_theorem_s_parameters_keep_its_bound(sample):
  # f(W) = |A^(1/2) (W - W*)|^2 / 2 with A of eigenvalues up to L = 2.
  m, n, r, many = 12, 5, 3, 16
  rng = np.random.default_rng(0)
  curvature = np.linspace(0.1, 2.0, m)[:, None]
  wanted = rng.standard_normal((m, n))
  gap = np.sum(curvature * wanted**2) / 2
  p = so.rso.theorem_parameters(
    smoothness=2.0, gap=gap, share=r / m, subproblems=many
  )
  curved = 2.0 * m / r
  assert p.eta == 1 / (2 * curved)
  np.testing.assert_allclose(p.bound, 18 * curved * gap / many)
  # Four matrices, each with bases of its own. Until the objective, of
  # condition 3, is at its minimum.
  spec = so.SubspaceSpec(
    r,
    side='in',
    only_if_smaller=False,
    weight_dimension_numbers={'w': so.DimensionNumbers(1, 2)},
  )
  rso = so.rso.subproblems(
    spec,
    optax.sgd(p.learning_rate),
    update_proj_gap=30,
    sample=sample,
    eta=p.eta,
  )

  def advance(carry, t):
    params, state = carry
    g = curvature[None] * (rso.merged(params, state)['w'] - wanted[None])
    basis = rso.bases(params, state)['w']
    square = jnp.sum(
      (curvature[None] * (params['w'] - wanted[None])) ** 2, (1, 2)
    )
    g = jnp.swapaxes(basis, 1, 2) @ g
    return rso.update({'w': g}, state, params), square

  @jax.jit
  def run(params):
    return jax.lax.scan(
      advance, (params, rso.init(params)), jnp.arange(30 * many)
    )[1]

  squares = np.asarray(run({'w': jnp.zeros((4, m, n))}))[::30]
  mean = np.mean(squares, axis=1)
  assert mean.mean() <= p.bound
  assert mean[-1] < 0.2 * mean[0]


@pytest.mark.parametrize(
  ('name', 'value'),
  [('smoothness', 0.0), ('gap', np.inf), ('share', 1.5), ('accuracy', -1.0)],
)
def test_values_that_the_theorem_cannot_have_are_named(name, value):
  values = {'smoothness': 1.0, 'gap': 1.0, 'share': 0.5, 'subproblems': 9}
  with errors.raises(ValueError, name, repr(value)):
    so.rso.theorem_parameters(**values | {name: value})


@pytest.mark.parametrize(
  'name',
  # The mean is moved by both as it is by the first.
  ['keep', pytest.param('first', marks=pytest.mark.full), 'both', 'reset'],
)
def test_moments_when_p_changes(name):
  both = so.transports.both(0.9, 0.999)
  transport = both if name == 'both' else name
  rso = so.rso.subproblems(
    _spec(STACK), optax.adam(0.01), update_proj_gap=2, transport=transport
  )
  history = _run(rso, cases.tree(STACK), 3)
  params, state, bases = history[2]
  mean = np.asarray(state.inner.inner[0].mu['up'], np.float64)
  p_old = np.asarray(history[1][2]['up'], np.float64)
  p_new = np.asarray(bases['up'], np.float64)
  # B is zero after the merge.
  g = np.swapaxes(p_new, 1, 2) @ _slope(np.asarray(params['up'], np.float64))
  _, state, _ = history[3]
  cross = (
    np.swapaxes(p_new, 1, 2)
    @ p_old
    @ np.linalg.inv(np.swapaxes(p_old, 1, 2) @ p_old)
  )
  moved = cross @ mean
  carried = {'keep': mean, 'reset': 0 * mean}.get(name, moved)
  np.testing.assert_allclose(
    state.inner.inner[0].mu['up'],
    0.9 * carried + 0.1 * g,
    rtol=1e-4,
    atol=1e-5,
  )


def _drift(rounding, steps=64):
  """Returns how far 64 small merges have moved a weight of 1."""
  params = {'w': jnp.ones((64, 256), jnp.bfloat16)}
  spec = so.SubspaceSpec(4, side='in')
  rso = so.rso.subproblems(
    spec, optax.sgd(1.0), update_proj_gap=1, rounding=rounding
  )
  state, exact = ref.jit(rso.init)(params), np.ones((64, 256))
  update, bases = cases.jit(rso.update), cases.jit(rso.bases)
  rng = np.random.default_rng(0)
  direction = rng.standard_normal((64, 256)) / 32
  for _ in range(steps):
    p = np.asarray(bases(params, state)['w'], np.float64)
    # A step of about 2e-4, a tenth of bfloat16's spacing at 1.
    g = -1e-2 * p.T @ direction / 8
    g = g.astype(np.float32)
    exact = exact - p @ g.astype(np.float64)
    params, state = update({'w': g}, state, params)
  whole = np.asarray(params['w'], np.float64)
  if rounding == 'compensated':
    whole = whole + np.asarray(state.lost['w'], np.float64)
  return whole - 1, exact - 1


@pytest.mark.parametrize('rounding', ['nearest', 'compensated', 'stochastic'])
def test_small_updates_of_bfloat16_weights(rounding):
  got, wanted = _drift(rounding)
  share = np.vdot(got, wanted) / np.vdot(wanted, wanted)
  if rounding == 'nearest':
    assert abs(share) < 0.5  # most of it is lost
  else:
    # More than four standard errors of rounding at random.
    np.testing.assert_allclose(share, 1.0, atol=0.1)
  if rounding == 'compensated':
    np.testing.assert_allclose(got, wanted, atol=2e-4)


def test_only_narrow_weights_lose_anything():
  wide, narrow = jnp.ones((8, 16), jnp.float32), jnp.ones((8, 16), jnp.bfloat16)
  params = {'wide': wide, 'narrow': narrow}
  rso = so.rso.subproblems(
    _spec_of_one(), optax.sgd(0.1), update_proj_gap=1, rounding='compensated'
  )
  state = ref.jit(rso.init)(params)
  gradients = jax.tree.map(jnp.ones_like, state.coords)
  after, moved = cases.jit(rso.update)(gradients, state, params)
  assert measure.types(moved) == measure.types(state)
  assert [x.dtype for x in jax.tree.leaves(moved.lost)] == [jnp.bfloat16]
  assert np.all(np.asarray(after['wide'] != wide))


def test_state_is_stable_and_holds_no_basis():
  rso = so.rso.subproblems(_spec(), optax.adam(0.01), update_proj_gap=GAP)
  params = cases.tree(LEAVES)
  state = jax.eval_shape(rso.init, params)

  def step(params, state):
    gradients = _gradients(rso, params, state, rso.bases(params, state))
    return rso.update(gradients, state, params)

  after = jax.eval_shape(step, params, state)
  assert measure.types(after) == measure.types((params, state))
  sizes = [x.size for x in jax.tree.leaves(state) if x.size > 12]
  # B and two moments of 3 x 12 for three layers and the query.
  assert sizes == [3 * 12, 3 * 3 * 12] * 3


@pytest.mark.parametrize(
  'kind, rounding',
  grid.cover(
    [AxisType.Auto, AxisType.Explicit], ['nearest', 'stochastic'], of=2
  ),
)
def test_on_a_mesh_it_is_the_same(kind, rounding):
  rng = np.random.default_rng(0)
  dtype = jnp.float32 if rounding == 'nearest' else jnp.bfloat16
  start = {'w': jnp.asarray(rng.standard_normal((16, 24)), dtype)}
  x = jnp.asarray(rng.standard_normal((4, 16)), jnp.float32)
  loss = lambda p, x: jnp.mean(
    jnp.sin(so.rso.dot(x, p['w'])).astype(jnp.float32)
  )
  rso = so.rso.subproblems(
    so.SubspaceSpec(4, side='in'),
    optax.adam(0.01),
    update_proj_gap=2,
    transport='first',
    rounding=rounding,
  )

  def run(params, state, x):
    step = cases.jit(rso.step(loss))
    for _ in range(5):
      params, state, _ = step(params, state, x)
    return params, state

  alone, _ = run(start, cases.jit(rso.init)(start), x)
  mesh = jax.make_mesh((2, 2), ('fsdp', 'tensor'), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    cut = NamedSharding(mesh, P('fsdp', 'tensor'))
    params = jax.device_put(start, cut)
    x = jax.device_put(x, NamedSharding(mesh, P()))
    many, state = run(params, rso.init(params), x)
    placed = so.state_sharding(rso, params)
  assert many['w'].sharding.spec == cut.spec
  assert state.coords['w'].sharding.spec == placed.coords['w'].spec
  assert placed.coords['w'].spec == P('fsdp', 'tensor')
  many, alone, start = (
    np.asarray(tree['w'], np.float32) for tree in (many, alone, start)
  )
  if rounding == 'nearest':
    np.testing.assert_allclose(many, alone, rtol=1e-5, atol=1e-5)
    return
  # Other sums may fall on the other side of the same noise: seldom, and then by
  # a spacing, of what the weight was when it was merged.
  assert np.mean(many != alone) < 0.05
  spacing = 2**-7 * np.maximum(np.abs(alone), np.abs(start)) + 1e-5
  np.testing.assert_array_less(np.abs(many - alone), spacing)


def test_what_it_refuses():
  inner = optax.sgd(0.1)
  random = so.rso.subproblems(_spec(), inner, rounding='stochastic')
  with errors.raises(ValueError, "'stochastic'", "'query'", 'float16'):
    random.init(jax.tree.map(jnp.float16, cases.tree(LEAVES)))
  with errors.raises(ValueError, "side='in'", "'short'"):
    so.rso.subproblems(so.SubspaceSpec(3), inner)
  with errors.raises(ValueError, 'sample', "'normal'"):
    so.rso.subproblems(_spec(), inner, sample='normal')
  with errors.raises(ValueError, 'rounding', "'up'"):
    so.rso.subproblems(_spec(), inner, rounding='up')
  rso = so.rso.subproblems(_spec(), inner)
  long = {'w': jax.ShapeDtypeStruct((2**20 + 1, 8), jnp.float32)}
  with errors.raises(ValueError, "'w'", 1048577, "sample='dct'"):
    so.rso.subproblems(so.SubspaceSpec(2, side='in'), inner).init(long)
  params = cases.tree(LEAVES)
  with errors.raises(ValueError, "'query'", 'with respect to B'):
    rso.update(params, rso.init(params), params)
