"""What each optimizer's step moves between devices, and what it keeps on each.

  python benchmarks/communication.py

Compiles `tx.update` for four TPU chips, for stacks of LLaMA's matrices on a
mesh of one axis and of two, and reads from the compiled program every
collective, those in a refresh's branch apart, and XLA's account of memory. No
TPU is needed, but `pip install libtpu` of jax's version, on Python 3.12 or
newer; without it the program is compiled for four virtual CPU devices, whose
partitioner is another, and the results say so.

Gradients are taken to be reduced already and sharded like the parameters, as
FSDP has them; what FSDP itself moves stands above each table. Results: tables,
benchmarks/results/communication.json and docs/communication.md; what is in the
JSON already is not compiled again.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
import os
import pathlib
import time
from typing import Any

# Nothing outside this machine is asked about TPUs.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
from jax.experimental import topologies
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import optax.contrib
import tyro

import communication_tables as tables
import hlo
import machine
import methods
import pages
import subspace_optax as so

ROOT = pathlib.Path(__file__).resolve().parent
DEVICES = 4
MESHES = {'fsdp=4': (4,), 'fsdp=2, tensor=2': (2, 2)}


@dataclasses.dataclass(frozen=True)
class Args:
  """What is compiled; see the module."""

  width: int = 1024
  mlp_width: int = 2816  # LLaMA-350M's 2736, in whole tiles of a TPU
  layers: int = 2
  rank: int = 256
  topology: str = 'v5e:2x2'  # 'cpu' for virtual CPU devices
  explicit: bool = False  # mesh axes in the types, instead of automatic ones
  only: tuple[str, ...] = ()  # names of the table; all by default
  out: str = str(ROOT / 'results' / 'communication.json')
  docs: str = str(ROOT.parent / 'docs' / 'communication.md')


def optimizers(args: Args) -> dict[str, Callable[[], Any]]:
  """From the name in the table to the optimizer."""
  lr, decay = 1e-3, 0.1
  ours = (
    'galore',
    'golore',
    'online_subspace_descent',
    'fira_adamw',
    'apollo_adamw',
    'ldadamw',
    'subspace_adamw',
    'subspace_muon',
  )
  make = lambda name: (
    lambda: getattr(so, name)(lr, args.rank, weight_decay=decay)
  )
  return {
    'optax.adamw': lambda: optax.adamw(lr, weight_decay=decay),
    **{f'so.{name}': make(name) for name in ours},
    # It projects no stack: layers are handed to it one by one.
    'optax.contrib.galore': lambda: methods.by_layer(
      optax.contrib.galore(lr, args.rank, weight_decay=decay)
    ),
  }


def matrices(args: Args) -> dict[str, tuple[int, int]]:
  """From a kind of matrix to its sizes, input first."""
  d, f = args.width, args.mlp_width
  return {'attention': (d, d), 'up': (d, f), 'down': (f, d)}


def spec(kind: str, mesh: Mesh) -> P:
  """Layers stay whole; `fsdp` cuts the width, `tensor` heads and hidden units.

  On a mesh of one axis the input side is cut.
  """
  if len(mesh.axis_names) == 1:
    return P(None, 'fsdp', None)
  cut = ('tensor', 'fsdp') if kind == 'down' else ('fsdp', 'tensor')
  return P(None, *cut)


def devices(args: Args) -> tuple[list[Any], str]:
  """The devices to compile for, and what they are."""
  here = 'virtual CPU devices: not what a TPU would run'
  if args.topology == 'cpu':
    return jax.devices(), here
  try:
    found = topologies.get_topology_desc(args.topology, 'tpu').devices
    return found, f'{found[0].device_kind}, topology {args.topology}'
  except Exception as error:  # no libtpu, or another process has it
    print(f'no TPU compiler: {error}\nso this compiles for {here}')
    return jax.devices(), here


def mesh_of(args: Args, shape: tuple[int, ...], devices: list[Any]) -> Mesh:
  """A mesh of `shape`."""
  names = ('fsdp', 'tensor')[: len(shape)]
  kind = AxisType.Explicit if args.explicit else AxisType.Auto
  return Mesh(
    np.array(devices).reshape(shape), names, axis_types=(kind,) * len(names)
  )


def compiled(tx: Any, params: Any, mesh: Mesh) -> tuple[Any, Any]:
  """The compiled update, and the shapes of the state that it was given."""
  bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(tx.init, bare),
    so.state_sharding(tx, params),
  )
  with jax.set_mesh(mesh):
    # Where the new state goes is left to the compiler, as in most trainers.
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    return step.lower(params, state, params).compile(), state


def shard_bytes(tree: Any) -> int:
  """The bytes of a tree on one device."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def moved(state: Any, shardings: Any) -> list[str]:
  """The paths of state that comes out of a step with another sharding."""
  return [
    jax.tree_util.keystr(path)
    for (path, x), s in zip(
      jax.tree.leaves_with_path(state), jax.tree.leaves(shardings), strict=True
    )
    if not s.is_equivalent_to(x.sharding, x.ndim)
  ]


