"""Layer-wise steps beside ordinary ones: temporaries, copies and time.

Both train a LLaMA of 12 layers on this machine's CPU. Both recompute their
layers, hold the same parameters and states, and donate them. They run in turns,
so noise of the machine affects both and leaves the ratios of their times alone.
`mesh` compiles both for 2 x 2 virtual devices and counts the bytes of one.

Results: results/layerwise.json and .png, and tables in docs/memory.md.
Optimizers that are in the JSON already are not measured again.
"""

from collections.abc import Callable
import dataclasses
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks import harness
from benchmarks import programs
from benchmarks.harness import MIB
import llama
import mesh
import subspace_optax as so
import train_step

KINDS = ('ordinary', 'layerwise')
ON_MESH = ('AdamW', '8-bit GoLore, bases drawn')


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
  out: str = str(harness.RESULTS / 'layerwise.json')
  docs: str = str(harness.DOCS / 'memory.md')


def optimizers(rank: int) -> dict[str, optax.GradientTransformation]:
  """From the name in the table to the optimizer."""
  spec = so.SubspaceSpec(rank, allow_empty=True)
  done = lambda tx: optax.chain(tx, optax.scale_by_learning_rate(1e-3))
  adam8bit = so.scale_by_adam8bit()
  within = lambda rule, inner: done(so.subspace(spec, rule, inner))
  products = so.projectors.svd(200, 'randomized')
  drawn = so.projectors.dct(200, 'random')
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
    self.model = nnx.eval_shape(self.create)
    graphdef, shapes = programs.split(self.create)
    self.loss = train_step.make_loss(graphdef)
    self.params = mesh.parameters(devices, shapes, lambda text: None)
    self.tokens = jax.ShapeDtypeStruct((args.batch, args.seq + 1), jnp.int32)

  def step(self, tx: Any, kind: str) -> tuple[Any, Callable]:
    """What has `init`, and (params, state, tokens) -> (params, state, ...)."""
    if kind == 'layerwise':
      made = so.layerwise(tx, *train_step.by_layer(self.model))
      return made, made.step
    shardings = mesh.shardings(self.params)
    gradient = train_step.placed_gradient(self.loss, shardings)
    return tx, programs.whole_step(None, tx, lambda _: gradient)

  def compiled(self, tx: Any, kind: str) -> tuple[Any, Any]:
    """The compiled step, and what makes its state."""
    made, step = self.step(tx, kind)
    state = programs.place_state(made, self.params)
    run = jax.jit(
      step,
      donate_argnums=(0, 1),
      out_shardings=(
        mesh.shardings(self.params),
        so.state_sharding(made, self.params),
        None,
      ),
      compiler_options=mesh.compiler_options(),
    )
    return run.lower(self.params, state, self.tokens).compile(), made


def counts(program: Any, layers: int) -> dict[str, int]:
  """XLA's bytes of one device, and copies of stacked arrays."""
  memory = programs.count_bytes(program)
  stacked = rf'= \w+\[{layers},\d[\d,]*\]\S* copy\('
  return {
    'arguments': memory.arguments,
    'temporaries': memory.temporaries,
    'beside': memory.total - memory.arguments - memory.temporaries,
    'copies': len(re.findall(stacked, program.as_text())),
  }


def timed(args: Args, model: Model, compiled: Any) -> dict[str, float]:
  """Seconds of a step of both, run in turns; medians, and of the ratio."""
  key, shape = jax.random.key(0), model.tokens.shape
  tokens = jax.random.randint(key, shape, 0, args.vocab)
  runners = []
  for program, made in compiled:
    params = nnx.to_pure_dict(nnx.state(model.create()))
    state = jax.jit(made.init)(params)
    runners.append(harness.Runner(program, params, state))
  for _ in range(args.rounds + 2):
    for runner in runners:
      runner.step(tokens)
  ordinary, by_layer = (np.array(runner.times[2:]) for runner in runners)
  return {
    'ordinary_seconds': float(np.median(ordinary)),
    'layerwise_seconds': float(np.median(by_layer)),
    'ratio': float(np.median(by_layer / ordinary)),
  }


