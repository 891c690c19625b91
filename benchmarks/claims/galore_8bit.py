"""8-bit states: the error of the codes, and its effect on training.

Counts the codes' error by octave and the bytes of a 7B model's states, and
repeats full-rank training. Rows of the Pareto benchmark, with tuned learning
rates and all seeds that both have, are quoted from results/pareto.json.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from benchmarks import programs
from benchmarks.claims import claim
from benchmarks.claims import training
from benchmarks.claims import tuned
import llama
import subspace_optax as so

METHODS = ('adamw', 'muon', 'normuon', 'subspace_adamw', 'subspace_muon')
PAIRS = {name: f'{name}_8bit' for name in METHODS}
SEEDS = 2
RATES = (0.01, 0.003)
OCTAVES = 24
# Of first moments over a block's largest, which are squares of even codes; of
# second moments over themselves, which have as many codes in every octave.
BOUNDS = {'first': 1 / 127, 'second': 0.036}


def octave_errors() -> dict[str, list[float]]:
  """The largest error in each octave below a block's largest, see `BOUNDS`."""
  tx = so.scale_by_adam8bit(b1=0.0, b2=0.0, rounding='nearest')
  found: dict[str, list[float]] = {'first': [], 'second': []}
  inside = np.linspace(1.0, 2.0, 64 * 128 - 64, endpoint=False) / 2
  for octave in range(OCTAVES):
    # 64 blocks of 128 rows, one column each, that start with their largest.
    rest = (inside * 2.0**-octave).reshape(127, 64)
    columns = np.concatenate([np.ones((1, 64)), rest]).astype(np.float32)
    for i, x in enumerate((columns, np.sqrt(columns))):
      gradients = {'w': jnp.asarray(x)}
      _, state = tx.update(gradients, tx.init(gradients))
      kept = jax.device_get(moments(state))[i]
      error = np.abs(kept[1:] - columns[1:]) / (columns[1:] if i else 1.0)
      list(found.values())[i].append(float(error.max()))
  return found


def moments(state: Any) -> tuple[jax.Array, jax.Array]:
  """What an optimizer reads off its codes, by the update that it makes."""
  codes = lambda tree: tree['w'].astype(jnp.float32)
  scales = lambda name: jnp.repeat(state.scales[name]['w'], 128, axis=0)
  mu, nu = codes(state.coded.mu), codes(state.coded.nu)
  sizes = jnp.where(nu == 0, 0, jnp.exp2((nu - 255) / 10))
  signed = jnp.sign(mu) * jnp.square(mu / 127)
  return signed * scales('mu'), sizes * scales('nu')


def bytes_per_moment() -> float:
  """Of LLaMA-7B under Adam."""
  config = llama.named('llama_7b', param_dtype='bfloat16')
  _, shapes = programs.model(config)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  return so.memory_report(so.scale_by_adam8bit(), shapes).state / (2 * count)


def train(inner: Any) -> float:
  """The loss of an Adam at its better rate."""
  make = lambda schedule: optax.chain(
    inner(), optax.scale_by_learning_rate(schedule)
  )
  _, values = training.best(training.perplexities(make, SEEDS, RATES))
  return float(np.log(np.mean(values)))


def run() -> claim.Found:
  """Counts, trains and quotes."""
  errors, per_moment = octave_errors(), bytes_per_moment()
  checks = [
    claim.Check(
      f'{name} moments: largest error in any of {OCTAVES} octaves',
      max(errors[name]),
      0,
      bound,
    )
    for name, bound in BOUNDS.items()
  ]
  checks.append(claim.Check('bytes per moment, 7B', per_moment, 1, 1.05))
  wide, narrow = train(optax.scale_by_adam), train(so.scale_by_adam8bit)
  checks.append(
    claim.Check('loss, 8 bits / float32, here', narrow / wide, 0, 1.01)
  )
  table: claim.Table = [('', 'float32', '8 bits', 'ratio')]
  line = lambda *values: tuple(f'{x:.4f}' for x in values)
  table.append(('Adam, here', *line(wide, narrow, narrow / wide)))
  for corpus, found in tuned.losses([*PAIRS, *PAIRS.values()]).items():
    for name, coded in PAIRS.items():
      what = f'{name}, Pareto benchmark, {corpus}'
      ratio, noise = claim.ratio_of_means(found[coded], found[name])
      if noise:  # one seed of both decides nothing
        checks.append(claim.Check(f'loss ratio, {what}', ratio, 0, 1.01, noise))
      pair = np.mean(found[name]), np.mean(found[coded])
      table.append((what, *line(*pair, ratio)))
  table.append(('Table 3, 7B, perplexity', '', 'Adam 14.61, GaLore 14.65', ''))
  worst = max(c.measured or 0 for c in checks if c.what.startswith('loss'))
  numbers = {'worst': worst, 'per_moment': per_moment}
  return claim.Found(checks, errors, table, numbers)


@harness.picture(figsize=(6, 3.5))
def picture(axes: Any, data: dict) -> None:
  """Errors by octave."""
  for name, values in data.items():
    axes.plot(values, 'o-', label=f'{name} moments')
  axes.set(yscale='log', ylabel='largest error')
  axes.set_xlabel("octaves below a block's largest number")
  axes.legend()
