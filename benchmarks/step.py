"""The time of every single step of each optimizer, refreshes included.

All optimizers update the parameters of a LLaMA from the same gradients, with
one array per matrix and with one stack of layers. They take turns, one step
each, so that noise affects all alike; the ratio to AdamW is the median over
turns. The first step is left out. Optimizers that are in results/step.json
already are not measured again.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib import ticker
import numpy as np
import optax
import tyro

from benchmarks import harness
from benchmarks import programs
import llama
import recipes
import subspace_optax as so

# Steps that are all alike, and long: every so many turns will do.
EVERY = {
  'optax.contrib.muon': 20,
  'so.subspace_muon': 20,
  'so.subspace_muon, 8 bits': 20,
}


@dataclasses.dataclass(frozen=True)
class Args:
  """What is measured; see the module."""

  model: str = 'llama_60m'
  rank: int = 128
  update_proj_gap: int = 200
  steps: int = 401  # after the first; enough for two refreshes
  only: tuple[str, ...] = ()  # names of the table; all by default
  out: str = str(harness.RESULTS / 'step.json')


def optimizers(args: Args) -> dict[str, Callable[[], Any]]:
  """From the name in the table to the optimizer."""
  lr, rank, gap = 1e-3, args.rank, args.update_proj_gap

  def galore(method: str) -> optax.GradientTransformation:
    rule = so.projectors.svd(gap, method, stagger=True)
    tx = so.subspace(so.SubspaceSpec(rank), rule, optax.scale_by_adam())
    return optax.chain(tx, optax.scale_by_learning_rate(lr))

  golore = lambda **options: so.golore(lr, rank, update_proj_gap=gap, **options)
  axes = recipes.matrix_axes
  muon_axes = axes(optax.contrib.MuonDimensionNumbers)
  galore_axes = axes(optax.contrib.GaLoreDimensionNumbers)
  return {
    'optax.adamw': lambda: optax.adamw(lr),
    'optax.contrib.muon': lambda: optax.contrib.muon(
      lr, muon_weight_dimension_numbers=muon_axes
    ),
    'optax.contrib.galore': lambda: optax.contrib.galore(
      lr, rank, gap, weight_dimension_numbers=galore_axes
    ),
    'so.galore': lambda: so.galore(lr, rank, gap),
    'so.galore, staggered': lambda: so.galore(lr, rank, gap, stagger=True),
    'svd gram, staggered': lambda: galore('gram'),
    'svd randomized, staggered': lambda: galore('randomized'),
    'so.golore': golore,
    'so.golore, staggered': lambda: golore(stagger=True),
    'so.online_subspace_descent': lambda: so.online_subspace_descent(lr, rank),
    'so.subspace_adamw': lambda: so.subspace_adamw(lr, rank),
    'so.subspace_muon': lambda: so.subspace_muon(lr, rank),
    'so.subspace_muon, 8 bits': lambda: so.subspace_muon(
      lr, rank, moment_bits=8
    ),
  }


class Optimizer(harness.Runner):
  """One optimizer's compiled step, its parameters and its state."""

  def __init__(self, name: str, tx: Any, params: Any):
    def step(params, state, gradients):
      updates, state = tx.update(gradients, state, params)
      return optax.apply_updates(params, updates), state

    self.name, state = name, tx.init(params)
    run = jax.jit(step, donate_argnums=(0, 1))
    self.compile_seconds, program = harness.time_call(
      lambda: run.lower(params, state, params).compile()
    )
    self.memory_report = so.memory_report(tx, params)
    # Copies: each step gives its buffers to the next one.
    super().__init__(program, jax.tree.map(jnp.array, params), state)

  def row(self) -> dict:
    """What was measured."""
    return {
      'optimizer': self.name,
      'compile_seconds': self.compile_seconds,
      'state_bytes': self.memory_report.state,
      'adam_state_bytes': self.memory_report.adam,
      'temporary_bytes': programs.count_bytes(self.program).temporaries,
      'seconds': [round(t, 5) for t in self.times[1:]],
    }


