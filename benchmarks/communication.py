"""What each optimizer's step moves between devices, and what each device keeps.

Compiles `tx.update` for four TPU chips, for stacks of LLaMA's matrices on a
mesh of one axis and of two. Reads every collective from the compiled program,
with those of a refresh counted apart, and XLA's account of memory. Without a
compiler for TPUs (see `programs.find_devices`) the program is compiled for four
virtual CPU devices, whose partitioner differs, and the results say so.

Gradients are taken to be reduced already and sharded like the parameters, as in
FSDP; what FSDP itself sends stands above each table. Results: tables,
results/communication.json and docs/communication.md. Rows that are in the JSON
already are not compiled again.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import optax.contrib
import tyro

from benchmarks import harness
from benchmarks import hlo
from benchmarks import programs
from benchmarks.harness import MIB
import subspace_optax as so

DEVICES = 4
MESHES = {'fsdp=4': (4,), 'fsdp=2, tensor=2': (2, 2)}
# How many of each matrix a layer of LLaMA has.
IN_A_LAYER = {'attention': 4, 'up': 2, 'down': 1}


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
  out: str = str(harness.RESULTS / 'communication.json')
  docs: str = str(harness.DOCS / 'communication.md')


# --- What is compiled --------------------------------------------------------


# Not one matrix at a time: see `benchmarks.orthogonal_traffic`.
WHOLE = ('subspace_muon', 'normuon', 'dion', 'trion', 'scale')


def optimizers(args: Args) -> dict[str, Callable[[], Any]]:
  """From the name in the table to the optimizer."""
  lr, rank, decay = 1e-3, args.rank, 0.1
  return {
    'optax.adamw': lambda: optax.adamw(lr, weight_decay=decay),
    **{
      f'so.{name}': lambda make=make: so.optimizers.with_rank(make, rank)(
        lr, weight_decay=decay
      )
      for name, make in so.optimizers.READY_MADE.items()
      if name not in WHOLE
    },
    # It projects no stack: layers are handed to it one by one.
    'optax.contrib.galore': lambda: by_layer(
      optax.contrib.galore(lr, rank, weight_decay=decay)
    ),
  }


def by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Shows an optimizer stacks of layers as lists, for one that can't stack."""
  apart = lambda tree: jax.tree.map(list, tree)

  def together(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda _, x: jnp.stack(x), like, tree)

  def update(updates, state, params=None):
    params = None if params is None else apart(params)
    new, state = tx.update(apart(updates), state, params)
    return together(new, updates), state

  init = lambda params: tx.init(apart(params))
  return optax.GradientTransformation(init, update)


def matrices(width: int, mlp_width: int) -> dict[str, tuple[int, int]]:
  """From a kind of matrix to its sizes, input first."""
  d, f = width, mlp_width
  return {'attention': (d, d), 'up': (d, f), 'down': (f, d)}


def spec(kind: str, mesh: Mesh) -> P:
  """Layers stay whole; `fsdp` cuts the width, `tensor` heads and hidden units.

  On a mesh of one axis the input side is cut.
  """
  if len(mesh.axis_names) == 1:
    return P(None, 'fsdp', None)
  cut = ('tensor', 'fsdp') if kind == 'down' else ('fsdp', 'tensor')
  return P(None, *cut)


def compiled(tx: Any, params: Any, mesh: Mesh) -> tuple[Any, Any]:
  """The compiled update, and the shapes of the state that it was given."""
  state = programs.place_state(tx, params)
  with jax.set_mesh(mesh):
    # Where the new state goes is left to the compiler, as in most trainers.
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    return step.lower(params, state, params).compile(), state


# --- What is counted ---------------------------------------------------------


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


def by_kind(found: hlo.Found) -> dict[str, float]:
  """The bytes sent by each kind of collective."""
  kinds = sorted({c.kind for c in found.values()})
  of_kind = lambda kind: {k: c for k, c in found.items() if c.kind == kind}
  return {kind: hlo.sent(of_kind(kind)) for kind in kinds}


def fsdp_bytes(size: int, mesh: Mapping[str, int]) -> float:
  """What a device sends for FSDP itself, for `size` bytes of weights.

  They are gathered for the forward and for the backward pass, and their
  gradients are reduced and scattered, each over the axis `fsdp` of a ring.
  """
  n, others = mesh['fsdp'], math.prod(mesh.values()) // mesh['fsdp']
  return 3 * (n - 1) / n * size / others


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
    'by_kind': by_kind(usual),
    'by_kind_at_refresh': by_kind(dear),
  }


