"""Lifted layers: their gradient is P^T of the full one, which never exists."""

import itertools
import math
import re

from flax import linen as nn
from flax import nnx
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
import rso_models as models
import subspace_optax as so
from subspace_optax import rso

FULL = pytest.mark.full


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def _assert_close(found, expected, rtol=1e-12):
  found, expected = models.flat(found), models.flat(expected)
  assert found.keys() == expected.keys()
  atol = rtol * max(np.linalg.norm(x) for x in expected.values())
  for path, want in expected.items():
    np.testing.assert_allclose(
      found[path], want, rtol=rtol, atol=atol, err_msg=path
    )


def _check_gradient(problem: models.Problem, axis: int = 0):
  bases, coords = models.draw(problem, axis)
  x = models.inputs()
  full = models.merged(problem.params, bases, coords, axis)
  want, gradient = cases.jit(jax.value_and_grad(problem.plain))(full, x)
  spec = models.spec(problem.params, axis) if axis else models.SPEC
  f = rso.value_and_grad(problem.lifted, spec)
  value, found = cases.jit(f)(problem.params, bases, coords, x)
  np.testing.assert_allclose(value, want, rtol=1e-13)
  lifted = jax.tree.leaves(bases)
  assert len(lifted) == len(jax.tree.leaves(coords)) > 0
  assert jax.tree.structure(found) == jax.tree.structure(problem.params)
  _assert_close(models.flat(found), models.projected(gradient, bases, axis))


# Stacks without remat are those of the tests below, and lists of nnx layers
# those of tests/test_rso_training.py.
DEFAULT = (
  (models.nnx_problem, True, True),
  (models.linen_problem, False, True),
)


@pytest.mark.parametrize(
  'make, stacked, remat',
  [
    pytest.param(*point, marks=() if point in DEFAULT else FULL)
    for point in itertools.product(
      (models.nnx_problem, models.linen_problem), (False, True), (False, True)
    )
  ],
)
def test_the_gradient_is_the_full_one_projected(make, stacked, remat):
  _check_gradient(make(stacked, remat))


@pytest.mark.parametrize('side', ['in', 'out'])
def test_second_derivatives(side):
  rng = np.random.default_rng(0)
  w, x = (jnp.asarray(rng.standard_normal(s)) for s in ((6, 9), (5, 6)))
  spec = so.SubspaceSpec(2, side=side, only_if_smaller=False)
  p = jnp.asarray(rng.standard_normal((6, 2) if side == 'in' else (9, 2)))
  b = jnp.asarray(rng.standard_normal((2, 9) if side == 'in' else (6, 2)))

  def penalty(w, x):
    y = lambda x: jnp.sum(jnp.tanh(rso.dot(x, w)))
    return jnp.sum(jax.grad(y)(x) ** 2)

  dense = lambda b: penalty(w + (p @ b if side == 'in' else b @ p.T), x)
  f = rso.value_and_grad(
    lambda at, x: penalty(at['w'], x), spec.match({'w': w})
  )
  value, found = jax.jit(f)({'w': w}, {'w': p}, {'w': b}, x)
  want = jax.jit(jax.value_and_grad(dense))(b)
  np.testing.assert_allclose(value, want[0], rtol=1e-12)
  np.testing.assert_allclose(found['w'], want[1], rtol=1e-10, atol=1e-12)


def test_an_nnx_state_of_params():
  _check_gradient(models.nnx_problem(True, False, pure=False))


def test_linen_layers_along_axis_1():
  _check_gradient(models.linen_problem(True, False, axis=1), axis=1)


def test_linen_boxes():
  problem = models.linen_problem(True, False, boxed=True)
  up = problem.params['blocks']['up']['kernel']
  assert isinstance(up, nn.Partitioned)
  _check_gradient(problem)


