"""Predicted time, memory and traffic of training steps on 8 to 4,096 chips.

This is a roofline model, not a measurement: FLOPs and bytes are counted and
divided by what the stated chips and links can do. The counts are compared with
XLA's for small programs. Every assumption is printed. Results:
results/scaling.json and .png, and the tables of docs/scaling.md.
"""

from collections.abc import Iterator
import dataclasses
import math
from typing import Any

import tyro

from benchmarks import harness
from benchmarks import programs
from benchmarks import roofline
from benchmarks import scaling_checks
from benchmarks import scaling_report

MODELS = {
  'LLaMA 7B': roofline.Model(4096, 11008, 32, 4096),
  'LLaMA 70B': roofline.Model(8192, 28672, 80, 1024),
}
# Google's and NVIDIA's data sheets. v5p: ICI of 1,200 GB/s both ways together,
# DCN of 50 Gb/s a chip, float32 products in 6 bf16 passes. H100 SXM: NVLink of
# 900 GB/s both ways together, one 400 Gb/s adapter a chip, 67 TFLOP/s float32.
CHIPS = {
  'v5p': roofline.Chip(459e12, 2765e9, 95 * 2**30, 600e9, 6.25e9, 256, 6.0),
  'H100': roofline.Chip(989e12, 3350e9, 80e9, 450e9, 50e9, 8, 989 / 67),
  # One 100 Gb/s adapter for eight chips.
  'H100, Ethernet': roofline.Chip(
    989e12, 3350e9, 80e9, 450e9, 12.5e9 / 8, 8, 989 / 67
  ),
}


@dataclasses.dataclass(frozen=True)
class Args:
  """Assumptions; see the page that is written."""

  chips: tuple[int, ...] = (8, 64, 512, 4096)
  kinds: tuple[str, ...] = tuple(CHIPS)
  flops: float | None = None  # this and the next five override every kind's
  hbm: float | None = None
  capacity: float | None = None
  fast: float | None = None
  slow: float | None = None
  domain: int | None = None
  matmul_share: float = 0.5  # of peak FLOP/s that products reach
  hbm_share: float = 0.8  # of HBM's speed
  link_share: float = 0.8  # of links' speed
  tokens: int = 2**22  # per step, but at least one sequence per chip
  sequence: int = 4096
  micro_tokens: int = 8192  # per chip at once; more are accumulated
  rank: float = 0.25  # of the short side
  param_bytes: int = 2
  gradient_bytes: int = 4  # accumulated, and reduced
  state_bytes: int = 4
  out: str = str(harness.RESULTS / 'scaling.json')
  docs: str = str(harness.DOCS / 'scaling.md')


def chip_of(args: Args, kind: str) -> roofline.Chip:
  """A kind of chip, with what the flags change of it."""
  names = ('flops', 'hbm', 'capacity', 'fast', 'slow', 'domain')
  given = {k: getattr(args, k) for k in names if getattr(args, k) is not None}
  return dataclasses.replace(CHIPS[kind], **given)


COMPRESSED = 'replicas, online_subspace_descent, compressed'
# FSDP over all chips; or over each domain, and its replicas averaged.
STRATEGIES = {
  'FSDP, AdamW': ('fsdp', 'AdamW'),
  'FSDP, online_subspace_descent': ('fsdp', 'online_subspace_descent'),
  'FSDP, subspace_adamw': ('fsdp', 'subspace_adamw'),
  'replicas, AdamW': ('replicas', 'AdamW'),
  'replicas, subspace_adamw': ('replicas', 'subspace_adamw'),
  COMPRESSED: ('replicas', 'online_subspace_descent'),
}


def memory(args: Args, model: Any, state: float, shards: int) -> dict:
  """Bytes on a chip: its shards, two gathered layers, inputs of layers."""
  layer = model.projected / model.layers
  tokens = args.micro_tokens
  return {
    'weights': args.param_bytes * model.parameters / shards,
    'gradients': args.gradient_bytes * model.parameters / shards,
    'state': args.state_bytes * state / shards,
    # The gradient of one layer before it is scattered, beside them.
    'gathered': (2 * args.param_bytes + args.gradient_bytes) * layer,
    'activations': 2 * tokens * model.width * (model.layers + 8)
    + 2 * 2 * tokens * model.mlp_width * 3,
    # A quarter of a micro-batch at once: logits and their gradients, float32.
    'logits': 2 * 4 * tokens / 4 * model.vocab,
  }


