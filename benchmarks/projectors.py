"""The time that each projector takes to move a basis, against that of an SVD.

Gradients have LLaMA's MLP shapes, and the coordinates R = P^T G are given. Each
rule's whole update, with all that the optimizer's state keeps for it, is
compared with `jnp.linalg.svd(full_matrices=False)` in the same run. Beside this
ratio stand the share of the best possible energy that the new basis captures of
the gradient, and the ratios of Liang et al., 2024, Figure 2. A shape that is in
results/projectors.json already is not measured again.
"""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import harness
from subspace_optax import projectors
from subspace_optax._matrix import _layout
from subspace_optax._matrix import _linalg
from subspace_optax.projectors import _base

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
  seconds: float = 1.0  # for which each update is repeated, at least
  out: str = str(harness.RESULTS / 'projectors.json')


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
  'lagged_power': lambda: projectors.lagged_power(1),
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


def update(rule: _base.Projector, layout: _layout.Layout) -> Callable[..., Any]:
  """(gradient, coordinates, subspaces, state) -> subspaces, state."""

  @jax.jit
  def run(g, coords, subspaces, state):
    energy, yes = layout.energy(g), jnp.array(True)
    one = {'w': _base.Matrix(g, g, layout, jnp.uint32(1), energy, yes)}
    context = _base.Context(jnp.zeros((), jnp.int32), yes)
    subspaces, _, state = rule.refresh(context, one, subspaces, state)
    coords = {'w': coords}
    subspaces, _, state = rule.track(context, one, coords, subspaces, state)
    return subspaces, state

  return run


def ranks(args: Args, m: int) -> list[int]:
  """Those of use at this size: between an eighth and a half of it."""
  return [rank for rank in args.ranks if m <= 8 * rank and 2 * rank <= m]


def measure(args: Args, m: int, n: int) -> Iterator[dict]:
  """Yields a row for every rule and rank at one shape."""
  g = gradient(m, n, seed=1)
  svd = jax.jit(lambda x: jnp.linalg.svd(x, full_matrices=False))
  whole = harness.median_seconds(svd, g, least=args.seconds)
  # The bases that rules follow are the best ones for another batch's tokens.
  vectors, values = svd(gradient(m, n, seed=2))[0], svd(g)[1]
  total, zero = float(jnp.sum(jnp.square(g))), jnp.zeros(())
  for rank in ranks(args, m):
    layout = _layout.Layout((m, n), (0,), (1,), True, rank)
    best = jnp.sum(jnp.square(values[:rank]))
    for name, make in RULES.items():
      rule, basis = make(), vectors[:, :rank]
      if name not in FOLLOW:
        basis = _linalg.haar(layout, jnp.uint32(2), 0)
      parts = ({'w': x} for x in (basis, zero, zero, zero))
      subspaces, coords = _base.Subspaces(*parts), layout.project(g, basis)
      zeros = lambda layout=layout: {'w': jnp.zeros(layout.coords_shape)}
      run, state = update(rule, layout), rule.init(subspaces, zeros)
      arrays = (g, coords, subspaces, state)
      took = harness.median_seconds(run, *arrays, least=args.seconds)
      # Some bases are not orthonormal.
      q, _ = jnp.linalg.qr(run(*arrays)[0].basis['w'])
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


def table(rows: list[dict]) -> str:
  """One shape's rows: rules down, ranks across."""
  columns = sorted({row['rank'] for row in rows})
  cell = lambda row: (
    f'{row["times_faster_than_svd"]:.1f}x {row["captured_over_best"]:.4f}'
  )
  by = {(row['rule'], row['rank']): cell(row) for row in rows}
  lines = [[name, *(by[name, rank] for rank in columns)] for name in RULES]
  head = ['times faster, share of the best energy']
  return harness.table(head + [f'rank {rank}' for rank in columns], lines)


def show(results: dict, shape: tuple[int, int]) -> None:
  """Prints what is known of one shape."""
  rows = [row for row in results['rows'] if tuple(row['shape']) == shape]
  paper = ', '.join(f'{k} {v}x' for k, v in PAPER.get(shape, {}).items())
  seconds = rows[0]['svd_seconds']
  print(f'{shape}: svd {seconds:.3f} s (the paper, for online PCA: {paper})')
  print(f'\n{table(rows)}\n', flush=True)


@harness.picture(figsize=(8, 5), dpi=120)
def picture(axes: Any, results: dict) -> None:
  """Speed at each shape's largest rank, the paper's beside it."""
  found: dict[str, dict] = {}
  for row in results['rows']:
    if row['rank'] == row['shape'][0] // 4:
      found.setdefault(row['rule'], {})[tuple(row['shape'])] = row
  speeds = {
    name: sorted(row['times_faster_than_svd'] for row in rows.values())
    for name, rows in found.items()
  }
  names = sorted(speeds, key=lambda name: -float(np.median(speeds[name])))
  ranges = {
    name: (min(x), float(np.median(x)), max(x)) for name, x in speeds.items()
  }
  harness.draw_ranges(axes, ranges, names, label='here: median of shapes')
  shapes = {shape for rows in found.values() for shape in rows}
  for device, marker in (('RTX 3090', 'D'), ('A100', 's')):
    at = [PAPER[shape][device] for shape in sorted(shapes & set(PAPER))]
    row = [names.index('online_pca adam') + 0.3] * len(at)
    label = f'online PCA in the paper, {device}'
    axes.plot(at, row, marker, markersize=4, fillstyle='none', label=label)
  axes.set_xscale('log')
  axes.xaxis.set_major_formatter('{x:g}')
  axes.set_xlabel('times faster than an SVD; line over all shapes, rank m / 4')
  axes.legend(fontsize=8)


def main(args: Args) -> None:
  """Measures every shape, then draws and prints everything."""
  results = harness.load_results(args.out)
  rows = results.setdefault('rows', [])
  known = {tuple(row['shape']) for row in rows}
  for m, n in args.shapes:
    if (m, n) not in known:
      total = len(ranks(args, m)) * len(RULES)
      rows += harness.track(measure(args, m, n), f'{m} x {n}', total)
      harness.save_results(args.out, results)
      jax.clear_caches()
    show(results, (m, n))
  picture(results, harness.next_to(args.out, '.png'))


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