def summarize(rows: list[dict]) -> None:
  """Adds to each row what the table shows."""
  reference = np.array(rows[0]['seconds'])
  for row in rows:
    times = np.array(row['seconds'])
    every = EVERY.get(row['optimizer'], 1)
    base = reference[every - 1 :: every]
    median = np.median(times)
    # Refreshes come back after a gap, the machine's hiccups do not: of each
    # step and the one a gap later, the faster.
    half = len(times) // 2
    twice = np.minimum(times[:half], times[half : 2 * half])
    row |= {
      'median_seconds': float(median),
      'worst_seconds': float(times.max()),
      'worst_over_median': float(times.max() / median),
      'worst_that_returns_over_median': float(twice.max() / median),
      'median_over_adamw': float(np.median(times / base)),
    }


def parameters(model: str, stacked: bool) -> Any:
  """Random arrays with the shapes of the model's parameters."""
  _, shapes = programs.model(llama.named(model, scan_layers=stacked))
  leaves, treedef = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  draw = lambda x: 0.02 * rng.standard_normal(x.shape, np.float32)
  return treedef.unflatten([jnp.asarray(draw(x)) for x in leaves])


def measure(args: Args, stacked: bool) -> list[dict]:
  """Steps all optimizers in turns; returns their rows."""
  params = parameters(args.model, stacked)
  gradients = jax.tree.map(lambda x: x[..., ::-1], params)
  runners = []
  for name, make in optimizers(args).items():
    if args.only and name not in (*args.only, 'optax.adamw'):
      continue
    if stacked and name == 'optax.contrib.galore':
      continue  # it projects no stack: naming the axes of one is an error
    runners.append(Optimizer(name, make(), params))
    print(f'compiled {name} in {runners[-1].compile_seconds:.1f} s', flush=True)
  for t in harness.track(range(args.steps + 1), 'steps of each'):
    for runner in runners:
      if t % EVERY.get(runner.name, 1) == 0:
        runner.step(gradients)
  return [runner.row() for runner in runners]


def table(rows: list[dict]) -> str:
  """A line for each optimizer."""
  return harness.table_of(
    rows,
    {
      'optimizer': '{optimizer}',
      'compile, s': '{compile_seconds:.1f}',
      'state, MiB': harness.megabytes('state_bytes', 0),
      'temporary, MiB': harness.megabytes('temporary_bytes', 0),
      'median, ms': lambda row: f'{row["median_seconds"] * 1e3:.0f}',
      'worst, ms': lambda row: f'{row["worst_seconds"] * 1e3:.0f}',
      'worst / median': '{worst_over_median:.2f}',
      'that returns / median': '{worst_that_returns_over_median:.2f}',
      '/ adamw': '{median_over_adamw:.2f}',
    },
  )


def picture(results: dict, path: Any) -> None:
  """The median step of each optimizer, and the longest that returns."""
  forms = results['rows']
  names = [row['optimizer'] for row in next(iter(forms.values()))]
  size = (7, 1 + 0.4 * len(names))
  with harness.draw(path, dpi=120, figsize=size) as (_, axes):
    for i, (form, rows) in enumerate(forms.items()):
      of = {row['optimizer']: milliseconds(row) for row in rows}
      shift = 0.24 * (i - (len(forms) - 1) / 2)
      harness.draw_ranges(axes, of, names, shift, label=form)
    axes.set_xscale('log')
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter('{x:,.0f}')
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(
      'milliseconds of a step\n(median, fastest to slowest that returns)'
    )
    axes.legend(fontsize=8)


def milliseconds(row: dict) -> tuple[float, float, float]:
  """The least, the median and the most that returns."""
  median = row['median_seconds']
  worst = median * row['worst_that_returns_over_median']
  return 1e3 * min(row['seconds']), 1e3 * median, 1e3 * max(worst, median)


def main(args: Args) -> None:
  """Measures both forms of the tree, then draws and prints everything."""
  settings = harness.settings_of(args)
  results = harness.load_results(args.out, settings=settings)
  forms = results.setdefault('rows', {})
  for form, stacked in (('one array a matrix', False), ('stacked', True)):
    if form not in forms:
      forms[form] = measure(args, stacked)
    summarize(forms[form])
    print(f'{args.model}, {form}\n\n{table(forms[form])}\n', flush=True)
    harness.save_results(args.out, results, indent=None)
    jax.clear_caches()
  picture(results, harness.next_to(args.out, '.png'))


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
