# SPDX-License-Identifier: Apache-2.0
"""Adam, Lion and Muon with their moments in 8 bits, by `quantize_moments`."""

from typing import Any

import jax
import optax
import optax.contrib

from subspace_optax._matrix import _notices
from subspace_optax._matrix import _tree
from subspace_optax.low_precision._quantize_moments import quantize_moments


def scale_by_adam8bit(
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  *,
  nesterov: bool = False,
  rounding: str = 'stochastic',
  exclude: str | None = 'auto',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_adam` with both moments in 8 bits.

  It is `quantize_moments` of Adam.

  Args:
    b1: decay of first moments.
    b2: decay of second moments.
    eps: added to the root of second moments.
    eps_root: added to second moments under the root.
    nesterov: whether to look ahead, as in NAdam.
    rounding: see `quantize_moments`.
    exclude: see `quantize_moments`.
    seed: of the rounding.

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
  rounding: str = 'stochastic',
  exclude: str | None = 'auto',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """`optax.scale_by_lion` with its moment in 8 bits.

  Args:
    b1: weight of the moment in the update's sign.
    b2: decay of the moment.
    rounding: see `quantize_moments`.
    exclude: see `quantize_moments`.
    seed: of the rounding.

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


def scale_by_muon8bit(
  ns_coeffs: Any = (3.4445, -4.7750, 2.0315),
  ns_steps: Any = 5,
  beta: Any = 0.95,
  eps: Any = 1e-8,
  *,
  nesterov: bool = True,
  adaptive: bool = False,
  preconditioning: Any = 'frobenius',
  weight_dimension_numbers: Any = None,
  rounding: str = 'stochastic',
  exclude: str | None = 'auto',
  seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
  """`optax.contrib.scale_by_muon` with its momentum in 8 bits.

  For matrices alone, as Muon is: give embeddings, heads, norms and biases
  another optimizer, by `optax.partition` or as `plain` of `subspace`.

  Args:
    ns_coeffs: coefficients of the Newton-Schulz iteration.
    ns_steps: number of its steps.
    beta: decay of the momentum.
    eps: added to norms that are divided by.
    nesterov: whether to look ahead.
    adaptive: whether to scale by the dual norm of the momentum.
    preconditioning: see `optax.contrib.scale_by_muon`, as for the next.
    weight_dimension_numbers: which axes are a matrix's; see there. By default
      the last two, those before them a stack.
    rounding: see `quantize_moments`.
    exclude: see `quantize_moments`.
    seed: of the rounding.

  Returns:
    See `quantize_moments`.

  Raises:
    ValueError: an unknown rounding; at `init`, a leaf of fewer than two axes.

  References:
    Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> state = so.scale_by_muon8bit().init({'w': jnp.ones((64, 512))})
    >>> state.coded.mu['w'].dtype
    dtype('int8')
  """
  if weight_dimension_numbers is None:
    weight_dimension_numbers = _last_two_axes
  muon = optax.contrib.scale_by_muon(
    ns_coeffs,
    ns_steps,
    beta,
    eps,
    nesterov=nesterov,
    adaptive=adaptive,
    preconditioning=preconditioning,
    weight_dimension_numbers=weight_dimension_numbers,
  )
  tx = quantize_moments(muon, rounding=rounding, exclude=exclude, seed=seed)

  def init(params):
    _check_matrices(params)
    return tx.init(params)

  return tx._replace(init=init)


def _check_matrices(params: Any) -> None:
  """Raises for a leaf that is no matrix, of which optax tells at `update`."""
  for path, leaf in _tree.flatten_params(params)[0]:
    if not _tree.is_masked(leaf) and len(leaf.shape) < 2:
      raise ValueError(
        f'scale_by_muon8bit is for matrices alone, and leaf {path!r} has shape '
        f'{tuple(leaf.shape)}; give it another optimizer, by optax.partition '
        'or as `plain` of `subspace`.'
      )


def _last_two_axes(params: Any) -> Any:
  numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
  return jax.tree.map(lambda _: numbers, params)
