"""What `subspace_optax.plan` predicts, beside XLA's account of the same step.

Steps of the example LLaMA are compiled for a TPU topology, which needs libtpu
but no TPU; nothing runs. Parameters and state are donated. XLA gives two
figures. The peak of its heap is what it compares with a device's memory. The
sum of arguments, temporaries, and results that do not reuse an argument's
memory is above the peak (on a TPU by up to the size of the parameters). If XLA
wants a parameter in another layout, it copies it first. These copies are
counted apart, since no trace knows of them. They do not happen with the layout
'auto', where XLA chooses the layout of parameters. Rows that are in
results/plan.json already are not compiled again.
"""

import dataclasses
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

import jax
from jax.experimental.layout import Format
from jax.experimental.layout import Layout
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import tyro

from benchmarks import harness
from benchmarks import programs
from benchmarks import rso_methods
from benchmarks.harness import GB
import llama
import mesh as meshes
import subspace_optax as so
from subspace_optax import plan


class Row(NamedTuple):
  """A step that is compiled.

  Layers are kept, recomputed or also updated one by one.
  """

  model: str
  method: str
  rank: int
  layers: str  # 'kept', 'remat' or 'layerwise'
  fsdp: int  # devices
  layout: str  # of arguments: 'auto' leaves it to XLA


