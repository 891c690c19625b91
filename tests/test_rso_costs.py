"""`benchmarks/rso.py`: FLOPs and residuals as its page predicts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama

pytest.importorskip('benchmarks', reason='a source distribution has none')

from benchmarks import rso_layers
from benchmarks import rso_model

CONFIG = llama.LlamaConfig(width=32, mlp_width=80, layers=2, heads=2, vocab=64)


@pytest.mark.parametrize('method', list(rso_layers.PREDICTED))
def test_flops_of_a_layer(method):
  b, m, n, r = size = 512, 96, 160, 8
  shapes = (m, n), (b, m), (b, n), (m, r), (r, n), (r, n)
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  program = jax.jit(rso_layers.layer_step(method, r)).lower(*arrays).compile()
  cost = program.cost_analysis()
  # And 2bn for the loss, 2b(m + n) for sums and copies.
  predicted = rso_layers.PREDICTED[method](*size)
  np.testing.assert_allclose(cost['flops'], predicted, rtol=0.01)


@pytest.mark.parametrize('kind', list(rso_layers.KINDS)[1:])
def test_what_a_block_keeps(kind):
  rank, x = 4, jnp.zeros((rso_layers.BATCH, rso_layers.TIME, CONFIG.width))
  made = rso_layers.block(CONFIG, 'none')
  whole, kept = (
    rso_layers.per_token(rso_layers.kept(k, made, x, rank))
    for k in ('whole gradients', kind)
  )
  before, after = (
    rso_layers.formula(k, CONFIG.width, CONFIG.mlp_width, rank)
    for k in ('whole gradients', kind)
  )
  np.testing.assert_allclose(whole - kept, before - after)


def test_products_of_a_kernels_shape_are_found():
  params = {'blocks': {'up': jnp.zeros((6, 9)), 'norm': jnp.zeros(6)}}
  text = '\n'.join(
    f'  x = f32[{shape}]{{1,0}} {kind}(a, b)'
    for shape, kind in (('6,9', 'dot'), ('9,6', 'dot'), ('6,9', 'add'))
  )
  assert rso_model.whole_products(text, params) == 2