def _dots(compiled) -> list[int]:
  """Returns the numbers of elements of all products of a program."""
  found = re.findall(r'= \w+\[([\d,]*)\]\S* dot\(', compiled.as_text())
  assert found
  return [math.prod(map(int, s.split(','))) if s else 1 for s in found]


# By default each of the two tests that compile a stack has one of both kinds.
@pytest.mark.parametrize(
  'make',
  [models.linen_problem, pytest.param(models.nnx_problem, marks=FULL)],
)
def test_no_product_has_the_size_of_a_kernel(make):
  problem = make(True, False)
  bases, coords = models.draw(problem)
  x = models.inputs()
  full = cases.jit(jax.grad(problem.plain)).lower(problem.params, x)
  f = cases.jit(rso.value_and_grad(problem.lifted, models.SPEC))
  lifted = f.lower(problem.params, bases, coords, x)
  of_kernels = lambda dots: [n for n in dots if n in models.KERNELS]
  assert len(of_kernels(_dots(full.compile()))) == 6
  assert not of_kernels(_dots(lifted.compile()))


def _lifted_matrix(m=6, n=9, r=2, dtype=jnp.float64):
  keys = jax.random.split(jax.random.key(0), 3)
  normal = lambda key, *shape: jax.random.normal(key, shape, dtype)
  params = {'w': normal(keys[0], m, n)}
  spec = so.SubspaceSpec(r, only_if_smaller=False)
  bases, coords = {'w': normal(keys[1], m, r)}, {'w': normal(keys[2], r, n)}
  return params, bases, coords, spec


def _residuals(f, *args) -> list[tuple[int, ...]]:
  """Returns the shapes of what the backward pass is given."""
  return [x.shape for x in jax.tree.leaves(jax.vjp(f, *args)[1])]


def test_backward_keeps_the_projected_input():
  params, bases, coords, spec = _lifted_matrix()
  x = jnp.ones((5, 6))

  def lifted(x, coords):
    return rso.dot(x, rso.lift(params, bases, coords, spec)['w'])

  kept = _residuals(lifted, x, coords)
  assert (5, 2) in kept and (5, 6) not in kept
  assert (5, 6) in _residuals(rso.dot, x, params['w'])


def test_three_products_are_one_for_remat_by_name():
  params, bases, coords, spec = _lifted_matrix()
  x = jnp.ones((5, 6))

  def kept(layer, policy, *args):
    loss = jax.checkpoint(
      lambda *args: jnp.sum(jnp.sin(layer(*args))), policy=policy
    )
    found = _residuals(lambda *args: loss(jnp.sin(args[0]), *args[1:]), *args)
    return sorted(s for s in found if s and s[0] == 5 and s != x.shape)

  def lifted(x, coords):
    return rso.dot(x, rso.lift(params, bases, coords, spec)['w'])

  policies = jax.checkpoint_policies
  names = policies.save_only_these_names
  args = x, coords
  assert kept(rso.dot, names(rso.LINEAR_OUT), x, params['w']) == [(5, 9)]
  assert kept(lifted, names(rso.LINEAR_OUT), *args) == [(5, 9)]
  both = names(rso.LINEAR_OUT, rso.PROJECTED_INPUT)
  assert kept(lifted, both, *args) == [(5, 2), (5, 9)]
  by_product = kept(lifted, policies.dots_with_no_batch_dims_saveable, *args)
  assert by_product == [(5, 2), (5, 9), (5, 9)]


def test_dot_of_kernels_with_several_axes():
  keys = jax.random.split(jax.random.key(0), 4)
  params = {'out': jax.random.normal(keys[0], (2, 3, 7))}
  bases = {'out': jax.random.normal(keys[1], (2, 3, 2))}
  coords = {'out': jax.random.normal(keys[2], (2, 7))}
  x = jax.random.normal(keys[3], (4, 5, 2, 3))
  spec = so.SubspaceSpec(2, only_if_smaller=False)
  lifted = rso.lift(params, bases, coords, spec)['out']
  full = params['out'] + np.einsum('abr,rn->abn', bases['out'], coords['out'])
  want = np.einsum('xyab,abn->xyn', x, full)
  np.testing.assert_allclose(rso.dot(x, lifted, axes=2), want, rtol=1e-12)
  np.testing.assert_allclose(rso.dot(x, full, axes=2), want, rtol=1e-12)


