"""`from_hf`: the steps that arguments of Hugging Face's trainer describe."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import references as ref
import subspace_optax as so

PARAMS = {
  'embed_tokens': {'embedding': ref.normal(0, (40, 16))},
  'layers': {
    '0': {
      'self_attn': {'q_proj': {'kernel': ref.normal(1, (16, 24))}},
      'mlp': {'up_proj': {'kernel': ref.normal(2, (32, 16))}},
    }
  },
  'lm_head': {'kernel': ref.normal(3, (16, 40))},
}
Q = 'layers/0/self_attn/q_proj/kernel'
UP = 'layers/0/mlp/up_proj/kernel'


def at(tree, path):
  for name in path.split('/'):
    tree = tree[name]
  return tree


def gradients(t):
  leaves, treedef = jax.tree.flatten(PARAMS)
  draw = lambda i, x: ref.normal(100 * t + i, x.shape)
  return treedef.unflatten([draw(i, x) for i, x in enumerate(leaves)])


def run(tx, steps=5):
  state, found = tx.init(PARAMS), []
  update = jax.jit(tx.update)
  for t in range(steps):
    updates, state = update(gradients(t), state, PARAMS)
    found.append(jax.tree.map(np.asarray, updates))
  return found, state


def projected(tx):
  return set(so.subspace_metrics(run(tx, 1)[1]))


@pytest.mark.parametrize(
  'modules, paths',
  [
    (['attn', 'mlp'], {Q, UP}),
    (['self_attn.q_proj'], {Q}),
    (['lm_head', r'.*\.up_proj'], {'lm_head/kernel', UP}),
    (r'.*attn.*', {Q}),
    (r'layers\.0\.mlp\.up_proj', {UP}),
    ('all-linear', {Q, UP, 'lm_head/kernel'}),
    (['embed', 'mlp'], {UP}),
  ],
)
def test_modules_are_found_as_there(modules, paths):
  assert projected(so.from_hf(1e-3, 'galore_adamw', 'rank=4', modules)) == paths


def test_experts_that_are_shared_are_no_embeddings():
  params = {
    'mlp': {
      'shared_expert': {'gate_proj': {'kernel': ref.normal(1, (16, 24))}}
    },
    'mlp_conv': {'kernel': ref.normal(2, (16, 24))},
    'shared': {'embedding': ref.normal(3, (40, 16))},
  }
  tx = so.from_hf(1e-3, 'galore_adamw', 'rank=4', 'all-linear')
  found = so.subspace_metrics(tx.init(params))
  assert set(found) == {'mlp/shared_expert/gate_proj/kernel'}


def test_a_string_must_match_whole():
  with pytest.raises(ValueError, match='no leaf|matches no'):
    so.from_hf(1e-3, 'galore_adamw', 'rank=4', 'attn').init(PARAMS)


def adam(directions, b1=0.9, b2=0.999, eps=1e-8):
  """Returns Adam's steps for a list of gradients, in float64."""
  m = v = 0.0
  for t, g in enumerate(directions, 1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


@pytest.mark.parametrize('kind, short', [('std', True), ('reverse_std', False)])
def test_galore_is_its_formula(kind, short):
  """One basis; W is (in, out), of which 'std' projects the shorter."""
  args = f'rank=4, update_proj_gap=100, scale=0.5, proj_type={kind}'
  tx = so.from_hf(0.1, 'galore_adamw', args, ['attn', 'mlp'], weight_decay=0.2)
  found, _ = run(tx)
  for path, rows in ((Q, short), (UP, not short)):
    take = lambda tree, path=path: np.asarray(at(tree, path), np.float64)
    g = [take(gradients(t)) for t in range(5)]
    g = g if rows else [x.T for x in g]
    p = np.linalg.svd(g[0])[0][:, :4]
    w = take(PARAMS) if rows else take(PARAMS).T
    for updates, n in zip(found, adam([p.T @ x for x in g]), strict=True):
      wanted = -0.1 * (0.5 * p @ n + 0.2 * w)
      got = take(updates) if rows else take(updates).T
      np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-5)
  head = [
    np.asarray(gradients(t)['lm_head']['kernel'], float) for t in range(5)
  ]
  w = np.asarray(PARAMS['lm_head']['kernel'], float)
  for updates, n in zip(found, adam(head), strict=True):
    np.testing.assert_allclose(
      updates['lm_head']['kernel'], -0.1 * (n + 0.2 * w), rtol=2e-4, atol=2e-5
    )


