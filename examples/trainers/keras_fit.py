"""Keras's `model.fit` on JAX with an optimizer of this library.

    pip install . keras
    python examples/trainers/keras_fit.py

Keras takes no optax optimizer. This class keeps the state of one in variables
of its own, so that `fit` carries it along. `model.save` needs a `get_config`,
which optax optimizers lack: save weights, or add one of yours.
"""

import os

os.environ['KERAS_BACKEND'] = 'jax'

import jax
import keras
import numpy as np
import optax

import subspace_optax as so


class Optax(keras.optimizers.Optimizer):
  """A Keras optimizer that steps as an optax one, whose rates are its own."""

  def __init__(self, tx: optax.GradientTransformation):
    super().__init__(learning_rate=1.0)  # of which nothing is used
    self.tx = tx

  def build(self, variables):
    super().build(variables)
    state = self.tx.init(self._by_path([v.value for v in variables]))
    leaves, self._treedef = jax.tree.flatten(state)
    self._first = len(self.variables)
    for i, x in enumerate(leaves):
      self.add_variable(x.shape, 'zeros', str(x.dtype), name=f'state_{i}')
      self.variables[-1].assign(x)

  def _by_path(self, values):
    paths = [v.path for v in self._trainable_variables]
    return dict(zip(paths, values, strict=True))

  def stateless_apply(self, optimizer_variables, grads, trainable_variables):
    steps, *rest = optimizer_variables
    own, leaves = rest[: self._first - 1], rest[self._first - 1 :]
    state = self._treedef.unflatten(leaves)
    params = self._by_path(trainable_variables)
    updates, state = self.tx.update(self._by_path(grads), state, params)
    params = optax.apply_updates(params, updates)
    new = [params[v.path] for v in self._trainable_variables]
    return new, [steps + 1, *own, *jax.tree.leaves(state)]


def main():
  """Fits what a random matrix says of random points."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((4096, 64)).astype('float32')
  labels = np.argmax(np.tanh(x) @ rng.standard_normal((64, 10)), axis=-1)
  # Of the three kernels the last is the head's.
  spec = so.SubspaceSpec(0.25, exclude='head')
  for name, tx in {
    'adamw': optax.adamw(3e-3),
    'subspace_muon': so.subspace_muon(3e-3, spec=spec),
  }.items():
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
      [
        layers.Dense(128, activation='gelu', name='up'),
        layers.Dense(128, activation='gelu', name='middle'),
        layers.Dense(10, name='head'),
      ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(Optax(tx), loss)
    found = model.fit(x, labels, batch_size=128, epochs=5, verbose=0)
    first, *_, last = found.history['loss']
    print(f'{name:14s} loss {first:.3f} -> {last:.3f}')


if __name__ == '__main__':
  main()
