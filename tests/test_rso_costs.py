"""`benchmarks/rso.py`: FLOPs and residuals as its page predicts them."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama

SCRIPTS = pathlib.Path(__file__).parent.parent / 'benchmarks'
if not SCRIPTS.exists():
  pytest.skip(
    'a source distribution has no benchmarks', allow_module_level=True
  )
sys.path.append(str(SCRIPTS))

import rso_block  # noqa: E402
import rso_layer  # noqa: E402
import rso_llama  # noqa: E402

CONFIG = llama.LlamaConfig(width=32, mlp_width=80, layers=2, heads=2, vocab=64)


@pytest.mark.parametrize('method', list(rso_layer.FORMULAS))
def test_flops_of_a_layer(method):
  b, m, n, r = size = 512, 96, 160, 8
  shapes = (m, n), (b, m), (b, n), (m, r), (r, n), (r, n)
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  program = jax.jit(rso_layer.step(method, r)).lower(*arrays).compile()
  cost = program.cost_analysis()
  # And 2bn for the loss, 2b(m + n) for sums and copies.
  predicted = rso_layer.predicted(method, *size)
  np.testing.assert_allclose(cost['flops'], predicted, rtol=0.01)


@pytest.mark.parametrize('kind', list(rso_block.KINDS)[1:])
def test_what_a_block_keeps(kind):
  rank, x = 4, jnp.zeros((rso_block.BATCH, rso_block.TIME, CONFIG.width))
  made = rso_block.model(CONFIG, 'none')
  whole, kept = (
    rso_block.per_token(rso_block.kept(k, made, x, rank))
    for k in ('whole gradients', kind)
  )
  before, after = (
    rso_block.formula(k, CONFIG.width, CONFIG.mlp_width, rank)
    for k in ('whole gradients', kind)
  )
  np.testing.assert_allclose(whole - kept, before - after)


def test_products_of_a_kernels_shape_are_found():
  params = {'blocks': {'up': jnp.zeros((6, 9)), 'norm': jnp.zeros(6)}}
  text = '\n'.join(
    f'  x = f32[{shape}]{{1,0}} {kind}(a, b)'
    for shape, kind in (('6,9', 'dot'), ('9,6', 'dot'), ('6,9', 'add'))
  )
  assert rso_llama.whole_products(text, params) == 2
