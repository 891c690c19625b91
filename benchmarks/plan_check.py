"""What `subspace_optax.plan` says beside XLA's account of the same step.

  python benchmarks/plan_check.py

Steps of the example LLaMA are compiled for a TPU topology, which needs libtpu
and no TPU; nothing runs. Parameters and state are donated. XLA gives two
figures: the peak of its heap, which is what it holds against a device's memory,
and the sum of arguments, temporaries, and results that take no argument's
place, which is above the peak (on a TPU by up to the size of the parameters).
Where XLA wants a parameter in another layout it copies it first: that is
counted apart, since no trace knows of it, and does not happen with the layout
'auto', where XLA says how parameters shall lie.
Rows that are there already are not compiled again.
"""

import dataclasses
import json
import math
import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / 'examples'))

# First, since it sets what jax reads when it is imported.
import rso_programs as programs  # noqa: E402, I001

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.experimental.layout import Format  # noqa: E402
from jax.experimental.layout import Layout  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import AxisType  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
import numpy as np  # noqa: E402
import tyro  # noqa: E402

import llama  # noqa: E402
import mesh as meshes  # noqa: E402
import pages  # noqa: E402
import subspace_optax as so  # noqa: E402
from subspace_optax import plan  # noqa: E402

# model, method, rank, layers recomputed, devices along fsdp, arguments' layout
ROWS = (
  ('llama_350m', 'adamw', 0, False, 1, 'default'),
  ('llama_350m', 'adamw', 0, True, 1, 'default'),
  ('llama_350m', 'galore', 256, False, 1, 'default'),
  ('llama_350m', 'galore', 256, True, 1, 'default'),
  ('llama_1b', 'adamw', 0, False, 1, 'default'),
  ('llama_1b', 'adamw', 0, True, 1, 'default'),
  ('llama_1b', 'adamw', 0, True, 1, 'auto'),
  ('llama_7b', 'adamw', 0, False, 1, 'default'),
  ('llama_7b', 'adamw', 0, True, 1, 'default'),
  ('llama_7b', 'adamw', 0, True, 2, 'default'),
  ('llama_7b', 'adamw', 0, True, 1, 'auto'),
  ('llama_7b', 'adafactor', 0, True, 1, 'default'),
  ('llama_7b', 'galore', 1024, True, 1, 'default'),
  ('llama_1b', 'galore', 512, False, 1, 'default'),
  ('llama_1b', 'galore', 512, True, 1, 'default'),
  ('llama_350m', 'adamw', 0, True, 1, 'auto'),
  ('llama_1b', 'galore', 512, True, 1, 'auto'),
  ('llama_7b', 'adafactor', 0, True, 1, 'auto'),
  ('llama_7b', 'galore', 1024, False, 1, 'default'),
  ('llama_7b', 'subspace_adamw', 1024, True, 1, 'default'),
)


@dataclasses.dataclass(frozen=True)
class Args:
  """What is compiled, and for what."""

  seq: int = 2048
  topology: str = 'v5p:2x2x1'
  only: str = ''  # a model: leaves out the rows of others
  out: str = str(ROOT / 'results' / 'plan.json')
  docs: str = str(ROOT.parent / 'docs' / 'plan.md')


def devices(topology: str, count: int) -> tuple[Mesh, str]:
  """A mesh along fsdp, and what its devices are."""
  found = topologies.get_topology_desc(topology, 'tpu').devices
  axes = (AxisType.Auto,)
  mesh = Mesh(np.array(found[:count]), ('fsdp',), axis_types=axes)
  return mesh, f'{found[0].device_kind}, topology {topology}'


def on(mesh: Mesh, tree: Any, *axes: str) -> Any:
  """Shapes with a sharding, where they have none of this mesh."""

  def place(x):
    known = getattr(x, 'sharding', None)
    named = isinstance(known, NamedSharding)
    new = known if named else NamedSharding(mesh, P(*axes))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=new)

  return jax.tree.map(place, tree)


def compiled(args: Args, row: tuple[Any, ...]) -> Any:
  """The program of an ordinary step, and the name of its devices."""
  model, method, rank, remat, count, layout = row
  mesh, name = devices(args.topology, count)
  config = llama.named(
    model,
    dtype='bfloat16',
    param_dtype='bfloat16',
    remat=remat,
    **meshes.constraints(mesh),
  )
  graphdef, params = programs.model(config)
  tx = plan.optimizer(method, rank=rank or 0.25)
  params = on(mesh, meshes.parameters(mesh, params) if count > 1 else params)
  state = jax.eval_shape(tx.init, params)
  where = so.state_sharding(tx, params)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    where,
  )
  tokens = jax.ShapeDtypeStruct((count, args.seq), jnp.int32)
  loss = lambda p, x: programs.loss(programs.named_merge, graphdef, p, x)
  step = programs.whole_step(loss, tx, jax.value_and_grad)
  sharding_of = lambda tree: jax.tree.map(lambda x: x.sharding, tree)
  out = sharding_of(params), sharding_of(state), NamedSharding(mesh, P())
  given: dict[str, Any] = {'out_shardings': out}
  if layout == 'auto':
    auto = lambda x: Format(Layout.AUTO, x.sharding)
    kept = jax.tree.map(auto, (params, state))
    rows = NamedSharding(mesh, P('fsdp'))
    given = {
      'in_shardings': (*kept, rows),
      'out_shardings': (*kept, NamedSharding(mesh, P())),
    }
  with jax.set_mesh(mesh):
    run = jax.jit(step, donate_argnums=(0, 1), **given)
    lowered = run.lower(params, state, on(mesh, tokens, 'fsdp'))
    return lowered.compile(), name


