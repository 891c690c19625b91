"""One linear layer, and one LLaMA block: what they compute and keep.

FLOPs of a layer are XLA's. The layer is inside a model, so its input has a
gradient too: the loss is sum(y dy) for a given dy. Bases stay fixed, and the
optimizer is SGD with momentum, as in the papers' tables.

What a block keeps for its backward pass is read from traces of `jax.vjp`:
distinct arrays that have an axis of the batch, in numbers per token, without
parameters and arrays derived only from them. This is what is kept if nothing is
fused; XLA recomputes some of the elementwise work.
"""

from collections.abc import Iterator
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from benchmarks import programs
from benchmarks import rso_methods
import llama
import subspace_optax as so

# --- One layer ---------------------------------------------------------------

# b inputs of a kernel of m x n.
SIZES = (
  (4096, 512, 512),
  (4096, 512, 1376),
  (4096, 1376, 512),
  (512, 512, 512),
)
# The first two of GoLore's paper, the third ours.
PREDICTED = {
  'GaLore': lambda b, m, n, r: (
    6 * b * m * n + 4 * r * m * n + 2 * m * n + 3 * r * n
  ),
  'RSO': lambda b, m, n, r: (
    4 * b * m * n + 4 * b * r * m + 6 * b * r * n + 5 * r * n
  ),
  'compressed': lambda b, m, n, r: (
    4 * b * m * n + 2 * b * r * (m + n) + (2 * r + 2) * m * n + 3 * r * n
  ),
}


def layer_step(name: str, rank: int) -> Any:
  """(W, x, dy, P, B, M) -> the loss, the gradient of x, W or B, and M."""
  spec = so.SubspaceSpec(rank, side='in', only_if_smaller=False, exclude='^x$')
  masked = rso_methods.MASKED

  def loss(params, dy):
    return jnp.sum(so.rso.dot(params['x'], params['w']) * dy)

  def run(w, x, dy, p, b, moment):
    params, bases = {'w': w, 'x': x}, {'w': p, 'x': masked}
    coords = {'w': b, 'x': masked} if name == 'RSO' else None
    if name == 'GaLore':
      value, g = jax.value_and_grad(loss)(params, dy)
      g['w'] = p.T @ g['w']
    else:
      f = so.rso.value_and_grad(loss, spec)
      value, g = f(params, bases, coords, dy)
    moment = 0.9 * moment + 0.1 * g['w']
    if name == 'RSO':
      return value, g['x'], b - 0.01 * moment, moment
    # The scale is that of P M, 2mn with the difference.
    return value, g['x'], w - 0.01 * (p @ moment), moment

  return run


def layer_rows() -> Iterator[dict[str, Any]]:
  """Yields every size and rank, by method."""
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  for b, m, n in SIZES:
    for part in (16, 4):
      r = min(m, n) // part
      shapes = (m, n), (b, m), (b, n), (m, r), (r, n), (r, n)
      arrays = [array(*shape) for shape in shapes]
      for name, predicted in PREDICTED.items():
        program = programs.compile_to_count(layer_step(name, r), *arrays)
        yield {
          'method': name,
          'b': b,
          'm': m,
          'n': n,
          'r': r,
          'predicted': predicted(b, m, n, r),
          'counted': programs.count_flops(program),
        }


# --- One block ---------------------------------------------------------------

# No other axis is as long as one of these.
BATCH, TIME = 3, 97
# The method, and which side of the kernels it projects.
KINDS = {
  'whole gradients': (rso_methods.ADAM, 'in'),
  'RSO': ('RSO', 'in'),
  'compressed, of inputs': ('compressed', 'in'),
  'compressed, of short sides': ('compressed', 'short'),
}


def formula(kind: str, n: int, f: int, r: int) -> int:
  """Numbers per token beside scores, if elementwise work is fused.

  Seven layers keep x P each.
  """
  return {
    'whole gradients': 8 * n + 4 * f,
    # The input of the down projection stays whole.
    'compressed, of short sides': 5 * n + 4 * f + 6 * r,
  }.get(kind, 5 * n + 3 * f + 7 * r)


def block(config: llama.LlamaConfig, policy: str) -> tuple[Any, Any]:
  """The graph of a block, and the shapes of its parameters."""
  make = lambda: llama.Block(config, nnx.Rngs(0))
  return programs.split(lambda: rso_methods.with_policy(make(), policy))


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
  init, step = rso_methods.training(name, of_loss, rank, side, value_and_grad)

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


def block_rows(
  config: llama.LlamaConfig, ranks: Any
) -> Iterator[dict[str, Any]]:
  """Yields what every method keeps under every policy, by rank."""
  x = jax.ShapeDtypeStruct((BATCH, TIME, config.width), config.dtype)
  for policy in rso_methods.POLICIES:
    made = block(config, policy)
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