def measure(args: Args, name: str, mesh: Mesh) -> Iterator[dict]:
  """Yields a row for every kind of matrix."""
  for kind, (m, n) in matrices(args.width, args.mlp_width).items():
    place = NamedSharding(mesh, spec(kind, mesh))
    w = jax.ShapeDtypeStruct((args.layers, m, n), 'float32', sharding=place)
    tx, params = optimizers(args)[name](), {'w': w}
    build = lambda tx=tx, params=params: compiled(tx, params, mesh)
    seconds, (program, state) = harness.time_call(build)
    memory = programs.count_bytes(program)
    yield {
      'matrix': kind,
      'shape': [args.layers, m, n],
      'matrices_at_once': 1 if 'contrib' in name else args.layers,
      'compile_seconds': round(seconds, 1),
      'fsdp_bytes': fsdp_bytes(w.size * 4, mesh.shape),
      **communication(program.as_text(), name == 'so.ldadamw'),
      'state_bytes': programs.tree_bytes(state),
      'state_bytes_per_device': shard_bytes(state),
      # With the gradient and the parameters; in tiles of the TPU.
      'argument_bytes': memory.arguments,
      'gradient_bytes': shard_bytes(w),
      'temporary_bytes': memory.temporaries,
      'state_that_moves': moved(state, program.output_shardings[1]),
    }


# --- The page ----------------------------------------------------------------


def of_layer(rows: list[dict], key: str) -> float:
  """The sum of a row's value over the matrices of one layer."""
  return sum(IN_A_LAYER[x['matrix']] * x[key] / x['shape'][0] for x in rows)


def cells(name: str, rows: list[dict], rank: int, devices: int) -> list[str]:
  """One optimizer's line of the table: sums, or the worst of all matrices."""
  worst = lambda value: max(map(value, rows))
  thin = lambda x: x['matrices_at_once'] * rank * sum(x['shape'][1:])
  whole = lambda x: x['matrices_at_once'] * math.prod(x['shape'][1:])
  share = lambda x: x['state_bytes_per_device'] * devices / x['state_bytes']
  held = lambda x: x['temporary_bytes'] / x['gradient_bytes']
  mib = lambda key: of_layer(rows, key) / MIB
  count = lambda key: worst(lambda x: x[key])
  return [
    f'`{name}`',
    f'{mib("sent_bytes"):.2f}',
    f'{mib("sent_bytes_at_refresh"):.1f}',
    f'{count("collectives")} / {count("collectives_at_refresh")}',
    f'{worst(lambda x: x["largest"] / thin(x)):.2f}',
    f'{worst(lambda x: x["largest_at_any_step"] / thin(x)):.2f}',
    f'{worst(lambda x: x["largest_at_any_step"] / whole(x)):.2f}',
    f'{mib("state_bytes_per_device"):.2f}',
    f'{worst(share):.3f}',
    f'{worst(held):.1f}',
  ]


HEAD = ('', 'sent a step', 'at a refresh', 'collectives', 'largest / r(m+n)')
HEAD += ('at any step', 'largest / mn', 'state', 'over an equal share')
HEAD += ('temporary / gradient',)


def markdown(results: dict) -> str:
  """A table for every mesh."""
  rank = results['settings']['rank']
  parts = [f'Compiled for {results["compiled_for"]}.']
  for mesh, rows in results['rows'].items():
    fsdp = of_layer(next(iter(rows.values())), 'fsdp_bytes') / MIB
    lines = [cells(name, x, rank, DEVICES) for name, x in rows.items()]
    parts += [
      f'Mesh `{mesh}`; FSDP itself sends {fsdp:.1f} MiB for these weights:',
      harness.table(HEAD, lines),
    ]
  return '\n\n'.join(parts)


def main(args: Args) -> None:
  """Compiles everything, then prints and writes the tables."""
  programs.use_cpu(DEVICES)
  devices, target = programs.find_devices(args.topology)
  settings = harness.settings_of(args, 'only')
  results = harness.load_results(
    args.out, compiled_for=target, settings=settings
  )
  for mesh_name, shape in MESHES.items():
    axes = dict(zip(('fsdp', 'tensor'), shape, strict=False))
    mesh = programs.make_mesh(devices, args.explicit, **axes)
    rows = results.setdefault('rows', {}).setdefault(mesh_name, {})
    for name in args.only or optimizers(args):
      if name not in rows:
        rows[name] = list(measure(args, name, mesh))
        harness.save_results(args.out, results)
      print(f'{mesh_name}: {name}', flush=True)
  # Those compiled for CPUs are in a file of their own beside this one.
  files = pathlib.Path(args.out).parent.glob('communication*.json')
  text = '\n\n'.join(markdown(json.loads(f.read_text())) for f in sorted(files))
  print(text)
  harness.fill_page(args.docs, {'tables': text})


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