def copied(program: Any) -> int:
  """Bytes of parameters that are first copied whole into another layout."""
  total = 0
  for shape in re.findall(
    r'= bf16\[([\d,]+)\]\S* copy\(%params', program.as_text()
  ):
    total += 2 * math.prod(map(int, shape.split(',')))
  return total


def measured(args: Args, row: tuple[Any, ...]) -> dict[str, Any]:
  """XLA's bytes beside the plan's."""
  model, method, rank, remat, count, layout = row
  program, name = compiled(args, row)
  memory = program.memory_analysis()
  beside = memory.output_size_in_bytes - memory.alias_size_in_bytes
  arguments = memory.argument_size_in_bytes
  return {
    'model': model,
    'method': method,
    'rank': rank,
    'remat': remat,
    'fsdp': count,
    'layout': layout,
    'batch': count,
    'seq': args.seq,
    'target': name,
    'jax': jax.__version__,
    'argument_bytes': arguments,
    'temporary_bytes': memory.temp_size_in_bytes,
    'sum_bytes': arguments + memory.temp_size_in_bytes + beside,
    'peak_bytes': memory.peak_memory_in_bytes,
    'copied_bytes': copied(program),
  }


def with_plan(row: dict[str, Any]) -> dict[str, Any]:
  """A row with the plan's parts, and how far they are off."""
  made = plan.plan(
    row['model'],
    row['method'],
    batch=row['batch'],
    seq=row['seq'],
    mesh=f'fsdp={row["fsdp"]}',
    rank=row['rank'] or 0.25,
    remat=row['remat'],
  )
  kept = made.weights + made.states + made.bases
  arguments, temporaries = row['argument_bytes'], made.total - kept
  off = lambda mine, theirs: round(mine / theirs - 1, 4)
  return row | {
    'plan': made._asdict() | {'total': made.total},
    'error': off(made.total, row['peak_bytes']),
    'error_arguments': off(kept, arguments),
    'error_temporaries': off(temporaries, row['peak_bytes'] - arguments),
    'error_with_copies': off(
      made.total + row['copied_bytes'], row['peak_bytes']
    ),
    'error_of_sum': off(made.total, row['sum_bytes']),
  }


def line(row: dict[str, Any]) -> str:
  names = ('model', 'method', 'rank', 'remat', 'fsdp', 'layout')
  what = ' '.join(str(row[name]) for name in names)
  names = ('argument_bytes', 'peak_bytes', 'copied_bytes', 'sum_bytes')
  sizes = ', '.join(f'{name} {row[name] / 1e9:.2f}' for name in names)
  errors = ', '.join(f'{k} {v:+.1%}' for k, v in row.items() if 'error' in k)
  return f'{what}: {sizes}, plan {row["plan"]["total"] / 1e9:.2f}; {errors}'


def table(rows: list[dict[str, Any]]) -> str:
  """The rows for a page, in GB."""
  head = (
    'model, optimizer, rank',
    'recomputed, fsdp, layout',
    'peak',
    'plan',
    'off',
    'off in temporaries',
    'copies',
    'off with copies',
    'sum',
  )
  lines = [head, ['---'] * len(head)]
  for row in rows:
    rank = f', {row["rank"]}' if row['rank'] else ''
    remat = 'yes' if row['remat'] else 'no'
    lines.append(
      [
        f'{row["model"]}, {row["method"]}{rank}',
        f'{remat}, {row["fsdp"]}, {row["layout"]}',
        f'{row["peak_bytes"] / 1e9:.2f}',
        f'{row["plan"]["total"] / 1e9:.2f}',
        f'{row["error"]:+.1%}',
        f'{row["error_temporaries"]:+.1%}',
        f'{row["copied_bytes"] / 1e9:.2f}',
        f'{row["error_with_copies"]:+.1%}',
        f'{row["sum_bytes"] / 1e9:.2f}',
      ]
    )
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
  names = ('model', 'method', 'rank', 'remat', 'fsdp', 'layout', 'seq')
  return tuple(row[name] for name in names)


def main(args: Args):
  out = pathlib.Path(args.out)
  rows = json.loads(out.read_text()) if out.exists() else []
  rows = [with_plan(row) for row in rows]
  for row in rows:
    print(line(row), flush=True)
  there = {key(row) for row in rows}
  for row in ROWS:
    if (*row, args.seq) in there or args.only not in row[0]:
      continue
    rows.append(with_plan(measured(args, row)))
    print(line(rows[-1]), flush=True)
    out.write_text(json.dumps(rows, indent=1) + '\n')
  out.write_text(json.dumps(rows, indent=1) + '\n')
  pages.fill(pathlib.Path(args.docs), {'checked': table(rows)})


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
