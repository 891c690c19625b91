"""Parameters, gradients and moments of bfloat16 and float16.

What must not happen: steps, decay or moments that rounding loses in silence.
"""

import itertools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import cases
import grid
import subspace_optax as so
from subspace_optax._matrix import _layout
from subspace_optax.low_precision import _rounding

LR = 1e-2
BF16 = jnp.bfloat16
NAMES = cases.READY_MADE
PAIRS = (
  (jnp.bfloat16, jnp.float32),
  (jnp.bfloat16, jnp.bfloat16),
  (jnp.float16, jnp.float16),
)


def but(*left_out):
  """Returns all optimizers for `parametrize`; some only run with `--full`."""
  return grid.but(NAMES, left_out)


# Fira has the SVD; the others' bases hold no more of a leaf than a rotation of
# it, and their residuals are those of Fira and Dion.
ALIKE = ('galore', 'golore', 'subspace_adamw', 'trion')
STACK = so.DimensionNumbers()  # the last two axes


def _make(name, learning_rate=LR, weight_decay=0.0, **spec):
  spec = {'weight_dimension_numbers': STACK, 'rank': 4} | spec
  return getattr(so, name)(
    learning_rate, weight_decay=weight_decay, spec=so.SubspaceSpec(**spec)
  )


def _normal(seed, shape, scale, dtype):
  x = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(np.asarray(scale * x, dtype))


