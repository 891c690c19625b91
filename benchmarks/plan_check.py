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
from typing import Any, NamedTuple

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

# model, method, rank, layers, devices along fsdp, arguments' layout. Layers are
# kept, recomputed ('remat') or also updated one by one ('layerwise').
ROWS = (
  ('llama_7b', 'golore8bit', 1024, 'layerwise', 1, 'auto'),
  ('llama_7b', 'gaussian8bit', 1024, 'layerwise', 1, 'auto'),
  ('llama_7b', 'adamw', 0, 'layerwise', 1, 'auto'),
  ('llama_7b', 'adamw8bit', 0, 'layerwise', 1, 'auto'),
  ('llama_7b', 'galore', 1024, 'layerwise', 1, 'auto'),
  ('llama_7b', 'galore8bit', 1024, 'layerwise', 1, 'auto'),
  ('llama_7b', 'subspace_adamw8bit', 1024, 'layerwise', 1, 'auto'),
  ('llama_7b', 'adafactor', 0, 'layerwise', 1, 'auto'),
  ('llama_7b', 'golore8bit', 1024, 'layerwise', 2, 'auto'),
  ('llama_1b', 'golore8bit', 512, 'layerwise', 1, 'auto'),
  ('llama_1b', 'adamw', 0, 'layerwise', 1, 'auto'),
  ('llama_7b', 'adamw8bit', 0, 'remat', 1, 'auto'),
  ('llama_7b', 'galore8bit', 1024, 'remat', 1, 'auto'),
  ('llama_350m', 'adamw', 0, 'kept', 1, 'default'),
  ('llama_350m', 'adamw', 0, 'remat', 1, 'default'),
  ('llama_350m', 'galore', 256, 'kept', 1, 'default'),
  ('llama_350m', 'galore', 256, 'remat', 1, 'default'),
  ('llama_1b', 'adamw', 0, 'kept', 1, 'default'),
  ('llama_1b', 'adamw', 0, 'remat', 1, 'default'),
  ('llama_1b', 'adamw', 0, 'remat', 1, 'auto'),
  ('llama_7b', 'adamw', 0, 'kept', 1, 'default'),
  ('llama_7b', 'adamw', 0, 'remat', 1, 'default'),
  ('llama_7b', 'adamw', 0, 'remat', 2, 'default'),
  ('llama_7b', 'adamw', 0, 'remat', 1, 'auto'),
  ('llama_7b', 'adafactor', 0, 'remat', 1, 'default'),
  ('llama_7b', 'galore', 1024, 'remat', 1, 'default'),
  ('llama_1b', 'galore', 512, 'kept', 1, 'default'),
  ('llama_1b', 'galore', 512, 'remat', 1, 'default'),
  ('llama_350m', 'adamw', 0, 'remat', 1, 'auto'),
  ('llama_1b', 'galore', 512, 'remat', 1, 'auto'),
  ('llama_7b', 'adafactor', 0, 'remat', 1, 'auto'),
  ('llama_7b', 'galore', 1024, 'kept', 1, 'default'),
  ('llama_7b', 'subspace_adamw', 1024, 'remat', 1, 'default'),
)


# GB of LLaMA-7B with batch 1 and 2,048 tokens, https://arxiv.org/abs/2403.03507.
PAPERS = {('adamw', 'remat'): '58', ('galore8bit', 'layerwise'): '22'}

# The papers count moments in the parameters' dtype, and so do the page's
# commands, by `--moment-dtype bfloat16`; ours are float32 unless told.
MOMENT_DTYPES: dict[str, str] = dict.fromkeys(
  ('galore', 'subspace_adamw'), 'bfloat16'
)

# Queries whose scores are in memory at a time, of a step layer by layer.
CHUNK = 512


class Row(NamedTuple):
  model: str
  method: str
  rank: int
  layers: str
  fsdp: int
  layout: str


@dataclasses.dataclass(frozen=True)
class Args:
  """What is compiled, and for what."""

  seq: int = 2048
  topology: str = 'v5p:2x2x1'
  only: str = ''  # part of model-method-rank-layers-...: leaves out the others
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


class Step(NamedTuple):
  """A training step to be compiled.

  Attributes:
    params: shapes, with shardings.
    state: likewise.
    update: (params, state, tokens) -> (params, state, other things).
  """

  params: Any
  state: Any
  update: Any


