"""`from_torch`: states of the PyTorch package galore-torch, gone on with.

`Theirs` is the published algorithm in float64, on weights as PyTorch has them,
(out, in), and keeps what the package keeps of each parameter.
"""

import copy
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import errors
import subspace_optax as so

GAP, RANK, SCALE, LR, EPS = 4, 3, 0.25, 0.1, 1e-8


class Theirs:
  """GaLoreAdamW of one weight; plain Adam without a rank."""

  def __init__(self, rank=None):
    self.kept, self.rank = {'step': 0}, rank

  def step(self, g):
    """Returns the update for a gradient."""
    kept, t = self.kept, self.kept['step']
    right = g.shape[0] >= g.shape[-1]
    if self.rank:
      if t % GAP == 0:
        u, _, vh = np.linalg.svd(g, full_matrices=False)
        kept['projector'] = {
          'rank': self.rank,
          'verbose': False,
          'update_proj_gap': GAP,
          'scale': SCALE,
          'ortho_matrix': vh[: self.rank] if right else u[:, : self.rank],
          'proj_type': 'std',
        }
      p = kept['projector']['ortho_matrix']
      g = g @ p.T if right else p.T @ g
    m = 0.9 * kept.get('exp_avg', 0.0) + 0.1 * g
    v = 0.999 * kept.get('exp_avg_sq', 0.0) + 0.001 * g * g
    kept |= {'step': t + 1, 'exp_avg': m, 'exp_avg_sq': v}
    root = np.sqrt(1 - 0.999 ** (t + 1)) / (1 - 0.9 ** (t + 1))
    n = root * m / (np.sqrt(v) + EPS)
    if self.rank:
      n = SCALE * (n @ p if right else p @ n)
    return -LR * n


# Key of the weight there, its shape there and the leaf's path and rank here.
WEIGHTS = {
  'embed.weight': ((20, 8), None),
  'q.weight': ((12, 8), RANK),  # of more rows: the right side, our inputs
  'down.weight': ((8, 14), RANK),
  'o.weight': ((8, 8), RANK),
  'layers.0.up.weight': ((14, 8), RANK),
  'layers.1.up.weight': ((14, 8), RANK),
  'layers.0.norm.weight': ((8,), None),
  'layers.1.norm.weight': ((8,), None),
  'head.weight': ((5, 8), None),
}
NAMES = {
  'embed_tokens/embedding': 'embed.weight',
  'attn/q/kernel': 'q.weight',
  'attn/o/kernel': 'o.weight',
  'mlp/down/kernel': 'down.weight',
  'layers/mlp/up/kernel': ['layers.0.up.weight', 'layers.1.up.weight'],
  'layers/norm/scale': ('layers.0.norm.weight', 'layers.1.norm.weight'),
  'lm_head/kernel': 'head.weight',
}


def gradients(t):
  rng = np.random.default_rng(t)
  return {k: rng.standard_normal(s) for k, (s, _) in WEIGHTS.items()}


def here(arrays):
  """Returns a tree of ours from weights of theirs."""
  tree = {}
  for path, keys in NAMES.items():
    several = not isinstance(keys, str)
    turn = lambda key, path=path: (
      arrays[key].T if path.endswith('kernel') else arrays[key]
    )
    x = np.stack([turn(k) for k in keys]) if several else turn(keys)
    node = tree
    for name in path.split('/')[:-1]:
      node = node.setdefault(name, {})
    node[path.split('/')[-1]] = jnp.asarray(x, jnp.float32)
  return tree


def make(rank=RANK, gap=GAP, **kwargs):
  args = f'rank={rank}, update_proj_gap={gap}, scale={SCALE}'
  args += kwargs.pop('more', '')
  schedule = lambda count: LR * jnp.ones_like(count, jnp.float32)
  optim = kwargs.pop('optim', 'galore_adamw')
  return so.from_hf(schedule, optim, args, ['attn', 'mlp'], **kwargs)


def run_theirs(steps):
  """Returns the optimizers after some steps."""
  theirs = {k: Theirs(rank) for k, (_, rank) in WEIGHTS.items()}
  for t in range(steps):
    for key, g in gradients(t).items():
      theirs[key].step(g)
  return theirs


def exported(theirs):
  """Returns what a file holds: float32 arrays and numbers."""
  narrow = lambda x: (
    x.astype(np.float32) if isinstance(x, np.ndarray) else copy.copy(x)
  )
  return jax.tree.map(narrow, {k: x.kept for k, x in theirs.items()})


PARAMS = here(gradients(99))
STATE = exported(run_theirs(6))


def assert_close(got, wanted):
  for (path, x), (_, y) in zip(
    jax.tree.leaves_with_path(got),
    jax.tree.leaves_with_path(here(wanted)),
    strict=True,
  ):
    np.testing.assert_allclose(
      x, y, rtol=2e-4, atol=2e-6, err_msg=jax.tree_util.keystr(path)
    )