ROWS = tuple(
  Row(*row)
  for row in (
    ('llama_7b', 'golore8bit', 1024, 'layerwise', 1, 'auto'),
    ('llama_7b', 'gaussian8bit', 1024, 'layerwise', 1, 'auto'),
    ('llama_7b', 'adamw', 0, 'layerwise', 1, 'auto'),
    ('llama_7b', 'adamw8bit', 0, 'layerwise', 1, 'auto'),
    ('llama_7b', 'galore', 1024, 'layerwise', 1, 'auto'),
    ('llama_7b', 'galore8bit', 1024, 'layerwise', 1, 'auto'),
    ('llama_7b', 'subspace_adamw8bit', 1024, 'layerwise', 1, 'auto'),
    ('llama_7b', 'subspace_muon8bit', 1024, 'layerwise', 1, 'auto'),
    ('llama_7b', 'subspace_muon8bit', 1024, 'layerwise', 1, 'default'),
    ('llama_7b', 'normuon8bit', 0, 'layerwise', 1, 'auto'),
    ('llama_7b', 'normuon4bit', 0, 'layerwise', 1, 'auto'),
    ('llama_7b', 'normuon_no_momentum', 0, 'layerwise', 1, 'auto'),
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
)


# GB of LLaMA-7B with batch 1 and 2,048 tokens, https://arxiv.org/abs/2403.03507.
PAPERS = {('adamw', 'remat'): '58', ('galore8bit', 'layerwise'): '22'}

# The papers count moments in the parameters' dtype, and so do the page's
# commands, by `--moment-dtype bfloat16`; ours are float32 unless told.
MOMENT_DTYPES = {'galore': 'bfloat16', 'subspace_adamw': 'bfloat16'}

# Queries whose scores are in memory at a time, of a step layer by layer.
CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Args:
  """What is compiled, and for what."""

  seq: int = 2048
  topology: str = 'v5p:2x2x1'
  only: str = ''  # rows whose model-method-rank-layers-... contain this
  out: str = str(harness.RESULTS / 'plan.json')
  docs: str = str(harness.DOCS / 'plan.md')


# --- XLA ---------------------------------------------------------------------


class Step(NamedTuple):
  """A training step to be compiled; shapes have shardings."""

  params: Any
  state: Any
  update: Any  # (params, state, tokens) -> (params, state, other things)


def optimizer(row: Row) -> Any:
  """The optimizer of a row."""
  moments = MOMENT_DTYPES.get(row.method)
  rank = row.rank or 0.25
  return plan.optimizer(row.method, rank=rank, moment_dtype=moments)


def parameters(mesh: Mesh, params: Any) -> Any:
  """The shapes of parameters, with shardings."""
  if mesh.size > 1:
    return meshes.parameters(mesh, params)
  return programs.place(params, NamedSharding(mesh, P()))


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
  tx, params = optimizer(row), parameters(mesh, params)
  merge = rso_methods.named_merge
  loss = lambda p, x: programs.loss(merge, graphdef, p, x)
  state = programs.place_state(tx, params)
  return Step(params, state, programs.whole_step(loss, tx))


def layerwise_step(mesh: Mesh, row: Row) -> tuple[so.TrainStep, Any]:
  """A step of the planner's LLaMA layer by layer, and shapes of parameters."""
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
  return step, parameters(mesh, model.params)


def layerwise(mesh: Mesh, row: Row) -> Step:
  """A step that updates layer by layer."""
  step, params = layerwise_step(mesh, row)
  return Step(params, programs.place_state(step, params), step.step)


def compiled(args: Args, row: Row) -> tuple[Any, str]:
  """The program of a step, and the name of its devices."""
  devices, name = programs.find_devices(args.topology)
  if name == programs.CPU:
    raise ValueError('plan_check compiles for TPUs only: pip install libtpu')
  mesh = programs.make_mesh(devices, fsdp=row.fsdp)
  step = (layerwise if row.layers == 'layerwise' else ordinary)(mesh, row)
  tokens = jax.ShapeDtypeStruct((row.fsdp, args.seq), jnp.int32)
  kept, rest = step[:2], NamedSharding(mesh, P())
  where = jax.tree.map(lambda x: x.sharding, kept)
  if row.layout == 'auto':
    where = jax.tree.map(lambda s: Format(Layout.AUTO, s), where)
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
  copies = r'= bf16\[([\d,]+)\]\S* copy\(%params'
  shapes = re.findall(copies, program.as_text())
  return sum(2 * math.prod(map(int, shape.split(','))) for shape in shapes)


def measured(args: Args, row: Row) -> dict[str, Any]:
  """XLA's bytes."""
  program, name = compiled(args, row)
  memory = programs.count_bytes(program)
  return row._asdict() | {
    'attention_chunk': CHUNK if row.layers == 'layerwise' else 0,
    'batch': row.fsdp,
    'seq': args.seq,
    'target': name,
    'jax': jax.__version__,
    'argument_bytes': memory.arguments,
    'temporary_bytes': memory.temporaries,
    'sum_bytes': memory.total,
    'peak_bytes': memory.peak,
    'copied_bytes': copied(program),
  }


# --- The plan ----------------------------------------------------------------


def plan_of(row: dict[str, Any]) -> Any:
  """What the planner says of a row."""
  return plan.plan(
    row['model'],
    row['method'],
    batch=row['batch'],
    seq=row['seq'],
    mesh=f'fsdp={row["fsdp"]}',
    rank=row['rank'] or 0.25,
    moment_dtype=MOMENT_DTYPES.get(row['method']),
    remat=row['layers'] == 'remat',
    layerwise=row['layers'] == 'layerwise',
    attention_chunk=row['attention_chunk'],
  )


def with_plan(row: dict[str, Any]) -> dict[str, Any]:
  """A row with the plan's parts, and how far they are off."""
  made, peak = plan_of(row), row['peak_bytes']
  kept = made.weights + made.states + made.bases
  arguments, temporaries = row['argument_bytes'], made.total - kept
  off = lambda mine, theirs: round(mine / theirs - 1, 4)
  return row | {
    'moment_dtype': MOMENT_DTYPES.get(row['method']),
    'plan': made._asdict() | {'total': made.total},
    'error': off(made.total, peak),
    'error_arguments': off(kept, arguments),
    'error_temporaries': off(temporaries, peak - arguments),
    'error_with_copies': off(made.total + row['copied_bytes'], peak),
    'error_of_sum': off(made.total, row['sum_bytes']),
  }


# --- The page ----------------------------------------------------------------


def ranked(row: dict[str, Any]) -> str:
  """The optimizer, and its rank if there is one."""
  return row['method'] + (f', {row["rank"]}' if row['rank'] else '')


SIZES = {
  'peak': harness.gigabytes('peak_bytes'),
  'plan': lambda row: f'{row["plan"]["total"] / GB:.2f}',
}


def table(rows: list[dict[str, Any]]) -> str:
  """All rows, in GB."""
  return harness.table_of(
    rows,
    {
      'model, optimizer, rank': lambda row: f'{row["model"]}, {ranked(row)}',
      'layers, fsdp, layout': '{layers}, {fsdp}, {layout}',
      **SIZES,
      'off': '{error:+.1%}',
      'off in temporaries': '{error_temporaries:+.1%}',
      'copies': harness.gigabytes('copied_bytes'),
      'off with copies': '{error_with_copies:+.1%}',
      'sum': harness.gigabytes('sum_bytes'),
    },
  )


def missed(rows: list[dict[str, Any]]) -> str:
  """How many rows the plan is within 5 % of, and which it is not."""
  lines = []
  parts = ('model', 'method', 'layers', 'fsdp', 'layout')
  name = lambda row: ' '.join(str(row[part]) for part in parts)
  for against, what in (('error', 'peak'), ('error_of_sum', 'sum')):
    far = [row for row in rows if abs(row[against]) > 0.05]
    names = [f'{name(row)} ({row[against]:+.1%})' for row in far]
    near = f'{len(rows) - len(far)} of {len(rows)} rows are within 5 % of the '
    rest = f'; not: {", ".join(names)}' if far else ''
    lines.append(f'- {near}{what}{rest}.')
  return '\n'.join(lines)


def printed(row: dict[str, Any]) -> str:
  """What the paper says of a row."""
  return PAPERS.get((row['method'], row['layers']), '')


def seven(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """LLaMA-7B on one device, the largest first."""
  wanted = ('llama_7b', 1, 'auto')
  keys = ('model', 'fsdp', 'layout')
  found = [row for row in rows if tuple(row[k] for k in keys) == wanted]
  return sorted(found, key=lambda row: -row['sum_bytes'])


def table_of_seven(rows: list[dict[str, Any]]) -> str:
  """What LLaMA-7B takes on one device, beside the paper's figures."""
  columns = {'optimizer, rank': ranked, 'layers': '{layers}'}
  columns |= {'sum': harness.gigabytes('sum_bytes'), **SIZES}
  return harness.table_of(seven(rows), columns | {"the paper's": printed})


def main(args: Args) -> None:
  """Compiles what is missing, plans everything, and fills the page."""
  programs.use_cpu()
  out = pathlib.Path(args.out)
  rows = json.loads(out.read_text()) if out.exists() else []
  there = {(*(row[k] for k in Row._fields), row['seq']) for row in rows}
  for row in ROWS:
    if (*row, args.seq) in there or args.only not in '-'.join(map(str, row)):
      continue
    rows.append(measured(args, row))
    print(rows[-1], flush=True)
    harness.save_results(out, rows)
  order = lambda row: ROWS.index(Row(*(row[k] for k in Row._fields)))
  rows = [with_plan(row) for row in sorted(rows, key=order)]
  harness.save_results(out, rows)
  tables = {'checked': table(rows), 'missed': missed(rows)}
  tables['seven'] = table_of_seven(rows)
  print('\n\n'.join(tables.values()))
  harness.fill_page(args.docs, tables)


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