def with_state(tx: Any, params: Any, update: Any) -> Step:
  """A step whose state lies where `so.state_sharding` says."""
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  state = jax.eval_shape(tx.init, params)
  state = jax.tree.map(place, state, so.state_sharding(tx, params))
  return Step(params, state, update)


def optimizer(row: Row) -> Any:
  """The optimizer of a row."""
  return plan.optimizer(
    row.method,
    rank=row.rank or 0.25,
    moment_dtype=MOMENT_DTYPES.get(row.method),
  )


def ordinary(mesh: Mesh, row: Row) -> Step:
  """A step of the example LLaMA with all gradients at once."""
  config = llama.named(
    row.model,
    dtype='bfloat16',
    param_dtype='bfloat16',
    remat=row.layers == 'remat',
    **meshes.constraints(mesh),
  )
  graphdef, params = programs.model(config)
  tx = optimizer(row)
  loss = lambda p, x: programs.loss(programs.named_merge, graphdef, p, x)
  update = programs.whole_step(loss, tx, jax.value_and_grad)
  return with_state(tx, parameters(mesh, params), update)


def parameters(mesh: Mesh, params: Any) -> Any:
  return on(mesh, meshes.parameters(mesh, params) if mesh.size > 1 else params)


def layerwise(mesh: Mesh, row: Row) -> Step:
  """A step of the planner's LLaMA that updates layer by layer."""
  model = plan.named(row.model, 'bfloat16', attention_chunk=CHUNK)
  places = meshes.constraints(mesh)
  rows, table = places.get('activations'), places.get('looked_up')

  def embed(rest, tokens):
    kept = llama.place(rest['embed']['embedding'], table)
    rest = rest | {'embed': {'embedding': kept}}
    return llama.place(model.embed(rest, tokens), rows)

  step = so.layerwise(
    optimizer(row),
    embed,
    lambda layer, x, tokens: llama.place(model.block(layer, x), rows),
    jax.checkpoint(model.head),
  )
  return with_state(step, parameters(mesh, model.params), step.step)


def compiled(args: Args, row: Row) -> Any:
  """The program of a step, and the name of its devices."""
  mesh, name = devices(args.topology, row.fsdp)
  step = (layerwise if row.layers == 'layerwise' else ordinary)(mesh, row)
  tokens = jax.ShapeDtypeStruct((row.fsdp, args.seq), jnp.int32)
  kept, rest = step[:2], NamedSharding(mesh, P())
  if row.layout == 'auto':
    where = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), kept)
  else:
    where = jax.tree.map(lambda x: x.sharding, kept)
  with jax.set_mesh(mesh):
    run = jax.jit(
      step.update,
      donate_argnums=(0, 1),
      in_shardings=(*where, NamedSharding(mesh, P('fsdp'))),
      out_shardings=(*where, rest),
    )
    # The layout of arguments is either theirs or XLA's choice.
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), kept)
    return run.lower(*bare, tokens).compile(), name


def copied(program: Any) -> int:
  """Bytes of parameters that are first copied whole into another layout."""
  total = 0
  for shape in re.findall(
    r'= bf16\[([\d,]+)\]\S* copy\(%params', program.as_text()
  ):
    total += 2 * math.prod(map(int, shape.split(',')))
  return total


