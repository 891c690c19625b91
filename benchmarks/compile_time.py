"""How long XLA takes to compile one update of each optimizer.

  python benchmarks/compile_time.py

Twelve matrices of one shape, each an array of its own as in an unrolled model,
compiled for a CPU: seconds of processor time to trace and to compile. Results
of each version of jax stand beside each other in
benchmarks/results/compile_time.json; those of other versions stay.
"""

import json
import os
import pathlib
import time
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jax.numpy as jnp
import optax

import machine
import subspace_optax as so

OUT = pathlib.Path(__file__).resolve().parent / 'results' / 'compile_time.json'

OPTIMIZERS = {
  'optax.adamw': lambda: optax.adamw(1e-3),
  'galore': lambda: so.galore(1e-3, 8),
  'golore': lambda: so.golore(1e-3, 8),
  'online_subspace_descent': lambda: so.online_subspace_descent(1e-3, 8),
  'fira_adamw': lambda: so.fira_adamw(1e-3, 8),
  'apollo_adamw': lambda: so.apollo_adamw(1e-3, 8),
  'ldadamw': lambda: so.ldadamw(1e-3, 8),
  'subspace_adamw': lambda: so.subspace_adamw(1e-3, 8),
  'subspace_muon': lambda: so.subspace_muon(1e-3, 8),
}


def seconds(tx: optax.GradientTransformation) -> dict[str, float]:
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
  results: dict[str, Any] = {}
  if OUT.exists():
    results = json.loads(OUT.read_text())
  jax.jit(lambda x: x + 1).lower(1.0).compile()  # what starts only once
  found = {name: seconds(make()) for name, make in OPTIMIZERS.items()}
  results[jax.__version__] = {'machine': machine.describe(), 'seconds': found}
  OUT.write_text(json.dumps(results, indent=2) + '\n')
  for name, parts in found.items():
    total = parts['trace'] + parts['compile']
    print(f'{name:24s} {total:5.1f} s, {parts["compile"]:5.1f} of it in XLA')


if __name__ == '__main__':
  main()
