"""The time that each projector takes to move a basis, against that of an SVD.

  python benchmarks/projectors.py

For gradients of LLaMA's MLP shapes, given the coordinates R = P^T G: the whole
update, with all that the optimizer's state keeps of it, as a ratio of
`jnp.linalg.svd(full_matrices=False)` in the same run. Beside it the share of
the best possible energy that the new basis captures of the gradient, and the
ratios of Liang et al., 2024, Figure 2. Results: a table,
benchmarks/results/projectors.json and .png; a shape that is in the former
already is not measured again.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rich import progress
import tyro

import machine
from subspace_optax import projectors
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax.projectors import _base

matplotlib.use('Agg')
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parent

# SVD over a step of online PCA: Liang et al., 2024, Figure 2, in PyTorch.
PAPER = {
  (512, 1376): {'RTX 3090': 16.38, 'A100': 20.71},
  (1024, 2736): {'RTX 3090': 51.00, 'A100': 57.93},
  (2048, 5461): {'RTX 3090': 49.75, 'A100': 72.88},
  (4096, 11008): {'RTX 3090': 58.01, 'A100': 142.43},
}


@dataclasses.dataclass(frozen=True)
class Args:
  """What is measured; see the module."""

  shapes: tuple[tuple[int, int], ...] = tuple(PAPER)
  ranks: tuple[int, ...] = (128, 256, 512, 1024)
  seconds: float = 1.0  # at least, of repetitions of one update
  out: str = str(ROOT / 'results' / 'projectors.json')


RULES: dict[str, Callable[[], _base.Projector]] = {
  'svd exact': lambda: projectors.svd(1, 'exact'),
  'svd gram': lambda: projectors.svd(1, 'gram'),
  'svd randomized': lambda: projectors.svd(1, 'randomized', power_iterations=1),
  'svd randomized, 2 rounds': lambda: projectors.svd(
    1, 'randomized', power_iterations=2
  ),
  'svd warm': lambda: projectors.svd(1, 'warm', power_iterations=1),
  'importance_svd gram': lambda: projectors.importance_svd(1, 'gram'),
  'power_iteration': lambda: projectors.power_iteration(1),
  'online_pca sgd': lambda: projectors.online_pca(optax.sgd(0.1)),
  'online_pca adam': lambda: projectors.online_pca(optax.adam(5e-3)),
  'grassmann_tracking': lambda: projectors.grassmann_tracking(1),
  'grassmann_walk': lambda: projectors.grassmann_walk(1),
  'stiefel': lambda: projectors.stiefel(1),
  'gaussian': lambda: projectors.gaussian(1),
}
# Their bases depend on the basis before, which here is that of another batch.
FOLLOW = ('svd warm', 'power_iteration', 'online_pca sgd', 'online_pca adam')
FOLLOW += ('grassmann_tracking', 'grassmann_walk')


def gradient(m: int, n: int, seed: int) -> jax.Array:
  """X^T D for 4,096 tokens whose features have variances 1, 1/2, 1/3 ...

  A linear layer's gradient has this form; the spectra are alike in both sides,
  and the tokens of each seed are others.
  """
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((4096, m), np.float32) * np.arange(1, m + 1) ** -0.5
  d = rng.standard_normal((4096, n), np.float32) * np.arange(1, n + 1) ** -0.5
  return jnp.asarray(x.T @ d, jnp.float32)


def matrix(layout: _layout.Layout, g: jax.Array) -> _base.Matrix:
  """The gradient as `project` hands it to projectors."""
  energy = layout.energy(g)
  return _base.Matrix(g, g, layout, jnp.uint32(1), energy, jnp.array(True))


def update(rule: _base.Projector, layout: _layout.Layout) -> Callable[..., Any]:
  """(gradient, coordinates, subspaces, state) -> subspaces, state."""

  def run(g, coords, subspaces, state):
    one = {'w': matrix(layout, g)}
    context = _base.Context(jnp.zeros((), jnp.int32), jnp.array(True))
    subspaces, _, state = rule.refresh(context, one, subspaces, state)
    subspaces, _, state = rule.track(
      context, one, {'w': coords}, subspaces, state
    )
    return subspaces, state

  return jax.jit(run)


def seconds(f: Callable[..., Any], *args: Any, least: float) -> float:
  """The median time of a call, the first one apart."""
  jax.block_until_ready(f(*args))
  times = []
  while not times or (sum(times) < least and len(times) < 50):
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    times.append(time.perf_counter() - start)
  return float(np.median(times))


def start(
  layout: _layout.Layout, basis: jax.Array
) -> tuple[_base.Subspaces, Callable[[], Any]]:
  """The subspaces of one leaf, and what makes its coordinates."""
  zero = jnp.zeros(())
  subspaces = _base.Subspaces(*({'w': x} for x in (basis, zero, zero, zero)))
  return subspaces, lambda: {'w': jnp.zeros(layout.coords_shape)}


def ranks(args: Args, m: int) -> list[int]:
  """Those of use at this size: between an eighth and a half of it."""
  return [rank for rank in args.ranks if m <= 8 * rank and 2 * rank <= m]


def measure(
  args: Args, m: int, n: int, whole: float, g: jax.Array, left: dict
) -> Iterator[dict]:
  """Yields a row for every rule and rank at one shape."""
  total = float(jnp.sum(jnp.square(g)))
  for rank in ranks(args, m):
    layout = _layout.Layout((m, n), (0,), (1,), True, rank)
    best = jnp.sum(jnp.square(left['values'][:rank]))
    for name, make in RULES.items():
      rule = make()
      basis = left['vectors'][:, :rank]
      if name not in FOLLOW:
        basis = _linalg.haar(layout, jnp.uint32(2), 0)
      subspaces, zero_coords = start(layout, basis)
      coords = layout.project(g, basis)
      state = rule.init(subspaces, zero_coords)
      run = update(rule, layout)
      took = seconds(run, g, coords, subspaces, state, least=args.seconds)
      new = run(g, coords, subspaces, state)[0].basis['w']
      q, _ = jnp.linalg.qr(new)  # some bases are not orthonormal
      captured = jnp.sum(jnp.square(layout.project(g, q)))
      yield {
        'shape': [m, n],
        'rank': rank,
        'rule': name,
        'seconds': took,
        'svd_seconds': whole,
        'times_faster_than_svd': whole / took,
        'captured_over_best': float(captured / best),
        'best_captured': float(best / total),
      }


def table(rows: list[dict], shape: tuple[int, int]) -> str:
  """One shape's rows as text: rules down, ranks across."""
  of_shape = [row for row in rows if tuple(row['shape']) == shape]
  columns = sorted({row['rank'] for row in of_shape})
  paper = ', '.join(f'{k} {v}x' for k, v in PAPER.get(shape, {}).items())
  lines = [
    f'{shape[0]} x {shape[1]}: svd {of_shape[0]["svd_seconds"]:.3f} s; times '
    'faster, and share of the best energy',
    f'(the paper, for online PCA: {paper})',
    f'{"":<26}' + ''.join(f'{f"rank {r}":>20}' for r in columns),
  ]
  for name in RULES:
    cells = [row for row in of_shape if row['rule'] == name]
    lines.append(
      f'{name:<26}'
      + ''.join(
        f'{c["times_faster_than_svd"]:>11.1f}x{c["captured_over_best"]:>8.4f}'
        for c in sorted(cells, key=lambda row: row['rank'])
      )
    )
  return '\n'.join(lines)


