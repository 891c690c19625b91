"""What lifted layers save: FLOPs, gradients and memory of a LLaMA, by XLA.

  python benchmarks/rso.py

Compiles the loss and its gradients for an 8-layer LLaMA, whole and with respect
to B in y = x (W + P B), with and without recomputed layers. Nothing runs.
Layers are unrolled, since XLA counts a loop's body once. Results: a table and
benchmarks/results/rso.json.
"""

from collections.abc import Iterator
import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / 'examples'))

from flax import nnx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
import tyro  # noqa: E402

import llama  # noqa: E402
import machine  # noqa: E402
import subspace_optax as so  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Args:
  """What is compiled; see the module."""

  width: int = 256
  mlp_width: int = 688
  layers: int = 8
  heads: int = 4
  vocab: int = 512
  ranks: tuple[int, ...] = (16, 64)
  batch: int = 4
  seq: int = 512
  out: str = str(ROOT / 'results' / 'rso.json')


def model(args: Args, remat: bool) -> tuple[Any, Any]:
  """The graph of a LLaMA, and the shapes of its parameters."""
  sizes = ('width', 'mlp_width', 'layers', 'heads', 'vocab')
  config = llama.LlamaConfig(
    **{name: getattr(args, name) for name in sizes},
    scan_layers=False,
    remat=remat,
  )
  made = nnx.eval_shape(lambda: llama.Llama(config, nnx.Rngs(0)))
  graphdef, params = nnx.split(made, nnx.Param)
  return graphdef, nnx.to_pure_dict(params)


def loss(merge: Any, graphdef: Any, params: Any, tokens: jax.Array) -> Any:
  """Mean cross-entropy of tokens."""
  logits = merge(graphdef, params)(tokens).astype(jnp.float32)
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  )


def count(f: Any, *args: Any) -> dict[str, float]:
  """XLA's counts of a compiled function."""
  program = jax.jit(f).lower(*args).compile()
  cost: Any = program.cost_analysis()
  memory: Any = program.memory_analysis()
  return {
    'flops': cost['flops'],
    'gradient_bytes': memory.output_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
  }


def measure(args: Args) -> Iterator[dict[str, Any]]:
  """Yields a row for whole gradients, and one for every rank."""
  tokens = jax.ShapeDtypeStruct((args.batch, args.seq), jnp.int32)
  for remat in (False, True):
    graphdef, params = model(args, remat)
    whole = jax.value_and_grad(functools.partial(loss, nnx.merge, graphdef))
    yield {'remat': remat, 'rank': None} | count(whole, params, tokens)
    lifted = functools.partial(loss, so.rso.nnx_merge, graphdef)
    for rank in args.ranks:
      spec = so.SubspaceSpec(rank, side='in')
      rso = so.rso.subproblems(spec, optax.sgd(1.0))
      state = jax.eval_shape(rso.init, params)
      bases = jax.eval_shape(rso.bases, params, state)
      f = so.rso.value_and_grad(lifted, spec)
      counted = count(f, params, bases, state.coords, tokens)
      yield {'remat': remat, 'rank': rank} | counted


def table(rows: list[dict[str, Any]]) -> str:
  """The rows beside those of whole gradients."""
  lines = ['remat  rank   GFLOP  saved  gradients MiB  temporary MiB']
  for row in rows:
    [full] = [x for x in rows if x['remat'] == row['remat'] and not x['rank']]
    saved = 1 - row['flops'] / full['flops']
    lines.append(
      f'{row["remat"]!s:5}  {row["rank"] or "full":>4}  '
      f'{row["flops"] / 1e9:6.1f}  {saved:5.1%}  '
      f'{row["gradient_bytes"] / 2**20:13.1f}  '
      f'{row["temporary_bytes"] / 2**20:13.1f}'
    )
  return '\n'.join(lines)


def main(args: Args) -> None:
  """Counts everything, then prints and writes it."""
  rows = list(measure(args))
  print(table(rows))
  results = {
    'machine': machine.describe(),
    'settings': {k: v for k, v in vars(args).items() if k != 'out'},
    'rows': rows,
  }
  pathlib.Path(args.out).write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
  main(tyro.cli(Args))
