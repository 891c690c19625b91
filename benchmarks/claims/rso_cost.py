"""FLOPs and gradients of lifted layers, by XLA's count.

python benchmarks/claims/rso_cost.py
"""

import dataclasses
import functools
import sys
from typing import Any

import claim  # isort: skip
from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import llama
import subspace_optax as so
import train_step

SIZES = llama.LlamaConfig(256, 688, layers=8, heads=4, vocab=512)
RANK, BATCH, SEQ = 16, 4, 512


def model(remat: bool) -> tuple[Any, Any]:
  """(loss, shapes of parameters); unrolled, since XLA counts a loop once."""
  config = dataclasses.replace(SIZES, scan_layers=False, remat=remat)
  made = nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
  graphdef, params = nnx.split(made, nnx.Param)
  return train_step.make_loss(graphdef), nnx.to_pure_dict(params)


def programs(remat: bool) -> dict[str, Any]:
  """Whole steps of GoLore, of its compressed form, and of RSO."""
  loss, params = model(remat)
  tx = so.golore(1e-3, RANK)
  rso = so.rso.subproblems(so.SubspaceSpec(RANK, side='in'), optax.adam(1e-3))

  def whole(params, state, batch):
    value, gradients = jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  steps = {
    'whole': (whole, tx),
    'compressed': (so.rso.compressed_step(loss, tx), tx),
    'rso': (rso.step(loss), rso),
  }
  batch = jax.ShapeDtypeStruct((BATCH, SEQ + 1), jnp.int32)
  return {
    name: functools.partial(
      jax.jit(step).lower, params, jax.eval_shape(made.init, params), batch
    )
    for name, (step, made) in steps.items()
  }


def flops(lower: Any) -> float:
  cost: Any = lower().compile().cost_analysis()
  return cost['flops']


def predicted(name: str) -> float:
  """FLOPs of all kernels, without recomputation and refreshes."""
  d, f, b, r = SIZES.width, SIZES.mlp_width, BATCH * SEQ, RANK
  total = 0.0
  for m, n in [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]:
    total += {
      'whole': 6 * b * m * n + 4 * r * m * n,
      'compressed': 4 * b * m * n + 2 * b * r * (m + n) + 2 * r * m * n,
      'rso': 4 * b * m * n + 4 * b * r * m + 6 * b * r * n,
    }[name]
  return total * SIZES.layers


def gradient_bytes() -> dict[str, int]:
  """Of the kernels alone: all of them, and their coordinates."""
  _, params = model(False)
  blocks = {'blocks': params['blocks']}
  kernels = lambda p: jax.tree_util.tree_map_with_path(
    lambda path, x: x if x.ndim == 2 else optax.MaskedNode(), p
  )
  report = functools.partial(so.memory_report, params=kernels(blocks))
  rso = so.rso.subproblems(so.SubspaceSpec(RANK, side='in'), optax.adam(1e-3))
  return {'whole': report(rso).params, 'rso': report(rso).gradients}


def run() -> claim.Claim:
  """Counts all programs."""
  rows = {}
  for remat in (False, True):
    made = programs(remat)
    for name in claim.track(list(made), f'remat={remat}'):
      rows[f'{name} {remat}'] = flops(made[name])
  size = gradient_bytes()
  d, f = SIZES.width, SIZES.mlp_width
  outputs, kernels = 5 * d + 2 * f, 4 * d * d + 3 * d * f
  saved = lambda name, remat: (
    1 - rows[f'{name} {remat}'] / rows[f'whole {remat}']
  )
  checks: list[claim.Check] = []
  table: claim.Table = [('', 'remat', 'GFLOP', 'saved')]
  for remat, least in ((False, 0.15), (True, 0.10)):
    for name in ('whole', 'rso', 'compressed'):
      share = saved(name, remat)
      cells = f'{rows[f"{name} {remat}"] / 1e9:.1f}', f'{share:.1%}'
      table.append((name, str(remat), *cells))
      if name != 'whole':
        what = f'{name}: FLOPs saved, remat={remat}'
        checks.append(claim.Check(what, share, least))
  for name in ('rso', 'compressed'):
    fewer = rows['whole False'] - rows[f'{name} False']
    formula = predicted('whole') - predicted(name)
    what = f'{name}: FLOPs saved, over the formula'
    checks.append(claim.near(what, fewer / formula, 1.0, 0.1))
  what = 'gradient bytes of kernels, RSO over whole'
  ratio = size['rso'] / size['whole']
  checks.append(claim.near(what, ratio, RANK * outputs / kernels, 1e-9))
  return claim.Claim(
    title='Differentiating by B saves FLOPs, and gradients by r/m',
    source='GoLore, table of the ReLoRA-like implementation; RSO, Section 4',
    prediction='a layer costs 4bmn + 4brm + 6brn in the place of 6bmn',
    measurement=(
      f'at rank {RANK} of {d}: {saved("rso", False):.1%} of the step saved by '
      f'RSO, {saved("compressed", False):.1%} by compressed GoLore; with '
      f'recomputed layers {saved("rso", True):.1%} and '
      f'{saved("compressed", True):.1%}; gradients of kernels {ratio:.3f} of '
      'their size'
    ),
    checks=tuple(checks),
    table=tuple(table),
    notes=(
      f'Whole training steps of a LLaMA of 8 layers, width {d}, '
      f'{BATCH} x {SEQ} tokens, compiled for a CPU: XLA counts, nothing runs. '
      'Embedding, head and attention are in the totals, and so are the '
      'random bases, which RSO draws at every step.',
      'In the compressed form B is always 0, so that the products with it are '
      'left out: 4bmn + 2brm + 2brn, and 2rmn for the update.',
    ),
    caption='FLOPs of a step, over those with whole gradients.',
    data={'rows': rows},
  )


def picture(data: dict, path) -> None:
  """Bars of both forms, with and without recomputed layers."""
  figure, axes = plt.subplots(figsize=(6, 3.5), layout='constrained')
  rows, x = data['rows'], np.arange(2)
  for i, name in enumerate(('whole', 'rso', 'compressed')):
    share = [rows[f'{name} {r}'] / rows[f'whole {r}'] for r in (False, True)]
    bars = axes.bar(x + 0.27 * (i - 1), share, 0.25, label=name)
    axes.bar_label(bars, [f'{y:.3f}' for y in share], fontsize=8)
  axes.set_xticks(x, ['layers as they are', 'recomputed'])
  axes.set_ylabel('FLOPs over those of whole gradients')
  axes.set_ylim(0, 1.25)
  axes.legend(fontsize=8, ncols=3)
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  claim.measure(sys.modules[__name__])
