"""FLOPs and gradients of lifted layers, by XLA's count."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks import programs
from benchmarks.claims import claim
import llama
import subspace_optax as so
import train_step

SIZES = llama.LlamaConfig(256, 688, layers=8, heads=4, vocab=512)
RANK, BATCH, SEQ = 16, 4, 512
WIDTH = SIZES.width
NAMES = ('whole', 'rso', 'compressed')
# The least share of FLOPs that is saved, without and with recomputed layers.
LEAST = {False: 0.15, True: 0.10}


def parameters(remat: bool) -> tuple[Any, Any]:
  """The graph and the shapes; unrolled, since XLA counts a loop once."""
  config = dataclasses.replace(SIZES, scan_layers=False, remat=remat)
  return programs.model(config)


def subproblems() -> Any:
  return so.rso.subproblems(so.SubspaceSpec(RANK, side='in'), optax.adam(1e-3))


def flops(name: str, remat: bool) -> float:
  """A whole step of GoLore, of its compressed form, or of RSO."""
  graphdef, params = parameters(remat)
  loss, tx = train_step.make_loss(graphdef), so.golore(1e-3, RANK)
  rso = subproblems()
  step, init = {
    'whole': (programs.whole_step(loss, tx), tx.init),
    'compressed': (so.rso.compressed_step(loss, tx), tx.init),
    'rso': (rso.step(loss), rso.init),
  }[name]
  batch = jax.ShapeDtypeStruct((BATCH, SEQ + 1), jnp.int32)
  state = jax.eval_shape(init, params)
  program = jax.jit(step).lower(params, state, batch).compile()
  return programs.count_flops(program)


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


def gradient_share() -> float:
  """The bytes of gradients of the kernels' coordinates, over the kernels'."""
  blocks = {'blocks': parameters(False)[1]['blocks']}
  kernels = jax.tree.map(
    lambda x: x if x.ndim == 2 else optax.MaskedNode(), blocks
  )
  report = so.memory_report(subproblems(), kernels)
  return report.gradients / report.params


def run() -> claim.Found:
  """Counts all programs."""
  pairs = [(name, remat) for remat in LEAST for name in NAMES]
  tracked = harness.track(pairs, 'FLOPs')
  rows = {f'{name} {remat}': flops(name, remat) for name, remat in tracked}
  of = lambda name, remat: rows[f'{name} {remat}']
  saved = lambda name, remat: 1 - of(name, remat) / of('whole', remat)
  checks: list[claim.Check] = []
  table: claim.Table = [('', 'remat', 'GFLOP', 'saved')]
  for name, remat in pairs:
    size, share = of(name, remat) / 1e9, saved(name, remat)
    table.append((name, str(remat), f'{size:.1f}', f'{share:.1%}'))
    if name != 'whole':
      what = f'{name}: FLOPs saved, remat={remat}'
      checks.append(claim.Check(what, share, LEAST[remat]))
  for name in NAMES[1:]:
    fewer = of('whole', False) - of(name, False)
    formula = predicted('whole') - predicted(name)
    what = f'{name}: FLOPs saved, over the formula'
    checks.append(claim.near(what, fewer / formula, 1.0, 0.1))
  d, f, ratio = WIDTH, SIZES.mlp_width, gradient_share()
  outputs, kernels = 5 * d + 2 * f, 4 * d * d + 3 * d * f
  what = 'gradient bytes of kernels, RSO over whole'
  checks.append(claim.near(what, ratio, RANK * outputs / kernels, 1e-9))
  shares = lambda remat: {name: saved(name, remat) for name in NAMES}
  numbers = {'ratio': ratio, 'saved': shares(False), 'recomputed': shares(True)}
  return claim.Found(checks, {'rows': rows}, table, numbers)


@harness.picture(figsize=(6, 3.5))
def picture(axes: Any, data: dict) -> None:
  """Bars of both forms, with and without recomputed layers."""
  rows, x = data['rows'], np.arange(2)
  for i, name in enumerate(NAMES):
    share = [rows[f'{name} {r}'] / rows[f'whole {r}'] for r in LEAST]
    bars = axes.bar(x + 0.27 * (i - 1), share, 0.25, label=name)
    axes.bar_label(bars, [f'{y:.3f}' for y in share], fontsize=8)
  axes.set_xticks(x, ['layers as they are', 'recomputed'])
  axes.set(ylim=(0, 1.25), ylabel='FLOPs over those of whole gradients')
  axes.legend(fontsize=8, ncols=3)
