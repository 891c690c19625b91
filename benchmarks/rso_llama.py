"""FLOPs, gradients and traffic of an 8-layer LLaMA, whole and lifted."""

from collections.abc import Iterator
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

import hlo
import llama
import rso_programs as programs

METHODS = (programs.ADAM, 'RSO', 'compressed')
LABELS = {programs.ADAM: 'whole gradients'}
_PRODUCT = re.compile(r'= \w+\[([\d,]*)\]\S* (?:dot|convolution|custom-call)\(')


def kernels(params: Any) -> list[tuple[int, int]]:
  """The sizes of all kernels of blocks, their inputs first."""
  return [x.shape for x in jax.tree.leaves(params['blocks']) if x.ndim == 2]


def whole_products(text: str, params: Any) -> int:
  """How many products of a program have the shape of a kernel."""
  made = [tuple(map(int, s.split(','))) for s in _PRODUCT.findall(text) if s]
  both = {s for shape in kernels(params) for s in (shape, shape[::-1])}
  return sum(shape in both for shape in made)


def rows(
  config: llama.LlamaConfig, ranks: Any, batch: int, seq: int
) -> Iterator[dict[str, Any]]:
  """Yields what loss and gradients cost under every policy, by rank.

  Layers are unrolled, since XLA counts a loop's body once.
  """
  tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
  for policy in programs.POLICIES:
    graphdef, params = programs.model(config, policy)
    of_loss = lambda merge, g=graphdef: functools.partial(
      programs.loss, merge, g
    )
    for method in METHODS:
      for rank in ranks if method != programs.ADAM else (0,):
        f, arrays = programs.gradients(method, of_loss, params, rank)
        program = programs.counted(f, *arrays, tokens)
        cost: Any = program.cost_analysis()
        memory: Any = program.memory_analysis()
        yield {
          'policy': policy,
          'method': method,
          'rank': rank,
          'flops': cost['flops'],
          'gradient_bytes': memory.output_size_in_bytes,
          'whole_products': whole_products(program.as_text(), params),
        }


def reduced(params: Any, method: str, rank: int) -> int:
  """The numbers that data parallelism averages in a step, predicted."""
  total = sum(x.size for x in jax.tree.leaves(params)) + 1  # and the loss
  if method in (programs.ADAM, 'GaLore'):
    return total
  stacks = [x.shape for x in jax.tree.leaves(params['blocks']) if x.ndim == 3]
  return total - sum(k * (m - rank) * n for k, m, n in stacks)


def traffic(
  where: programs.Target, config: llama.LlamaConfig, ranks: Any, seq: int
) -> Iterator[dict[str, Any]]:
  """Yields the bytes that a device sends in a step of replicas."""
  devices = where.mesh.size
  tokens = jax.ShapeDtypeStruct((devices, seq), jnp.int32)
  made = programs.model(config)
  for method in (programs.ADAM, *programs.METHODS):
    for rank in ranks if method != programs.ADAM else (0,):
      program = programs.compiled_step(where, method, made, tokens, rank)
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


def sharing(
  configs: Any, rank: int, batch: int, seq: int
) -> Iterator[dict[str, Any]]:
  """Yields what RSO's gradients cost if layers share not only equal P.

  Leaves of one `key_group` draw equal bases, each its own array; here they are
  given one array, so that x P of the same x is one product.
  """
  tokens = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
  for config in configs:
    graphdef, params = programs.model(config)
    of_loss = lambda merge, g=graphdef: functools.partial(
      programs.loss, merge, g
    )
    f, arrays = programs.gradients('RSO', of_loss, params, rank)
    as_one = lambda params, bases, *args, f=f: f(params, one_each(bases), *args)
    for name, g in (('equal', f), ('one array', as_one)):
      program = programs.counted(g, *arrays, tokens)
      cost: Any = program.cost_analysis()
      memory: Any = program.memory_analysis()
      yield {
        'scan_layers': config.scan_layers,
        'bases': name,
        'rank': rank,
        'flops': None if config.scan_layers else cost['flops'],
        'temporary_bytes': memory.temp_size_in_bytes,
      }


def one_each(bases: Any) -> Any:
  """Puts the first basis of every group in the place of the others."""
  leaves, treedef = jax.tree.flatten_with_path(bases)
  first: dict[str, Any] = {}
  names = [
    programs.shared(jax.tree_util.keystr(path, simple=True, separator='/'))
    for path, _ in leaves
  ]
  return treedef.unflatten(
    [first.setdefault(k, x) for k, (_, x) in zip(names, leaves, strict=True)]
  )