def measured(args: Args, row: Row) -> dict[str, Any]:
  """XLA's bytes beside the plan's."""
  program, name = compiled(args, row)
  memory = program.memory_analysis()
  beside = memory.output_size_in_bytes - memory.alias_size_in_bytes
  arguments = memory.argument_size_in_bytes
  return row._asdict() | {
    'attention_chunk': CHUNK if row.layers == 'layerwise' else 0,
    'batch': row.fsdp,
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
  moment_dtype = MOMENT_DTYPES.get(row['method'])
  made = plan.plan(
    row['model'],
    row['method'],
    batch=row['batch'],
    seq=row['seq'],
    mesh=f'fsdp={row["fsdp"]}',
    rank=row['rank'] or 0.25,
    moment_dtype=moment_dtype,
    remat=row['layers'] == 'remat',
    layerwise=row['layers'] == 'layerwise',
    attention_chunk=row['attention_chunk'],
  )
  kept = made.weights + made.states + made.bases
  arguments, temporaries = row['argument_bytes'], made.total - kept
  off = lambda mine, theirs: round(mine / theirs - 1, 4)
  return row | {
    'moment_dtype': moment_dtype,
    'plan': made._asdict() | {'total': made.total},
    'error': off(made.total, row['peak_bytes']),
    'error_arguments': off(kept, arguments),
    'error_temporaries': off(temporaries, row['peak_bytes'] - arguments),
    'error_with_copies': off(
      made.total + row['copied_bytes'], row['peak_bytes']
    ),
    'error_of_sum': off(made.total, row['sum_bytes']),
  }


def write(out: pathlib.Path, rows: list[dict[str, Any]]):
  out.write_text(json.dumps(rows, indent=1) + '\n')


def line(row: dict[str, Any]) -> str:
  what = ' '.join(str(row[name]) for name in Row._fields)
  names = ('argument_bytes', 'peak_bytes', 'copied_bytes', 'sum_bytes')
  sizes = ', '.join(f'{name} {row[name] / 1e9:.2f}' for name in names)
  errors = ', '.join(f'{k} {v:+.1%}' for k, v in row.items() if 'error' in k)
  return f'{what}: {sizes}, plan {row["plan"]["total"] / 1e9:.2f}; {errors}'


def table(rows: list[dict[str, Any]]) -> str:
  """The rows for a page, in GB."""
  head = (
    'model, optimizer, rank',
    'layers, fsdp, layout',
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
    lines.append(
      [
        f'{row["model"]}, {row["method"]}{rank}',
        f'{row["layers"]}, {row["fsdp"]}, {row["layout"]}',
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


def missed(rows: list[dict[str, Any]]) -> str:
  """How many rows the plan is within 5 % of, and which it is not."""
  lines = []
  for against in ('error', 'error_of_sum'):
    what = {'error': 'peak', 'error_of_sum': 'sum'}[against]
    far = [row for row in rows if abs(row[against]) > 0.05]
    names = [f'{name(row)} ({row[against]:+.1%})' for row in far]
    near = (
      f'- {len(rows) - len(far)} of {len(rows)} rows are within 5 % of the '
    )
    rest = f'; not: {", ".join(names)}' if far else ''
    lines.append(f'{near}{what}{rest}.')
  return '\n'.join(lines)


def name(row: dict[str, Any]) -> str:
  parts = ('model', 'method', 'layers', 'fsdp', 'layout')
  return ' '.join(str(row[part]) for part in parts)


def seven(rows: list[dict[str, Any]]) -> str:
  """What LLaMA-7B takes on one device, beside the paper's figures."""
  cells = [
    ('optimizer, rank', 'layers', 'sum', 'peak', 'plan', "the paper's"),
    ['---'] * 6,
  ]
  alone = lambda row: (row['model'], row['fsdp']) == ('llama_7b', 1)
  auto = [row for row in rows if alone(row) and row['layout'] == 'auto']
  for row in sorted(auto, key=lambda row: -row['sum_bytes']):
    rank = f', {row["rank"]}' if row['rank'] else ''
    sizes = row['sum_bytes'], row['peak_bytes'], row['plan']['total']
    cells.append(
      [
        row['method'] + rank,
        row['layers'],
        *(f'{size / 1e9:.2f}' for size in sizes),
        PAPERS.get((row['method'], row['layers']), ''),
      ]
    )
  return '\n'.join(f'| {" | ".join(line)} |' for line in cells)


def main(args: Args):
  out = pathlib.Path(args.out)
  rows = json.loads(out.read_text()) if out.exists() else []
  there = {(*(row[k] for k in Row._fields), row['seq']) for row in rows}
  for row in map(Row._make, ROWS):
    if (*row, args.seq) in there or args.only not in '-'.join(map(str, row)):
      continue
    rows.append(measured(args, row))
    print(rows[-1], flush=True)
    write(out, rows)
  order = lambda row: ROWS.index(tuple(row[k] for k in Row._fields))
  rows = [with_plan(row) for row in sorted(rows, key=order)]
  for row in rows:
    print(line(row), flush=True)
  write(out, rows)
  tables = {
    'checked': table(rows),
    'missed': missed(rows),
    'seven': seven(rows),
  }
  pages.fill(pathlib.Path(args.docs), tables)


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
