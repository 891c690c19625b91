"""What optimizers that orthogonalise send for one layer of LLaMA-350M.

Compiles `tx.update` for four TPU chips on meshes of one axis and of two, for
all seven kernels of a layer together, so that matrices of several leaves may
share devices, in stacks of two and of eight. Everything is counted as in
`benchmarks.communication`, whose account of FSDP's own traffic stands beside
it. `optax.contrib.muon` and `optax.adamw` are for comparison. Results:
results/orthogonal_traffic.json and a table in docs/communication.md. Rows that
are in the JSON already are not compiled again.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
import optax
import optax.contrib
import tyro

from benchmarks import communication
from benchmarks import harness
from benchmarks import hlo
from benchmarks import programs
from benchmarks.harness import MIB
import subspace_optax as so

KERNELS = {'attention': ('query', 'key', 'value', 'out')}
KERNELS |= {'up': ('gate', 'up'), 'down': ('down',)}
STACKS = (2, 8)


@dataclasses.dataclass(frozen=True)
class Args:
  """What is compiled; see the module."""

  width: int = 1024
  mlp_width: int = 2816  # LLaMA-350M's 2736, in whole tiles of a TPU
  rank: int = 256
  topology: str = 'v5e:2x2'  # 'cpu' for virtual CPU devices
  only: tuple[str, ...] = ()  # names of the table; all by default
  kinds: tuple[str, ...] = ('automatic',)  # of mesh axes; or 'explicit'
  out: str = str(harness.RESULTS / 'orthogonal_traffic.json')
  docs: str = str(harness.DOCS / 'communication.md')


def optimizers(args: Args) -> dict[str, Callable[[], Any]]:
  """From the name in the table to the optimizer."""
  lr, rank = 1e-3, args.rank
  return {
    'optax.adamw': lambda: optax.adamw(lr),
    'optax.contrib.muon': lambda: optax.contrib.muon(
      lr, muon_weight_dimension_numbers=_stacks
    ),
    'so.normuon': lambda: so.normuon(lr),
    'so.scale_by_muon8bit': lambda: optax.chain(
      so.scale_by_muon8bit(), optax.scale_by_learning_rate(lr)
    ),
    'so.subspace_muon': lambda: so.subspace_muon(lr, rank),
    'so.trion': lambda: so.trion(lr, rank),
  }


def _stacks(params: Any) -> Any:
  axes = optax.contrib.MuonDimensionNumbers(1, 2)
  return jax.tree.map(lambda _: axes, params)


def layer(args: Args, stack: int, mesh: Mesh) -> dict[str, Any]:
  """The shapes of a layer's kernels, placed as FSDP has them."""
  return {
    name: jax.ShapeDtypeStruct(
      (stack, *sizes),
      'float32',
      sharding=NamedSharding(mesh, communication.spec(kind, mesh)),
    )
    for kind, sizes in communication.matrices(
      args.width, args.mlp_width
    ).items()
    for name in KERNELS[kind]
  }


def measure(args: Args, name: str, stack: int, mesh: Mesh) -> dict:
  """One optimizer's figures, for a layer."""
  params = layer(args, stack, mesh)
  tx = optimizers(args)[name]()
  build = lambda: communication.compiled(tx, params, mesh)
  seconds, (program, state) = harness.time_call(build)
  found = hlo.collectives(program.as_text(), communication.DEVICES, 'cheap')
  size = programs.tree_bytes(params)
  return {
    'compile_seconds': round(seconds, 1),
    'fsdp_bytes': communication.fsdp_bytes(size, mesh.shape) / stack,
    'sent_bytes': hlo.sent(found) / stack,
    'by_kind': {
      kind: sent / stack for kind, sent in communication.by_kind(found).items()
    },
    'collectives': sum(c.times for c in found.values()),
    'temporary_bytes': programs.count_bytes(program).temporaries,
    'gradient_bytes': communication.shard_bytes(params),
    'state_bytes_per_device': communication.shard_bytes(state),
    'state_bytes': programs.tree_bytes(state),
    'state_that_moves': communication.moved(state, program.output_shardings[1]),
  }


HEAD = ('', 'sent a step', 'of what FSDP sends', 'by all-to-all')
HEAD += ('collectives', 'temporary / gradient')


def cells(name: str, row: dict) -> list[str]:
  """One line of a table."""
  return [
    f'`{name}`',
    f'{row["sent_bytes"] / MIB:.1f}',
    f'{row["sent_bytes"] / row["fsdp_bytes"]:.2f}',
    f'{row["by_kind"].get("all-to-all", 0) / MIB:.1f}',
    f'{row["collectives"]}',
    f'{row["temporary_bytes"] / row["gradient_bytes"]:.1f}',
  ]


def markdown(results: dict) -> str:
  """A table for every mesh and stack."""
  parts = [f'Compiled for {results["compiled_for"]}.']
  for title, rows in results['rows'].items():
    fsdp = next(iter(rows.values()))['fsdp_bytes'] / MIB
    lines = [cells(*item) for item in rows.items()]
    parts += [
      f'{title}; FSDP itself sends {fsdp:.1f} MiB a layer:',
      harness.table(HEAD, lines),
    ]
  return '\n\n'.join(parts)


def main(args: Args) -> None:
  """Compiles everything, then prints and writes the tables."""
  programs.use_cpu(communication.DEVICES)
  devices, target = programs.find_devices(args.topology)
  settings = harness.settings_of(args, 'only', 'kinds')
  results = harness.load_results(
    args.out, compiled_for=target, settings=settings
  )
  for mesh_name, shape in communication.MESHES.items():
    axes = dict(zip(('fsdp', 'tensor'), shape, strict=False))
    for kind in args.kinds:
      mesh = programs.make_mesh(devices, kind == 'explicit', **axes)
      for stack in STACKS:
        title = f'Mesh `{mesh_name}`, {kind}, stacks of {stack}'
        rows = results.setdefault('rows', {}).setdefault(title, {})
        for name in args.only or optimizers(args):
          if name not in rows:
            rows[name] = measure(args, name, stack, mesh)
            harness.save_results(args.out, results)
          print(f'{title}: {name}', flush=True)
  text = markdown(results)
  print(text)
  harness.fill_page(args.docs, {'orthogonal': text})


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
