# SPDX-License-Identifier: Apache-2.0
"""The convergence theorem of randomized subspace optimization."""

import math
from typing import NamedTuple


class TheoremParameters(NamedTuple):
  """Parameters that Theorem 5.5 prescribes for `subproblems`, and its bound.

  Attributes:
    eta: eta of the proximal term |B|^2 / (2 eta).
    learning_rate: learning rate of gradient descent on B. The curvature of its
      objective is between 1 / (2 eta) and 3 / (2 eta).
    bound: bound on the mean of E||grad f(W^k)||_F^2 over the subproblems.
  """

  eta: float
  learning_rate: float
  bound: float


def theorem_parameters(
  *,
  smoothness: float,
  gap: float,
  share: float,
  subproblems: int,
  accuracy: float = 0.0,
) -> TheoremParameters:
  """Returns the parameters of Theorem 5.5 for bases with P^T P = (m / r) I.

  With L' = L / share, eta = 1 / (2 L') makes every subproblem 3 L'-smooth and
  L'-strongly convex. The constants of the bound, 18 L' (gap / K + accuracy),
  follow from that and from E[P P^T] = I.

  Args:
    smoothness: L, the Lipschitz constant of the gradient.
    gap: f(W^0) - inf f, in units of the loss.
    share: the smallest r / m of all kernels, m their inputs, in (0, 1].
    subproblems: K, the number of subproblems, at least 1.
    accuracy: how far above its minimum a subproblem's objective ends, on
      average.

  Returns:
    The proximal parameter, a learning rate and the bound.

  Raises:
    ValueError: a value outside its range.

  References:
    Chen et al., `RSO <https://arxiv.org/abs/2502.07222>`_, 2025, Theorem 5.5

  Example:
    >>> import optax, subspace_optax as so
    >>> p = so.rso.theorem_parameters(
    ...   smoothness=1.0, gap=8.0, share=0.25, subproblems=1_000
    ... )
    >>> print(p.eta, round(p.learning_rate, 4), round(p.bound, 4))
    0.125 0.0833 0.576
    >>> rso = so.rso.subproblems(
    ...   so.SubspaceSpec(0.25, side='in'),
    ...   optax.sgd(p.learning_rate),
    ...   eta=p.eta,
    ... )
  """
  least = {'smoothness': smoothness, 'gap': gap, 'subproblems': subproblems}
  for name, value in least.items():
    if not 0 < value < math.inf:
      raise ValueError(f'{name} must be positive and finite, got {value!r}.')
  if not 0 < share <= 1:
    raise ValueError(f'share must lie in (0, 1], got {share!r}.')
  if not 0 <= accuracy < math.inf:
    raise ValueError(
      f'accuracy must be finite and not negative, got {accuracy!r}.'
    )
  curved = smoothness / share
  bound = 18 * curved * (gap / subproblems + accuracy)
  return TheoremParameters(1 / (2 * curved), 1 / (3 * curved), bound)