@pytest.mark.parametrize('kind, outputs', [('std', 0), ('reverse_std', 1)])
def test_side_of_a_square_matrix(kind, outputs):
  """Theirs is (out, in): 'std' takes its right vectors, the other its left."""
  g = ref.normal(5, (16, 16))
  args = f'rank=4, scale=1, proj_type={kind}'
  tx = so.from_hf(1.0, 'galore_adamw', args, ['q'])
  params = {'q': {'kernel': jnp.zeros((16, 16))}}
  grads = {'q': {'kernel': g}}
  updates, _ = tx.update(grads, tx.init(params), params)
  g = np.asarray(g, np.float64)
  u, _, vt = np.linalg.svd(g)
  x = g @ vt[:4].T if outputs else u[:, :4].T @ g
  direction = x / (np.abs(x) + 1e-8)
  wanted = direction @ vt[:4] if outputs else u[:, :4] @ direction
  np.testing.assert_allclose(
    updates['q']['kernel'], -wanted, rtol=2e-4, atol=2e-5
  )


def test_apollo_takes_the_root_of_their_scale():
  """Mini: the whole gradient by one number, sqrt(128) |N| / |R|."""
  args = 'rank=1, scale=128, scale_type=tensor, update_proj_gap=100'
  found, _ = run(so.from_hf(1.0, 'apollo_adamw', args, ['attn']), 1)
  g = np.asarray(at(gradients(0), Q), np.float64)
  # Adam's first direction of 24 numbers has a length of sqrt(24); R is G along
  # one direction p of length sqrt(16 / 16) on average: what it is, is not said.
  got = -np.asarray(at(found[0], Q), np.float64)
  factor = np.sum(got * g) / np.sum(g * g)
  np.testing.assert_allclose(got, factor * g, rtol=1e-4, atol=1e-5)
  alone = so.apollo_adamw(
    1.0, 1, granularity='tensor', scale=128**0.5, update_proj_gap=100
  )
  params = {'self_attn': {'q_proj': {'kernel': at(PARAMS, Q)}}}
  tx = so.from_hf(1.0, 'apollo_adamw', args, ['attn'])
  state, other = tx.init(params), alone.init(params)
  one = jax.tree.map(lambda _: jnp.asarray(g, jnp.float32), params)
  for x, y in zip(
    jax.tree.leaves(tx.update(one, state, params)[0]),
    jax.tree.leaves(alone.update(one, other, params)[0]),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, rtol=1e-6)


def test_eight_bits():
  found, state = run(so.from_hf(0.1, 'adamw_8bit', adam_beta2=0.99), 3)
  wanted, _ = run(optax.adamw(0.1, b2=0.99, weight_decay=0.0), 3)
  near = {'rtol': 0.15, 'atol': 0.01}
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, **near), found, wanted
  )
  assert any(x.dtype == jnp.uint8 for x in jax.tree.leaves(state))
  tx = so.from_hf(0.1, 'galore_adamw_8bit', 'rank=4', ['attn', 'mlp'])
  assert any(x.dtype == jnp.uint8 for x in jax.tree.leaves(tx.init(PARAMS)))


def test_eight_bits_are_for_kernels_also_in_stacks():
  params = {
    'norm': {'scale': jnp.ones((4, 1024))},
    'q': {'kernel': jnp.ones((4, 64, 64)), 'bias': jnp.ones((4, 512))},
    'embed': {'embedding': jnp.ones((64, 64))},
    'shared': {'embedding': jnp.ones((64, 64))},
  }
  state = so.from_hf(0.1, 'adamw_8bit').init(params)
  dtypes = jax.tree.map(lambda x: x.dtype.name, state[0].coded.mu)
  assert dtypes == {
    'norm': {'scale': 'float32'},
    'q': {'kernel': 'int8', 'bias': 'float32'},
    'embed': {'embedding': 'float32'},
    'shared': {'embedding': 'float32'},
  }


@pytest.mark.parametrize(
  'arguments, message',
  [
    (('galore_adamw_layerwise', '', ['mlp']), 'galore_adamw.*so.layerwise'),
    (('adafactor',), "optim='adafactor' is not here"),
    (('galore_adamw', 'rank=4'), 'must name modules'),
    (('galore_adamw', 'rank', ['mlp']), 'must look like'),
    (('galore_adamw', 'proj_type=full', ['mlp']), 'proj_type=full'),
    (('galore_adamw', 'rang=4', ['mlp']), 'takes no rang'),
    (('apollo_adamw', 'proj=svd', ['mlp']), 'proj=svd'),
    (('adamw_8bit', 'rank=4'), 'takes no rank'),
  ],
)
def test_what_is_not_here_says_so(arguments, message):
  with pytest.raises(ValueError, match=message):
    so.from_hf(1e-3, *arguments)