def test_training_goes_on_by_the_formula_to_the_next_refresh():
  tx, theirs = make(), run_theirs(6)
  state = so.from_torch(tx, STATE, PARAMS, NAMES)
  assert jax.tree.structure(state) == jax.tree.structure(tx.init(PARAMS))
  counts = [
    int(x)
    for path, x in jax.tree.leaves_with_path(state)
    if 'count' in jax.tree_util.keystr(path)
  ]
  assert len(counts) >= 3 and set(counts) == {6}  # Adam's and the schedule's
  update = jax.jit(tx.update)
  for t in (6, 7):
    g = gradients(t)
    wanted = {k: theirs[k].step(x) for k, x in g.items()}
    updates, state = update(here(g), state, PARAMS)
    assert_close(updates, wanted)
  # At 8, a refresh: the same subspaces, of singular vectors of any sign.
  g = gradients(8)
  for key, x in g.items():
    theirs[key].step(x)
  _, state = update(here(g), state, PARAMS)
  basis = state[0][0].subspaces.basis
  b = theirs['q.weight'].kept['projector']['ortho_matrix']
  a = theirs['down.weight'].kept['projector']['ortho_matrix']
  for p, wanted in (
    (basis['attn']['q']['kernel'], b.T @ b),
    (basis['mlp']['down']['kernel'], a @ a.T),
  ):
    np.testing.assert_allclose(p @ p.T, wanted, atol=1e-4)


def test_all_of_a_state_dict_objects_and_what_numpy_reads():
  """Numbers for keys, a projector as an object, arrays by `__array__`."""

  class Tensor:
    def __init__(self, x):
      self.x, self.shape = x, x.shape

    def __array__(self, dtype=None, copy=None):
      return np.asarray(self.x, dtype)

  numbers = {key: i for i, key in enumerate(STATE)}
  wrap = lambda x: Tensor(x) if isinstance(x, np.ndarray) else x
  state = {numbers[k]: jax.tree.map(wrap, x) for k, x in STATE.items()}
  for kept in state.values():
    if 'projector' in kept:
      kept['projector'] = types.SimpleNamespace(**kept['projector'])
  number = lambda keys: (
    numbers[keys] if isinstance(keys, str) else [numbers[k] for k in keys]
  )
  got = so.from_torch(
    make(),
    {'state': state, 'param_groups': []},
    PARAMS,
    {path: number(keys) for path, keys in NAMES.items()},
  )
  wanted = so.from_torch(make(), STATE, PARAMS, NAMES)
  jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_galore_of_heads_and_stacks_on_another_axis():
  """(embed, heads, dim) of (heads dim, embed), and layers on axis 1."""
  params = {
    'query': {'kernel': jnp.ones((8, 3, 4))},
    'up': {'kernel': jnp.ones((8, 2, 14))},
  }
  numbers = {
    'query': {'kernel': so.DimensionNumbers((0,), (1, 2))},
    'up': {'kernel': so.DimensionNumbers((0,), (2,))},
  }
  spec = so.SubspaceSpec(RANK, weight_dimension_numbers=numbers)
  tx = so.galore(LR, update_proj_gap=GAP, scale=SCALE, spec=spec)
  keys = ['q.weight', 'layers.0.up.weight', 'layers.1.up.weight']
  state = {k: STATE[k] for k in keys}
  names = {'query/kernel': keys[0], 'up/kernel': keys[1:]}
  state = so.from_torch(tx, state, params, names)
  theirs, g = run_theirs(6), gradients(6)
  shaped = lambda x: {
    'query': {'kernel': x['q.weight'].T.reshape(8, 3, 4)},
    'up': {'kernel': np.stack([x[k].T for k in keys[1:]], 1)},
  }
  wanted = shaped({k: theirs[k].step(g[k]) for k in keys})
  g = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), shaped(g))
  updates, _ = jax.jit(tx.update)(g, state, params)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6)
  jax.tree.map(close, updates, wanted)


def test_moments_in_8_bits_are_rounded():
  rank, params = 16, {'mlp': {'kernel': jnp.ones((64, 256))}}
  theirs = Theirs(rank)
  for t in range(3):
    theirs.step(np.random.default_rng(t).standard_normal((256, 64)))
  tx = make(rank, optim='galore_adamw_8bit')
  kept = exported({'w': theirs})
  state = so.from_torch(tx, kept, params, {'mlp/kernel': 'w'})
  assert any(x.dtype == jnp.uint8 for x in jax.tree.leaves(state))
  boxed = jax.tree.map(lambda x: nn.Partitioned(x, ('in', 'out')), params)
  again = so.from_torch(tx, kept, boxed, {'mlp/kernel': 'w'})
  assert jax.tree.structure(again) == jax.tree.structure(tx.init(boxed))
  for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(x, y)
  g = np.random.default_rng(3).standard_normal((256, 64))
  updates, _ = jax.jit(tx.update)(
    {'mlp': {'kernel': jnp.asarray(g.T, jnp.float32)}}, state, params
  )
  wanted = theirs.step(g).T
  error = np.linalg.norm(updates['mlp']['kernel'] - wanted)
  assert 0 < error < 0.05 * np.linalg.norm(wanted)


