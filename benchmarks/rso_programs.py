"""Training steps of a LLaMA that `rso.py` compiles, and where to compile them.

A step takes (params, state, tokens) and returns (params, state, loss).
"""

from collections.abc import Callable
import dataclasses
import functools
import os
import pathlib
import sys
from typing import Any

# Nothing outside this machine is asked about TPUs.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
sys.path.insert(
  0, str(pathlib.Path(__file__).resolve().parent.parent / 'examples')
)

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import llama
import subspace_optax as so

# Recomputed layers: not at all, whole, or all but what bears these names.
POLICIES = {
  'none': None,
  'layers': (),
  'names': (so.rso.LINEAR_OUT,),
  'names and x P': (so.rso.LINEAR_OUT, so.rso.PROJECTED_INPUT),
}
ADAM = 'Adam'
METHODS = ('GaLore', 'RSO', 'compressed')
MASKED = optax.MaskedNode()
CPU = 'virtual CPU devices: not what a TPU would run'

# Nothing of what is counted depends on these, and it compiles sooner.
_SOONER = {
  'xla_backend_optimization_level': 0,
  'xla_llvm_disable_expensive_passes': True,
}


def shared(path: str) -> str:
  """The name that kernels with the same input have in common."""
  for group, names in (('attention', 'wq|wk|wv'), ('mlp', 'gate|up')):
    for name in names.split('|'):
      path = path.replace(f'{group}/{name}', f'{group}/{names}')
  return path


def spec(rank: int, side: str = 'in', **options: Any) -> so.SubspaceSpec:
  """Kernels of all blocks, whatever their rank saves."""
  return so.SubspaceSpec(
    rank, side=side, only_if_smaller=False, key_group=shared, **options
  )


class Remat(nnx.Module):
  """A block that is recomputed, but for what bears one of some names."""

  def __init__(self, block: Any, names: tuple[str, ...]):
    self.block = block
    self.names = names

  def __call__(self, x):
    policy = jax.checkpoint_policies.save_only_these_names(*self.names)
    run = jax.checkpoint(lambda block, x: block(x), policy=policy)
    return run(self.block, x)


def with_policy(blocks: Any, policy: str) -> Any:
  """Blocks that are recomputed: one, stacked ones or a list."""
  names = POLICIES[policy]
  if names is None:
    return blocks
  if isinstance(blocks, nnx.List):
    return nnx.List([Remat(block, names) for block in blocks])
  return Remat(blocks, names)


def model(config: llama.LlamaConfig, policy: str = 'none') -> tuple[Any, Any]:
  """The graph of a LLaMA, and the shapes of its parameters."""

  def make():
    made = llama.Llama(config, nnx.Rngs(0))
    made.blocks = with_policy(made.blocks, policy)
    return made

  graphdef, params = nnx.split(nnx.eval_shape(make), nnx.Param)
  return graphdef, nnx.to_pure_dict(params)


def named_product(*args: Any, **kwargs: Any) -> jax.Array:
  return checkpoint_name(
    jax.lax.dot_general(*args, **kwargs), so.rso.LINEAR_OUT
  )


def named_merge(graphdef: Any, params: Any) -> Any:
  """As `nnx.merge`; products have the name that those of lifted kernels have.

  Else a policy by names would be another one for whole gradients.
  """
  made = nnx.merge(graphdef, params)
  for _, module in nnx.iter_modules(made):
    if isinstance(module, nnx.Linear):
      module.dot_general = named_product
  return made


def loss(merge: Any, graphdef: Any, params: Any, tokens: jax.Array) -> Any:
  """Mean cross-entropy of tokens."""
  logits = merge(graphdef, params)(tokens).astype(jnp.float32)
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
  )


def whole_step(f: Any, tx: Any, value_and_grad: Any) -> Callable[..., Any]:
  """The usual step, with whole gradients."""

  def step(params, state, *args):
    value, gradients = value_and_grad(f)(params, *args)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value

  return step


