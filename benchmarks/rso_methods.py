"""The methods that `rso.py` compares, and how their layers are recomputed."""

import functools
from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from benchmarks import programs
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


def shared(path: str) -> str:
  """The name that kernels with the same input have in common."""
  for group, names in (('attention', 'wq|wk|wv'), ('mlp', 'gate|up')):
    for name in names.split('|'):
      path = path.replace(f'{group}/{name}', f'{group}/{names}')
  return path


def spec(rank: int, side: str = 'in') -> so.SubspaceSpec:
  """Kernels of all blocks, whatever their rank saves."""
  return so.SubspaceSpec(
    rank, side=side, only_if_smaller=False, key_group=shared
  )


# --- Models ------------------------------------------------------------------


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

  return programs.split(make)


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


# --- Steps -------------------------------------------------------------------


def in_subspace(rank: int, side: str, rule: Any) -> Any:
  """Adam in subspaces, with moments that start again with a new basis."""
  adam, of = optax.scale_by_adam(), spec(rank, side)
  tx = so.subspace(of, rule, adam, transport='reset')
  return optax.chain(tx, optax.scale_by_learning_rate(1e-3))


def training(
  name: str,
  of_loss: Any,
  rank: int = 0,
  side: str = 'in',
  value_and_grad: Any = jax.value_and_grad,
) -> tuple[Any, Any]:
  """A method's `init`, and (params, state, tokens) -> (params, state, loss).

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
  return tx.init, programs.whole_step(plain, tx, value_and_grad)


def gradients(
  name: str, graphdef: Any, params: Any, rank: int
) -> tuple[Any, tuple[Any, ...]]:
  """A method's loss and gradients, and the shapes of all but the tokens."""
  of_loss = lambda merge: functools.partial(programs.loss, merge, graphdef)
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


def compiled_step(
  mesh: Mesh, name: str, made: tuple[Any, Any], tokens: Any, rank: int
) -> Any:
  """A compiled training step whose parameters and state are donated.

  They are whole on every device of the mesh's axis `data`, which cuts tokens.
  """
  graphdef, params = made
  of_loss = lambda merge: functools.partial(programs.loss, merge, graphdef)
  init, step = training(name, of_loss, rank)
  on = lambda tree, *axes: programs.place(tree, NamedSharding(mesh, P(*axes)))
  params, state = on((params, jax.eval_shape(init, params)))
  with jax.set_mesh(mesh):
    run = jax.jit(step, donate_argnums=(0, 1))
    return run.lower(params, state, on(tokens, 'data')).compile()
