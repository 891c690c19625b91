"""How long XLA takes to compile one update of each optimizer.

Twelve matrices of one shape, each an array of its own as in an unrolled model,
are compiled for a CPU. The figures are seconds of processor time to trace and
to compile. results/compile_time.json keeps the results of every version of jax
beside each other; a run replaces only those of its own version.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from benchmarks import harness
from benchmarks import programs
import subspace_optax as so

OUT = harness.RESULTS / 'compile_time.json'


def optimizers() -> dict[str, Any]:
  """AdamW, Muon and what has moments in fewer bits, and all ready-made ones."""
  ours = {
    name: so.optimizers.with_rank(make, 8)(1e-3)
    for name, make in so.optimizers.READY_MADE.items()
  }
  return {
    'optax.adamw': optax.adamw(1e-3),
    'optax.contrib.muon': optax.contrib.muon(1e-3),
    'adam, 8 bits': so.scale_by_adam8bit(),
    'muon, 8 bits': so.scale_by_muon8bit(),
    'normuon, 4 bits': so.normuon(1e-3, moment_bits=4),
  } | ours


def seconds(tx: Any) -> dict[str, float]:
  """Processor time to trace one update, and to compile it."""
  params = {f'layer_{i}/kernel': jnp.ones((64, 128)) for i in range(12)}
  state = tx.init(params)
  start = time.process_time()
  lowered = jax.jit(tx.update).lower(params, state, params)
  traced = time.process_time()
  lowered.compile()
  return {
    'trace': round(traced - start, 2),
    'compile': round(time.process_time() - traced, 2),
  }


def main() -> None:
  """Measures, prints and keeps what this version of jax takes."""
  programs.use_cpu()
  results = json.loads(OUT.read_text()) if OUT.exists() else {}
  jax.jit(lambda x: x + 1).lower(1.0).compile()  # what starts only once
  found = {name: seconds(tx) for name, tx in optimizers().items()}
  row = {'machine': harness.describe_machine(), 'seconds': found}
  harness.save_results(OUT, results | {jax.__version__: row}, indent=2)
  for name, parts in found.items():
    total = sum(parts.values())
    print(f'{name:24s} {total:5.1f} s, {parts["compile"]:5.1f} of it in XLA')


if __name__ == '__main__':
  main()