def _layers(dtype, precision=None, dot_general=None):
  """Returns both flaxes' layers of 6 x 9, their params and merge or apply."""
  kwargs = {'dtype': dtype, 'precision': precision}
  linear = nnx.LinearGeneral(
    6, 9, dot_general=dot_general, rngs=nnx.Rngs(0), **kwargs
  )
  graphdef, state = nnx.split(linear)
  dense = nn.Dense(9, dot_general=dot_general, **kwargs)
  variables = jax.jit(dense.init)(jax.random.key(0), jnp.ones((1, 6), dtype))
  return {
    'nnx': (
      nnx.to_pure_dict(state),
      lambda p, x: rso.nnx_merge(graphdef, p)(x),
    ),
    'linen': (
      variables['params'],
      lambda p, x: rso.linen_apply(dense.apply, {'params': p}, x),
    ),
  }


def _lift_layer(params):
  _, bases, coords, spec = _lifted_matrix(dtype=jnp.float32)
  masked = {'bias': optax.MaskedNode()}
  bases, coords = ({'kernel': t['w'], **masked} for t in (bases, coords))
  return rso.lift(params, bases, coords, spec), bases, coords, spec


@pytest.mark.parametrize('flax', ['nnx', 'linen'])
def test_products_in_the_dtype_of_the_layer(flax):
  params, apply = _layers(jnp.bfloat16)[flax]
  lifted, bases, coords, spec = _lift_layer(params)
  x = jax.random.normal(jax.random.key(1), (5, 6), jnp.float32)
  text = str(jax.make_jaxpr(apply)(lifted, x))
  assert re.findall(r':(\w+)\[\S* = dot_general', text) == ['bf16'] * 3
  loss = lambda p: jnp.sum(apply(p, x).astype(jnp.float32) ** 2)
  f = rso.value_and_grad(loss, spec)
  gradient = jax.jit(f)(params, bases, coords)[1]
  dtypes = {k: g.dtype for k, g in gradient.items()}
  assert dtypes == {'kernel': jnp.float32, 'bias': jnp.float32}
  w = params['kernel'] + bases['kernel'] @ coords['kernel']
  y = x @ w + params['bias'][None]
  np.testing.assert_allclose(apply(lifted, x), y, rtol=0.03, atol=0.1)
  want = bases['kernel'].T @ (x.T @ (2 * y))
  scale = np.linalg.norm(want)
  np.testing.assert_allclose(gradient['kernel'], want, atol=0.02 * scale)


@pytest.mark.parametrize('flax', ['nnx', 'linen'])
def test_the_layer_s_own_product_and_precision(flax):
  calls = []

  def product(x, w, numbers, precision=None, out_sharding=None):
    calls.append((w.shape, precision))
    return 2 * jax.lax.dot_general(x, w, numbers, precision=precision)

  params, apply = _layers(jnp.float32, 'highest', product)[flax]
  calls.clear()
  lifted, bases, coords, _ = _lift_layer(params)
  x = jax.random.normal(jax.random.key(1), (5, 6), jnp.float32)
  y = apply(lifted, x)
  shapes = [(6, 2), (6, 9), (2, 9)]
  assert calls == [(shape, 'highest') for shape in shapes]
  step = 4 * (x @ bases['kernel']) @ coords['kernel']
  want = 2 * x @ params['kernel'] + step + params['bias'][None]
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-4)


