"""Layer-wise steps beside ordinary ones: temporaries, copies and time.

  python benchmarks/layerwise.py

A LLaMA of 12 layers on this machine's CPU. Both steps recompute their layers,
hold the same parameters and states, donate them, and run in turns, so that
ratios of their times share whatever else the machine did. `mesh` compiles both
for 2 x 2 virtual devices, and counts the bytes of one.

Results: benchmarks/results/layerwise.json and .png, tables in docs/memory.md.
"""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import re
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
import mesh  # noqa: E402
import pages  # noqa: E402
import subspace_optax as so  # noqa: E402
import train_step  # noqa: E402

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Args:
  """What is measured; see the module."""

  width: int = 256
  mlp_width: int = 688
  layers: int = 12
  heads: int = 4
  vocab: int = 512
  batch: int = 4
  seq: int = 64
  rank: int = 64
  rounds: int = 30  # of one step each
  mesh: str = 'fsdp=2,tensor=2'
  only: tuple[str, ...] = ()  # names of the table; all by default
  out: str = str(ROOT / 'results' / 'layerwise.json')
  docs: str = str(ROOT.parent / 'docs' / 'memory.md')


def optimizers(rank: int) -> dict[str, optax.GradientTransformation]:
  """From the name in the table to the optimizer."""
  spec = so.SubspaceSpec(rank, allow_empty=True)
  done = lambda tx: optax.chain(tx, optax.scale_by_learning_rate(1e-3))
  adam8bit = so.scale_by_adam8bit()
  within = lambda rule, inner: done(so.subspace(spec, rule, inner))
  products = so.projectors.svd(200, 'randomized')
  drawn = so.projectors.stiefel(200, regenerate=True)
  return {
    'AdamW': optax.adamw(1e-3),
    '8-bit Adam': done(adam8bit),
    'Adafactor': optax.adafactor(1e-3, min_dim_size_to_factor=32),
    'GaLore': within(products, optax.scale_by_adam()),
    '8-bit GaLore': within(products, adam8bit),
    '8-bit GoLore, bases drawn': within(drawn, adam8bit),
    'subspace_adamw, 8-bit': so.subspace_adamw(1e-3, rank, moment_bits=8),
    'subspace_muon': so.subspace_muon(1e-3, rank),
  }


class Model:
  """A LLaMA on some devices: its shapes, and a step of either kind."""

  def __init__(self, args: Args, devices: Any):
    names = ('width', 'mlp_width', 'layers', 'heads', 'vocab')
    sizes: dict[str, Any] = {name: getattr(args, name) for name in names}
    sizes |= mesh.constraints(devices)
    config = llama.LlamaConfig(**sizes, remat=True)
    self.create = lambda: llama.Llama(config, nnx.Rngs(0))
    self.devices = devices
    self.model = nnx.eval_shape(self.create)
    graphdef, shapes = nnx.split(self.model)
    self.loss = train_step.make_loss(graphdef)
    shapes = nnx.to_pure_dict(shapes)
    self.params = mesh.parameters(devices, shapes, lambda text: None)
    self.tokens = jax.ShapeDtypeStruct((args.batch, args.seq + 1), jnp.int32)

  def step(self, tx: Any, by_layer: bool) -> tuple[Any, Callable]:
    """What has `init`, and (params, state, tokens) -> (params, state, ...)."""
    if by_layer:
      made = so.layerwise(tx, *train_step.by_layer(self.model))
      return made, made.step
    gradient = train_step.placed_gradient(
      self.loss, mesh.shardings(self.params)
    )

    def step(params, state, tokens):
      value, grads = gradient(params, tokens)
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state, value

    return tx, step

  def compiled(self, tx: Any, by_layer: bool) -> tuple[Any, Any]:
    """The compiled step, and the shapes and shardings of its state."""
    made, step = self.step(tx, by_layer)
    placed = so.state_sharding(made, self.params)
    state = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      jax.eval_shape(made.init, self.params),
      placed,
    )
    out = (mesh.shardings(self.params), placed, None)
    run = jax.jit(
      step,
      donate_argnums=(0, 1),
      out_shardings=out,
      compiler_options=mesh.compiler_options(),
    )
    return run.lower(self.params, state, self.tokens).compile(), made


def counts(program: Any, layers: int) -> dict[str, int]:
  """XLA's bytes of one device, and copies of stacked arrays."""
  memory = program.memory_analysis()
  beside = memory.output_size_in_bytes - memory.alias_size_in_bytes
  stacked = rf'= \w+\[{layers},\d[\d,]*\]\S* copy\('
  return {
    'arguments': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'beside': beside,
    'copies': len(re.findall(stacked, program.as_text())),
  }


