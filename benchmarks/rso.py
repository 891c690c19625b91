"""What lifted layers cost and save, counted by XLA; nothing runs.

The parts are the FLOPs of one layer; those of an 8-layer LLaMA with and without
recomputed layers; what a block keeps for its backward pass; what x P saves if
layers share it; what replicas send; and the peak memory of training steps. The
first five take five minutes on two cores. `peak` takes half a minute to two for
each of 78 programs; `--only` chooses some of them. Programs are compiled for a
TPU if possible (see `programs.find_devices`), else for a CPU, as the results
say.

Parts that are in results/rso.json are not compiled again without `--again`.
`--parts` without a name only rewrites docs/rso.md and results/rso.png.
"""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

import jax
import tyro

from benchmarks import harness
from benchmarks import programs
from benchmarks import rso_layers
from benchmarks import rso_model
from benchmarks import rso_report
import llama

PARTS = ('layer', 'llama', 'block', 'sharing', 'traffic', 'peak')
DEVICES = 4


@dataclasses.dataclass(frozen=True)
class Args:
  """What is counted; see the module."""

  parts: tuple[str, ...] = PARTS
  again: bool = False  # whether to count again what is there already
  # The model of `llama` (unrolled layers) and of `traffic` (scanned layers).
  width: int = 256
  mlp_width: int = 688
  layers: int = 8
  heads: int = 4
  vocab: int = 512
  ranks: tuple[int, ...] = (16, 32, 64)
  batch: int = 4
  seq: int = 512
  block: str = 'llama_350m'
  # For `peak`: tokens per device, the target, and which runs.
  peak_batch: int = 8
  peak_seq: int = 256
  topology: str = 'v5p:2x2x1'
  only: str = ''  # part of model-policy-method-width/rank
  out: str = str(harness.RESULTS / 'rso.json')
  docs: str = str(harness.DOCS / 'rso.md')


def rows(args: Args, part: str) -> Iterator[dict[str, Any]]:
  """Yields the rows of any part but `peak`."""
  names = ('width', 'mlp_width', 'layers', 'heads', 'vocab')
  sizes: dict[str, Any] = {name: getattr(args, name) for name in names}
  scanned = llama.LlamaConfig(**sizes)
  unrolled = dataclasses.replace(scanned, scan_layers=False)
  block, tokens = llama.named(args.block), (args.batch, args.seq)
  if part == 'layer':
    return rso_layers.layer_rows()
  if part == 'llama':
    return rso_model.flops_rows(unrolled, args.ranks, *tokens)
  if part == 'block':
    ranks = [block.width // k for k in (16, 8, 4, 2)]
    return rso_layers.block_rows(block, ranks)
  if part == 'sharing':
    both = (unrolled, scanned)
    return rso_model.sharing_rows(both, args.ranks[-1], *tokens)
  mesh = programs.make_mesh(jax.devices(), data=DEVICES)
  return rso_model.traffic_rows(mesh, scanned, args.ranks, args.seq)


def count_peaks(args: Args, results: dict, save: Callable[[], None]) -> None:
  """Compiles the training steps that `results` lacks."""
  devices, target = programs.find_devices(args.topology)
  mesh = programs.make_mesh(devices, data=1)
  found = results.setdefault('peak', {}).setdefault(target, [])
  known = [(x['model'], x['policy'], x['method'], x['part']) for x in found]
  for run in rso_model.PEAK_RUNS:
    if run in known or args.only not in '-'.join(map(str, run)):
      continue
    seconds, row = harness.time_call(
      rso_model.peak_row, mesh, run, args.peak_batch, args.peak_seq
    )
    found.append(row | {'seconds': round(seconds)})
    print(found[-1], flush=True)
    save()


def main(args: Args) -> None:
  """Counts, then prints and writes everything."""
  programs.use_cpu(DEVICES)
  settings = harness.settings_of(args, 'parts', 'again', 'only')
  results = harness.load_results(args.out, settings=settings)
  save = lambda: harness.save_results(args.out, results)
  for part in args.parts:
    if args.again:
      results.pop(part, None)
    if part == 'peak':
      count_peaks(args, results, save)
    elif part not in results:
      results[part] = list(harness.track(rows(args, part), part))
    save()
  made = rso_report.tables(results)
  print('\n\n'.join(made.values()))
  harness.fill_page(args.docs, made)
  if 'peak' in results:
    rso_report.picture(results, harness.next_to(args.out, '.png'))


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
