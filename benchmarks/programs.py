"""What benchmarks compile, and for which devices; nothing here runs."""

from collections.abc import Callable
import os
from typing import Any, NamedTuple

from flax import nnx
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import Sharding
import numpy as np
import optax

import llama
import subspace_optax as so

CPU = 'virtual CPU devices: not what a TPU would run'

# Nothing of what is counted depends on these, and it compiles sooner.
_SOONER = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


# --- Devices -----------------------------------------------------------------


def use_cpu(devices: int = 1) -> None:
  """Runs on this machine's CPU as some devices; call it before all else."""
  # Nothing outside this machine is asked about TPUs.
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS', 'cpu'))
  jax.config.update('jax_num_cpu_devices', devices)


def find_devices(topology: str) -> tuple[list[Any], str]:
  """Devices to compile for, and what they are.

  Those of a TPU topology need not be there, but `pip install libtpu` of jax's
  version must, on Python 3.12 or newer. Without it, and for 'cpu', they are
  this machine's.
  """
  if topology == 'cpu':
    return jax.devices(), CPU
  try:
    found = topologies.get_topology_desc(topology, 'tpu').devices
    return list(found), f'{found[0].device_kind}, topology {topology}'
  except Exception as error:  # no libtpu, or another process has it
    print(f'no TPU compiler: {error}\nso this compiles for {CPU}')
    return jax.devices(), CPU


def make_mesh(devices: list[Any], explicit: bool = False, **axes: int) -> Mesh:
  """A mesh of the first devices, with axes of these sizes."""
  sizes = tuple(axes.values())
  first = np.array(devices[: int(np.prod(sizes))]).reshape(sizes)
  kind = AxisType.Explicit if explicit else AxisType.Auto
  return Mesh(first, tuple(axes), axis_types=(kind,) * len(sizes))


def place(tree: Any, shardings: Any) -> Any:
  """Shapes with one sharding for all leaves, or a tree of them."""
  if isinstance(shardings, Sharding):
    shardings = jax.tree.map(lambda _, one=shardings: one, tree)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def place_state(tx: Any, params: Any) -> Any:
  """The shapes of an optimizer's state, where `so.state_sharding` has them."""
  bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  return place(jax.eval_shape(tx.init, bare), so.state_sharding(tx, params))


# --- Models and steps --------------------------------------------------------


def split(make: Callable[[], nnx.Module]) -> tuple[Any, Any]:
  """The graph of a module, and the shapes of its parameters."""
  graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)
  return graphdef, nnx.to_pure_dict(params)


def model(config: llama.LlamaConfig) -> tuple[Any, Any]:
  """The graph of a LLaMA, and the shapes of its parameters."""
  return split(lambda: llama.Llama(config, nnx.Rngs(0)))


def loss(merge: Any, graphdef: Any, params: Any, tokens: jax.Array) -> Any:
  """Mean cross-entropy of tokens."""
  logits = merge(graphdef, params)(tokens).astype(jnp.float32)
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  )


def whole_step(
  f: Any, tx: Any, value_and_grad: Any = jax.value_and_grad
) -> Callable[..., Any]:
  """The usual step, with whole gradients of `f`."""

  def step(params, state, *args):
    value, gradients = value_and_grad(f)(params, *args)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  return step


# --- Counts ------------------------------------------------------------------


class Memory(NamedTuple):
  """XLA's bytes of one device.

  Attributes:
    arguments: of the program.
    temporaries: the most that it needs at once besides.
    total: both, and those results that take no argument's place.
    peak: of XLA's heap, which need not hold all of that at once.
    results: all of them.
  """

  arguments: int
  temporaries: int
  total: int
  peak: int
  results: int


def count_bytes(program: Any) -> Memory:
  """XLA's account of a compiled program."""
  of = program.memory_analysis()
  arguments, temporaries = of.argument_size_in_bytes, of.temp_size_in_bytes
  beside = of.output_size_in_bytes - of.alias_size_in_bytes
  return Memory(
    arguments,
    temporaries,
    arguments + temporaries + beside,
    of.peak_memory_in_bytes,
    of.output_size_in_bytes,
  )


def count_flops(program: Any) -> float:
  """XLA's count for a compiled program."""
  found = program.cost_analysis()
  return (found[0] if isinstance(found, list) else found)['flops']


def compile_to_count(f: Any, *args: Any) -> Any:
  """A program for a CPU, to be counted and not to be run."""
  return jax.jit(f).lower(*args).compile(_SOONER)


def tree_bytes(tree: Any) -> int:
  """Of all leaves together, half a byte for a number of 4 bits."""
  narrow = lambda x: x.dtype in (jnp.int4, jnp.uint4)
  size = lambda x: x.size / 2 if narrow(x) else x.size * x.dtype.itemsize
  return round(sum(map(size, jax.tree.leaves(tree))))
