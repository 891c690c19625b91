"""Whether GaLore goes the same way on one device and on meshes of four.

  python benchmarks/mesh_losses.py

A small LLaMA (`llama_1m`) takes 100 steps after one refresh, on docstrings:
with the bases of an exact SVD and of `randomized` on one device, and with
`auto` on virtual devices, with rows, columns or both of every kernel cut, under
automatic and explicit sharding. Losses are compared step by step.
"""

import contextlib
import json
import os
import pathlib
import sys
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / 'examples'))

from flax import nnx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import corpora  # noqa: E402
import data  # noqa: E402
import llama  # noqa: E402
import machine  # noqa: E402
import subspace_optax as so  # noqa: E402

STEPS, BATCH, SEQUENCE, RANK, LR = 100, 8, 64, 32, 2e-3
CUTS = {'rows': ('x', None), 'columns': (None, 'x'), '2 x 2': ('x', 'y')}
MODES = {'auto': AxisType.Auto, 'explicit': AxisType.Explicit}
OUT = ROOT / 'results' / 'mesh_losses.json'

jax.config.update('jax_num_cpu_devices', 4)


def galore(method: str) -> optax.GradientTransformation:
  """GaLore's long side at its scale of 0.25."""
  spec = so.SubspaceSpec(RANK, side='long', only_if_smaller=False)
  return so.subspace(
    spec,
    so.projectors.svd(200, method),
    optax.scale_by_adam(),
    scale=0.25,
    after=optax.scale_by_learning_rate(LR),
  )


def mesh_of(cut: str, mode: str) -> Mesh:
  shape, names = ((2, 2), ('x', 'y')) if cut == '2 x 2' else ((4,), ('x',))
  return jax.make_mesh(shape, names, axis_types=(MODES[mode],) * len(names))


def losses(
  method: str, tokens: np.ndarray, cut: str = '', mode: str = ''
) -> np.ndarray:
  """The loss of every step, on a mesh if a cut is named."""
  config = llama.named('llama_1m', vocab=256)
  create = lambda: llama.Llama(config, nnx.Rngs(0))
  graphdef, _ = nnx.split(nnx.eval_shape(create))
  params = jax.jit(lambda: nnx.to_pure_dict(nnx.state(create())))()
  tx, mesh = galore(method), mesh_of(cut, mode) if cut else None

  def loss(params: Any, rows: jax.Array) -> jax.Array:
    if (
      mesh and mode == 'explicit'
    ):  # the model is not written for explicit axes
      whole = NamedSharding(mesh, P())
      params = jax.tree.map(lambda x: jax.reshard(x, whole), params)
    logits = nnx.merge(graphdef, params)(rows[:, :-1]).astype(jnp.float32)
    targets = jax.nn.one_hot(rows[:, 1:], 256)
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(logits) * targets, -1))

  def step(params, state, rows):
    value, grads = jax.value_and_grad(loss)(params, rows)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  def place(x: Any, spec: P) -> Any:
    return x if mesh is None else jax.device_put(x, NamedSharding(mesh, spec))

  def cut_of(x: jax.Array) -> P:
    return P(*(None,) * (x.ndim - 2), *CUTS[cut]) if x.ndim > 1 and cut else P()

  found = []
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    params = jax.tree.map(lambda x: place(x, cut_of(x)), params)
    state, run = tx.init(params), jax.jit(step)
    for t in range(STEPS):
      rows = place(data.batch(tokens, (BATCH,), SEQUENCE, 0, t), P())
      params, state, value = run(params, state, rows)
      found.append(float(value))
  return np.array(found)


def apart(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
  """How far two runs are apart, in shares of the loss."""
  off = np.abs(a / b - 1)
  return {'largest': float(off.max()), 'mean': float(off.mean())}


def main() -> None:
  tokens, _, digest = corpora.load(
    'docstrings', ROOT.parent / 'runs' / 'mesh_losses'
  )
  exact = losses('exact', tokens)
  randomized = losses('randomized', tokens)
  rows = []
  for mode in MODES:
    for cut in CUTS:
      print(f'{mode} sharding, {cut}', flush=True)
      found = losses('auto', tokens, cut, mode)
      rows.append(
        {
          'mode': mode,
          'cut': cut,
          'from_randomized_on_one_device': apart(found, randomized),
          'from_exact_on_one_device': apart(found, exact),
        }
      )
  result = {
    'machine': machine.describe(),
    'corpus': digest,
    'last_loss': float(exact[-1]),
    'randomized_from_exact_on_one_device': apart(randomized, exact),
    'rows': rows,
  }
  OUT.write_text(json.dumps(result, indent=1) + '\n')
  print(OUT.read_text())


if __name__ == '__main__':
  main()
