"""LoRA: frozen matrices W, to which a trained product scale A B is added.

Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021,
https://arxiv.org/abs/2106.09685. `scale` is the paper's alpha / r.
"""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import optax

from hf_files import by_path
import recipes


def matrices(params: Mapping) -> dict[tuple, jax.Array]:
  """The kernels that every method here projects, by path."""
  mask = by_path(recipes.matrix_mask(params))
  return {path: x for path, x in by_path(params).items() if mask[path]}


def _factors(key: jax.Array, w: jax.Array, rank: int):
  """A (..., m, r) of variance 1 / m, and B (..., r, n) of zeros."""
  *stack, m, n = w.shape
  r = min(rank, m, n)
  a = jax.random.normal(key, (*stack, m, r), w.dtype) * m**-0.5
  return a, jnp.zeros((*stack, r, n), w.dtype)


def init(
  key: jax.Array, params: Mapping, rank: int, train_head: bool = True
) -> dict[str, Any]:
  """What training sees: the frozen model, the factors A and B, the head.

  Without `train_head` the head, if there is one, is frozen like the rest.
  """
  chosen = matrices(params)
  keys = jax.random.split(key, len(chosen))
  pairs = {
    path: _factors(k, w, rank)
    for k, (path, w) in zip(keys, chosen.items(), strict=True)
  }
  heads = [k for k in params if train_head and recipes.is_head(k)]
  frozen = {k: x for k, x in params.items() if k not in heads}
  head = {name: params[name] for name in heads}
  tree = lambda i: traverse_util.unflatten_dict(
    {path: pair[i] for path, pair in pairs.items()}
  )
  return {'frozen': frozen, 'a': tree(0), 'b': tree(1)} | head


def trained(params: Mapping) -> int:
  """The number of parameters that move, of LoRA or of a whole model."""
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  return count(params) - count(params.get('frozen', {}))


def merge(params: Mapping, scale: float) -> dict[str, Any]:
  """The parameters of the model: W + scale A B, and the head."""
  frozen = by_path(jax.lax.stop_gradient(params['frozen']))
  a, b = by_path(params['a']), by_path(params['b'])
  merged = {path: frozen[path] + scale * (a[path] @ b[path]) for path in a}
  tree = traverse_util.unflatten_dict(frozen | merged)
  heads = params.keys() - {'frozen', 'a', 'b'}
  return tree | {name: params[name] for name in sorted(heads)}


def make(c) -> optax.GradientTransformation:
  """AdamW on factors and head; c.optimizer is 'adamw'."""
  label = lambda name: 'frozen' if name == 'frozen' else 'trained'
  return optax.partition(
    {'trained': recipes.make(c), 'frozen': optax.set_to_zero()},
    lambda params: {name: label(name) for name in params},
  )