# `_decay_and_step` applies decay for all: one in a subspace, one with a full
# momentum and two without a subspace.
@pytest.mark.parametrize(
  'name',
  but(*set(NAMES) - {'apollo_adamw', 'dion', 'normuon', 'scale'}),
)
def test_weight_decay_is_applied_whole(name):
  """Sharded stacks of every dtype, with gradients of wider and narrower ones.

  All pairs of dtypes for one optimizer, since compiling takes the time, and one
  for each other.
  """
  mesh = jax.make_mesh((2, 2), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
  mixed = (jnp.float32, jnp.bfloat16), (jnp.float16, jnp.bfloat16)
  own = [PAIRS[list(NAMES).index(name) % len(PAIRS)]]
  pairs = {
    f'{jnp.dtype(p).name}-{jnp.dtype(g).name}': (p, g)
    for p, g in (PAIRS + mixed if name == 'apollo_adamw' else own)
  }
  sharding = NamedSharding(mesh, P(None, 'x', 'y'))
  put = lambda x: jax.device_put(x, sharding)
  params = {
    k: put(_normal(i, (4, 64, 64), 0.02, p))
    for i, (k, (p, _)) in enumerate(pairs.items())
  }
  grads = {
    k: put(_normal(50 + i, (4, 64, 64), 1e-2, g))
    for i, (k, (_, g)) in enumerate(pairs.items())
  }

  @cases.jit
  def update(weight_decay):
    tx = _make(name, 1.0, weight_decay)
    return tx.update(grads, tx.init(params), params)[0]

  decay = 2.0**-6  # below half of bfloat16's spacing at a step of 1
  without, with_decay = update(0.0), update(decay)
  for key, (_, dtype) in pairs.items():
    assert with_decay[key].dtype == dtype
    wanted = -decay * np.asarray(params[key], np.float64)
    found, start = (
      np.asarray(x[key], np.float64) for x in (with_decay, without)
    )
    share = np.sum((found - start) * wanted) / np.sum(wanted * wanted)
    # Rounded to the nearest, at most once on the way, of steps about 1.
    step = float(jnp.finfo(dtype).eps) * np.abs(start).max()
    deviation = np.sqrt(step / np.sum(np.abs(wanted)))
    np.testing.assert_allclose(share, 1, atol=5 * deviation, err_msg=key)
    # Optax multiplies decay and weight in the weight's dtype.
    rtol = float(jnp.finfo(params[key].dtype).eps)
    np.testing.assert_allclose(found - start, wanted, rtol, atol=2 * step)


@cases.jit
def narrow(params, updates):
  """Returns bfloat16 weights, and the state, after all updates."""
  last = so.round_updates('compensated')

  def body(carry, updates):
    params, state = carry
    updates, state = last.update(updates, state, params)
    return (optax.apply_updates(params, updates), state), None

  return lax.scan(body, (params, last.init(params)), updates)[0]


# Adam's moments and PCA's are those of `apollo_adamw`, in rank and dtype.
@pytest.mark.parametrize(
  'name', but(*ALIKE, 'fira_adamw', 'online_subspace_descent')
)
def test_compensated_rounding_is_float32_to_the_bit(name):
  """In 300 steps on bfloat16 weights, against those on float32 weights."""
  tx = _make(name)
  start = _normal(0, (16, 32), 0.02, jnp.bfloat16)
  keys = jax.random.split(jax.random.key(0), 300)

  @cases.jit
  def steps(params):
    def body(state, key):
      updates, state = tx.update(
        {'w': jax.random.normal(key, (16, 32))}, state, params
      )
      return state, updates

    return lax.scan(body, tx.init(params), keys)[1]

  updates = steps({'w': start})
  wanted = steps({'w': start.astype(jnp.float32)})
  np.testing.assert_array_equal(updates['w'], wanted['w'])
  params, state = narrow({'w': start}, updates)
  wide = np.asarray(start, np.float32)
  for update in np.asarray(wanted['w']):
    wide = wide + update
  assert np.abs(wide - np.asarray(start, np.float32)).mean() > LR
  joined = _rounding.joined(params['w'].astype(jnp.float32), state.lost['w'])
  np.testing.assert_array_equal(joined, wide)
  np.testing.assert_array_equal(params['w'], _rounding.nearest(wide, BF16))


# Each optimizer has one of the six orders of a stack's axes and of the two
# kernels of attention; the orders' products are all below.
@pytest.mark.parametrize(
  'name, order',
  [
    pytest.param(name, i, marks=pytest.mark.full if name in ALIKE else ())
    for i, name in enumerate(sorted(NAMES, key=lambda x: x in ALIKE))
  ],
)
def test_small_gradients_make_the_steps_of_float32(name, order):
  """Of 1e-5 to 1e-3, whose squares are nothing in float16; and of zero.

  A matrix in float16, and a kernel in bfloat16, for whose products XLA:CPU
  lacks some kernels.
  """
  kernels = [
    *layouts('bio').values(),
    cases.Leaf((8, 3, 4), BF16, (0,), (1, 2)),  # query
    cases.Leaf((3, 2, 4, 8), BF16, (0, 2), (3,)),  # out
  ]
  leaves = {
    'w': cases.Leaf((8, 12), jnp.float16, (0,), (1,)),
    'bias': cases.Leaf((16,), jnp.float16),
    'unused': cases.Leaf((8,), jnp.float16),
    'kernel': kernels[order % len(kernels)],
  }
  tx = _make(
    name,
    rank=2,
    only_if_smaller=False,
    weight_dimension_numbers=cases.dimension_numbers(leaves),
  )

  @cases.jit
  def run(params, grads):
    def step(_, carry):
      totals, state = carry
      updates, state = tx.update(grads, state, params)
      add = lambda x, u: x + u.astype(jnp.float32)
      return jax.tree.map(add, totals, updates), state

    totals = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    return lax.fori_loop(0, 3, step, (totals, tx.init(params)))

  rng, grads, rounded = np.random.default_rng(1), {}, {}
  for path, leaf in leaves.items():
    sizes = np.logspace(-5, -3, leaf.shape[0])
    x = np.moveaxis(sizes * rng.standard_normal(leaf.shape[::-1]), -1, 0)
    x = x.reshape(leaf.shape) * (path != 'unused')
    grads[path] = np.asarray(x).astype(leaf.dtype)
    rounded[path] = np.float32(grads[path])
  wanted, _ = run(rounded, rounded)
  found, _ = run(grads, grads)
  for path in grads:
    size = np.abs(wanted[path]).max(initial=0)
    np.testing.assert_allclose(
      found[path], wanted[path], rtol=0.02, atol=0.02 * size, err_msg=path
    )


@pytest.mark.parametrize(
  'dtype, moment_dtype',
  [(BF16, None), (jnp.float16, None), (BF16, 'parameter')],
  ids=['bfloat16', 'float16', 'bfloat16-as-optax'],
)
def test_second_moments_decay(dtype, moment_dtype):
  """After one gradient by 0.1 % a step, unless optax's own dtype is wanted."""
  tx = so.golore(LR, spec=so.SubspaceSpec(4, moment_dtype=moment_dtype))
  params = {'w': jnp.ones((16, 32), dtype), 'bias': jnp.ones((16,), dtype)}
  grads = jax.tree.map(jnp.ones_like, params)
  zeros = jax.tree.map(jnp.zeros_like, params)

  @cases.jit
  def after(steps):
    step = lambda _, s: tx.update(zeros, s, params)[1]
    _, state = tx.update(grads, tx.init(params), params)
    return lax.fori_loop(0, steps, step, state)

  old, new = (optax.tree.get(after(steps), 'nu') for steps in (0, 200))
  for path in params:
    share = np.float32(new[path]).sum() / np.float32(old[path]).sum()
    wanted = 0.999**200 if moment_dtype is None else 1.0
    assert new[path].dtype == (jnp.float32 if moment_dtype is None else dtype)
    np.testing.assert_allclose(share, wanted, rtol=1e-4, err_msg=path)


def test_moments_of_wider_and_other_leaves_keep_their_dtype():
  params = {
    'w': jax.ShapeDtypeStruct((16, 32), jnp.float64),
    'complex': jax.ShapeDtypeStruct((8,), jnp.complex64),
  }
  for moment_dtype in (None, 'parameter', jnp.float32):
    spec = so.SubspaceSpec(4, moment_dtype=moment_dtype)
    with jax.enable_x64(True):
      state = jax.eval_shape(so.golore(LR, spec=spec).init, params)
    mu = optax.tree.get(state, 'mu')
    assert mu['w'].dtype == (
      moment_dtype if moment_dtype == jnp.float32 else 'float64'
    )
    assert mu['complex'].dtype == jnp.complex64


@pytest.mark.parametrize('gradient_dtype', [jnp.float32, BF16])
@pytest.mark.parametrize('rounding', [None, 'stochastic', 'compensated'])
def test_wrappers_whose_branches_are_gradients(rounding, gradient_dtype):
  """Their updates have the dtypes of the gradients, or they raise."""
  last = [] if rounding is None else [so.round_updates(rounding)]
  tx = optax.chain(_make('golore'), *last)
  params = {'w': jnp.ones((16, 32), BF16), 'bias': jnp.ones((16,), BF16)}
  grads = jax.tree.map(lambda x: x.astype(gradient_dtype), params)
  for wrapped in (
    optax.apply_if_finite(tx, 3),
    optax.transforms.conditionally_transform(
      tx, lambda step, *_, **__: step < 5
    ),
  ):
    state = jax.eval_shape(wrapped.init, params)
    updates, after = jax.eval_shape(wrapped.update, grads, state, params)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(updates) == types(grads)
    assert types(after) == types(state)


def _layouts(length):
  """Every way in which axes make matrices, rows projected; one axis a stack."""
  for kinds in itertools.product('bmn', repeat=length):
    axes = lambda kind, kinds=kinds: tuple(
      i for i, c in enumerate(kinds) if c == kind
    )
    one = length == 3 or len(axes('b')) == 1
    if axes('m') and axes('n') and one:
      shape = (8, 4, 6, 5)[:length]
      yield _layout.Layout(shape, axes('m'), axes('n'), True, 2)


@pytest.mark.parametrize('length', [3, 4])
@pytest.mark.parametrize('basis_dtype', [BF16, jnp.float32])
def test_products_of_bfloat16_kernels_of_any_axes(length, basis_dtype):
  """XLA:CPU lacks some products of bfloat16 that are summed in float32.

  Bases in float32 have values of bfloat16, to which products round them.
  """
  every = list(_layouts(length))
  assert len(every) == {3: 12, 4: 24}[length]
  normal = lambda seed, shape: np.asarray(_normal(seed, shape, 1, BF16))
  arrays = [
    (
      normal(0, layout.shape),
      normal(1, layout.basis_shape).astype(basis_dtype),
      normal(2, layout.coords_shape).astype(basis_dtype),
    )
    for layout in every
  ]

  @cases.jit
  def multiply(arrays):
    return [
      (
        layout.project(leaf, basis),
        layout.back(leaf, coords),
        layout.unproject(basis, coords, None),
      )
      for layout, (leaf, basis, coords) in zip(every, arrays, strict=True)
    ]

  wide = jax.tree.map(np.float32, arrays)
  found, wanted = multiply(arrays), multiply(wide)
  for layout, *products in zip(every, found, wanted, strict=True):
    for x, y in zip(*products, strict=True):
      assert x.dtype == jnp.float32
      np.testing.assert_allclose(
        x, y, rtol=1e-5, atol=1e-5, err_msg=str(layout)
      )


def test_bfloat16_attention_kernel():
  params = {'query': jnp.ones((64, 4, 16), BF16)}
  tx = so.golore(LR, rank=8)
  updates = cases.jit(lambda p: tx.update(p, tx.init(p), p)[0])(params)
  assert np.isfinite(np.float32(updates['query'])).all()


@pytest.mark.parametrize('dtype', [jnp.float8_e4m3fn, jnp.int8])
def test_plain_leaves_of_other_dtypes_are_left_to_the_inner_optimizer(dtype):
  params = {'w': jnp.ones((16, 32)), 'table': jnp.ones((4,), dtype)}
  tx = so.subspace(
    so.SubspaceSpec(4, include='w'),
    so.projectors.stiefel(9),
    optax.identity(),
  )
  updates, _ = jax.eval_shape(tx.update, params, tx.init(params), params)
  assert updates['table'].dtype == dtype


@pytest.mark.parametrize('dtype', [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_plain_leaves_of_8_bits_step_as_in_float32(dtype):
  tx = so.galore(1.0, rank=4)
  updates = []
  for own in (dtype, jnp.float32):
    params = {'w': jnp.ones((16, 32)), 'b': jnp.full(4, 0.5, own)}
    state = tx.init(params)
    for _ in range(3):
      step, state = cases.jit(tx.update)(params, state, params)
    assert step['b'].dtype == own
    updates.append(np.float32(step['b']))
  np.testing.assert_allclose(*updates, rtol=2**-3)


def layouts(*forms):
  """Leaves whose axes are rows (i), columns (o), stacks (b), in any order."""
  sizes = {'b': 2, 'i': 3, 'o': 4}
  every = {''.join(x) for f in forms for x in itertools.permutations(f)}
  return {
    form: cases.Leaf(
      tuple(sizes[c] + i for i, c in enumerate(form)),
      BF16,
      tuple(i for i, c in enumerate(form) if c == 'i'),
      tuple(i for i, c in enumerate(form) if c == 'o'),
    )
    for form in sorted(every)
  }