def picture(results: dict, path: pathlib.Path) -> None:
  """Speed over shape at each shape's largest rank, the paper's beside it."""
  figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
  shapes = sorted({tuple(row['shape']) for row in results['rows']})
  ticks = range(len(shapes))
  for i, name in enumerate(RULES):
    ratios = []
    for shape in shapes:
      rows = [
        row
        for row in results['rows']
        if tuple(row['shape']) == shape and row['rule'] == name
      ]
      ratios += [
        row['times_faster_than_svd']
        for row in rows
        if row['rank'] == shape[0] // 4
      ] or [np.nan]
    color = plt.get_cmap('tab20')(i)
    axes.plot(ticks, ratios, marker='o', color=color, label=name)
  for device in ('RTX 3090', 'A100'):
    ratios = [PAPER.get(shape, {}).get(device, np.nan) for shape in shapes]
    axes.plot(ticks, ratios, 'k:', alpha=0.5)
    axes.annotate(f'paper, {device}', (ticks[-1], ratios[-1]), ha='right')
  axes.set_xticks(ticks, [f'{m} x {n}, rank {m // 4}' for m, n in shapes])
  axes.set_yscale('log')
  axes.set_ylabel('times faster than an SVD')
  axes.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
  figure.savefig(path, dpi=150)


def main(args: Args) -> None:
  """Measures every shape, then draws and prints everything."""
  out = pathlib.Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  results: dict[str, Any] = {'machine': machine.describe(), 'rows': []}
  if out.exists():
    results = json.loads(out.read_text())
  known = {tuple(row['shape']) for row in results['rows']}
  for m, n in args.shapes:
    if (m, n) in known:
      print(table(results['rows'], (m, n)) + '\n', flush=True)
      continue
    g = gradient(m, n, seed=1)
    svd = jax.jit(lambda x: jnp.linalg.svd(x, full_matrices=False))
    whole = seconds(svd, g, least=args.seconds)
    # The bases that rules follow are the best ones for another batch's tokens.
    left = {
      'vectors': svd(gradient(m, n, seed=2))[0],
      'values': svd(g)[1],
    }
    rows = measure(args, m, n, whole, g, left)
    total = len(ranks(args, m)) * len(RULES)
    for row in progress.track(rows, f'{m} x {n}', total=total):
      results['rows'].append(row)
    print(table(results['rows'], (m, n)) + '\n', flush=True)
    out.write_text(json.dumps(results, indent=1) + '\n')
    jax.clear_caches()
  picture(results, out.with_suffix('.png'))


if __name__ == '__main__':
  main(tyro.cli(Args))
