"""Seven billion parameters in 20 GB, by the planner and by XLA.

The planner, `memory_report` and a compiled layer-wise step run here. XLA's
account of 7B steps is quoted from results/plan.json, which `plan_check` makes
with a compiler for TPUs.
"""

from collections.abc import Sequence
import json
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from benchmarks import harness
from benchmarks import plan_check
from benchmarks import programs
from benchmarks.claims import claim
from benchmarks.harness import GB
import llama
import subspace_optax as so
import train_step

TARGET = 20e9
SLIDES = 1620.0  # of GPT-3 175B with Adam, in GB
PARTS = ('weights', 'states', 'bases', 'gradients', 'activations', 'workspace')


def quote() -> list[dict[str, Any]]:
  """XLA's rows of LLaMA-7B on one device, the plan's parts made anew."""
  rows = plan_check.seven(json.loads(claim.PLAN.read_text()))
  return [row | {'plan': plan_check.plan_of(row)._asdict()} for row in rows]


def gpt3() -> dict[str, float]:
  """GB of GPT-3 175B by the planner."""
  settings = {'batch': 1, 'seq': 2048, 'rank': 1024}
  of = lambda method, **options: (
    so.plan.plan('gpt3_175b', method, **settings, **options).total / GB
  )
  return {
    'AdamW, all activations': of('adamw'),
    'AdamW, layer by layer': of('adamw', layerwise=True),
    '8-bit GaLore, layer by layer': of('galore8bit', layerwise=True),
  }


def temporaries() -> list[int]:
  """Those of a layer-wise and of an ordinary step of 12 layers."""
  config = llama.LlamaConfig(64, 176, 12, 2, vocab=32, remat=True)
  graphdef, params = programs.model(config)
  model = nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
  tx, loss = optax.adam(1e-3), train_step.make_loss(graphdef)
  layers = so.layerwise(tx, *train_step.by_layer(model))
  tokens, found = jax.ShapeDtypeStruct((2, 33), jnp.int32), []
  whole = programs.whole_step(loss, tx)
  for init, step in ((layers.init, layers.step), (tx.init, whole)):
    state = jax.eval_shape(init, params)
    run = jax.jit(step, donate_argnums=(0, 1))
    program = run.lower(params, state, tokens).compile()
    found.append(programs.count_bytes(program).temporaries)
  return found


def least(rows: list[dict]) -> dict:
  """The smallest of the projected ones."""
  return min((row for row in rows if row['rank']), key=lambda r: r['sum_bytes'])


def checks(rows: list[dict], big: dict) -> Sequence[claim.Check]:
  """The plan against XLA, both against the papers."""
  made = []
  near = lambda what, ratio: made.append(claim.near(what, ratio, 1.0, 0.05))
  for row in rows:
    name, plan = f'{row["method"]}, {row["layers"]}', row['plan']
    total = sum(plan.values())
    near(f'{name}: plan / peak of XLA', total / row['peak_bytes'])
    kept = plan['weights'] + plan['states'] + plan['bases']
    ratio = row['argument_bytes'] / kept
    near(f'{name}: arguments / weights and states', ratio)
    if paper := plan_check.printed(row):
      ratio = row['peak_bytes'] / GB / float(paper)
      near(f'{name}: peak / the printed {paper} GB', ratio)
  one = least(rows)
  what, size = f'{one["method"]}, GB in all by XLA', one['sum_bytes'] / GB
  made.append(claim.Check(what, size, 0, TARGET / GB))
  layerwise, ordinary = temporaries()
  what = '12 layers: temporaries, layer-wise / ordinary step'
  made.append(claim.Check(what, layerwise / ordinary, 0, 0.5))
  near('GPT-3 by AdamW / 1,620 GB', big['AdamW, all activations'] / SLIDES)
  return made


def run() -> claim.Found:
  """Plans, compiles a small step, and quotes."""
  rows, big = quote(), gpt3()
  table: claim.Table = [
    ('7B, optimizer', 'layers', 'sum', 'peak', 'plan', 'printed')
  ]
  for row in rows:
    sizes = row['sum_bytes'], row['peak_bytes'], sum(row['plan'].values())
    cells = (f'{size / GB:.2f}' for size in sizes)
    table.append(
      (row['method'], row['layers'], *cells, plan_check.printed(row))
    )
  for name, size in big.items():
    table.append((f'GPT-3, {name}', '', '', '', f'{size:,.0f}', ''))
  keys, one = ('method', 'layers', 'plan', 'peak_bytes'), least(rows)
  data = [{k: row[k] for k in keys} for row in rows]
  numbers = {'method': one['method'], 'sum': one['sum_bytes'] / GB}
  numbers['peak'] = one['peak_bytes'] / GB
  return claim.Found(checks(rows, big), data, table, numbers)


@harness.picture(figsize=(8, 5.5))
def picture(axes: Any, data: list[dict]) -> None:
  """Stacked bars of the parts, a bar a method."""
  y, left = range(len(data)), [0.0] * len(data)
  for part in PARTS:
    sizes = [row['plan'][part] / GB for row in data]
    axes.barh(y, sizes, left=left, label=part)
    left = [a + b for a, b in zip(left, sizes, strict=True)]
  peaks = [row['peak_bytes'] / GB for row in data]
  axes.plot(peaks, y, 'k|', markersize=14, label="XLA's peak")
  axes.axvline(24, color='gray', linestyle=':', label='24 GB')
  names = [f'{row["method"]}, {row["layers"]}' for row in data]
  axes.set_yticks(y, names, fontsize=8)
  axes.invert_yaxis()
  axes.set_xlabel('GB')
  axes.legend(fontsize=8)
