"""The example's LLaMA against the same formulas in numpy, in float64."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama
import small_llama

VOCAB = 11
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 7))


@functools.cache
def make(**changes):
  """(graphdef, params) of the smallest model, with weights of NumPy's."""
  config = llama.named('llama_test', vocab=VOCAB, **changes)
  return small_llama.drawn(config)


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, params, tokens):
  return nnx.merge(graphdef, params)(tokens)


def unstack(params):
  """The parameters of the same model with `scan_layers=False`."""
  layer = lambda i: jax.tree.map(lambda x: x[i], params['blocks'])
  return params | {'blocks': {i: layer(i) for i in range(2)}}


def reference_norm(x, scale):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def reference_rope(x):
  """The rotation by complex numbers, one head (..., T, K)."""
  T, K = x.shape[-2:]
  angle = np.outer(np.arange(T), 10_000.0 ** (-np.arange(K // 2) / (K // 2)))
  z = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], axis=-1)


def reference_attention(p, x, heads):
  split = lambda y: np.stack(np.split(y, heads, axis=-1), axis=1)  # B H T K
  q, k, v = (split(x @ p[w]['kernel']) for w in ('wq', 'wk', 'wv'))
  score = reference_rope(q) @ np.swapaxes(reference_rope(k), -1, -2)
  score = score / np.sqrt(q.shape[-1])
  score[..., ~np.tri(x.shape[1], dtype=bool)] = -np.inf
  weight = np.exp(score - score.max(axis=-1, keepdims=True))
  weight = weight / weight.sum(axis=-1, keepdims=True)
  return (
    np.concatenate(list((weight @ v).swapaxes(0, 1)), axis=-1)
    @ p['wo']['kernel']
  )


def reference_mlp(p, x):
  gate = x @ p['gate']['kernel']
  return (gate / (1 + np.exp(-gate)) * (x @ p['up']['kernel'])) @ p['down'][
    'kernel'
  ]


def reference(params, tokens, heads=2):
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), unstack(params))
  x = p['embed']['embedding'][tokens]
  for block in p['blocks'].values():
    y = reference_norm(x, block['attention_norm']['scale'])
    x = x + reference_attention(block['attention'], y, heads)
    x = x + reference_mlp(
      block['mlp'], reference_norm(x, block['mlp_norm']['scale'])
    )
  return reference_norm(x, p['final_norm']['scale']) @ p['lm_head']['kernel']


def test_logits_equal_reference_stacked_and_not():
  stacked, params = make()
  listed, _ = make(scan_layers=False)
  want = reference(params, TOKENS)
  for graphdef, p in ((stacked, params), (listed, unstack(params))):
    got = logits(graphdef, p, TOKENS)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_kernels_are_stacked_matrices_or_matrices():
  _, params = make()
  assert params['blocks']['mlp']['gate']['kernel'].shape == (2, 16, 40)
  assert params['blocks']['attention']['wo']['kernel'].shape == (2, 16, 16)
  _, listed = make(scan_layers=False)
  shapes = jax.tree.map(jnp.shape, listed)
  assert shapes == jax.tree.map(jnp.shape, unstack(params))


def test_layers_differ_at_the_start():
  config = llama.named('llama_test', vocab=VOCAB)
  create = lambda: llama.Llama(config, nnx.Rngs(0)).blocks.mlp.up.kernel[...]
  first, second = jax.jit(create)()
  assert not np.allclose(first, second)


def test_remat_does_not_change_gradients():
  def gradient(remat):
    graphdef, params = make(remat=remat)
    loss = lambda p: jnp.mean(logits(graphdef, p, TOKENS) ** 2)
    return jax.jit(jax.grad(loss))(params)

  for a, b in zip(
    *map(jax.tree.leaves, (gradient(False), gradient(True))), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_attention_is_causal():
  graphdef, params = make()
  changed = TOKENS.copy()
  changed[:, -1] = (changed[:, -1] + 1) % VOCAB
  a, b = (logits(graphdef, params, t) for t in (TOKENS, changed))
  np.testing.assert_allclose(a[:, :-1], b[:, :-1], atol=1e-6)
  assert not np.allclose(a[:, -1], b[:, -1])


def test_bfloat16_computes_in_bfloat16_on_float32_parameters():
  graphdef, params = make(dtype='bfloat16')
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  got = logits(graphdef, params, TOKENS)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(got, np.float64), reference(params, TOKENS), atol=0.1
  )


def test_rope_depends_on_distance_only():
  q, k = np.random.default_rng(0).standard_normal((2, 8), np.float32)
  rotate = jax.jit(lambda x: llama.rotate(x, 10_000.0)[0, :, 0])
  q, k = (np.asarray(rotate(np.tile(x, (1, 6, 1, 1)))) for x in (q, k))
  scores = q @ k.T
  for distance in range(-5, 6):
    diagonal = np.diagonal(scores, distance)
    np.testing.assert_allclose(
      diagonal, np.full_like(diagonal, diagonal[0]), rtol=1e-4
    )
  assert not np.isclose(scores[0, 0], scores[0, 3])


def test_rope_keeps_norms_and_the_first_position():
  x = np.random.default_rng(0).standard_normal((2, 5, 3, 8), np.float32)
  y = jax.jit(lambda x: llama.rotate(x, 10_000.0))(x)
  np.testing.assert_allclose(y[:, 0], x[:, 0])
  norm = lambda z: np.linalg.norm(z, axis=-1)
  np.testing.assert_allclose(norm(y), norm(x), rtol=1e-5)


def test_rms_norm():
  norm = llama.RMSNorm(llama.named('llama_test'))
  x = 5 * np.random.default_rng(0).standard_normal((2, 3, 16), np.float32)
  want = reference_norm(np.asarray(x, np.float64), 1.0)
  np.testing.assert_allclose(jax.jit(norm)(x), want, rtol=1e-5)


@pytest.mark.parametrize(
  ('name', 'parameters'),
  [
    ('llama_60m', 58_073_600),
    ('llama_130m', 134_105_856),
    ('llama_350m', 367_969_280),
    ('llama_1b', 1_339_082_752),
    ('llama_7b', 6_738_415_616),  # as the original LLaMA
  ],
)
def test_named_sizes(name, parameters):
  make = lambda: llama.Llama(llama.named(name), nnx.Rngs(0))
  state = nnx.state(nnx.eval_shape(make))
  assert sum(x.size for x in jax.tree.leaves(state)) == parameters


def test_unknown_name():
  with pytest.raises(ValueError, match="model='llama_2b' is unknown"):
    llama.named('llama_2b')
