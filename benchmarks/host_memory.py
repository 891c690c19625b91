"""Steps of LLaMA-7B with states on the host, by compilation for a TPU.

Layers are updated one by one. Nothing runs: XLA says what a device holds, apart
from what the host holds for it, and the compiled program says what crosses the
link between the two. The same step without any state stands beside them.

Results: results/host_memory.json and a table in docs/memory.md. Rows that are
in the JSON already are not compiled again.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental.layout import Format
from jax.experimental.layout import Layout
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax
import tyro

from benchmarks import harness
from benchmarks import hlo
from benchmarks import programs
import subspace_optax as so
from subspace_optax import plan

# Queries whose scores are in memory at a time.
CHUNK = 512
OPTIMIZERS = {
  'no state (SGD)': lambda rank: optax.sgd(1e-3),
  'AdamW, float32 moments': lambda rank: plan.optimizer(
    'adamw', rank=0.25, moment_dtype='float32'
  ),
  'subspace_adamw': lambda rank: so.subspace_adamw(1e-3, rank),
}


class Row(NamedTuple):
  """A step that is compiled."""

  optimizer: str
  memory: str  # of the states
  fetch: str  # of `so.layerwise`


# How the table says where states are.
WHERE = {
  ('device', 'layer'): 'device',
  ('pinned_host', 'layer'): "host, `fetch='layer'`",
  ('pinned_host', 'leaf'): "host, `fetch='leaf'`",
}
ROWS = (
  Row('no state (SGD)', 'device', 'layer'),
  Row('AdamW, float32 moments', 'device', 'layer'),
  Row('AdamW, float32 moments', 'pinned_host', 'layer'),
  Row('AdamW, float32 moments', 'pinned_host', 'leaf'),
  Row('subspace_adamw', 'device', 'layer'),
  Row('subspace_adamw', 'pinned_host', 'layer'),
  Row('subspace_adamw', 'pinned_host', 'leaf'),
)


@dataclasses.dataclass(frozen=True)
class Args:
  """What is compiled, and for what."""

  model: str = 'llama_7b'
  rank: int = 1024
  seq: int = 2048
  topology: str = 'v5p:2x2x1'
  out: str = str(harness.RESULTS / 'host_memory.json')
  docs: str = str(harness.DOCS / 'memory.md')


def compiled(args: Args, row: Row) -> tuple[Any, str]:
  """The program of a step, and the name of its devices."""
  devices, name = programs.find_devices(args.topology)
  if name == programs.CPU:
    raise ValueError('host_memory compiles for TPUs only: pip install libtpu')
  mesh = programs.make_mesh(devices, fsdp=1)
  model = plan.named(args.model, 'bfloat16', attention_chunk=CHUNK)
  step = so.layerwise(
    OPTIMIZERS[row.optimizer](args.rank),
    model.embed,
    lambda layer, x, tokens: model.block(layer, x),
    jax.checkpoint(model.head),
    fetch=row.fetch,
  )
  params = programs.place(model.params, NamedSharding(mesh, P()))
  places = step.state_sharding(params, memory_kind=row.memory)
  state = programs.place(jax.eval_shape(step.init, params), places)
  # XLA says how parameters shall lie: it would else copy some of them first.
  where = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), params)
  bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  tokens = jax.ShapeDtypeStruct((1, args.seq), jnp.int32)
  with jax.set_mesh(mesh):
    run = jax.jit(
      step.step,
      donate_argnums=(0, 1),
      in_shardings=(where, places, None),
      out_shardings=(where, places, None),
    )
    return run.lower(bare, state, tokens).compile(), name


def measured(args: Args, row: Row) -> dict[str, Any]:
  """XLA's bytes, and what crosses the link between device and host."""
  program, name = compiled(args, row)
  memory, moved = (
    programs.count_bytes(program),
    hlo.transfers(program.as_text()),
  )
  crossing = lambda sends: sum(
    x.size * x.times for x in moved if x.sends is sends
  )
  on_host = program.memory_analysis()
  return row._asdict() | {
    'model': args.model,
    'rank': args.rank,
    'seq': args.seq,
    'attention_chunk': CHUNK,
    'target': name,
    'jax': jax.__version__,
    'argument_bytes': memory.arguments,
    'temporary_bytes': memory.temporaries,
    'sum_bytes': memory.total,
    'host_argument_bytes': on_host.host_argument_size_in_bytes,
    'host_temporary_bytes': on_host.host_temp_size_in_bytes,
    'fetched_bytes': crossing(False),
    'sent_bytes': crossing(True),
    'largest_transfer_bytes': max((x.size for x in moved), default=0),
  }


def table(rows: list[dict[str, Any]]) -> str:
  """One line a step."""
  bare = next(
    row['sum_bytes'] for row in rows if row['host_argument_bytes'] == 0
  )
  columns = {
    'optimizer': '{optimizer}',
    'state': lambda row: WHERE[row['memory'], row['fetch']],
    'on the device': harness.gigabytes('sum_bytes'),
    'ratio': lambda row: f'{row["sum_bytes"] / bare:.3f}',
    'on the host': harness.gigabytes('host_argument_bytes'),
    'fetched a step': harness.gigabytes('fetched_bytes'),
    'sent a step': harness.gigabytes('sent_bytes'),
    'most at once': harness.gigabytes('largest_transfer_bytes', 3),
  }
  return harness.table_of(rows, columns)


def main(args: Args) -> None:
  """Compiles what is missing, and fills the page."""
  programs.use_cpu()
  settings = harness.settings_of(args)
  results = harness.load_results(args.out, settings=settings)
  rows = results.setdefault('rows', [])
  known = {Row(*(row[k] for k in Row._fields)) for row in rows}
  for row in ROWS:
    if row not in known:
      rows.append(measured(args, row))
      print(rows[-1], flush=True)
      harness.save_results(args.out, results)
  print(table(rows))
  harness.fill_page(args.docs, {'host': table(rows)})


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
