"""What lifted layers cost and save, counted by XLA; nothing runs.

  python benchmarks/rso.py

Parts: FLOPs of one layer; of an 8-layer LLaMA with and without recomputed
layers; what a block keeps for its backward pass; what x P saves if layers share
it; what replicas send; the peak memory of training steps. The first five take
five minutes on two cores, `peak` half a minute to two for each of 78 programs:
`--models`, `--policies`, `--methods` and `--width-over-rank` choose some. It
compiles for a TPU, which need not be there, but `pip install libtpu` of jax's
version must, on Python 3.12 or newer; else for a CPU, as the results say.

What results/rso.json holds is not compiled again without `--again`; `--parts`
with no name only writes the page and the picture anew.

Results: benchmarks/results/rso.json and rso.png, and docs/rso.md.
"""

from collections.abc import Iterator
import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

# Nothing outside this machine is asked about TPUs.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent / 'examples'))

import jax  # noqa: E402
import tyro  # noqa: E402

import llama  # noqa: E402
import machine  # noqa: E402
import pages  # noqa: E402
import rso_block  # noqa: E402
import rso_layer  # noqa: E402
import rso_llama  # noqa: E402
import rso_memory  # noqa: E402
import rso_programs as programs  # noqa: E402
import rso_report  # noqa: E402

PARTS = ('layer', 'llama', 'block', 'sharing', 'traffic', 'peak')
DEVICES = 4


@dataclasses.dataclass(frozen=True)
class Args:
  """What is counted; see the module."""

  parts: tuple[str, ...] = PARTS
  again: bool = False  # whether parts that are there already are counted anew
  # The LLaMA of `llama` and `traffic`, whose layers are unrolled and scanned.
  width: int = 256
  mlp_width: int = 688
  layers: int = 8
  heads: int = 4
  vocab: int = 512
  ranks: tuple[int, ...] = (16, 32, 64)
  batch: int = 4
  seq: int = 512
  block: str = 'llama_350m'
  # Of `peak`: tokens of a device, and what is compiled for.
  models: tuple[str, ...] = ('llama_350m', 'llama_1b', 'llama_7b')
  policies: tuple[str, ...] = ('none', 'layers')
  methods: tuple[str, ...] = (programs.ADAM, *programs.METHODS)
  width_over_rank: tuple[int, ...] = (4, 16, 2, 8)
  peak_batch: int = 8
  peak_seq: int = 256
  topology: str = 'v5p:2x2x1'
  out: str = str(ROOT / 'results' / 'rso.json')
  docs: str = str(ROOT.parent / 'docs' / 'rso.md')


def config(args: Args, scan: bool) -> llama.LlamaConfig:
  """The small LLaMA."""
  names = ('width', 'mlp_width', 'layers', 'heads', 'vocab')
  sizes = {name: getattr(args, name) for name in names}
  return llama.LlamaConfig(**sizes, scan_layers=scan)


def rows(args: Args, part: str) -> Iterator[dict[str, Any]]:
  """Yields the rows of any part but `peak`."""
  if part == 'layer':
    return rso_layer.rows()
  if part == 'llama':
    sizes = args.batch, args.seq
    return rso_llama.rows(config(args, False), args.ranks, *sizes)
  if part == 'block':
    block = llama.named(args.block)
    return rso_block.rows(block, [block.width // k for k in (16, 8, 4, 2)])
  if part == 'sharing':
    both = [config(args, scan) for scan in (False, True)]
    sizes = args.ranks[-1], args.batch, args.seq
    return rso_llama.sharing(both, *sizes)
  where = programs.target('cpu', DEVICES)
  return rso_llama.traffic(where, config(args, True), args.ranks, args.seq)


def progress(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
  for row in rows:
    print(row, flush=True)
    yield row


def peaks(args: Args, results: dict, save: Any) -> None:
  """Compiles the training steps that `results` lacks."""
  where = programs.target(args.topology, 1)
  found = results.setdefault('peak', {}).setdefault(where.name, [])
  known = [(x['model'], x['policy'], x['method'], x['part']) for x in found]
  chosen = args.models, args.policies, args.methods, args.width_over_rank
  for run in rso_memory.runs(*chosen):
    if run in known:
      continue
    start = time.perf_counter()
    row = rso_memory.row(where, run, args.peak_batch, args.peak_seq)
    found.append(row | {'seconds': round(time.perf_counter() - start)})
    print(found[-1], flush=True)
    save()


def load(args: Args, out: pathlib.Path) -> dict[str, Any]:
  """What has been counted before, with these settings."""
  leave = ('parts', 'again', 'out', 'docs')
  leave += ('models', 'policies', 'methods', 'width_over_rank')
  fixed = {k: v for k, v in vars(args).items() if k not in leave}
  fixed = json.loads(json.dumps(fixed))
  results = json.loads(out.read_text()) if out.exists() else {}
  if results.setdefault('settings', fixed) != fixed:
    raise ValueError(
      f'{out} holds {results["settings"]}, not {fixed}: delete it or name '
      'another --out'
    )
  return results | {'machine': machine.describe()}


def main(args: Args) -> None:
  """Counts, then prints and writes everything."""
  jax.config.update('jax_num_cpu_devices', DEVICES)
  out = pathlib.Path(args.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  results = load(args, out)
  save = lambda: out.write_text(json.dumps(results, indent=1) + '\n')
  for part in args.parts:
    if args.again:
      results.pop(part, None)
    if part == 'peak':
      peaks(args, results, save)
    elif part not in results:
      results[part] = list(progress(rows(args, part)))
    save()
  made = rso_report.tables(results)
  print('\n\n'.join(made.values()))
  pages.fill(pathlib.Path(args.docs), made)
  if 'peak' in results:
    rso_report.picture(results, out.with_suffix('.png'))


if __name__ == '__main__':
  main(tyro.cli(Args))
