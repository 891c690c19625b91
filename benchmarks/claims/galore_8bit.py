"""States of a byte each: what the code loses, and what training does.

  python benchmarks/claims/galore_8bit.py

The code's error by octave and the bytes of a 7B model's states are counted
here; full-rank training is repeated here; the quality benchmark's rows, with
tuned rates and three seeds, are quoted from benchmarks/results/quality.json.
"""

import json
import sys
from typing import Any

import claim  # isort: skip
from flax import nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import training

import llama
import subspace_optax as so

PAIRS = {
  'adamw': 'adamw_8bit',
  'galore': 'galore_8bit',
  'subspace_adamw': 'subspace_adamw_8bit',
}
SEEDS = 2
RATES = (0.01, 0.003)
OCTAVES = 24


def octave_errors() -> dict[str, list[float]]:
  """The largest relative error in each octave below a block's largest."""
  tx = so.scale_by_adam8bit(b1=0.0, b2=0.0, rounding='nearest')
  found: dict[str, list[float]] = {'first': [], 'second': []}
  inside = np.linspace(1.0, 2.0, 64 * 128 - 64, endpoint=False) / 2
  for octave in range(OCTAVES):
    # 64 blocks of 128 rows, one column each, that start with their largest.
    columns = np.concatenate(
      [np.ones((1, 64)), (inside * 2.0**-octave).reshape(127, 64)]
    ).astype(np.float32)
    for name, x in (('first', columns), ('second', np.sqrt(columns))):
      gradients = {'w': jnp.asarray(x)}
      _, state = tx.update(gradients, tx.init(gradients))
      kept = jax.device_get(moments(state))
      i = 0 if name == 'first' else 1
      error = np.abs(kept[i][1:] / columns[1:] - 1)
      found[name].append(float(error.max()))
  return found


def moments(state: Any) -> tuple[jax.Array, jax.Array]:
  """What an optimizer reads off its codes, by the update that it makes."""
  top = {'mu': (127, 8), 'nu': (255, 10)}

  def decode(name: str) -> jax.Array:
    codes = getattr(state.coded, name)['w'].astype(jnp.float32)
    scales = jnp.repeat(state.scales[name]['w'], 128, axis=0)
    size = jnp.exp2((jnp.abs(codes) - top[name][0]) / top[name][1])
    return jnp.sign(codes) * jnp.where(codes == 0, 0, size) * scales

  return decode('mu'), decode('nu')


def bytes_per_moment() -> float:
  """Of LLaMA-7B under Adam."""
  config = llama.named('llama_7b', param_dtype='bfloat16')
  shapes = nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
  shapes = nnx.to_pure_dict(nnx.state(shapes, nnx.Param))
  count = sum(x.size for x in jax.tree.leaves(shapes))
  return so.memory_report(so.scale_by_adam8bit(), shapes).state / (2 * count)


def quoted() -> dict[str, dict[str, float]]:
  """The mean loss of every pair's best rate, by corpus, over three seeds."""
  searches = json.loads(claim.QUALITY.read_text())['searches']
  found: dict[str, dict[str, float]] = {}
  for search in searches:
    name = search['method']
    wanted = name in PAIRS or name in PAIRS.values()
    if not wanted or search['width'] != 1.0 or search['rank'] not in (0, 0.25):
      continue
    runs = search['runs']
    best = min((r for r in runs if r['seed'] == 0), key=lambda r: r['loss'])
    losses = [r['loss'] for r in runs if r['lr'] == best['lr']]
    found.setdefault(search['corpus'], {})[name] = float(np.mean(losses))
  return found


def trained() -> dict[str, float]:
  """Perplexity of Adam's better rate, both ways."""
  means = {}
  for name, make in (
    ('float32', optax.scale_by_adam),
    ('8 bits', so.scale_by_adam8bit),
  ):
    tx = lambda schedule, make=make: optax.chain(
      make(), optax.scale_by_learning_rate(schedule)
    )
    _, values = training.best(training.perplexities(tx, SEEDS, RATES))
    means[name] = float(np.mean(values))
  return means


def run() -> claim.Claim:
  """Counts, trains and quotes."""
  errors, per_moment = octave_errors(), bytes_per_moment()
  here, pairs = trained(), quoted()
  bounds = {'first': (0.045, 15), 'second': (0.036, OCTAVES)}
  checks = [
    claim.Check(
      f'{name} moments: error in any of {octaves} octaves',
      max(errors[name][:octaves]),
      0,
      bound,
    )
    for name, (bound, octaves) in bounds.items()
  ]
  checks.append(claim.Check('bytes per moment, 7B', per_moment, 1, 1.05))
  ratio = np.log(here['8 bits']) / np.log(here['float32'])
  checks.append(claim.Check('loss, 8 bits / float32, here', ratio, 0, 1.01))
  table: claim.Table = [('', 'float32', '8 bits', 'ratio')]
  losses = [float(np.log(here[k])) for k in ('float32', '8 bits')]
  table.append(('Adam, here', *(f'{x:.4f}' for x in losses), f'{ratio:.4f}'))
  for corpus, found in pairs.items():
    for wide, narrow in PAIRS.items():
      ratio = found[narrow] / found[wide]
      what = f'{wide}, quality benchmark, {corpus}'
      checks.append(claim.Check(f'loss ratio, {what}', ratio, 0, 1.01))
      cells = f'{found[wide]:.4f}', f'{found[narrow]:.4f}', f'{ratio:.4f}'
      table.append((what, *cells))
  table.append(('Table 3, 7B, perplexity', '', 'Adam 14.61, GaLore 14.65', ''))
  worst = max(c.measured or 0 for c in checks if c.what.startswith('loss'))
  s = training.SETTING
  return claim.Claim(
    title='8-bit states train as float32 states do',
    source='GaLore, Section 5.2, Table 3; 8-bit optimizers (Dettmers et al.)',
    prediction='the same loss within 1 %, at most 1.05 bytes a moment',
    measurement=(
      f'loss at most {worst:.4f} of float32, {per_moment:.3f} bytes a moment'
    ),
    checks=tuple(checks),
    table=tuple(table),
    notes=(
      'The paper compares 8-bit GaLore with 8-bit Adam only; the claim that 8 '
      'bits lose nothing is that of the 8-bit optimizers it uses. Our code is '
      'another one, logarithmic, with float32 scales of blocks of 128 to 512.',
      'Rounding is at random. Rounded to the nearest, second moments that '
      'decay by 0.1 % a step stay where they are.',
      f'Trained here: width {s.width}, {s.layers} layers, {s.steps} steps, '
      f'{SEEDS} seeds, the better rate of {RATES}. Loss is in nats per byte.',
    ),
    caption="The code's largest relative error in each octave.",
    data=errors,
  )


def picture(data: dict, path) -> None:
  """Errors by octave."""
  figure, axes = plt.subplots(figsize=(6, 3.5), layout='constrained')
  for name, values in data.items():
    axes.plot(values, 'o-', label=f'{name} moments')
  axes.set_yscale('log')
  axes.set_xlabel("octaves below a block's largest number")
  axes.set_ylabel('largest relative error')
  axes.legend()
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  claim.measure(sys.modules[__name__])
