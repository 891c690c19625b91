"""RSO on an unmodified LLaMA: the whole loop, and what it costs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llama
import measure
import small_llama
import subspace_optax as so
import train_step

BATCH = (2, 9)


def _model(**changes):
  return small_llama.drawn(llama.named('llama_test', vocab=64, **changes))


def _loss(graphdef):
  """As the trainer's, but for `nnx_merge` in the place of `nnx.merge`."""

  def loss(params, tokens):
    logits = so.rso.nnx_merge(graphdef, params)(tokens[:, :-1])
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    )

  return loss


def _tokens(t):
  rng = np.random.default_rng(t)
  # Every token follows from the one before.
  first = rng.integers(0, 64, (BATCH[0], 1))
  return jnp.asarray((first + 5 * np.arange(BATCH[1])) % 64)


@pytest.mark.parametrize(
  'scan_layers, remat',
  [
    (False, False),
    # Stacks: tests/test_pretrain_rso.py.
    pytest.param(True, True, marks=pytest.mark.full),
  ],
)
def test_learns_and_ends_in_plain_weights(scan_layers, remat):
  # Every layer of a list is a model of its own to the compiler.
  layers = 2 if scan_layers else 1
  graphdef, params = _model(scan_layers=scan_layers, remat=remat, layers=layers)
  spec = so.SubspaceSpec(4, side='in')
  rso = so.rso.subproblems(spec, optax.adam(0.01), update_proj_gap=7)
  step = jax.jit(rso.step(_loss(graphdef)), donate_argnums=(0, 1))
  state = rso.init(params)
  first_types = measure.types(state)
  values = []
  for t in range(60):
    params, state, value = step(params, state, _tokens(t % 4))
    values.append(value)
  assert measure.types(state) == first_types
  assert step._cache_size() == 1
  assert np.mean(values[-4:]) < 0.5 * np.mean(values[:4])

  @jax.jit
  def losses(params, state, tokens):
    """Of the model as it stands: lifted, and with P B added."""
    lifted = so.rso.lift(params, rso.bases(params, state), state.coords, spec)
    merged = rso.merged(params, state)
    whole = train_step.make_loss(graphdef)
    return _loss(graphdef)(lifted, tokens), whole(merged, tokens), merged

  of_lifted, of_merged, merged = losses(params, state, _tokens(0))
  assert any(
    (x != y).any()
    for x, y in zip(*map(jax.tree.leaves, (params, merged)), strict=True)
  )
  np.testing.assert_allclose(of_lifted, of_merged, rtol=1e-5)


@functools.cache
def _compiled(lift):
  """Returns the compiled gradient of one unrolled layer, and its numbers."""
  width, mlp = 64, 160
  graphdef, params = _model(
    width=width, mlp_width=mlp, layers=1, heads=2, scan_layers=False
  )
  spec, tokens = so.SubspaceSpec(4, side='in'), jnp.zeros((4, 65), jnp.int32)
  if not lift:
    gradient = jax.grad(train_step.make_loss(graphdef))
    return jax.jit(gradient).lower(params, tokens).compile()
  rso = so.rso.subproblems(spec, optax.sgd(0.1))
  state = jax.eval_shape(rso.init, params)
  bases = jax.eval_shape(rso.bases, params, state)
  f = so.rso.value_and_grad(_loss(graphdef), spec)
  run = lambda *args: f(*args)[1]
  return jax.jit(run).lower(params, bases, state.coords, tokens).compile()


def test_costs_less_than_whole_gradients():
  full, small = _compiled(False), _compiled(True)
  flops = lambda program: program.cost_analysis()['flops']
  # For b tokens 6bmn against 4bmn + 4brm + 6brn of each matrix; attention, the
  # head and elementwise work are the same.
  d, f, b, r = 64, 160, 256, 4
  shapes = [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]
  saved = sum(2 * b * m * n - 4 * b * r * m - 6 * b * r * n for m, n in shapes)
  np.testing.assert_allclose(flops(full) - flops(small), saved, rtol=0.1)
  bytes_of = lambda program: program.memory_analysis().output_size_in_bytes
  rest = 4 * (2 * 64 * d + 3 * d)  # embedding, head, norms
  wanted = sum(4 * r * n for _, n in shapes)
  np.testing.assert_allclose(bytes_of(small) - rest, wanted, rtol=0.05)
  np.testing.assert_allclose(
    bytes_of(full) - rest, sum(4 * m * n for m, n in shapes), rtol=0.05
  )


def test_no_product_of_the_backward_pass_is_as_large_as_a_kernel():
  # Both sides of the MLP's kernels appear in no other product.
  for lift in (False, True):
    text = _compiled(lift).as_text()
    made = re.findall(r'f32\[(\d+),(\d+)\]\S* (?:dot|custom-call)\(', text)
    whole = {('64', '160'), ('160', '64')} & set(made)
    assert bool(whole) != lift
