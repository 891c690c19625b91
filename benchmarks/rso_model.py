"""Whole LLaMAs, with whole gradients and lifted: FLOPs, traffic and memory."""

from collections.abc import Iterator
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks import hlo
from benchmarks import programs
from benchmarks import rso_methods
from benchmarks.rso_methods import ADAM
import llama

_PRODUCT = re.compile(r'= \w+\[([\d,]*)\]\S* (?:dot|convolution|custom-call)\(')


def shape_of_tokens(batch: int, seq: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct((batch, seq), jnp.int32)


def whole_products(text: str, params: Any) -> int:
  """How many products of a program have the shape of a block's kernel."""
  kernels = [x.shape for x in jax.tree.leaves(params['blocks']) if x.ndim == 2]
  made = [tuple(map(int, s.split(','))) for s in _PRODUCT.findall(text) if s]
  both = {s for shape in kernels for s in (shape, shape[::-1])}
  return sum(shape in both for shape in made)


def flops_rows(
  config: llama.LlamaConfig, ranks: Any, batch: int, seq: int
) -> Iterator[dict[str, Any]]:
  """Yields what loss and gradients cost under every policy, by rank.

  Layers are unrolled, since XLA counts a loop's body once.
  """
  tokens = shape_of_tokens(batch, seq)
  for policy in rso_methods.POLICIES:
    made = rso_methods.model(config, policy)
    for method in (ADAM, 'RSO', 'compressed'):
      for rank in ranks if method != ADAM else (0,):
        f, arrays = rso_methods.gradients(method, *made, rank)
        program = programs.compile_to_count(f, *arrays, tokens)
        yield {
          'policy': policy,
          'method': method,
          'rank': rank,
          'flops': programs.count_flops(program),
          'gradient_bytes': programs.count_bytes(program).results,
          'whole_products': whole_products(program.as_text(), made[1]),
        }


# --- Replicas ----------------------------------------------------------------


def reduced(params: Any, method: str, rank: int) -> int:
  """The numbers that data parallelism averages in a step, predicted."""
  total = sum(x.size for x in jax.tree.leaves(params)) + 1  # and the loss
  if method in (ADAM, 'GaLore'):
    return total
  stacks = [x.shape for x in jax.tree.leaves(params['blocks']) if x.ndim == 3]
  return total - sum(k * (m - rank) * n for k, m, n in stacks)


def traffic_rows(
  mesh: Mesh, config: llama.LlamaConfig, ranks: Any, seq: int
) -> Iterator[dict[str, Any]]:
  """Yields the bytes that a device sends in a step of replicas."""
  devices, made = mesh.size, rso_methods.model(config)
  tokens = shape_of_tokens(devices, seq)
  for method in (ADAM, *rso_methods.METHODS):
    for rank in ranks if method != ADAM else (0,):
      program = rso_methods.compiled_step(mesh, method, made, tokens, rank)
      found = hlo.collectives(program.as_text(), devices)
      numbers = reduced(made[1], method, rank)
      yield {
        'method': method,
        'rank': rank,
        'sent_bytes': hlo.sent(found),
        'predicted_bytes': 2 * (devices - 1) / devices * 4 * numbers,
        'largest': hlo.largest(found),
        'kinds': sorted({c.kind for c in found.values()}),
      }


# --- Layers that share x P ---------------------------------------------------


def sharing_rows(
  configs: Any, rank: int, batch: int, seq: int
) -> Iterator[dict[str, Any]]:
  """Yields what RSO's gradients cost if layers share not only equal P.

  Leaves of one `key_group` draw equal bases, each its own array; here they are
  given one array, so that x P of the same x is one product.
  """
  tokens = shape_of_tokens(batch, seq)
  for config in configs:
    made = rso_methods.model(config)
    f, arrays = rso_methods.gradients('RSO', *made, rank)
    as_one = lambda params, bases, *args, f=f: f(params, one_each(bases), *args)
    for name, g in (('equal', f), ('one array', as_one)):
      program = programs.compile_to_count(g, *arrays, tokens)
      flops = programs.count_flops(program)
      yield {
        'scan_layers': config.scan_layers,
        'bases': name,
        'rank': rank,
        'flops': None if config.scan_layers else flops,
        'temporary_bytes': programs.count_bytes(program).temporaries,
      }


def one_each(bases: Any) -> Any:
  """Puts the first basis of every group in the place of the others."""
  first: dict[str, Any] = {}

  def of_group(path: Any, basis: Any) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return first.setdefault(rso_methods.shared(name), basis)

  return jax.tree_util.tree_map_with_path(of_group, bases)


# --- Memory of whole training steps ------------------------------------------

# Model, policy, method, width over rank; Adam has no rank.
PEAK_RUNS = [
  (model, policy, method, part)
  for policy in ('none', 'layers')
  for part in (0, 4, 16, 2, 8)
  for model in ('llama_350m', 'llama_1b', 'llama_7b')
  for method in (rso_methods.METHODS if part else (ADAM,))
]


def peak_row(
  mesh: Mesh, run: tuple[str, str, str, int], batch: int, seq: int
) -> dict[str, Any]:
  """XLA's account of one step, or why it refused to compile it.

  Parameters and state are donated: what a step holds are its arguments, its
  temporaries, and those results that take no argument's place.
  """
  model, policy, method, part = run
  config = llama.named(model, dtype='bfloat16', param_dtype='bfloat16')
  rank = config.width // part if part else 0
  made, tokens = rso_methods.model(config, policy), shape_of_tokens(batch, seq)
  keys = ('model', 'policy', 'method', 'part')
  found = dict(zip(keys, run, strict=True)) | {'rank': rank}
  try:
    program = rso_methods.compiled_step(mesh, method, made, tokens, rank)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return found | {'refused': str(error).splitlines()[0]}
  memory = programs.count_bytes(program)
  return found | {
    'argument_bytes': memory.arguments,
    'temporary_bytes': memory.temporaries,
    'peak_bytes': memory.total,
  }