def row(args: Args, name: str, devices: Any, time_it: bool) -> dict:
  """One optimizer, both steps."""
  tx = optimizers(args.rank)[name]
  with jax.set_mesh(devices):
    model = Model(args, devices)
    compiled = [model.compiled(tx, kind) for kind in KINDS]
    ordinary, layered = (counts(x, args.layers) for x, _ in compiled)
    found = {'optimizer': name, 'ordinary': ordinary, 'layerwise': layered}
    return found | (timed(args, model, compiled) if time_it else {})


def table(rows: list[dict]) -> str:
  """One line an optimizer."""
  head = ['optimizer', 'arguments', 'temporaries', 'layer-wise', 'ratio']
  head += ['stacked copies']
  if 'ratio' in rows[0]:
    head += ['ms', 'layer-wise', 'ratio of times']
  return harness.table(head, map(cells, rows))


def cells(x: dict) -> list[str]:
  """The line of one optimizer."""
  old, new = (x[kind]['temporaries'] for kind in KINDS)
  sizes = [x['layerwise']['arguments'], old, new]
  found = [x['optimizer'], *(f'{size / MIB:.1f}' for size in sizes)]
  found.append(f'{new / old:.2f}')
  found.append(' -> '.join(str(x[kind]['copies']) for kind in KINDS))
  if 'ratio' in x:
    found += [f'{1e3 * x[f"{kind}_seconds"]:.0f}' for kind in KINDS]
    found.append(f'{x["ratio"]:.2f}')
  return found


@harness.picture(figsize=(8.5, 4.5))
def picture(axes: Any, results: dict) -> None:
  """What both steps hold, a pair of bars an optimizer."""
  rows = results['rows']
  for i, row in enumerate(rows):
    label = lambda text, i=i: text if i == 0 else None
    for j, kind in enumerate(KINDS):
      x, of = i + 0.4 * (j - 0.5), row[kind]
      below, height = of['arguments'] / MIB, of['temporaries'] / MIB
      kept = label('parameters and state' if j == 0 else None)
      axes.bar(x, below, 0.36, color='tab:gray', label=kept)
      color = ('tab:orange', 'tab:blue')[j]
      held = label(f'temporaries, {kind}')
      axes.bar(x, height, 0.36, below, color=color, label=held)
  names = [row['optimizer'].replace(', ', ',\n') for row in rows]
  axes.set_xticks(range(len(rows)), names, fontsize=7)
  axes.set_ylabel('MiB')
  title = '{layers} layers of width {width}, XLA:CPU'
  axes.set_title(title.format(**results['settings']))
  axes.legend(fontsize=8)


def main(args: Args) -> None:
  """Measures, then writes everything."""
  programs.use_cpu(4)
  settings = harness.settings_of(args)
  results = harness.load_results(args.out, settings=settings)
  parts = {'rows': (mesh.make(), True), 'mesh': (mesh.make(args.mesh), False)}
  for name in harness.track(optimizers(args.rank), 'Optimizers'):
    for part, (devices, time_it) in parts.items():
      rows = results.setdefault(part, [])
      known = [x['optimizer'] for x in rows]
      wanted = part == 'rows' or name in ON_MESH
      if wanted and name not in known and name in (args.only or [name]):
        rows.append(row(args, name, devices, time_it))
        print(rows[-1], flush=True)
        harness.save_results(args.out, results)
  picture(results, harness.next_to(args.out, '.png'))
  tables = {'layerwise': table(results['rows'])}
  if results['mesh']:
    tables['mesh'] = table(results['mesh'])
  print('\n\n'.join(tables.values()))
  harness.fill_page(args.docs, tables)


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
