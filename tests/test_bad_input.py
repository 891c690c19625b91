"""Bad input: a ValueError or TypeError that names argument, value and leaf."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cases
import errors
import grid
import subspace_optax as so
from subspace_optax import projectors

PARAMS = {
  'mlp': {'up': jnp.ones((8, 12)), 'down': jnp.ones((12, 8))},
  'bias': jnp.ones(12),
}
SPEC = so.SubspaceSpec(rank=2)


def _project(spec=SPEC, projector=None):
  return so.project(spec, projector or projectors.stiefel(2))


FACTORIES = [so.galore, so.golore, so.online_subspace_descent]


def _altered():
  up, down, bias = (jnp.ones(s) for s in ((8, 12), (12, 8), (12,)))
  mlp = {'up': up, 'down': down}
  return {
    'missing': ({'mlp': mlp}, 'bias'),
    'missing_matrix': ({'mlp': {'up': up}, 'bias': bias}, 'mlp/down'),
    'extra': ({'mlp': mlp, 'bias': bias, 'new': up}, 'new'),
    'extra_plain': ({'mlp': mlp, 'bias': bias, 'z': bias}, 'z'),
    'renamed': ({'mlp': {'up': up, 'dawn': down}, 'bias': bias}, 'mlp/dawn'),
    'shape': ({'mlp': {'up': up[:6], 'down': down}, 'bias': bias}, 'mlp/up'),
    'other_side': (
      {'mlp': {'up': up, 'down': down[:7]}, 'bias': bias},
      'mlp/down',
    ),
    'free_side': (
      {'mlp': {'up': up[:, :9], 'down': down}, 'bias': bias},
      'mlp/up',
    ),
    'fewer_axes': (
      {'mlp': {'up': up[0], 'down': down}, 'bias': bias},
      'mlp/up',
    ),
    'more_axes': (
      {'mlp': {'up': up[None], 'down': down}, 'bias': bias},
      'mlp/up',
    ),
    'masked': (
      {'mlp': {'up': optax.MaskedNode(), 'down': down}, 'bias': bias},
      'mlp/up',
    ),
  }


@pytest.mark.parametrize(
  'kind, factory', grid.cover(_altered(), FACTORIES, of=3)
)
def test_tree_at_update_unlike_that_at_init(kind, factory):
  tx = factory(1e-3, rank=2)
  params = jax.eval_shape(lambda: PARAMS)
  state = jax.eval_shape(tx.init, params)
  gradients, path = _altered()[kind]
  with errors.raises(ValueError, path):
    jax.eval_shape(tx.update, gradients, state, gradients)


def _pieces():
  return {
    'project': _project(),
    'in_subspace': so.in_subspace(optax.scale_by_adam(), SPEC),
    'unproject': so.unproject(),
  }


# `project` alone, or with `in_subspace`, is a right beginning of a chain.
_RIGHT = {
  ('project',),
  ('project', 'in_subspace'),
  ('project', 'in_subspace', 'unproject'),
}
_ORDERS = [
  order
  for length in (1, 2, 3)
  for order in itertools.permutations(_pieces(), length)
]
_ORDERS += [
  ('project', 'project', 'in_subspace', 'unproject'),
  ('project', 'in_subspace', 'in_subspace', 'unproject'),
  ('project', 'in_subspace', 'unproject', 'unproject'),
  ('project', 'in_subspace', 'unproject', 'in_subspace'),
]


@pytest.mark.parametrize('order', _ORDERS, ids='-'.join)
def test_pieces_in_every_order(order):
  tx = optax.chain(*[_pieces()[name] for name in order])
  params = jax.eval_shape(lambda: PARAMS)
  state = jax.eval_shape(tx.init, params)
  run = lambda: jax.eval_shape(tx.update, params, state, params)
  if order in _RIGHT:
    run()
    return
  with errors.raises(ValueError, 'chain') as caught:
    run()
  # Names the piece that is missing or came too early.
  assert any(f'`{name}`' in str(caught.value) for name in _pieces())
  assert re.search("'(mlp/up|mlp/down|bias)'", str(caught.value))


def test_piece_in_front_of_the_residual_must_keep_the_gradient():
  residual = so.residuals.sign()
  tx = optax.chain(
    _project(),
    so.in_subspace(optax.scale_by_adam(), SPEC),
    so.unproject(residual=residual),
  )
  params = jax.eval_shape(lambda: PARAMS)
  state = jax.eval_shape(tx.init, params)
  with errors.raises(ValueError, 'keep_gradient=True', 'mlp/'):
    jax.eval_shape(tx.update, params, state, params)


@pytest.mark.parametrize('transport', ['second', None, 'Keep'])
def test_unknown_transport(transport):
  with errors.raises(ValueError, 'transport', repr(transport), 'keep'):
    so.in_subspace(optax.scale_by_adam(), SPEC, transport=transport)
  with errors.raises(ValueError, 'transport', repr(transport)):
    so.subspace(
      SPEC,
      projectors.svd(2),
      optax.scale_by_adam(),
      transport=transport,
    )


@pytest.mark.parametrize(
  'inner, state',
  [
    (optax.scale_by_adan(), 'ScaleByAdanState'),
    (optax.scale_by_amsgrad(), 'ScaleByAmsgradState'),
  ],
)
def test_first_transport_of_unknown_moments_fails_at_init(inner, state):
  tx = so.in_subspace(inner, SPEC, transport='first')
  with errors.raises(ValueError, 'transport', 'keep', state):
    tx.init(PARAMS)
  so.in_subspace(inner, SPEC, transport='keep').init(PARAMS)
  so.in_subspace(inner, SPEC, transport='reset').init(PARAMS)


@pytest.mark.parametrize(
  'inner',
  [
    optax.adamw(1e-3),
    optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1)),
    optax.lamb(1e-3),
  ],
  ids=['adamw', 'decay', 'lamb'],
)
@pytest.mark.parametrize('transport', ['keep', 'reset'])
def test_inner_optimizer_that_needs_params_fails_at_init(inner, transport):
  tx = so.subspace(SPEC, projectors.stiefel(2), inner, transport=transport)
  with errors.raises(ValueError, 'inner needs params', 'add_decayed_weights'):
    jax.eval_shape(tx.init, PARAMS)
  tx = so.galore(1e-3, rank=2, base_optimizer=inner)
  with errors.raises(ValueError, 'inner needs params'):
    jax.eval_shape(tx.init, PARAMS)


def _against():
  warm_up = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)
  return {
    'adam': optax.adam(0.1),
    'warm_up': optax.adam(warm_up),
    'sgd': optax.sgd(0.1, momentum=0.9),
    'lion': optax.chain(optax.scale_by_lion(), optax.scale(-0.1)),
    'injected': optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
    'late': optax.chain(optax.apply_every(3), optax.scale(-0.1)),
  }


def _along():
  return {
    'adam': optax.scale_by_adam(),
    'chain': optax.chain(optax.adam(0.1), optax.scale(-1.0)),
    'momentum': optax.trace(0.9),
    'lion': optax.scale_by_lion(),
    'identity': optax.identity(),
    'adam8bit': so.scale_by_adam8bit(),
  }


@pytest.mark.parametrize(
  'kind, factory', grid.cover(_against(), FACTORIES, of=3)
)
def test_base_optimizer_that_would_climb_fails_at_init(kind, factory):
  name = cases.inner_of(factory.__name__)
  tx = factory(0.5, rank=2, **{name: _against()[kind]})
  with errors.raises(ValueError, name, 'optax.scale_by_adam()'):
    jax.eval_shape(tx.init, PARAMS)


@pytest.mark.parametrize('kind', _along())
def test_optimizers_of_directions_are_taken(kind):
  along = _along()[kind]
  spec = so.SubspaceSpec(2, side='in')
  for factory in (so.galore, so.online_subspace_descent):
    name = cases.inner_of(factory.__name__)
    jax.eval_shape(factory(0.5, rank=2, **{name: along}).init, PARAMS)
  jax.eval_shape(so.subspace_muon(0.5, rank=2, plain=along).init, PARAMS)
  loop = so.rso.subproblems(spec, optax.chain(along, optax.scale(-1.0)))
  jax.eval_shape(loop.init, PARAMS)


@pytest.mark.parametrize('kind', _against())
def test_plain_optimizer_that_would_climb(kind):
  against, adam = _against()[kind], optax.scale_by_adam()
  tx = so.subspace_muon(0.5, rank=2, plain=against)
  with errors.raises(ValueError, 'plain', 'optax.scale_by_adam()'):
    jax.eval_shape(tx.init, PARAMS)
  tx = so.subspace(SPEC, projectors.stiefel(2), adam, plain=against)
  with errors.raises(ValueError, 'inner and plain', 'optax.scale_by_adam()'):
    jax.eval_shape(tx.init, PARAMS)


@pytest.mark.parametrize('kind', _along())
def test_complete_optimizers_that_would_climb(kind):
  along = _along()[kind]
  spec = so.SubspaceSpec(2, side='in')
  for name, loop in {
    'inner': so.rso.subproblems(spec, along),
    'plain': so.rso.subproblems(spec, optax.adam(0.1), plain=along),
    'optimizer': so.project(SPEC, projectors.online_pca(along)),
  }.items():
    with errors.raises(ValueError, name, 'optax.adam(1e-3)'):
      jax.eval_shape(loop.init, PARAMS)


def test_a_basis_optimizer_that_would_climb():
  against = functools.partial(so.online_subspace_descent, 0.5, rank=2)
  tx = against(basis_optimizer=optax.scale_by_adam())
  with errors.raises(ValueError, 'basis_optimizer steps along', '1e-3'):
    jax.eval_shape(tx.init, PARAMS)
  for alpha in (-1.0, float('nan')):
    with errors.raises(ValueError, 'alpha must not be negative', alpha):
      against(alpha=alpha)


def _with(name, optimizer):
  """A call in which an optimizer is passed as the argument `name`."""
  adam, spec = optax.scale_by_adam(), so.SubspaceSpec(2, side='in')
  subspace = functools.partial(so.subspace, SPEC, projectors.stiefel(2))
  return {
    'base_optimizer': lambda f: so.galore(1e-3, rank=2, base_optimizer=f),
    'basis_optimizer': lambda f: so.online_subspace_descent(
      1e-3, basis_optimizer=f
    ),
    'inner': subspace,
    'plain': lambda f: subspace(adam, plain=f),
    'after': lambda f: subspace(adam, after=f),
    'inner beside': lambda f: subspace(f, residual=so.residuals.fira()),
    'inner of rso': lambda f: so.rso.subproblems(spec, f),
    'optimizer': projectors.online_pca,
  }[name](optimizer)


@pytest.mark.parametrize(
  'name',
  [
    *('base_optimizer', 'basis_optimizer', 'inner', 'plain', 'after'),
    *('inner beside', 'inner of rso', 'optimizer'),
  ],
)
def test_a_function_in_the_place_of_an_optimizer(name):
  argument = name.removesuffix(' of rso')
  with pytest.raises(
    TypeError, match=f'^{argument}.* must be an optax opt.*adam'
  ):
    _with(name, optax.adam)


@pytest.mark.parametrize('make', [so.normuon, so.scale, so.subspace_muon])
def test_what_is_no_optimizer_and_counts_as_false(make):
  with errors.raises(TypeError, 'plain must be an optax optimizer', '()'):
    make(1e-3, plain=())


def test_signs_are_asked_for_no_sooner_than_at_init():
  """A program may build its optimizer before it starts its devices."""

  def fail(*args):
    raise AssertionError

  broken = optax.GradientTransformation(fail, fail)
  so.galore(1e-3, base_optimizer=broken)
  so.rso.subproblems(so.SubspaceSpec(2, side='in'), broken)
  projectors.online_pca(broken)


def test_signs_of_traced_hyperparameters_are_not_known():
  def make(inner_rate):
    return so.galore(0.1, rank=2, base_optimizer=optax.sgd(inner_rate))

  tx = optax.inject_hyperparams(make)(inner_rate=0.1)
  jax.eval_shape(tx.init, PARAMS)
  with errors.raises(ValueError, 'base_optimizer'):
    tx.init(PARAMS)


@pytest.mark.parametrize('value', [0.5, 3, 'gelu', jax.nn.relu])
def test_leaf_that_is_no_array(value):
  params = {'w': PARAMS['mlp']['up'], 'layer': [{'temperature': value}]}
  spec = so.SubspaceSpec(2, side='in')
  for tx in (
    so.galore(1e-3, rank=2),
    so.subspace_muon(1e-3, rank=2),
    so.rso.subproblems(spec, optax.sgd(0.1)),
  ):
    with errors.raises(TypeError, 'layer/0/temperature', type(value).__name__):
      tx.init(params)
  tx = so.golore(1e-3, rank=2)
  state = tx.init(params | {'layer': [{'temperature': jnp.ones(())}]})
  with errors.raises(TypeError, 'layer/0/temperature'):
    tx.update(params, state)


@pytest.mark.parametrize('method', ['full', None, 'Exact'])
def test_unknown_svd_method(method):
  with errors.raises(ValueError, 'method', repr(method), 'randomized'):
    projectors.svd(2, method=method)


@pytest.mark.parametrize('init', ['zeros', None, 'SVD'])
def test_unknown_online_pca_init(init):
  with errors.raises(ValueError, 'init', repr(init), 'random'):
    projectors.online_pca(optax.sgd(0.1), init=init)


def test_negative_orthogonality():
  with errors.raises(ValueError, 'orthogonality', -0.1):
    projectors.online_pca(optax.sgd(0.1), orthogonality=-0.1)
  with errors.raises(ValueError, 'orthogonality', -0.1):
    so.online_subspace_descent(1e-3, rank=2, orthogonality=-0.1)


@pytest.mark.parametrize('optimizer', [1e-3, None, optax.adam])
def test_online_pca_without_an_optimizer(optimizer):
  with errors.raises(TypeError, 'optimizer'):
    projectors.online_pca(optimizer)


@pytest.mark.parametrize('gap', [0, -1, np.int64(0)])
@pytest.mark.parametrize(
  'make',
  [
    projectors.svd,
    projectors.stiefel,
    lambda gap: so.galore(1e-3, 2, gap),
    lambda gap: so.golore(1e-3, 2, update_proj_gap=gap),
    lambda gap: so.golore(1e-3, 2, update_proj_gap=gap, random_from=3),
  ],
  ids=['svd', 'stiefel', 'galore', 'golore', 'golore_late'],
)
def test_update_proj_gap_below_1(gap, make):
  with errors.raises(ValueError, 'update_proj_gap', int(gap)):
    make(gap)


@pytest.mark.parametrize('gap', [2.0, '2', None, True])
def test_update_proj_gap_that_is_no_int(gap):
  with errors.raises(TypeError, 'update_proj_gap', repr(gap)):
    projectors.stiefel(gap)


@pytest.mark.parametrize(
  'name, make',
  [
    ('update_proj_gap', projectors.svd),
    ('update_proj_gap', lambda n: so.galore(1e-3, 2, n)),
    ('update_proj_gap', lambda n: so.subspace_muon(1e-3, 2, update_proj_gap=n)),
    ('update_proj_gap', lambda n: _subproblems(update_proj_gap=n)),
    ('start', projectors.LazyGap),
    ('factor', lambda n: projectors.LazyGap(factor=n)),
    ('random_from', lambda n: so.golore(1e-3, 2, random_from=n)),
    ('projectors', lambda n: _switched({0: 2, n: 2})),
    ('every_k', lambda n: so.galore(1e-3, 2, every_k=n)),
    ('update_every', lambda n: _online_pca(update_every=n)),
    ('orthonormalize_every', lambda n: _online_pca(orthonormalize_every=n)),
  ],
)
@pytest.mark.parametrize('steps', [2**31, 10**12])
def test_numbers_of_steps_beyond_int32(name, make, steps):
  with errors.raises(ValueError, name, steps, 'int32'):
    make(steps)


def _subproblems(**kwargs):
  return so.rso.subproblems(
    so.SubspaceSpec(2, side='in'), optax.sgd(0.1), **kwargs
  )


def _switched(gaps):
  return projectors.switch({n: projectors.svd(gap) for n, gap in gaps.items()})


def _online_pca(**kwargs):
  return projectors.online_pca(optax.sgd(0.1), **kwargs)


def test_switch_without_step_0():
  rule = projectors.stiefel(2)
  with errors.raises(ValueError, 'step 0', '[3]'):
    projectors.switch({3: rule})
  with errors.raises(ValueError, 'step 0', '[]'):
    projectors.switch({})
  with errors.raises(ValueError, 'step 0', '[-1, 0]'):
    projectors.switch({0: rule, -1: rule})
  with errors.raises(TypeError, 'step', '0.5'):
    projectors.switch({0: rule, 0.5: rule})


def test_random_from_that_is_no_step():
  with errors.raises(TypeError, 'random_from', '0.5'):
    so.golore(1e-3, 2, random_from=0.5)
  with errors.raises(TypeError, 'random_from', 'True'):
    so.golore(1e-3, 2, random_from=True)
  with errors.raises(ValueError, '-5'):
    so.golore(1e-3, 2, random_from=-5)


@pytest.mark.parametrize('spec', [None, 8, {'rank': 8}])
def test_something_else_for_the_spec(spec):
  with errors.raises(TypeError, 'spec', repr(spec)):
    so.project(spec, projectors.stiefel(2))
  with errors.raises(TypeError, 'spec', repr(spec)):
    so.in_subspace(optax.scale_by_adam(), spec)


@pytest.mark.parametrize('projector', [None, 'svd', projectors.svd])
def test_something_else_for_the_projector(projector):
  with errors.raises(TypeError, 'projector'):
    so.project(SPEC, projector)


def test_describe_of_something_without_project():
  with errors.raises(ValueError, 'project'):
    so.describe(optax.adam(1e-3), PARAMS)


def test_metrics_of_a_state_without_project():
  with errors.raises(ValueError, 'project'):
    so.subspace_metrics(optax.adam(1e-3).init(PARAMS))
  with errors.raises(ValueError, 'project'):
    so.subspace_metrics(cases.tree(cases.SMALL))


def test_noise_does_not_decide_on_which_side_an_optimizer_steps():
  for seed in range(4):
    noisy = optax.chain(optax.add_noise(1.0, 0.55, seed), optax.scale_by_adam())
    tx = so.golore(0.1, rank=2, inner=noisy)
    jax.eval_shape(tx.init, {'w': jnp.ones((8, 12))})


def test_a_learning_rate_in_inner_and_another_after():
  tx = so.subspace(
    so.SubspaceSpec(2),
    projectors.stiefel(3),
    optax.adam(0.1),
    after=optax.scale_by_learning_rate(0.5),
  )
  with errors.raises(ValueError, 'inner', '`after`', 'scale_by_adam'):
    tx.init({'w': jnp.ones((8, 12))})


# --- Pieces in the wrong places, and what poses as something else ------------


def _between(middle, *, behind='project'):
  """The three pieces with a transformation between two of them."""
  pieces = [
    so.project(SPEC, projectors.stiefel(2)),
    so.in_subspace(optax.scale_by_adam(), SPEC),
    so.unproject(),
  ]
  pieces.insert({'project': 1, 'in_subspace': 2}[behind], middle)
  return optax.chain(*pieces)


@pytest.mark.parametrize('behind', ['project', 'in_subspace'])
@pytest.mark.parametrize(
  'middle',
  [
    optax.clip(1.0),
    optax.clip_by_global_norm(1.0),
    optax.scale(0.1),
    optax.scale_by_schedule(lambda _: 0.1),
    optax.scale_by_learning_rate(lambda _: 0.1),
    optax.centralize(),
    optax.ema(0.9),
  ],
  ids=[
    *('clip', 'norm', 'scale', 'schedule', 'learning rate', 'centralize'),
    'ema',
  ],
)
def test_what_maps_over_arrays_between_the_pieces(middle, behind):
  """It would change the bases, too, and none of it is silent."""
  tx = _between(middle, behind=behind)
  with pytest.raises((TypeError, ValueError)):
    state = tx.init(PARAMS)
    jax.eval_shape(tx.update, PARAMS, state, PARAMS)


def test_what_lets_the_arrays_be_may_stand_between_the_pieces():
  tx = _between(optax.masked(optax.identity(), True))
  wanted = _between(optax.identity())
  programs = [
    jax.make_jaxpr(lambda p, x=x: x.update(p, x.init(p), p)[0])(PARAMS)
    for x in (tx, wanted)
  ]
  assert str(programs[0]) == str(programs[1])


def test_no_unproject():
  tx = optax.chain(
    so.project(SPEC, projectors.stiefel(2)),
    so.in_subspace(optax.scale_by_adam(), SPEC),
  )

  def step(params):
    updates, _ = tx.update(params, tx.init(params), params)
    return optax.apply_updates(params, updates)

  with errors.raises(TypeError, 'chain `subspace_optax.unproject`'):
    jax.eval_shape(step, PARAMS)


@pytest.mark.parametrize(
  'inner',
  [optax.contrib.scale_by_muon(), optax.contrib.scale_by_muon(beta=0.9)],
)
def test_optimizers_of_one_matrix(inner):
  with errors.raises(ValueError, 'per_matrix=True', 'plain='):
    so.golore(1e-3, rank=2, inner=inner).init(PARAMS)


def test_lifted_leaf_as_an_array():
  lifted = so.rso.lift(
    {'w': jnp.ones((8, 16))}, {'w': jnp.ones((8, 2))}, None, so.SubspaceSpec(2)
  )
  x = jnp.ones((4, 8))
  for use in (
    lambda w: x @ w,
    lambda w: w @ x.T,
    lambda w: 2 * w,
    lambda w: w - 1,
    lambda w: jax.grad(lambda w: jnp.sum(x @ w))(w),
  ):
    with errors.raises(TypeError, "'w'", 'rso.dot(x, w)', 'exclude'):
      use(lifted['w'])


@pytest.mark.parametrize(
  'name, arguments',
  [
    ('learning_rate', (optax.scale_by_adam(), 8)),
    ('scale', (1e-3, 8, 200, optax.scale_by_adam())),
    ('scale', (1e-3, 8, 200, True)),
    ('base_optimizer', (1e-3, 8, 200, 0.25, 0.01)),
    ('weight_decay', (1e-3, 8, 200, 0.25, None, None)),
    ('update_proj_gap', (1e-3, 8, 0.25)),
  ],
)
def test_positional_arguments_of_galore_in_another_order(name, arguments):
  with errors.raises(TypeError, f'{name} must be', 'got'):
    so.galore(*arguments)


@pytest.mark.parametrize('name', ['golore', 'apollo_adamw', 'subspace_muon'])
def test_state_of_another_rank(name):
  make = getattr(so, name)
  params = {'w': jnp.ones((16, 32))}
  state = jax.eval_shape(make(1e-3, rank=2).init, params)
  with errors.raises(ValueError, "'w'", 'resize_rank'):
    jax.eval_shape(make(1e-3, rank=4).update, params, state, params)


def test_adafactor_in_a_ready_made_optimizer():
  inner = optax.scale_by_factored_rms()
  with errors.raises(ValueError, "so.subspace(..., params='coordinates')"):
    so.galore(1e-3, rank=2, base_optimizer=inner).init(PARAMS)