def timed(args: Args, model: Model, programs: Any) -> dict[str, float]:
  """Seconds of a step of both, run in turns; medians, and of the ratio."""
  tokens = jax.random.randint(
    jax.random.key(0), model.tokens.shape, 0, args.vocab
  )
  held, seconds = [], [[], []]
  for _, made in programs:
    params = nnx.to_pure_dict(nnx.state(model.create()))
    held.append((params, jax.jit(made.init)(params)))
  for _ in range(args.rounds + 2):
    for i, (program, _) in enumerate(programs):
      start = time.perf_counter()
      *carry, _ = jax.block_until_ready(program(*held[i], tokens))
      seconds[i].append(time.perf_counter() - start)
      held[i] = tuple(carry)
  ordinary, by_layer = (np.array(x[2:]) for x in seconds)
  return {
    'ordinary_seconds': float(np.median(ordinary)),
    'layerwise_seconds': float(np.median(by_layer)),
    'ratio': float(np.median(by_layer / ordinary)),
  }


def row(args: Args, name: str, tx: Any, devices: Any, time_it: bool) -> dict:
  """One optimizer, both steps."""
  with jax.set_mesh(devices):
    model = Model(args, devices)
    programs = [model.compiled(tx, by_layer) for by_layer in (False, True)]
    ordinary, layered = (counts(x, args.layers) for x, _ in programs)
    found = {'optimizer': name, 'ordinary': ordinary, 'layerwise': layered}
    return found | (timed(args, model, programs) if time_it else {})


MiB = 2**20


def table(rows: list[dict]) -> str:
  """One line an optimizer."""
  head = ['optimizer', 'arguments', 'temporaries', 'layer-wise', 'ratio']
  head += ['stacked copies', 'ms', 'layer-wise', 'ratio of times']
  head = head if 'ratio' in rows[0] else head[:6]
  lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
  for x in rows:
    old, new = (x[k]['temporaries'] for k in ('ordinary', 'layerwise'))
    both = (x[k]['copies'] for k in ('ordinary', 'layerwise'))
    cells = [
      x['optimizer'],
      f'{x["layerwise"]["arguments"] / MiB:.1f}',
      f'{old / MiB:.1f}',
      f'{new / MiB:.1f}',
      f'{new / old:.2f}',
      ' -> '.join(map(str, both)),
    ]
    if 'ratio' in x:
      cells += [
        f'{1e3 * x[f"{k}_seconds"]:.0f}' for k in ('ordinary', 'layerwise')
      ]
      cells += [f'{x["ratio"]:.2f}']
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def picture(results: dict, path: pathlib.Path) -> None:
  """What both steps hold, a pair of bars an optimizer."""
  rows = results['rows']
  figure, axes = plt.subplots(figsize=(8.5, 4.5), layout='constrained')
  for i, row in enumerate(rows):
    for j, kind in enumerate(('ordinary', 'layerwise')):
      x, bytes_ = i + 0.4 * (j - 0.5), row[kind]
      below = bytes_['arguments'] / MiB
      label = lambda text, i=i: text if i == 0 else None
      axes.bar(
        x,
        below,
        0.36,
        color='tab:gray',
        label=label('parameters and state' if j == 0 else None),
      )
      color = ('tab:orange', 'tab:blue')[j]
      height = bytes_['temporaries'] / MiB
      axes.bar(
        x, height, 0.36, below, color=color, label=label(f'temporaries, {kind}')
      )
  axes.set_xticks(
    range(len(rows)),
    [r['optimizer'].replace(', ', ',\n') for r in rows],
    fontsize=7,
  )
  axes.set_ylabel('MiB')
  axes.set_title(
    '{layers} layers of width {width}, XLA:CPU'.format(**results['settings'])
  )
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main(args: Args) -> None:
  """Measures, then writes everything."""
  jax.config.update('jax_num_cpu_devices', 4)
  chosen = {
    k: v
    for k, v in optimizers(args.rank).items()
    if k in args.only or not args.only
  }
  one, four = mesh.make(), mesh.make(args.mesh)
  rows, on_mesh = [], []
  for name, tx in progress.track(chosen.items(), 'Optimizers'):
    rows.append(row(args, name, tx, one, True))
    if name in ('AdamW', '8-bit GoLore, bases drawn'):
      on_mesh.append(row(args, name, tx, four, False))
    print(rows[-1], flush=True)
  settings = dataclasses.asdict(args)
  settings = {k: v for k, v in settings.items() if k not in ('out', 'docs')}
  results = {
    'machine': machine.describe(),
    'settings': settings,
    'rows': rows,
    'mesh': on_mesh,
  }
  out = pathlib.Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(results, indent=1) + '\n')
  picture(results, out.with_suffix('.png'))
  tables = {'layerwise': table(rows), 'mesh': table(on_mesh)}
  print('\n\n'.join(tables.values()))
  pages.fill(pathlib.Path(args.docs), tables)


if __name__ == '__main__':
  main(tyro.cli(Args))