def micro_steps(args: Args, chips: int) -> tuple[int, float]:
  """How often a chip computes gradients in a step, and tokens at a time."""
  tokens = max(args.tokens, chips * args.sequence) / chips
  steps = math.ceil(tokens / args.micro_tokens)
  return steps, tokens / steps


def average(args: Args, model: Any, method: Any, shards: int, domains: int):
  """Bytes that replicas send, each chip for its shard; plain leaves too."""
  numbers = model.parameters
  if method.compressed:
    numbers = roofline.thin_numbers(model, args.rank) + model.plain
  size = args.gradient_bytes * numbers / shards
  return roofline.Links(0.0, roofline.reduced(size, domains))


def predict(args: Args, kind: str, model: Any, chips: int, name: str) -> dict:
  """Everything that is predicted of one step."""
  chip = chip_of(args, kind)
  layout, method_name = STRATEGIES[name]
  method = roofline.METHODS[method_name]
  domain = min(chip.domain, chips)
  domains = math.ceil(chips / domain)
  shards = chips if layout == 'fsdp' else domain
  steps, tokens = micro_steps(args, chips)

  flops = model.flops(tokens, args.sequence, remat=True)
  weights = args.param_bytes * model.parameters
  gradients = args.gradient_bytes * model.parameters
  # Weights are read in three passes, whole gradients written once.
  read = 3 * weights + gradients
  compute = max(
    flops / (args.matmul_share * chip.flops), read / (args.hbm_share * chip.hbm)
  )
  span = chips if layout == 'fsdp' else domain
  # Forward, recomputed forward and backward share two gathers.
  links = roofline.gathered_over(2 * weights + gradients, span, chip.domain)
  wire = links.seconds(chip, args.link_share)
  replicas = roofline.Links(0.0, 0.0)
  if layout == 'replicas':
    replicas = average(args, model, method, shards, domains)

  # Replicas are averaged while the last micro-batch is computed.
  last = max(compute, wire, replicas.seconds(chip, args.link_share))
  model_seconds = (steps - 1) * max(compute, wire) + last

  state = roofline.state_numbers(method, model, args.rank)
  bf16, f32 = roofline.update_flops(method, model, args.rank)
  products = (bf16 + f32 * chip.float32) / shards
  touched = weights * 2 + gradients + 2 * args.state_bytes * state
  thin = 0.0
  if method.products:
    thin = 2 * args.gradient_bytes * roofline.thin_numbers(model, args.rank)
  thin_links = roofline.gathered_over(thin, span, chip.domain)
  update = {
    'update_products': products / (args.matmul_share * chip.flops),
    'update_hbm': touched / shards / (args.hbm_share * chip.hbm),
    'update_links': thin_links.seconds(chip, args.link_share),
  }
  held = memory(args, model, state, shards)
  seconds = model_seconds + sum(update.values())
  batch = steps * tokens * chips
  useful = model.flops(batch, args.sequence, remat=False)
  return {
    'strategy': name,
    'batch_tokens': batch,
    'micro_steps': steps,
    'seconds': seconds,
    'compute_seconds': steps * compute,
    'waiting_seconds': model_seconds - steps * compute,
    **update,
    'share_of_peak': useful / (seconds * chips * chip.flops),
    'fast_bytes': links.times(steps).fast + thin_links.fast,
    'slow_bytes': links.times(steps).slow + thin_links.slow + replicas.slow,
    'memory': held,
    'memory_bytes': sum(held.values()),
    'fits': sum(held.values()) < chip.capacity,
  }


def predictions(args: Args) -> Iterator[dict]:
  """Yields a row for every kind of chip, model, number and strategy."""
  for kind in args.kinds:
    for model_name, model in MODELS.items():
      for chips in args.chips:
        for name in STRATEGIES:
          row = predict(args, kind, model, chips, name)
          yield {'kind': kind, 'model': model_name, 'chips': chips} | row


def main(args: Args) -> None:
  """Checks the counts, predicts, draws and writes."""
  programs.use_cpu()
  results = {
    'machine': harness.describe_machine(),
    'settings': harness.settings_of(args),
    'chips': {k: dataclasses.asdict(chip_of(args, k)) for k in args.kinds},
    'models': {
      k: dataclasses.asdict(v) | {'parameters': v.parameters}
      for k, v in MODELS.items()
    },
    'checks': scaling_checks.run(),
    'rows': list(predictions(args)),
  }
  harness.save_results(args.out, results)
  text = scaling_report.markdown(results)
  print(text)
  harness.fill_page(args.docs, {'tables': text})
  scaling_report.picture(results, harness.next_to(args.out, '.png'))


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
