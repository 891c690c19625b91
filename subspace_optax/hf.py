# SPDX-License-Identifier: Apache-2.0
"""Optimizers from the arguments of Hugging Face's trainer."""

from collections.abc import Callable, Sequence
import re
from typing import Any

import optax

from subspace_optax import optimizers
from subspace_optax._chain import _spec
from subspace_optax.low_precision import _quantize_moments

_SIDES = {
  'std': 'short',
  'reverse_std': 'reverse_std',
  'right': 'in',
  'left': 'out',
}
# Hugging Face leaves embeddings out by class, since they are not linear layers;
# heads are linear.
_EMBEDDING = r'(^|/)(\w*embed\w*|wte|wpe|shared)(/|$)'
_NOT_LINEAR = rf'{_EMBEDDING}|(^|/)(\w*norm\w*|\w*conv\w*)(/|$)'


def from_hf(
  learning_rate: optax.ScalarOrSchedule,
  optim: str,
  optim_args: str = '',
  optim_target_modules: str | Sequence[str] | None = None,
  *,
  adam_beta1: float = 0.9,
  adam_beta2: float = 0.999,
  adam_epsilon: float = 1e-8,
  weight_decay: Any = 0.0,
  mask: Any = None,
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """Makes the optimizer that Hugging Face's `TrainingArguments` describe.

  Arguments have the names and defaults of `TrainingArguments`. A module is
  found by the path of a leaf without its last name, with slashes instead of
  dots: 'self_attn.q_proj' finds `layers/0/self_attn/q_proj/kernel`. A list
  finds paths that contain one of its strings, or match one as a whole. A single
  string is a regular expression that must match the whole path. Both may find a
  head, which this library's own optimizers leave out; embeddings are left out
  by Hugging Face and here.

  Some differences remain. Weights decay, which their trainer forgets for GaLore
  and APOLLO; without a `mask` all weights decay, while theirs leaves out biases
  and norms. Epsilon is added to the square root of the corrected second moment.
  Codes of 8 bits are this library's, and random bases have other numbers.
  `describe` shows what is projected.

  Args:
    learning_rate: a float or a schedule.
    optim: 'galore_adamw', 'galore_adamw_8bit', 'apollo_adamw' or 'adamw_8bit',
      also called 'adamw_bnb_8bit'.
    optim_args: such as 'rank=128, update_proj_gap=200, scale=0.25,
      proj_type=std'. Pass APOLLO's `scale` as in Hugging Face; it is the square
      of the one here, and is converted.
    optim_target_modules: which modules are projected; 'all-linear' for all
      except embeddings, None only for Adam.
    adam_beta1: decay rate of first moments.
    adam_beta2: decay rate of second moments.
    adam_epsilon: added to the square root of second moments.
    weight_decay: decoupled weight decay; `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    seed: seed of random bases and of stochastic rounding.

  Returns:
    An optimizer.

  Raises:
    ValueError: an unsupported optimizer, argument or value in `optim_args`; a
      layer-wise optimizer, for which use `layerwise`; no target modules.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024; Zhu et al.,
    `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> tx = so.from_hf(
    ...   1e-3, 'galore_adamw', 'rank=4, scale=0.5', ['attn', 'mlp']
    ... )
    >>> params = {'mlp': {'up': {'kernel': jnp.ones((16, 32))}}}
    >>> update = jax.jit(tx.update)
    >>> updates, state = update(params, tx.init(params), params)
    >>> so.subspace_metrics(state).keys()
    dict_keys(['mlp/up/kernel'])
  """
  adam = {'b1': adam_beta1, 'b2': adam_beta2, 'eps': adam_epsilon}
  decay = {'weight_decay': weight_decay, 'mask': mask}
  given = _parse(optim_args)
  if optim in ('adamw_8bit', 'adamw_bnb_8bit'):
    _check_used(given, optim)
    return _adamw_8bit(learning_rate, adam, seed, **decay)
  make = _MAKERS.get(optim)
  if make is None:
    raise ValueError(_unknown(optim))
  include = _pattern(optim_target_modules)
  tx = make(given, adam, include, seed)
  _check_used(given, optim)
  return tx(learning_rate, **decay)


def _galore(bits: int) -> Callable[..., Callable[..., Any]]:
  def make(given: dict[str, str], adam: Any, include: Any, seed: int):
    side = _one_of(given, 'proj_type', 'std', _SIDES)
    spec = _make_spec(given, include, seed, side)
    gap = int(given.pop('update_proj_gap', 200))
    scale = float(given.pop('scale', 0.25))
    return lambda lr, **decay: optimizers.galore(
      lr,
      update_proj_gap=gap,
      scale=scale,
      base_optimizer=optax.scale_by_adam(**adam),
      moment_bits=bits,
      spec=spec,
      **decay,
    )

  return make


def _apollo(given: dict[str, str], adam: Any, include: Any, seed: int):
  side = _one_of(given, 'proj_type', 'std', {'std': 'short'})
  _one_of(given, 'proj', 'random', {'random': 'random'})
  granularity = {'channel': 'channel', 'tensor': 'tensor'}
  granularity = _one_of(given, 'scale_type', 'channel', granularity)
  spec = _make_spec(given, include, seed, side)
  gap = int(given.pop('update_proj_gap', 200))
  scale = float(given.pop('scale', 1.0)) ** 0.5
  return lambda lr, **decay: optimizers.apollo_adamw(
    lr,
    update_proj_gap=gap,
    scale=scale,
    granularity=granularity,
    spec=spec,
    **adam,
    **decay,
  )


_MAKERS: dict[str, Callable[..., Any]] = {
  'galore_adamw': _galore(32),
  'galore_adamw_8bit': _galore(8),
  'apollo_adamw': _apollo,
}


def _adamw_8bit(
  learning_rate: Any, adam: Any, seed: int, weight_decay: Any, mask: Any
) -> optax.GradientTransformationExtraArgs:
  # Hugging Face keeps embeddings and small arrays in float32. Small arrays are
  # norms and biases, which would pass for matrices in stacks.
  exclude = ('auto', _EMBEDDING)
  moments = _quantize_moments.quantize_moments(
    optax.scale_by_adam(**adam), 8, exclude=exclude, seed=seed
  )
  return optax.chain(
    moments,
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _make_spec(
  given: dict[str, str], include: str | None, seed: int, side: str
) -> _spec.SubspaceSpec:
  return _spec.SubspaceSpec(
    int(given.pop('rank', 128)),
    include=include,
    exclude=_NOT_LINEAR,
    side=side,
    only_if_smaller=False,
    seed=seed,
  )


def _parse(optim_args: str) -> dict[str, str]:
  """Returns the names and values in a string such as 'rank=128, scale=0.25'."""
  parts = [x for x in optim_args.replace(' ', '').split(',') if x]
  if not all(x.count('=') == 1 for x in parts):
    raise ValueError(
      f'optim_args={optim_args!r} must look like "rank=128, scale=0.25".'
    )
  return dict(x.split('=') for x in parts)


def _one_of(
  given: dict[str, str], name: str, default: str, choices: dict[str, str]
) -> str:
  value = given.pop(name, default)
  if value not in choices:
    raise ValueError(
      f'optim_args: {name}={value} is not here; choose from {list(choices)}.'
    )
  return choices[value]


def _check_used(given: dict[str, str], optim: str) -> None:
  if given:
    known = 'rank, update_proj_gap, scale, proj_type; APOLLO scale_type, proj'
    known = 'nothing' if optim.startswith('adamw') else known
    raise ValueError(
      f'optim_args: {optim} takes no {", ".join(given)}, but {known}.'
    )


def _unknown(optim: str) -> str:
  name = optim.removesuffix('_layerwise')
  if name != optim and name in _MAKERS:
    return (
      f'optim={optim!r}: pass `so.from_hf(..., {name!r}, ...)` to '
      '`so.layerwise`.'
    )
  known = [*_MAKERS, 'adamw_8bit', 'adamw_bnb_8bit']
  return (
    f'optim={optim!r} is not here; choose from {known}, or write '
    '`optax.adamw` and the like yourself.'
  )


def _pattern(modules: str | Sequence[str] | None) -> str | None:
  """Returns a pattern for paths of target modules' leaves; None for all."""
  if not modules:
    raise ValueError(
      'optim_target_modules must name modules, as ["attn", "mlp"], or be '
      '"all-linear".'
    )
  if modules in ('all-linear', 'all_linear', ['all-linear']):
    return None
  if isinstance(modules, str):
    return _whole(modules)
  inside = [rf'{re.escape(x.replace(".", "/"))}.*/[^/]+$' for x in modules]
  return '|'.join([*inside, *map(_whole, filter(_is_pattern, modules))])


def _whole(pattern: str) -> str:
  slashes = pattern.replace(r'\.', '/')
  return rf'^(?:{slashes})/[^/]+$'


def _is_pattern(text: str) -> bool:
  try:
    re.compile(text)
  except re.error:
    return False
  return True