def in_subspace(
  rank: int, side: str, rule: Any
) -> optax.GradientTransformation:
  """Adam in subspaces, with moments that start again with a new basis."""
  return optax.chain(
    so.subspace(
      spec(rank, side), rule, optax.scale_by_adam(), transport='reset'
    ),
    optax.scale_by_learning_rate(1e-3),
  )


def training(
  name: str,
  of_loss: Any,
  rank: int = 0,
  side: str = 'in',
  value_and_grad: Any = jax.value_and_grad,
) -> tuple[Any, Any]:
  """A method's `init` and its step.

  Bases are those that compile soonest on a TPU: Gaussian ones in the place of
  Haar samples, and GaLore's by products in the place of an SVD.

  Args:
    name: of the method.
    of_loss: from a `merge` to a loss (params, *args) -> scalar.
    rank: of all kernels.
    side: of the kernels that is projected, unless by RSO.
    value_and_grad: see `so.rso.compressed_step`.
  """
  plain, lifted = of_loss(named_merge), of_loss(so.rso.nnx_merge)
  if name == 'RSO':
    rso = so.rso.subproblems(spec(rank), optax.adam(1e-3), sample='gaussian')
    return rso.init, rso.step(lifted, value_and_grad)
  if name == 'compressed':
    tx = in_subspace(rank, side, so.projectors.gaussian(200))
    step = so.rso.compressed_step(lifted, tx, value_and_grad=value_and_grad)
    return tx.init, step
  tx = optax.adam(1e-3)
  if name == 'GaLore':
    tx = in_subspace(rank, 'short', so.projectors.svd(200, 'randomized'))
  return tx.init, whole_step(plain, tx, value_and_grad)


def gradients(
  name: str, of_loss: Any, params: Any, rank: int
) -> tuple[Any, tuple[Any, ...]]:
  """A method's loss and gradients, and the shapes of all but the tokens."""
  if name in (ADAM, 'GaLore'):
    return jax.value_and_grad(of_loss(named_merge)), (params,)
  rso = so.rso.subproblems(spec(rank), optax.sgd(1.0))
  state = jax.eval_shape(rso.init, params)
  bases = jax.eval_shape(rso.bases, params, state)
  f = so.rso.value_and_grad(of_loss(so.rso.nnx_merge), spec(rank))
  if name == 'RSO':
    return f, (params, bases, state.coords)
  at_zero = lambda params, bases, *args: f(params, bases, None, *args)
  return at_zero, (params, bases)


@dataclasses.dataclass(frozen=True)
class Target:
  """A mesh with one axis, `data`, and what its devices are."""

  mesh: Mesh
  name: str

  def place(self, tree: Any, *axes: str) -> Any:
    """Shapes on the mesh; the first axis cut, or whole on every device."""
    sharding = NamedSharding(self.mesh, P(*axes))
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def target(topology: str, devices: int) -> Target:
  """Devices of a TPU topology, or of this machine for 'cpu'."""
  found, name = list(jax.devices()), CPU
  if topology != 'cpu':
    try:
      found = topologies.get_topology_desc(topology, 'tpu').devices
      name = f'{found[0].device_kind}, topology {topology}'
    except Exception as error:  # no libtpu, or another process has it
      print(f'no TPU compiler: {error}\nso this compiles for {name}')
  kinds = (AxisType.Auto,)
  mesh = Mesh(np.array(found[:devices]), ('data',), axis_types=kinds)
  return Target(mesh, name)


def compiled_step(
  where: Target, name: str, made: tuple[Any, Any], tokens: Any, rank: int
) -> Any:
  """A compiled training step whose parameters and state are donated."""
  graphdef, params = made
  of_loss = lambda merge: functools.partial(loss, merge, graphdef)
  init, step = training(name, of_loss, rank)
  arrays = where.place((params, jax.eval_shape(init, params)))
  with jax.set_mesh(where.mesh):
    run = jax.jit(step, donate_argnums=(0, 1))
    return run.lower(*arrays, where.place(tokens, 'data')).compile()


def counted(f: Any, *args: Any) -> Any:
  """A program for a CPU, to be counted and not to be run."""
  return jax.jit(f).lower(*args).compile(_SOONER)
