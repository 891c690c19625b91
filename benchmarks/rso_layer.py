"""FLOPs of one linear layer and its update: predicted, and XLA's count.

The layer stands inside a model, so that its input has a gradient too: the loss
is sum(y dy) for a given dy. Bases stay as they are, and the optimizer is SGD
with momentum, as in the papers' tables.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import rso_programs as programs
import subspace_optax as so

# b inputs of a kernel of m x n.
SIZES = (
  (4096, 512, 512),
  (4096, 512, 1376),
  (4096, 1376, 512),
  (512, 512, 512),
)
FORMULAS = {
  'GaLore': '6bmn + 4rmn + 2mn + 3rn',
  'RSO': '4bmn + 4brm + 6brn + 5rn',
  'compressed': '4bmn + 2brm + 2brn + 2rmn + 2mn + 3rn',
}


def predicted(name: str, b: int, m: int, n: int, r: int) -> int:
  """The first two of GoLore's paper, the third ours."""
  return {
    'GaLore': 6 * b * m * n + 4 * r * m * n + 2 * m * n + 3 * r * n,
    'RSO': 4 * b * m * n + 4 * b * r * m + 6 * b * r * n + 5 * r * n,
    'compressed': 4 * b * m * n
    + 2 * b * r * (m + n)
    + (2 * r + 2) * m * n
    + 3 * r * n,
  }[name]


def loss(params: Any, dy: jax.Array) -> jax.Array:
  return jnp.sum(so.rso.dot(params['x'], params['w']) * dy)


def step(name: str, rank: int) -> Any:
  """(W, x, dy, P, B, M) -> the loss, the gradient of x, W or B, and M."""
  spec = so.SubspaceSpec(rank, side='in', only_if_smaller=False, exclude='^x$')

  def run(w, x, dy, p, b, moment):
    params, bases = {'w': w, 'x': x}, {'w': p, 'x': programs.MASKED}
    coords = {'w': b, 'x': programs.MASKED} if name == 'RSO' else None
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


def rows() -> Iterator[dict[str, Any]]:
  """Yields every size and rank, by method."""
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  for b, m, n in SIZES:
    for part in (16, 4):
      r = min(m, n) // part
      arrays = [array(*s) for s in ((m, n), (b, m), (b, n), (m, r))]
      for name in FORMULAS:
        args = (*arrays, array(r, n), array(r, n))
        program = programs.counted(step(name, r), *args)
        cost: Any = program.cost_analysis()
        yield {
          'method': name,
          'b': b,
          'm': m,
          'n': n,
          'r': r,
          'predicted': predicted(name, b, m, n, r),
          'counted': cost['flops'],
        }
