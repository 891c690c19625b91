"""Peak memory of a whole training step by rank, and where it goes.

Parameters and state are donated: what a step holds are its arguments, its
temporaries, and those results that take no argument's place.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import llama
import rso_programs as programs

Run = tuple[str, str, str, int]  # model, policy, method, width over rank


def runs(models: Any, policies: Any, methods: Any, parts: Any) -> Iterator[Run]:
  """Yields what is to be compiled; Adam has no rank."""
  for policy in policies:
    for part in (0, *parts):
      for model in models:
        for method in methods:
          if (method == programs.ADAM) == (part == 0):
            yield model, policy, method, part


def row(
  where: programs.Target, run: Run, batch: int, seq: int
) -> dict[str, Any]:
  """XLA's account of one step, or why it refused to compile it."""
  model, policy, method, part = run
  config = llama.named(model, dtype='bfloat16', param_dtype='bfloat16')
  rank = config.width // part if part else 0
  made = programs.model(config, policy)
  tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
  keys = ('model', 'policy', 'method', 'part')
  found = dict(zip(keys, run, strict=True)) | {'rank': rank}
  try:
    program = programs.compiled_step(where, method, made, tokens, rank)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return found | {'refused': str(error).splitlines()[0]}
  memory: Any = program.memory_analysis()
  beside = memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + beside
  return found | {
    'argument_bytes': memory.argument_size_in_bytes,
    'temporary_bytes': memory.temp_size_in_bytes,
    'peak_bytes': peak,
  }
