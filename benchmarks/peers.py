"""Two optimizers of the Pareto benchmark that do not support stacks themselves.

`factors` use a quarter of each short side as rank, and `contrib_galore` a
quarter of the smallest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib


def _rank(x: Any) -> int:
  return min(x.shape[-2:]) // 4


def _unstacked(tree: Any) -> Any:
  return jax.tree.map(lambda x: [*x] if x.ndim > 2 else x, tree)


def _restacked(tree: Any, like: Any) -> Any:
  stack = lambda _, x: jnp.stack(x) if isinstance(x, list) else x
  return jax.tree.map(stack, like, tree)


def contrib_galore(
  lr: Any, decay: Any, b2: float
) -> optax.GradientTransformation:
  """optax's own GaLore, to which each layer of a stack is a leaf."""

  def make(params: Any) -> optax.GradientTransformation:
    return optax.contrib.galore(
      lr,
      min(map(_rank, jax.tree.leaves(params))),
      base_optimizer=optax.scale_by_adam(b2=b2),
      weight_decay=decay,
    )

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    found, state = make(params).update(
      _unstacked(updates), state, _unstacked(params)
    )
    return _restacked(found, updates), state

  init = lambda params: make(params).init(_unstacked(params))
  return optax.GradientTransformation(init, update)


class FactorsState(NamedTuple):
  """A (..., m, r) and B (..., r, n) of every matrix, and their optimizer's."""

  factors: dict[str, Any]
  inner: Any


def factors(
  inner: optax.GradientTransformation, scale: float = 2.0
) -> optax.GradientTransformation:
  """LoRA's parametrisation: W = W0 + scale A B, and `inner` moves A and B.

  Their gradients follow from that of W; B begins at zero. (Hu et al., LoRA,
  2021, https://arxiv.org/abs/2106.09685.)
  """

  def init(params: Any) -> FactorsState:
    a = jax.tree.map(lambda w: jnp.zeros((*w.shape[:-1], _rank(w))), params)
    b = jax.tree.map(
      lambda w: jnp.zeros((*w.shape[:-2], _rank(w), w.shape[-1])), params
    )
    drawn = optax.tree.random_like(jax.random.key(0), a)
    a = jax.tree.map(lambda x: x * x.shape[-2] ** -0.5, drawn)
    own: Any = {'a': a, 'b': b}
    return FactorsState(own, inner.init(own))

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    a, b = state.factors['a'], state.factors['b']
    turned = lambda x: jnp.swapaxes(x, -1, -2)
    grads = {
      'a': jax.tree.map(lambda g, y: scale * g @ turned(y), updates, b),
      'b': jax.tree.map(lambda g, x: scale * turned(x) @ g, updates, a),
    }
    steps, own = inner.update(grads, state.inner, state.factors)
    new: Any = optax.apply_updates(state.factors, steps)
    moved = jax.tree.map(
      lambda x, y, x1, y1: scale * (x1 @ y1 - x @ y), a, b, new['a'], new['b']
    )
    return moved, FactorsState(new, own)

  return optax.GradientTransformation(init, update)
