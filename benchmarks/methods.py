"""The optimizers of the quality benchmark, all for the matrices alone.

Embeddings, head and norms are Adam's at one learning rate in every run, so that
a method is judged by the matrices that it is about. Each is made from a
schedule, the rank as a share of the width, and the run's settings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import subspace_optax as so


class Method(NamedTuple):
  """An optimizer and where its grid of learning rates starts.

  Attributes:
    make: (learning rate schedule, rank, gap, seed) -> optimizer of matrices; or
      with `rso`, (rank, gap, seed, options) -> subproblems.
    lr: the start of the grid.
    ranked: whether there is a rank.
    lora: whether the matrices are frozen, and the optimizer is for factors.
    ours: whether this library brings it.
    rso: whether the matrices' gradients are those of subproblems.
    variant: whether it is only tried: one corpus, rank and seed.
  """

  make: Callable[..., Any]
  lr: float
  ranked: bool = False
  lora: bool = False
  ours: bool = False
  rso: bool = False
  variant: bool = False


def narrow(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Keeps an optimizer's floating-point state in bfloat16 between steps."""

  def cast(tree: Any, dtype: Any) -> Any:
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(dtype) if floats(x) else x, tree)

  def update(updates, state, params=None):
    updates, state = tx.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, jnp.bfloat16)

  return optax.GradientTransformation(
    lambda params: cast(tx.init(params), jnp.bfloat16), update
  )


def by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """Shows an optimizer stacks of layers as lists, for one that can't stack."""
  apart = lambda tree: jax.tree.map(list, tree)

  def together(tree: Any, like: Any) -> Any:
    return jax.tree.map(lambda _, x: jnp.stack(x), like, tree)

  def update(updates, state, params=None):
    params = None if params is None else apart(params)
    new, state = tx.update(apart(updates), state, params)
    return together(new, updates), state

  init = lambda params: tx.init(apart(params))
  return optax.GradientTransformation(init, update)


def muon(beta: float) -> Callable[..., optax.GradientTransformation]:
  """Optax's Muon on the last two axes of every leaf."""

  def axes(params: Any) -> Any:
    number = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda x: number(x.ndim - 2, x.ndim - 1), params)

  return lambda lr, rank, gap, seed: optax.contrib.muon(
    lr, beta=beta, muon_weight_dimension_numbers=axes
  )


def contrib_galore(lr, rank, gap, seed):
  """Optax's GaLore, which takes no share of the width as its rank."""
  del seed

  def make(params):
    width = min(jax.tree.leaves(params)[0].shape)
    return optax.contrib.galore(lr, max(1, round(rank * width)), gap)

  def update(updates, state, params=None):
    return make(updates).update(updates, state, params)

  init = lambda params: make(params).init(params)
  return by_layer(optax.GradientTransformation(init, update))


def apollo_mini(lr, rank, gap, seed):
  del rank
  fixed = {'scale': 128**0.5, 'granularity': 'tensor'}
  return so.apollo_adamw(lr, 1, update_proj_gap=gap, seed=seed, **fixed)


def adamw_8bit(lr, rank, gap, seed):
  del rank, gap
  return optax.chain(
    so.scale_by_adam8bit(seed=seed), optax.scale_by_learning_rate(lr)
  )


def orthogonal_sgd(lr, rank, gap, seed):
  """Muon without momentum: what orthogonalisation does alone, with no state."""
  del rank
  tx = so.subspace(
    so.SubspaceSpec(1, seed=seed),
    so.projectors.stiefel(gap, regenerate=True),
    optax.identity(),
    residual=so.residuals.orthogonal(),
  )
  return optax.chain(tx, optax.scale_by_learning_rate(lr))


def rso(lr: float = 2e-3, variant: bool = True, **fixed: Any) -> Method:
  """Randomized subspace optimization by Adam."""

  def make(rank, gap, seed, **options):
    spec = so.SubspaceSpec(rank, side='in', seed=seed)
    return so.rso.subproblems(spec, update_proj_gap=gap, **fixed, **options)

  return Method(make, lr, ranked=True, ours=True, rso=True, variant=variant)


def _plain(make: Callable[[Any], optax.GradientTransformation]) -> Callable:
  return lambda lr, rank, gap, seed: make(lr)


def _ours(make: Callable[..., Any], **fixed: Any) -> Callable:
  """One of the library's ready-made optimizers, with what it takes."""

  def build(lr, rank, gap, seed):
    choices = {'rank': rank, 'update_proj_gap': gap, 'seed': seed}
    known = {k: x for k, x in choices.items() if so.optimizers.takes(make, k)}
    return make(lr, **known, **fixed)

  return build


def _ours_8bit(make: Callable[..., Any]) -> Method:
  return Method(_ours(make, moment_bits=8), 4e-3, ranked=True)


METHODS: dict[str, Method] = {
  'adamw': Method(_plain(optax.adam), 2e-3),
  'adamw_bf16': Method(_plain(lambda lr: narrow(optax.adam(lr))), 2e-3),
  'adamw_8bit': Method(adamw_8bit, 2e-3),
  'adafactor': Method(
    _plain(
      lambda lr: optax.adafactor(
        lr, min_dim_size_to_factor=32, multiply_by_parameter_scale=False
      )
    ),
    4e-3,
  ),
  'lion': Method(_plain(lambda lr: optax.lion(lr, weight_decay=0.0)), 5e-4),
  'muon': Method(muon(0.95), 2e-2),
  'muon_b0.8': Method(muon(0.8), 4e-2),
  'orthogonal_sgd': Method(orthogonal_sgd, 4e-2, ours=True),
  'lora': Method(_plain(optax.adam), 4e-3, ranked=True, lora=True),
  'contrib_galore': Method(contrib_galore, 4e-3, ranked=True),
  'galore_8bit': _ours_8bit(so.galore),
  'rso': rso(variant=False),
  'rso_keep': rso(transport='keep'),
  'rso_first': rso(transport='first', variant=False),
  'rso_both': rso(transport=so.transports.both(0.9, 0.999)),
  'rso_gaussian': rso(sample='gaussian'),
  'rso_eta10': rso(eta=10.0),
  'apollo_mini': Method(apollo_mini, 4e-3, ours=True),
  'subspace_adamw_8bit': _ours_8bit(so.subspace_adamw),
}
# Peak learning rates of ready-made optimizers; 4e-3 of the others.
_RATES = {
  'fira_adamw': 1.6e-2,
  'apollo_adamw': 8e-3,
  'subspace_muon': 5e-3,
  'normuon': 5e-3,
}
METHODS |= {
  name: Method(
    _ours(make),
    _RATES.get(name, 4e-3),
    ranked=so.optimizers.takes(make, 'rank'),
    ours=True,
  )
  for name, make in so.optimizers.READY_MADE.items()
}

RECIPES = ('subspace_adamw', 'subspace_muon')