def changed(key, **changes):
  """Returns the state with changes to one parameter or its projector."""
  state = {k: dict(x) for k, x in STATE.items()}
  for name, x in changes.items():
    if name in ('proj_type', 'update_proj_gap', 'ortho_matrix'):
      state[key]['projector'] = state[key]['projector'] | {name: x}
    else:
      state[key][name] = x
  return state


def without(mapping, key):
  return {k: x for k, x in mapping.items() if k != key}


REFUSED = {
  'bits': (
    lambda: changed('q.weight', state1=np.ones(3, np.uint8)),
    ("'q.weight'", "'state1'", '8-bit'),
  ),
  'codes': (
    lambda: changed('q.weight', exp_avg=np.ones((12, RANK), np.uint8)),
    ("'q.weight'", 'uint8', 'exp_avg'),
  ),
  'right': (
    lambda: changed('q.weight', proj_type='right'),
    ("'q.weight'", "proj_type='right'", 'std'),
  ),
  'gap': (
    lambda: changed('q.weight', update_proj_gap=7),
    ("'q.weight'", 'update_proj_gap=7', 'tx has 4'),
  ),
  'random': (
    lambda: changed('q.weight', ortho_matrix=np.full((RANK, 8), 0.5)),
    ("'q.weight'", 'ortho_matrix', 'orthonormal', 'APOLLO'),
  ),
  'first': (
    lambda: changed('q.weight', ortho_matrix=None),
    ("'q.weight'", 'ortho_matrix', 'NoneType'),
  ),
  'step': (
    lambda: changed('q.weight', step=5),
    ("step=5 of 'q.weight'", 'step=6'),
  ),
  'moments': (
    lambda: changed('q.weight', exp_avg=np.ones((13, RANK))),
    ("'q.weight'", '(3, 13)', '(3, 12)', 'attn/q/kernel'),
  ),
  'plain': (
    lambda: changed('head.weight', exp_avg=np.ones((8, 5))),
    ("'head.weight'", '(8, 5)', 'lm_head/kernel', 'transpose'),
  ),
  'projector': (
    lambda: STATE | {'q.weight': without(STATE['q.weight'], 'projector')},
    ("'q.weight'", 'no projector', 'projected by tx'),
  ),
  'nothing': (
    lambda: STATE | {'q.weight': without(STATE['q.weight'], 'exp_avg_sq')},
    ("'q.weight'", "'exp_avg_sq'"),
  ),
  'lost': (lambda: STATE | {'more': STATE['q.weight']}, ("['more']", 'names')),
}


@pytest.mark.parametrize('name', REFUSED)
def test_states_that_are_not_converted(name):
  state, words = REFUSED[name]
  with errors.raises(ValueError, *words):
    so.from_torch(make(), state(), PARAMS, NAMES)


@pytest.mark.parametrize(
  'tx, words',
  [
    (lambda: make(rank=4), ('rank=3', 'tx has 4', 'attn', 'resize_rank')),
    (
      lambda: make(more=', proj_type=reverse_std'),
      ('proj_type=std', "side='"),
    ),
    (
      lambda: so.golore(0.1, RANK, update_proj_gap=GAP),
      ('stiefel', 'so.from_hf'),
    ),
    (
      lambda: so.galore(0.1, RANK, GAP, base_optimizer=optax.scale_by_lion()),
      ('scale_by_adam',),
    ),
    (
      lambda: so.galore(0.1, RANK, GAP, stagger=True),
      ('stagger', 'svd('),
    ),
    (
      lambda: so.galore(0.1, spec=so.SubspaceSpec(RANK, basis_dtype='int8')),
      ('int8', 'basis_dtype'),
    ),
  ],
)
def test_optimizers_that_do_not_go_on(tx, words):
  with errors.raises(ValueError, *words):
    so.from_torch(tx(), STATE, PARAMS, NAMES)


def test_names_that_do_not_fit():
  make_names = (
    (without(NAMES, 'attn/q/kernel'), ("lacks ['attn/q/kernel']",)),
    (NAMES | {'attn/q/kernel': 'q'}, ("['q']", "['q.weight']")),
    (
      NAMES | {'layers/mlp/up/kernel': ['layers.0.up.weight']},
      ("['layers.1.up.weight']",),
    ),
  )
  for names, words in make_names:
    with errors.raises(ValueError, *words):
      so.from_torch(make(), STATE, PARAMS, names)
  # The wrong way around, in which some matrices still fit: the square one.
  with errors.raises(ValueError, 'transpose=None'):
    so.from_torch(make(), STATE, PARAMS, NAMES, transpose=None)
