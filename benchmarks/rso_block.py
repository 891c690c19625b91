"""What the backward pass of one LLaMA block keeps, by traces of `jax.vjp`.

Counted are distinct arrays that have an axis of the batch, in numbers per
token: no parameter, and nothing derived from one, is among them. This is what
is kept where nothing is fused; XLA recomputes some of the elementwise work.
"""

from collections.abc import Iterator
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

import llama
import rso_programs as programs

# No other axis is as long as one of these.
BATCH, TIME = 3, 97
# The method, and which side of the kernels it projects.
KINDS = {
  'whole gradients': (programs.ADAM, 'in'),
  'RSO': ('RSO', 'in'),
  'compressed, of inputs': ('compressed', 'in'),
  'compressed, of short sides': ('compressed', 'short'),
}


def formula(kind: str, n: int, f: int, r: int) -> int:
  """Numbers per token beside scores, if elementwise work is fused.

  Seven layers keep x P each, or four if those with the same input share it.
  """
  return {
    'whole gradients': 8 * n + 4 * f,
    'shared': 5 * n + 3 * f + 4 * r,
    # The input of the down projection stays whole.
    'compressed, of short sides': 5 * n + 4 * f + 6 * r,
  }.get(kind, 5 * n + 3 * f + 7 * r)


def model(config: llama.LlamaConfig, policy: str) -> tuple[Any, Any]:
  """The graph of a block, and the shapes of its parameters."""
  make = lambda: programs.with_policy(llama.Block(config, nnx.Rngs(0)), policy)
  graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)
  return graphdef, nnx.to_pure_dict(params)


def kept(kind: str, made: Any, x: Any, rank: int) -> list[tuple[int, ...]]:
  """The shapes of the batch's arrays that the backward pass is given."""
  graphdef, params = made
  name, side = KINDS[kind]
  found: list[Any] = []

  def value_and_grad(f):
    def run(at, x):
      # By x too: there are layers below.
      value, pull = jax.vjp(f, at, x)
      found.extend(jax.tree.leaves(pull))
      return value, pull(jnp.ones_like(value))[0]

    return run

  of_loss = lambda merge: lambda p, x: jnp.sum(merge(graphdef, p)(x))
  init, step = programs.training(name, of_loss, rank, side, value_and_grad)

  def trace(params, x):
    found.clear()
    step(params, init(params), x)
    return found

  jaxpr = jax.make_jaxpr(trace)(params, x).jaxpr
  distinct: Any = {id(v): v.aval for v in jaxpr.outvars}
  shapes = [v.shape for v in distinct.values()]
  return [s for s in shapes if BATCH in s and TIME in s]


def per_token(shapes: list[tuple[int, ...]]) -> float:
  return sum(map(math.prod, shapes)) / (BATCH * TIME)


def rows(config: llama.LlamaConfig, ranks: Any) -> Iterator[dict[str, Any]]:
  """Yields what every method keeps under every policy, by rank."""
  shape = (BATCH, TIME, config.width)
  x = jax.ShapeDtypeStruct(shape, config.dtype)
  for policy in programs.POLICIES:
    made = model(config, policy)
    for kind in KINDS:
      for rank in ranks if kind != 'whole gradients' else (0,):
        shapes = kept(kind, made, x, rank)
        yield {
          'policy': policy,
          'kind': kind,
          'rank': rank,
          'kept': per_token([s for s in shapes if s.count(TIME) == 1]),
          'scores': per_token([s for s in shapes if s.count(TIME) > 1]),
          'formula': formula(kind, config.width, config.mlp_width, rank),
        }