def _place(mesh, tree):
  """Returns kernels split over both axes, bases over one, all else whole."""

  def put(x):
    spec = P(None, 'fsdp', *['tensor'] * (x.ndim == 3)) if x.ndim > 2 else P()
    fits = all(
      name is None or n % mesh.shape[name] == 0
      for n, name in zip(x.shape, spec, strict=False)
    )
    return jax.device_put(x, NamedSharding(mesh, spec if fits else P()))

  return jax.tree.map(put, tree)


@pytest.mark.parametrize(
  'make',
  [models.nnx_problem, pytest.param(models.linen_problem, marks=FULL)],
)
def test_sharded_params(make):
  problem = make(True, False)
  bases, coords = models.draw(problem)
  x = models.inputs()
  f = cases.jit(rso.value_and_grad(problem.lifted, models.SPEC))
  value, gradient = f(problem.params, bases, coords, x)
  mesh = jax.make_mesh(
    (2, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2
  )
  with jax.set_mesh(mesh):
    placed = _place(mesh, (problem.params, bases, coords))
    up = placed[0]['blocks']['up']['kernel'].sharding
    assert up.spec == P(None, 'fsdp', 'tensor')
    x = jax.device_put(x, NamedSharding(mesh, P('fsdp')))
    sharded_value, sharded = f(*placed, x)
  np.testing.assert_allclose(sharded_value, value, rtol=1e-13)
  _assert_close(sharded, gradient)


def test_explicit_sharding():
  params, bases, coords, spec = _lifted_matrix(m=8, n=12)
  graphdef, state = nnx.split(
    nnx.Linear(8, 12, use_bias=False, rngs=nnx.Rngs(0))
  )
  named = lambda t: {'kernel': t['w']}
  args = [named(params), named(bases), named(coords)]
  x = jax.random.normal(jax.random.key(1), (4, 8))
  mesh = jax.make_mesh(
    (2, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Explicit,) * 2
  )

  def gradient(out, args, x):
    model = lambda p: rso.nnx_merge(graphdef, p)
    loss = lambda p, x: jnp.sum(model(p)(x, out_sharding=out) ** 2)
    return jax.jit(rso.value_and_grad(loss, spec))(*args, x)

  want = gradient(None, args, x)
  with jax.set_mesh(mesh):
    # A basis at rest may have its rank axis split.
    specs = (P('fsdp', 'tensor'), P('fsdp', 'tensor'), P(None, 'tensor'))
    put = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))
    args = [
      {'kernel': put(a['kernel'], s)} for a, s in zip(args, specs, strict=True)
    ]
    found = gradient(P('fsdp', 'tensor'), args, put(x, P('fsdp')))
  np.testing.assert_allclose(found[0], want[0], rtol=1e-12)
  _assert_close(found[1], want[1])


@pytest.mark.parametrize('side', ['in', 'out'])
def test_dot_over_a_sharded_axis(side):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.standard_normal(s)) for s in ((4, 8), (8, 12)))
  spec = so.SubspaceSpec(2, side=side, only_if_smaller=False)
  shapes = ((8, 2), (2, 12)) if side == 'in' else ((12, 2), (8, 2))
  basis, coords = (jnp.asarray(rng.standard_normal(s)) for s in shapes)

  def gradient(x, w, out):
    trees = {'w': w}, {'w': basis}, {'w': coords}
    y = lambda p, x: rso.dot(x, p['w'], out_sharding=out)
    f = lambda p, x: jnp.sum(jnp.sin(y(p, x)))
    return rso.value_and_grad(f, spec.match(trees[0]))(*trees, x)

  want = gradient(x, w, None)
  mesh = jax.make_mesh((4,), ('tensor',), axis_types=(AxisType.Explicit,))
  with jax.set_mesh(mesh):
    put = lambda x, *s: jax.device_put(x, NamedSharding(mesh, P(*s)))
    found = cases.jit(gradient, static_argnums=2)(
      put(x, None, 'tensor'), put(w, 'tensor', None), P(None, None)
    )
  np.testing.assert_allclose(found[0], want[0], rtol=1e-12)
  np.testing.assert_allclose(found[1]['w'], want[1]['w'], rtol=1e-10)


