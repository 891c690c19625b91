"""Seven billion parameters in 20 GB, by the planner and by XLA.

  python benchmarks/claims/galore_7b.py

The planner, `memory_report` and a compiled layer-wise step run here. XLA's
account of 7B steps is quoted from benchmarks/results/plan.json, which
`python benchmarks/plan_check.py` makes with a compiler for TPUs.
"""

import json
import sys
from typing import Any

import claim  # isort: skip
from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import llama
import subspace_optax as so
import train_step

TARGET = 20e9
# GaLore's paper, Sections 1 and 5.5, in GB.
PAPER = {
  ('adamw', 'remat'): 58.0,
  ('galore8bit', 'layerwise'): 22.0,
}
SLIDES = 1620.0  # of GPT-3 175B with Adam, in GB
PARTS = ('weights', 'states', 'bases', 'gradients', 'activations', 'workspace')


def rows() -> list[dict[str, Any]]:
  """XLA's rows of LLaMA-7B on one device, the plan's parts made anew."""
  found = []
  for row in json.loads(claim.PLAN.read_text()):
    if (row['model'], row['fsdp'], row['layout']) == ('llama_7b', 1, 'auto'):
      found.append(row | {'plan': plan_of(row)._asdict()})
  return sorted(found, key=lambda row: -row['sum_bytes'])


def plan_of(row: dict[str, Any]) -> Any:
  return so.plan.plan(
    row['model'],
    row['method'],
    batch=row['batch'],
    seq=row['seq'],
    rank=row['rank'] or 0.25,
    moment_dtype=row['moment_dtype'],
    remat=row['layers'] == 'remat',
    layerwise=row['layers'] == 'layerwise',
    attention_chunk=row['attention_chunk'],
  )


def gpt3() -> dict[str, float]:
  """GB of GPT-3 175B by the planner."""
  settings = {'batch': 1, 'seq': 2048, 'rank': 1024}
  of = lambda method, **options: (
    so.plan.plan('gpt3_175b', method, **settings, **options).total / 1e9
  )
  return {
    'AdamW, all activations': of('adamw'),
    'AdamW, layer by layer': of('adamw', layerwise=True),
    '8-bit GaLore, layer by layer': of('galore8bit', layerwise=True),
  }


def small() -> dict[str, int]:
  """Temporaries of both steps of 12 layers, compiled here; stacked copies."""
  config = llama.LlamaConfig(64, 176, 12, 2, vocab=32, remat=True)
  model = nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
  graphdef, params = nnx.split(model)
  params, loss = nnx.to_pure_dict(params), train_step.make_loss(graphdef)
  tx = optax.adam(1e-3)

  def ordinary(params, state, tokens):
    value, gradient = jax.value_and_grad(loss)(params, tokens)
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value

  layers = so.layerwise(tx, *train_step.by_layer(model))
  tokens = jax.ShapeDtypeStruct((2, 33), jnp.int32)
  found = {}
  for name, init, step in (
    ('ordinary', tx.init, ordinary),
    ('layerwise', layers.init, layers.step),
  ):
    state = jax.eval_shape(init, params)
    run = jax.jit(step, donate_argnums=(0, 1))
    program = run.lower(params, state, tokens).compile()
    memory: Any = program.memory_analysis()
    found[name] = memory.temp_size_in_bytes
  return found


def checks(found: list[dict], big: dict, temporaries: dict) -> list[Any]:
  """The plan against XLA, both against the papers."""
  made = []
  for row in found:
    name = f'{row["method"]}, {row["layers"]}'
    total = sum(row['plan'].values())
    ratio = total / row['peak_bytes']
    made.append(claim.near(f'{name}: plan / peak of XLA', ratio, 1.0, 0.05))
    kept = sum(row['plan'][part] for part in ('weights', 'states', 'bases'))
    ratio = row['argument_bytes'] / kept
    made.append(
      claim.near(f'{name}: arguments / weights and states', ratio, 1.0, 0.05)
    )
    if (row['method'], row['layers']) in PAPER:
      paper = PAPER[row['method'], row['layers']]
      what = f'{name}: peak / the printed {paper:.0f} GB'
      made.append(claim.near(what, row['peak_bytes'] / 1e9 / paper, 1.0, 0.05))
  least = min(
    (row for row in found if row['rank']), key=lambda row: row['sum_bytes']
  )
  what = f'{least["method"]}, GB in all by XLA'
  made.append(claim.Check(what, least['sum_bytes'] / 1e9, 0, TARGET / 1e9))
  ratio = temporaries['layerwise'] / temporaries['ordinary']
  made.append(claim.Check('12 layers, temporaries, of ordinary', ratio, 0, 0.5))
  ratio = big['AdamW, all activations'] / SLIDES
  made.append(claim.near('GPT-3 by AdamW / 1,620 GB', ratio, 1.0, 0.05))
  return made


