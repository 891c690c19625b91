# SPDX-License-Identifier: Apache-2.0
"""Hyperparameters under which GaLore and GoLore are proven to converge."""

import math
from typing import NamedTuple

THEOREMS = ('galore', 'large_batch_galore', 'golore')


class TheoremParameters(NamedTuple):
  """Hyperparameters that a convergence theorem prescribes, and its rate.

  Attributes:
    b1: weight of the new gradient in m <- (1 - b1) m + b1 P^T g, so that 1
      means no momentum; optax's decay rate is 1 - b1.
    update_proj_gap: tau, steps between refreshes.
    learning_rate: eta in W <- W - eta P m.
    batch_size: B, samples in every stochastic gradient; 1 if the theorem does
      not use it.
    rate: order of the mean squared gradient norm, without its constant.
  """

  b1: float
  update_proj_gap: int
  learning_rate: float
  batch_size: int
  rate: float


def theorem_parameters(
  theorem: str,
  *,
  smoothness: float,
  gap: float,
  noise: float = 0.0,
  share: float,
  steps: int,
) -> TheoremParameters:
  """Returns the hyperparameters of a convergence theorem of the GoLore paper.

  The theorems are about momentum SGD with momentum projection, m <- (1 - b1) m
  + b1 P^T g and W <- W - eta P m, on smooth functions bounded below. They cover
  the worst case: the prescribed training is slow, but shows how the choices
  scale.

  Args:
    theorem: 'galore' (Theorem 2, exact gradients), 'large_batch_galore'
      (Theorem 3) or 'golore' (Theorem 4, single samples).
    smoothness: L, the Lipschitz constant of the gradient.
    gap: Delta = f(W_0) - inf f, in units of the loss.
    noise: sigma, standard deviation of a sample's whole gradient, in units of
      the gradient's norm.
    share: delta, the smallest r / min(m, n) of all matrices, in (0, 1].
    steps: T, the number of steps of the whole run.

  Returns:
    The momentum, the gap between refreshes, the learning rate, the batch size
    and the order of (1/T) sum E||grad f||^2 over the T steps.

  Raises:
    ValueError: an unknown theorem; a value outside its range; noise with
      Theorem 2; fewer steps than the theorem needs.

  References:
    He et al., `Subspace Optimization for Large Language Models with
    Convergence Guarantees <https://arxiv.org/abs/2410.11289>`_, 2024, Theorems
    2 to 4

  Example:
    >>> import optax, subspace_optax as so
    >>> p = so.theorem_parameters(
    ...   'golore', smoothness=1.0, gap=8.0, noise=0.5, share=0.25, steps=10_000
    ... )
    >>> print(p.update_proj_gap, p.batch_size, f'{p.b1:.3f}')
    619 1 0.138
    >>> momentum = optax.chain(optax.scale(p.b1), optax.trace(1 - p.b1))
    >>> tx = so.golore(
    ...   p.learning_rate,
    ...   0.25,
    ...   update_proj_gap=p.update_proj_gap,
    ...   inner=momentum,
    ... )
  """
  _check(theorem, smoothness, gap, noise, share)
  least = _least_steps(theorem, smoothness, gap, noise, share)
  if not least <= steps < math.inf:
    raise ValueError(
      f'steps must be at least {math.ceil(least)} for {theorem!r} with these '
      f'values, got {steps!r}; train for longer.'
    )
  # Use 1 / b1, since formulas only divide by b1.
  slowness = 1 + math.sqrt(share**1.5 * noise**2 * steps / (smoothness * gap))
  tau = math.ceil(64 / (3 * share) * slowness)
  batch_size = 1
  on_tau, on_slowness = 80 / (3 * share), 16 / 3
  if theorem == 'large_batch_galore':
    batch_size = math.ceil(slowness / share)
    on_tau, on_slowness = 40 / share, 32 / 3
  eta = 1 / (
    smoothness
    * (
      4
      + math.sqrt(80 / (3 * share)) * slowness
      + math.sqrt(on_tau) * tau
      + math.sqrt(on_slowness * tau * slowness)
    )
  )
  of_descent = smoothness * gap / (share**2.5 * steps)
  of_noise = math.sqrt(smoothness * gap * noise**2 / (share**3.5 * steps))
  return TheoremParameters(
    1 / slowness, tau, eta, batch_size, of_descent + of_noise
  )


def _check(
  theorem: str, smoothness: float, gap: float, noise: float, share: float
) -> None:
  """Raises unless all values except the steps are in their ranges."""
  if theorem not in THEOREMS:
    raise ValueError(f'theorem must be one of {THEOREMS}, got {theorem!r}.')
  for name, value in {'smoothness': smoothness, 'gap': gap}.items():
    if not 0 < value < math.inf:
      raise ValueError(
        f'{name} must be positive and finite, got {value!r}; an upper bound '
        'of it will do.'
      )
  if not 0 <= noise < math.inf:
    raise ValueError(
      f'noise must be finite and not negative, got {noise!r}; give 0 for exact '
      'gradients.'
    )
  if theorem == 'galore' and noise > 0:
    raise ValueError(
      f"noise must be 0 for 'galore', got {noise!r}: it need not converge "
      "under noise; use 'large_batch_galore' or 'golore'."
    )
  if not 0 < share <= 1:
    raise ValueError(
      f'share must lie in (0, 1], got {share!r}; give the smallest '
      'r / min(m, n) of all matrices.'
    )


def _least_steps(
  theorem: str, smoothness: float, gap: float, noise: float, share: float
) -> float:
  """Returns the smallest T for which the theorem holds."""
  if theorem == 'galore':
    return 64 / (3 * share)
  of_noise = (128 * noise) ** 2 / (9 * math.sqrt(share) * smoothness * gap)
  return 2 + 128 / (3 * share) + of_noise