def communication(text: str, every_step: bool) -> dict:
  """Bytes that a device sends, between refreshes and at one, and the largest.

  A branch is taken to be a refresh if it sends more than the other one.
  """
  cheap, dear, both = (
    hlo.collectives(text, DEVICES, branches)
    for branches in ('cheap', 'dear', 'all')
  )
  usual = dear if every_step else cheap
  return {
    'sent_bytes': hlo.sent(usual),
    'sent_bytes_at_refresh': hlo.sent(dear),
    'collectives': sum(c.times for c in usual.values()),
    'collectives_at_refresh': sum(c.times for c in dear.values()),
    'largest': hlo.largest(usual),
    'largest_at_any_step': hlo.largest(both),
    'by_kind': tables.by_kind(usual),
    'by_kind_at_refresh': tables.by_kind(dear),
  }


def measure(args: Args, name: str, mesh: Mesh) -> Iterator[dict]:
  """Yields a row for every kind of matrix."""
  for kind, (m, n) in matrices(args).items():
    place = NamedSharding(mesh, spec(kind, mesh))
    w = jax.ShapeDtypeStruct((args.layers, m, n), 'float32', sharding=place)
    start = time.perf_counter()
    program, state = compiled(optimizers(args)[name](), {'w': w}, mesh)
    seconds = time.perf_counter() - start
    memory: Any = program.memory_analysis()
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    gradient = shard_bytes(w)
    yield {
      'matrix': kind,
      'shape': [args.layers, m, n],
      'matrices_at_once': 1 if 'contrib' in name else args.layers,
      'compile_seconds': round(seconds, 1),
      'fsdp_bytes': tables.fsdp_bytes(w.size * 4, mesh.shape),
      **communication(program.as_text(), name == 'so.ldadamw'),
      'state_bytes': total,
      'state_bytes_per_device': shard_bytes(state),
      # With the gradient and the parameters; in tiles of the TPU.
      'argument_bytes': memory.argument_size_in_bytes,
      'gradient_bytes': gradient,
      'temporary_bytes': memory.temp_size_in_bytes,
      'state_that_moves': moved(state, program.output_shardings[1]),
    }


def main(args: Args) -> None:
  """Compiles everything, then prints and writes the tables."""
  jax.config.update('jax_num_cpu_devices', DEVICES)
  out = pathlib.Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  found, target = devices(args)
  keep = ('out', 'docs', 'only')
  fixed = {k: v for k, v in dataclasses.asdict(args).items() if k not in keep}
  results = {
    'machine': machine.describe(),
    'compiled_for': target,
    'settings': fixed,
    'rows': {},
  }
  if out.exists():
    results = json.loads(out.read_text())
    if results['settings'] != fixed or results['compiled_for'] != target:
      raise ValueError(
        f'{out} holds {results["settings"]} for {results["compiled_for"]}, '
        f'not {fixed} for {target}: delete it or name another --out'
      )
  for mesh_name, shape in MESHES.items():
    mesh = mesh_of(args, shape, found)
    rows = results['rows'].setdefault(mesh_name, {})
    for name in args.only or optimizers(args):
      if name not in rows:
        rows[name] = list(measure(args, name, mesh))
        out.write_text(json.dumps(results, indent=1) + '\n')
      print(f'{mesh_name}: {name}', flush=True)
  # Those compiled for CPUs are in a file of their own beside this one.
  files = sorted(out.parent.glob('communication*.json'))
  text = '\n\n'.join(tables.markdown(json.loads(f.read_text())) for f in files)
  print(text)
  pages.fill(pathlib.Path(args.docs), {'tables': text})


if __name__ == '__main__':
  main(tyro.cli(Args))
