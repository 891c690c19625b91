# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, for `plan`, which counts their actual states."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import subspace_optax as so
from subspace_optax.plan import _nearest


class Settings(NamedTuple):
  """The settings of an optimizer.

  Attributes:
    rank: an int, or a fraction of each matrix's short side.
    moment_dtype: dtype of the moments; None for the optimizer's own default,
      float32 in ours and the parameters' in optax's.
    basis_dtype: dtype of the bases, if there are any; None for float32, or
      bfloat16 with moments of 8 bits.
    regenerate: whether random bases are drawn again at every step.
  """

  rank: Any = 0.25
  moment_dtype: Any = None
  basis_dtype: Any = None
  regenerate: bool = False


class Method(NamedTuple):
  """An optimizer with a name.

  Attributes:
    make: Settings -> optimizer, or `rso.Subproblems`.
    ranked: whether it has a rank.
    random: whether its bases are random, so that they can be drawn again.
  """

  make: Callable[[Settings], Any]
  ranked: bool = False
  random: bool = False


# No count depends on it.
_LR = 1e-3


def in_dtype(tx: optax.GradientTransformation, dtype: Any) -> Any:
  """Keeps an optimizer's floating-point state in a dtype between steps."""
  if dtype is None:
    return tx

  def cast(tree: Any, to: Any) -> Any:
    floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(to) if floats(x) else x, tree)

  def update(updates, state, params=None):
    updates, state = tx.update(updates, cast(state, jnp.float32), params)
    return updates, cast(state, dtype)

  return optax.GradientTransformation(
    lambda params: cast(tx.init(params), dtype), update
  )


def _eight_bit(s: Settings) -> Settings:
  """Returns settings for an optimizer whose moments are 8-bit codes."""
  return s._replace(
    moment_dtype=None, basis_dtype=s.basis_dtype or jnp.bfloat16
  )


def _spec(s: Settings, side: str = 'short', **options: Any) -> so.SubspaceSpec:
  return so.SubspaceSpec(
    s.rank,
    side=side,
    allow_empty=True,
    basis_dtype=s.basis_dtype or jnp.float32,
    moment_dtype=s.moment_dtype,
    **options,
  )


def _rest() -> optax.GradientTransformation:
  """Returns the transformation that ready-made optimizers chain last."""
  return optax.chain(
    optax.add_decayed_weights(0.0), optax.scale_by_learning_rate(_LR)
  )


def _plain(make: Callable[[], Any]) -> Callable[[Settings], Any]:
  return lambda s: in_dtype(make(), s.moment_dtype)


def _bytes(make: Callable[[], Any]) -> Callable[[Settings], Any]:
  """Makes an optimizer of whole matrices with moments of 8 bits."""
  return lambda s: optax.chain(make(), _rest())


def _adam(s: Settings, projector: Any, **options: Any) -> Any:
  """Makes Adam in the subspaces of a projector."""
  inner = optax.scale_by_adam()
  return so.subspace(_spec(s), projector, inner, after=_rest(), **options)


def _adam8bit(s: Settings, projector: Any, **options: Any) -> Any:
  spec, inner = _spec(_eight_bit(s)), so.scale_by_adam8bit()
  return so.subspace(spec, projector, inner, after=_rest(), **options)


def _svd() -> Any:
  """Returns GaLore's bases, by products: the memory of an exact SVD varies.

  They are on the short side, as in the paper; `so.galore` uses the long side,
  as optax does.
  """
  return so.projectors.svd(200, 'randomized')


def _random(regenerate: bool) -> Any:
  if regenerate:
    return so.projectors.dct(200, 'random')
  return so.projectors.stiefel(200)


def _gaussian() -> Any:
  """Returns bases without orthonormalisation, the cheapest to draw again."""
  return so.projectors.gaussian(200, regenerate=True)


def _ours(make: Callable[..., Any]) -> Callable[[Settings], Any]:
  return lambda s: make(_LR, spec=_spec(s))


def _coded(
  make: Callable[..., Any], bits: int = 8
) -> Callable[[Settings], Any]:
  """Makes an optimizer with moments of few bits."""
  return lambda s: make(_LR, spec=_spec(_eight_bit(s)), moment_bits=bits)


def _rso(s: Settings) -> Any:
  return so.rso.subproblems(_spec(s, 'in'), optax.adam(_LR))


METHODS: dict[str, Method] = {
  'sgd': Method(_plain(lambda: optax.sgd(_LR))),
  'adamw': Method(_plain(lambda: optax.adamw(_LR))),
  'adamw8bit': Method(_bytes(so.scale_by_adam8bit)),
  'lion': Method(_plain(lambda: optax.lion(_LR))),
  'lion8bit': Method(_bytes(so.scale_by_lion8bit)),
  'adafactor': Method(_plain(lambda: optax.adafactor(_LR))),
  'galore': Method(lambda s: _adam(s, _svd()), ranked=True),
  'galore8bit': Method(lambda s: _adam8bit(s, _svd()), ranked=True),
  'golore': Method(
    lambda s: _adam(s, _random(s.regenerate), transport='first'), True, True
  ),
  'golore8bit': Method(
    lambda s: _adam8bit(s, _random(True), transport='first'), True, True
  ),
  'gaussian8bit': Method(lambda s: _adam8bit(s, _gaussian()), True, True),
  'rso': Method(_rso, ranked=True, random=True),
}
# Optimizers that draw their bases again in any case.
_RANDOM = ('apollo_adamw', 'subspace_adamw', 'subspace_muon')
_MAKERS: dict[str, Callable[..., Any]] = {
  **so.optimizers.READY_MADE,
  'muon': functools.partial(so.normuon, b2=None),
}
for _name, _make in _MAKERS.items():
  _kind = (so.optimizers.takes(_make, 'rank'), _name in _RANDOM)
  METHODS.setdefault(_name, Method(_ours(_make), *_kind))
  METHODS.setdefault(f'{_name}8bit', Method(_coded(_make), *_kind))
# The smallest states of docs/choose.md.
METHODS['normuon4bit'] = Method(_coded(functools.partial(so.normuon, b=0.9), 4))
METHODS['normuon_no_momentum'] = Method(
  _coded(functools.partial(so.normuon, b=None))
)


def named(name: str) -> Method:
  """Returns the method called `name`."""
  if name not in METHODS:
    near = _nearest.did_you_mean(name, METHODS)
    raise ValueError(
      f'optimizer={name!r} is unknown{near}; choose from {sorted(METHODS)}.'
    )
  return METHODS[name]


def make(name: str, settings: Settings) -> Any:
  """Returns the optimizer called `name`."""
  method = named(name)
  if settings.regenerate and not method.random:
    random = sorted(k for k, v in METHODS.items() if v.random)
    raise ValueError(
      f'regenerate: the bases of optimizer={name!r} are not random; choose '
      f'from {random}.'
    )
  return method.make(settings)
