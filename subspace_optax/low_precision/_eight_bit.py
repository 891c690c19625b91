# SPDX-License-Identifier: Apache-2.0
"""Adam and Lion with moments in 8 bits, by `quantize_moments`."""

from collections.abc import Sequence
from typing import Any

import optax

from subspace_optax._matrix import _notices
from subspace_optax.low_precision._quantize_moments import quantize_moments


def scale_by_adam8bit(
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  *,
  nesterov: bool = False,
  rounding: str = 'auto',
  exclude: str | Sequence[str] | None = 'auto',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam` with both moments in 8 bits.

  This is `quantize_moments` applied to Adam.

  Args:
    b1: decay rate of first moments.
    b2: decay rate of second moments.
    eps: added to the square root of second moments.
    eps_root: added to second moments under that square root.
    nesterov: whether to use Nesterov momentum, as in NAdam.
    rounding: see `quantize_moments`.
    exclude: see `quantize_moments`.
    seed: seed of the stochastic rounding.

  Returns:
    See `quantize_moments`.

  Raises:
    ValueError: an unknown rounding.

  References:
    Dettmers et al., `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_, 2021

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> tx = so.scale_by_adam8bit()
    >>> state = tx.init({'w': jnp.ones((64, 512))})
    >>> print(state.coded.nu['w'].dtype, state.scales['nu']['w'].shape)
    uint8 (64, 4)
  """
  adam = optax.scale_by_adam(b1, b2, eps, eps_root, nesterov=nesterov)
  tx = quantize_moments(adam, rounding=rounding, exclude=exclude, seed=seed)
  return _notices.warning_of_ones(tx, b1=b1, b2=b2)


def scale_by_lion8bit(
  b1: Any = 0.9,
  b2: Any = 0.99,
  *,
  rounding: str = 'auto',
  exclude: str | Sequence[str] | None = 'auto',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_lion` with its moment in 8 bits.

  Args:
    b1: weight of the moment in the sum whose sign is the update.
    b2: decay rate of the moment.
    rounding: see `quantize_moments`.
    exclude: see `quantize_moments`.
    seed: seed of the stochastic rounding.

  Returns:
    See `quantize_moments`.

  Raises:
    ValueError: an unknown rounding.

  References:
    Chen et al., `Symbolic Discovery of Optimization Algorithms
    <https://arxiv.org/abs/2302.06675>`_, 2023

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> state = so.scale_by_lion8bit().init({'w': jnp.ones((64, 512))})
    >>> state.coded.mu['w'].dtype
    dtype('int8')
  """
  lion = optax.scale_by_lion(b1, b2)
  return quantize_moments(lion, rounding=rounding, exclude=exclude, seed=seed)
