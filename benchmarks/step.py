"""The time of every single step of each optimizer, refreshes included.

  python benchmarks/step.py

All optimizers update the parameters of a LLaMA from the same gradients, with
one array per matrix and with one stack of layers. They take turns, a step each,
so that noise hits all alike; the ratio to AdamW is the median over turns. The
first step is left out. Results: a table, benchmarks/results/step.json and .png;
what is in the former already is not measured again.
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / 'examples'))

from flax import nnx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from rich import progress  # noqa: E402
import tyro  # noqa: E402

import llama  # noqa: E402
import machine  # noqa: E402
import recipes  # noqa: E402
import subspace_optax as so  # noqa: E402

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

# Steps that are all alike, and long: every so many turns will do.
EVERY = {'optax.contrib.muon': 20}


@dataclasses.dataclass(frozen=True)
class Args:
  """What is measured; see the module."""

  model: str = 'llama_60m'
  rank: int = 128
  update_proj_gap: int = 200
  steps: int = 401  # beyond the first; two refreshes of whatever refreshes
  only: tuple[str, ...] = ()  # names of the table; all by default
  out: str = str(ROOT / 'results' / 'step.json')


def optimizers(args: Args) -> dict[str, Callable[[], Any]]:
  """From the name in the table to the optimizer."""
  gap = args.update_proj_gap
  spec = so.SubspaceSpec(args.rank)

  def galore(method: str, stagger: bool):
    return optax.chain(
      so.subspace(
        spec,
        so.projectors.svd(gap, method, stagger=stagger),
        optax.scale_by_adam(),
      ),
      optax.scale_by_learning_rate(1e-3),
    )

  axes = recipes.matrix_axes
  return {
    'optax.adamw': lambda: optax.adamw(1e-3),
    'optax.contrib.muon': lambda: optax.contrib.muon(
      1e-3,
      muon_weight_dimension_numbers=axes(optax.contrib.MuonDimensionNumbers),
    ),
    'optax.contrib.galore': lambda: optax.contrib.galore(
      1e-3,
      args.rank,
      gap,
      weight_dimension_numbers=axes(optax.contrib.GaLoreDimensionNumbers),
    ),
    'so.galore': lambda: so.galore(1e-3, args.rank, gap),
    'so.galore, staggered': lambda: so.galore(
      1e-3, args.rank, gap, stagger=True
    ),
    'svd gram, staggered': lambda: galore('gram', True),
    'svd randomized, staggered': lambda: galore('randomized', True),
    'so.golore': lambda: so.golore(1e-3, args.rank, update_proj_gap=gap),
    'so.golore, staggered': lambda: so.golore(
      1e-3, args.rank, update_proj_gap=gap, stagger=True
    ),
    'so.online_subspace_descent': lambda: so.online_subspace_descent(
      1e-3, args.rank
    ),
  }


class Runner:
  """One optimizer's compiled step, its parameters and its state."""

  def __init__(self, name: str, tx: Any, params: Any):
    self.name, self.times = name, []
    # Copies: each step gives its buffers to the next one.
    self.params = jax.tree.map(jnp.array, params)
    self.state = tx.init(self.params)

    def step(gradients, state, params):
      updates, state = tx.update(gradients, state, params)
      return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(1, 2)).lower(
      params, self.state, params
    )
    self.compiled = lowered.compile()
    self.compile_seconds = time.perf_counter() - start
    self.memory_report = so.memory_report(tx, params)

  def step(self, gradients: Any) -> None:
    """Takes one step and notes its time."""
    start = time.perf_counter()
    self.params, self.state = self.compiled(gradients, self.state, self.params)
    jax.block_until_ready((self.params, self.state))
    self.times.append(time.perf_counter() - start)

  def row(self) -> dict:
    """What was measured."""
    memory: Any = self.compiled.memory_analysis()
    return {
      'optimizer': self.name,
      'compile_seconds': self.compile_seconds,
      'state_bytes': self.memory_report.state,
      'adam_state_bytes': self.memory_report.adam,
      'temporary_bytes': memory.temp_size_in_bytes,
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
  config = llama.named(model, scan_layers=stacked)
  shapes = nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
  shapes = nnx.to_pure_dict(nnx.state(shapes, nnx.Param))
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
    runners.append(Runner(name, make(), params))
    print(f'compiled {name} in {runners[-1].compile_seconds:.1f} s', flush=True)
  for t in progress.track(range(args.steps + 1), 'steps of each'):
    for runner in runners:
      if t % EVERY.get(runner.name, 1) == 0:
        runner.step(gradients)
  return [runner.row() for runner in runners]


def table(rows: list[dict]) -> str:
  """The rows as text."""
  lines = [
    f'{"optimizer":<28}{"compile":>8}{"state":>9}{"temp":>9}{"median":>9}'
    f'{"worst":>9}{"worst / median":>16}{"that returns":>14}{"/ adamw":>9}'
  ]
  for row in rows:
    lines.append(
      f'{row["optimizer"]:<28}{row["compile_seconds"]:>6.1f} s'
      f'{row["state_bytes"] / 2**20:>5.0f} MiB'
      f'{row["temporary_bytes"] / 2**20:>5.0f} MiB'
      f'{row["median_seconds"] * 1e3:>6.0f} ms'
      f'{row["worst_seconds"] * 1e3:>6.0f} ms'
      f'{row["worst_over_median"]:>16.2f}'
      f'{row["worst_that_returns_over_median"]:>14.2f}'
      f'{row["median_over_adamw"]:>9.2f}'
    )
  return '\n'.join(lines)


def picture(results: dict, path: pathlib.Path) -> None:
  """Every step's time: a panel for each optimizer, a column for each form."""
  forms = results['rows']
  names = [row['optimizer'] for row in next(iter(forms.values()))]
  figure, panels = plt.subplots(
    len(names),
    len(forms),
    figsize=(10, 1.2 * len(names)),
    sharex=True,
    sharey=True,
    layout='constrained',
  )
  for column, (form, rows) in zip(panels.T, forms.items(), strict=True):
    by_name = {row['optimizer']: row for row in rows}
    for axes, name in zip(column, names, strict=True):
      axes.set_title(f'{name}, {form}', fontsize=8, loc='left', pad=2)
      axes.set_yscale('log')
      row = by_name.get(name)
      if row is None:
        axes.text(0.5, 0.5, 'projects no stack', transform=axes.transAxes)
        continue
      every = EVERY.get(name, 1)
      steps = np.arange(1, len(row['seconds']) + 1) * every
      axes.plot(steps, np.array(row['seconds']) * 1e3, linewidth=0.7)
  figure.supxlabel('step')
  figure.supylabel('milliseconds')
  figure.savefig(path, dpi=150)


def main(args: Args) -> None:
  """Measures both forms of the tree, then draws and prints everything."""
  out = pathlib.Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  fixed = {k: v for k, v in dataclasses.asdict(args).items() if k != 'out'}
  fixed = json.loads(json.dumps(fixed))
  results = {'machine': machine.describe(), 'settings': fixed, 'rows': {}}
  if out.exists():
    results = json.loads(out.read_text())
    if results['settings'] != fixed:
      raise ValueError(
        f'{out} holds runs with {results["settings"]}, not {fixed}: delete it '
        'or name another --out'
      )
  for form, stacked in (('one array a matrix', False), ('stacked', True)):
    if form not in results['rows']:
      results['rows'][form] = measure(args, stacked)
    summarize(results['rows'][form])
    print(f'{args.model}, {form}\n{table(results["rows"][form])}\n', flush=True)
    out.write_text(json.dumps(results) + '\n')
    jax.clear_caches()
  picture(results, out.with_suffix('.png'))


if __name__ == '__main__':
  main(tyro.cli(Args))