def run() -> claim.Claim:
  """Plans, compiles a small step, and quotes."""
  found, big, temporaries = rows(), gpt3(), small()
  gb = lambda size: f'{size / 1e9:.2f}'
  head = ('7B, optimizer', 'layers', 'sum', 'peak', 'plan', 'printed')
  table: claim.Table = [head]
  for row in found:
    printed = PAPER.get((row['method'], row['layers']))
    sizes = row['sum_bytes'], row['peak_bytes'], sum(row['plan'].values())
    cells = (*map(gb, sizes), '' if printed is None else f'{printed:.0f}')
    table.append((row['method'], row['layers'], *cells))
  for name, size in big.items():
    table.append((f'GPT-3, {name}', '', '', '', f'{size:,.0f}', ''))
  least = min(
    (row for row in found if row['rank']), key=lambda r: r['sum_bytes']
  )
  return claim.Claim(
    title='LLaMA-7B pre-trains on a card of 24 GB',
    source='GaLore, Sections 1 and 5.5',
    prediction='58 GB with Adam, 22 GB with 8-bit GaLore, ours in 20 GB',
    measurement=(
      f'{gb(least["sum_bytes"])} GB with {least["method"]}, layer by layer, '
      f'its peak {gb(least["peak_bytes"])}'
    ),
    checks=tuple(checks(found, big, temporaries)),
    table=tuple(table),
    notes=(
      'GB of one device, batch 1 x 2,048, bfloat16, rank 1,024, activations '
      "included. XLA's figures are of programs compiled for a TPU v5p with "
      'layouts of arguments left to it; nothing of that size has run.',
      "The sum is arguments, temporaries and results that take no argument's "
      "place; the peak is that of XLA's heap, which does not hold all "
      'temporaries at once. The plan is of the peak.',
      'gaussian8bit: Gaussian bases that are drawn at every step, moments in 8 '
      'bits. Attention is in chunks of 512 queries.',
      'GPT-3: the slides say 1,620 GB with Adam and 8 cards of 80 GB with low '
      'rank, not what is in it; see docs/plan.md.',
    ),
    caption='The plan of LLaMA-7B, and the peak by XLA (black).',
    data=[
      {k: row[k] for k in ('method', 'layers', 'plan', 'peak_bytes')}
      for row in found
    ],
  )


def picture(data: list[dict], path) -> None:
  """Stacked bars of the parts, a bar a method."""
  figure, axes = plt.subplots(figsize=(8, 4.5), layout='constrained')
  below = [0.0] * len(data)
  for part in PARTS:
    sizes = [row['plan'][part] / 1e9 for row in data]
    axes.bar(range(len(data)), sizes, bottom=below, label=part)
    below = [a + b for a, b in zip(below, sizes, strict=True)]
  peaks = [row['peak_bytes'] / 1e9 for row in data]
  axes.plot(range(len(data)), peaks, 'k_', markersize=18, label="XLA's peak")
  axes.axhline(24, color='gray', linestyle=':')
  axes.text(len(data) - 0.5, 24, '24 GB', va='bottom', ha='right', fontsize=8)
  names = [f'{row["method"]}\n{row["layers"]}' for row in data]
  axes.set_xticks(range(len(data)), names, rotation=30, ha='right', fontsize=8)
  axes.set_ylabel('GB')
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  claim.measure(sys.modules[__name__])
