"""The optimizers of the example trainer: rates, clipping, schedule."""

import jax.numpy as jnp
import numpy as np
import optax

import data
import llama
import pretrain
import recipes


def test_rates_of_matrices_and_the_rest():
  config = pretrain.Config(
    optimizer='adamw', lr=1e-2, lr_rest=3e-2, schedule='constant', clip=0.0
  )
  params = {
    'embed': {'embedding': jnp.ones((4, 4))},
    'wq': {'kernel': jnp.ones((4, 4))},
  }
  tx = recipes.make(config)
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_allclose(
    updates['wq']['kernel'], np.full((4, 4), -1e-2), rtol=1e-4
  )
  rest = updates['embed']['embedding']
  np.testing.assert_allclose(rest, np.full((4, 4), -3e-2), rtol=1e-4)


def test_gradients_are_clipped():
  config = pretrain.Config(optimizer='adamw', clip=1.0)
  tx = recipes.make(config)
  params = {'wq': {'kernel': jnp.full((2, 2), 100.0)}}
  _, state = tx.update(params, tx.init(params), params)
  mu = optax.tree.get(state, 'mu')['wq']['kernel']
  np.testing.assert_allclose(mu, np.full((2, 2), 0.1 * 0.5), rtol=1e-5)


def test_schedule():
  rate = recipes.schedule(2.0, 100)
  assert 0 < rate(0) < rate(5) < rate(10)
  np.testing.assert_allclose([rate(10), rate(55), rate(100)], [2.0, 1.1, 0.2])
  assert recipes.schedule(2.0, 100, 'constant')(77) == 2.0


def test_every_optimizer_has_learning_rates():
  for name in recipes.OPTIMIZERS:
    assert recipes.known(name, recipes.LEARNING_RATES), name
  assert recipes.LEARNING_RATES.keys() <= recipes.OPTIMIZERS.keys()
  assert all(min(rates) > 0 for rates in recipes.LEARNING_RATES.values())


def test_defaults_are_valid():
  config = pretrain.resolve(pretrain.Config())
  assert config.out == f'runs/{config.model}-{config.optimizer}'
  assert config.model in llama.NAMED
  assert config.rank == llama.named(config.model).width // 4 == 32
  assert set(data.PACKAGES) >= {'jax', 'optax'}