class _Einsum(nnx.Module):
  def __init__(self):
    self.mix = nnx.Einsum('bi,ij->bj', (6, 9), rngs=nnx.Rngs(0))


def test_a_lifted_leaf_of_another_nnx_module():
  params, bases, coords, spec = _lifted_matrix(dtype=jnp.float32)
  graphdef, state = nnx.split(_Einsum())
  tree = lambda t: {'mix': {'kernel': t['w']}}
  lifted = rso.lift(tree(params), tree(bases), tree(coords), spec)
  message = r"'mix/kernel' belongs to a Einsum.*nnx.LinearGeneral.*`exclude`"
  with pytest.raises(ValueError, match=message):
    rso.nnx_merge(graphdef, lifted)


@pytest.mark.parametrize('use', [lambda w: w.T, lambda w: w * 2, jnp.sum])
def test_a_lifted_leaf_outside_of_its_layer(use):
  model = nnx.Linear(8, 20, use_bias=False, rngs=nnx.Rngs(0))
  graphdef, params = nnx.split(model)
  params = nnx.to_pure_dict(params)
  bases, coords = {'kernel': jnp.ones((8, 3))}, {'kernel': jnp.ones((3, 20))}
  lifted = rso.lift(params, bases, coords, models.SPEC)
  with pytest.raises(
    (AttributeError, TypeError, ValueError), match='[Ll]ifted'
  ):
    use(rso.nnx_merge(graphdef, lifted).kernel[...])
  with errors.raises(AttributeError, "'kernel'", "'shape'", 'exclude'):
    lifted['kernel'].shape  # noqa: B018


def test_a_lifted_leaf_of_another_linen_module():
  params, bases, coords, spec = _lifted_matrix(dtype=jnp.float32)
  tree = lambda t: {'mix': {'kernel': t['w']}}
  lifted = rso.lift(tree(params), tree(bases), tree(coords), spec)
  model = nn.Sequential([nn.Einsum((6, 9), 'bi,ij->bj', False, name='mix')])
  model.init(jax.random.key(0), jnp.ones((5, 6)))
  tree = {'params': {'layers_0': lifted['mix']}}
  message = r"'mix/kernel' belongs to a Einsum.*linen.DenseGeneral.*`exclude`"
  with pytest.raises(ValueError, match=message):
    rso.linen_apply(model, tree, jnp.ones((5, 6)))


def test_a_spec_with_other_axes_than_the_layer():
  layer = nnx.LinearGeneral(6, (3, 4), use_bias=False, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(layer)
  params = nnx.to_pure_dict(state)
  spec = so.SubspaceSpec(2, only_if_smaller=False)
  bases, coords = (
    {'kernel': jnp.ones((6, 3, 2))},
    {'kernel': jnp.ones((6, 2, 4))},
  )
  lifted = rso.lift(params, bases, coords, spec)
  message = r"'kernel' contracts axes \(0,\).*weight_dimension_numbers"
  with pytest.raises(ValueError, match=message):
    rso.nnx_merge(graphdef, lifted)(jnp.ones((5, 6)))


def test_trees_that_do_not_fit():
  params, bases, coords, spec = _lifted_matrix()
  with pytest.raises(ValueError, match="bases must have an entry.*'w'"):
    rso.lift(params, {}, coords, spec)
  wrong = {'w': bases['w'].T}
  with pytest.raises(ValueError, match=r"bases of leaf 'w' has shape \(2, 6\)"):
    rso.lift(params, wrong, coords, spec)
  plain = so.SubspaceSpec(2, exclude='w', allow_empty=True)
  with pytest.raises(ValueError, match="'w' has a basis.*path matches exclude"):
    rso.lift(params, bases, coords, plain)
  lifted = rso.lift(params, bases, coords, spec)['w']
  with pytest.raises(TypeError, match="'w' was indexed with 0"):
    lifted[0]
