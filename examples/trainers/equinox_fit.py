"""Equinox's `filter_jit` and `filter_grad` with an optimizer of this library.

    pip install . equinox
    python examples/trainers/equinox_fit.py

An equinox model holds functions and numbers among its arrays. The optimizer is
given the arrays alone, as optax's own are: what `eqx.filter` leaves out is
None, and stays None in states and updates. Kernels have their outputs first.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import subspace_optax as so


class Classifier(eqx.Module):
  """A perceptron with a head of its own."""

  body: eqx.nn.MLP
  head: eqx.nn.Linear

  def __init__(self, key):
    one, two = jax.random.split(key)
    self.body = eqx.nn.MLP(64, 128, 128, 2, jax.nn.gelu, key=one)
    self.head = eqx.nn.Linear(128, 10, key=two)

  def __call__(self, x):
    return self.head(self.body(x))


@eqx.filter_value_and_grad
def loss_and_grads(model, x, labels):
  logits = jax.vmap(model)(x)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return jnp.mean(losses)


def fit(tx, x, labels, epochs=5, size=128):
  """Returns the mean loss of each epoch."""
  model = Classifier(jax.random.key(0))
  state = tx.init(eqx.filter(model, eqx.is_inexact_array))

  @eqx.filter_jit(donate='all')
  def step(model, state, x, labels):
    loss, grads = loss_and_grads(model, x, labels)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, state = tx.update(grads, state, params)
    return eqx.apply_updates(model, updates), state, loss

  means = []
  for _ in range(epochs):
    losses = []
    for i in range(0, len(x), size):
      part = x[i : i + size], labels[i : i + size]
      model, state, loss = step(model, state, *part)
      losses.append(loss)
    means.append(float(jnp.mean(jnp.stack(losses))))
  return means


def main():
  """Fits what a random matrix says of random points."""
  one, two = jax.random.split(jax.random.key(1))
  x = jax.random.normal(one, (4096, 64))
  labels = jnp.argmax(jnp.tanh(x) @ jax.random.normal(two, (64, 10)), axis=-1)
  spec = so.SubspaceSpec(0.25, outputs_first=True, exclude='head')
  results = {}
  for name, tx in {
    'adamw': optax.adamw(3e-3),
    'subspace_muon': so.subspace_muon(3e-3, spec=spec),
  }.items():
    first, *_, last = results[name] = fit(tx, x, labels)
    print(f'{name:14s} loss {first:.3f} -> {last:.3f}')
  return results


if __name__ == '__main__':
  main()
