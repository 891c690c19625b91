"""How much of a LLaMA's gradients each projector's bases capture as it trains.

The main job of the examples trains once, and all projectors see its gradients,
each with bases of its own. At every step, `captured_energy` of the basis that
this step would use, the share of ||G||_F^2 that it keeps, is averaged over the
matrices. It stands beside the most that any basis of that rank could capture.
A basis that is refreshed at this step has seen the gradient that it is judged
by; the others have not. Results that are in results/captured_energy.json
already are only drawn again.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import harness
import mesh
import pretrain
import subspace_optax as so
from subspace_optax import projectors


@dataclasses.dataclass(frozen=True)
class Args:
  """What is measured; see the module."""

  optimizer: str = pretrain.Config.optimizer  # that trains
  rank: int = 32
  steps: int = pretrain.Config.steps
  update_proj_gap: int = 50
  best_every: int = 5  # steps between SVDs of everything
  warm_up: int = 50  # steps that the table leaves out
  out: str = str(harness.RESULTS / 'captured_energy.json')


def panels(gap: int) -> dict[str, dict[str, projectors.Projector]]:
  """From the title of a panel to its projectors by name."""
  adam = optax.adam(5e-3)
  return {
    f'chosen by a gradient every {gap} steps': {
      'svd exact': projectors.svd(gap, 'exact'),
      'svd randomized': projectors.svd(gap, 'randomized'),
      'svd warm': projectors.svd(gap, 'warm', power_iterations=1),
      'importance_svd': projectors.importance_svd(gap),
      'dct l1': projectors.dct(gap, 'l1'),
      'dct l2': projectors.dct(gap, 'l2'),
    },
    'moved at every step, or nearly': {
      'power_iteration': projectors.power_iteration(1),
      'lagged_power': projectors.lagged_power(1),
      'power_iteration, momentum 0.9': projectors.power_iteration(1, 0.9),
      'online_pca': projectors.online_pca(adam),
      'online_pca from svd': projectors.online_pca(adam, init='svd'),
      'dct l1, every step': projectors.dct(1, 'l1'),
    },
    'moved a little, or at random': {
      'grassmann_tracking': projectors.grassmann_tracking(gap),
      'grassmann_tracking every 5': projectors.grassmann_tracking(5),
      'grassmann_walk': projectors.grassmann_walk(gap),
      'stiefel': projectors.stiefel(gap),
      'gaussian': projectors.gaussian(gap),
      'dct random': projectors.dct(gap, 'random'),
    },
  }


def watch(tx: optax.GradientTransformation) -> Callable:
  """(gradient, state) -> (mean captured energy, state) of one projector."""

  @jax.jit
  def step(gradient, state):
    _, state = tx.update(gradient, state)
    metrics = so.subspace_metrics(state).values()
    shares = [jnp.ravel(m['captured_energy']) for m in metrics]
    return jnp.mean(jnp.concatenate(shares)), state

  return step


def best(spec: so.SubspaceSpec, gradient: Any) -> jax.Array:
  """The largest mean share that bases of these ranks can capture."""

  def one(match):
    g = match.layout.to_matrix(match.leaf)
    squares = jnp.square(jnp.linalg.svd(g, compute_uv=False))
    kept = jnp.sum(squares[..., : match.layout.rank], axis=-1)
    return jnp.ravel(kept / jnp.sum(squares, axis=-1))

  matches = [m for m in spec.match(gradient) if m and m.layout]
  return jnp.mean(jnp.concatenate([one(match) for match in matches]))


def run(args: Args) -> dict:
  """Trains; returns the mean share of each projector at each step."""
  config = pretrain.resolve(
    pretrain.Config(optimizer=args.optimizer, rank=args.rank, steps=args.steps)
  )
  corpus = pretrain.load_corpus(config)
  loss, tx, state = pretrain.build(config, corpus.vocab)
  spec = so.SubspaceSpec(args.rank)
  rules = panels(args.update_proj_gap).values()
  made = {k: so.project(spec, v) for of in rules for k, v in of.items()}
  steps = {name: watch(one) for name, one in made.items()}
  states = {name: one.init(state['params']) for name, one in made.items()}
  gradient_of = jax.jit(jax.grad(loss))
  best_of = jax.jit(lambda gradient: best(spec, gradient))

  @jax.jit
  def train(gradient, state):
    params = state['params']
    updates, opt_state = tx.update(gradient, state['opt_state'], params)
    params = optax.apply_updates(params, updates)
    return {'params': params, 'opt_state': opt_state}

  curves: dict[str, list] = {name: [] for name in steps}
  most = []
  batches = pretrain.batches(config, corpus, 0, mesh.make())
  for t, batch in enumerate(harness.track(batches, 'Steps', args.steps)):
    gradient = gradient_of(state['params'], batch[0])
    for name, step in steps.items():
      share, states[name] = step(gradient, states[name])
      curves[name].append(float(share))
    if t % args.best_every == 0:
      most.append((t, float(best_of(gradient))))
    state = train(gradient, state)
  return {'curves': curves, 'best': most}


def means(args: Args, results: dict) -> dict[str, float]:
  """Each projector's share of the best, over the steps after the first few."""
  best_at = [(t, share) for t, share in results['best'] if t >= args.warm_up]
  return {
    name: float(np.mean([curve[t] / share for t, share in best_at]))
    for name, curve in results['curves'].items()
  }


def spread(args: Args, results: dict) -> dict[str, tuple[float, float, float]]:
  """From each projector to the deciles of its shares, and their median."""
  return {
    name: tuple(np.percentile(curve[args.warm_up :], (10, 50, 90)))
    for name, curve in results['curves'].items()
  }


@harness.picture(figsize=(7, 6.5))
def picture(axes: Any, results: dict) -> None:
  """Captured energy over training, and between what it mostly was."""
  args = Args(**results['settings'])
  shares = spread(args, results)
  names = sorted(shares, key=lambda name: -shares[name][1])
  for title, rules in panels(args.update_proj_gap).items():
    of = {name: shares[name] for name in rules}
    harness.draw_ranges(axes, of, names, label=title)
  most = float(np.median([x for t, x in results['best'] if t >= args.warm_up]))
  axes.axvline(most, color='k', linewidth=0.8, label='best possible')
  axes.set_xlim(0, 1.02)
  rank = results['settings']['rank']
  axes.set_xlabel(
    f'share of the gradient at rank {rank}, mean of matrices\n'
    f'(median of steps {args.warm_up} to {args.steps}, first to last decile)'
  )
  axes.legend(fontsize=8, loc='upper left')


def main(args: Args) -> None:
  """Trains if there are no results yet, then draws and prints everything."""
  settings = harness.settings_of(args)
  results = harness.load_results(args.out, settings=settings)
  if 'curves' not in results:
    results |= run(args)
    results['mean_share_of_the_best'] = means(args, results)
    harness.save_results(args.out, results, indent=None)
  picture(results, harness.next_to(args.out, '.png'))
  for name, share in results['mean_share_of_the_best'].items():
    print(f'{name:<32}{share:.3f} of the best')


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
