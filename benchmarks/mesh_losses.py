"""Whether GaLore takes the same path on one device and on meshes of four.

A small LLaMA (`llama_1m`) trains for 100 steps after one refresh, on
docstrings. On one device it has the bases of an exact SVD and of `randomized`.
On virtual devices it has those of `auto`, with rows, columns or both of every
kernel sharded, under automatic and explicit sharding. Losses are compared step
by step.
"""

import contextlib
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import tyro

from benchmarks import corpora
from benchmarks import harness
from benchmarks import programs
import data
import llama
import subspace_optax as so

BATCH, SEQUENCE, RANK, LR = 8, 64, 32, 2e-3
CUTS = {'rows': ('x', None), 'columns': (None, 'x'), '2 x 2': ('x', 'y')}
MODES = ('auto', 'explicit')


@dataclasses.dataclass(frozen=True)
class Args:
  """How long is trained, and where results go."""

  steps: int = 100
  out: str = str(harness.RESULTS / 'mesh_losses.json')


def galore(method: str) -> optax.GradientTransformation:
  """GaLore's long side at its scale of 0.25."""
  return so.subspace(
    so.SubspaceSpec(RANK, side='long', only_if_smaller=False),
    so.projectors.svd(200, method),
    optax.scale_by_adam(),
    scale=0.25,
    after=optax.scale_by_learning_rate(LR),
  )


def losses(
  method: str, tokens: np.ndarray, steps: int, cut: str = '', mode: str = ''
) -> np.ndarray:
  """The loss of every step, on a mesh if a cut is named."""
  config = llama.named('llama_1m', vocab=256)
  create = lambda: llama.Llama(config, nnx.Rngs(0))
  graphdef, _ = programs.split(create)
  params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(create())))()
  axes = {'x': 2, 'y': 2} if cut == '2 x 2' else {'x': 4}
  explicit = mode == 'explicit'
  mesh = programs.make_mesh(jax.devices(), explicit, **axes) if cut else None

  def loss(params: Any, rows: jax.Array) -> jax.Array:
    if mesh and explicit:  # the model is not written for explicit axes
      whole = NamedSharding(mesh, P())
      params = jax.tree.map(lambda x: jax.reshard(x, whole), params)
    logits = nnx.merge(graphdef, params)(rows[:, :-1]).astype(jnp.float32)
    targets = jax.nn.one_hot(rows[:, 1:], 256)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, -1))

  def place(x: Any, spec: P) -> Any:
    return x if mesh is None else jax.device_put(x, NamedSharding(mesh, spec))

  def cut_of(x: jax.Array) -> P:
    return P(*(None,) * (x.ndim - 2), *CUTS[cut]) if x.ndim > 1 and cut else P()

  found, tx = [], galore(method)
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    params = jax.tree.map(lambda x: place(x, cut_of(x)), params)
    state, run = tx.init(params), jax.jit(programs.whole_step(loss, tx))
    for t in range(steps):
      rows = place(data.batch(tokens, (BATCH,), SEQUENCE, 0, t), P())
      params, state, value = run(params, state, rows)
      found.append(float(value))
  return np.array(found)


def apart(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
  """How far two runs are apart, in shares of the loss."""
  off = np.abs(a / b - 1)
  return {'largest': float(off.max()), 'mean': float(off.mean())}


def main(args: Args) -> None:
  """Trains in every way, and writes how far the losses are apart."""
  programs.use_cpu(4)
  cache = harness.ROOT / 'runs' / 'mesh_losses'
  tokens, _, digest = corpora.load('docstrings', cache)
  exact = losses('exact', tokens, args.steps)
  randomized = losses('randomized', tokens, args.steps)
  rows = []
  for mode in MODES:
    for cut in CUTS:
      found = losses('auto', tokens, args.steps, cut, mode)
      row = {
        'mode': mode,
        'cut': cut,
        'from_randomized_on_one_device': apart(found, randomized),
        'from_exact_on_one_device': apart(found, exact),
      }
      print(row, flush=True)
      rows.append(row)
  results = {
    'machine': harness.describe_machine(),
    'corpus': digest,
    'last_loss': float(exact[-1]),
    'randomized_from_exact_on_one_device': apart(randomized, exact),
    'rows': rows,
  }
  harness.save_results(args.out, results)


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
