"""What a data-parallel step sums over TPUs: full gradients or coordinates.

Compiles the ordinary step under `jax.jit` and `so.data_parallel_step` for a
LLaMA on four TPU chips, each with a part of the batch, and reads from the
programs what they send between refreshes. Nothing runs. Results:
results/data_parallel.json and a table in docs/communication.md. Rows that are
in the JSON already are not compiled again.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import optax
import tyro

from benchmarks import harness
from benchmarks import hlo
from benchmarks import programs
from benchmarks.harness import MIB
import llama
import subspace_optax as so

DEVICES = 4


@dataclasses.dataclass(frozen=True)
class Args:
  """What is compiled; see the module."""

  width: int = 1024
  mlp_width: int = 2816
  layers: int = 4
  heads: int = 16
  vocab: int = 256
  rank: int = 256
  batch: int = 4
  seq: int = 256
  topology: str = 'v5e:2x2'  # 'cpu' for virtual CPU devices
  out: str = str(harness.RESULTS / 'data_parallel.json')
  docs: str = str(harness.DOCS / 'communication.md')


def optimizers(rank: int) -> dict[str, optax.GradientTransformation]:
  """From the name in the table to the optimizer."""
  return {
    'optax.adamw': optax.adamw(1e-3),
    'so.golore': so.golore(1e-3, rank),
    'so.online_subspace_descent': so.online_subspace_descent(1e-3, rank),
    'so.subspace_adamw': so.subspace_adamw(1e-3, rank),
  }


def steps(loss: Any, tx: Any, mesh: Mesh) -> dict[str, so.TrainStep]:
  """Both steps of an optimizer."""
  return {
    'ordinary': so.train_step(loss, tx),
    'coordinates': so.data_parallel_step(loss, tx, mesh),
  }


def measure(args: Args, name: str, mesh: Mesh) -> dict[str, float]:
  """Bytes that a device sends in a step, by the kind of step."""
  sizes = {k: getattr(args, k) for k in ('width', 'mlp_width', 'layers')}
  sizes |= {k: getattr(args, k) for k in ('heads', 'vocab')}
  graphdef, shapes = programs.model(llama.LlamaConfig(**sizes))
  loss = functools.partial(programs.loss, nnx.merge, graphdef)
  whole = NamedSharding(mesh, PartitionSpec())
  rows = NamedSharding(mesh, PartitionSpec('data'))
  params = programs.place(shapes, whole)
  tokens = jax.ShapeDtypeStruct(
    (args.batch, args.seq + 1), jnp.int32, sharding=rows
  )
  found = {}
  for kind, made in steps(loss, optimizers(args.rank)[name], mesh).items():
    state = programs.place(jax.eval_shape(made.init, params), whole)
    run: Callable[..., Any] = jax.jit(
      made.step, donate_argnums=(0, 1), out_shardings=whole
    )
    with jax.set_mesh(mesh):
      text = run.lower(params, state, tokens).compile().as_text() or ''
    found[kind] = hlo.sent(hlo.collectives(text, DEVICES, 'cheap'))
  return found


def table(rows: dict[str, dict[str, float]]) -> str:
  """A line for each optimizer."""
  cells = lambda name, x: [
    f'`{name}`',
    f'{x["ordinary"] / MIB:.1f}',
    f'{x["coordinates"] / MIB:.1f}',
    f'{x["coordinates"] / x["ordinary"]:.2f}',
  ]
  head = ('', '`so.train_step`', '`so.data_parallel_step`', 'ratio')
  return harness.table(head, [cells(*item) for item in rows.items()])


def main(args: Args) -> None:
  """Compiles everything, then prints and writes the table."""
  programs.use_cpu(DEVICES)
  devices, target = programs.find_devices(args.topology)
  mesh = programs.make_mesh(devices, data=DEVICES)
  settings = harness.settings_of(args)
  results = harness.load_results(
    args.out, compiled_for=target, settings=settings
  )
  rows = results.setdefault('rows', {})
  for name in optimizers(args.rank):
    if name not in rows:
      rows[name] = measure(args, name, mesh)
      harness.save_results(args.out, results)
    print(f'{name}: {rows[name]}', flush=True)
  text = f'Compiled for {target}.\n\n{table(rows)}'
  harness.fill_page(args.docs, {'data parallel': text})


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
