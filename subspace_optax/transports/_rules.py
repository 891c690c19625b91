# SPDX-License-Identifier: Apache-2.0
"""The transports of the papers.

He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024: momentum
projection, m <- C m with C = P_n^T P_o, or C = P_n^T P_o (P_o^T P_o)^-1 for
bases that are not orthonormal. Robert et al., `LDAdam
<https://arxiv.org/abs/2410.16103>`_, 2024: second moments change as if
coordinates were independent with means m^ and variances v^ - m^^2,

  v^ <- |C^2 (v^ - m^^2) + (C m^)^2|,

where m^ and v^ are debiased and squares are taken element by element.
"""

from typing import Any

import jax
import jax.numpy as jnp

from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _linalg
from subspace_optax.transports import _base


def keep() -> _base.Transport:
  """Leaves moments unchanged when a basis moves (GaLore).

  Returns:
    A transport for `in_subspace` and `subspace`; 'keep' is short for it.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> so.transports.keep().name
    'keep'
  """
  return _base.Transport('keep')


def first() -> _base.Transport:
  """Maps first moments by C and leaves second moments unchanged (GoLore).

  Returns:
    A transport for `in_subspace` and `subspace`; 'first' is short for it.

  References:
    He et al., `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = so.subspace(
    ...   so.SubspaceSpec(rank=16),
    ...   so.projectors.stiefel(200),
    ...   optax.scale_by_lion(),
    ...   transport=so.transports.first(),
    ... )
  """
  return _base.Transport('first', _map_mean, ('mean', 'sum'))


def both(b1: Any, b2: Any) -> _base.Transport:
  """Maps first and second moments by LDAdam's rule.

  Second moments without corresponding first moments, as in RMSProp, are mapped
  by the squares of C's elements.

  Args:
    b1: the inner optimizer's decay rate of first moments.
    b2: the inner optimizer's decay rate of second moments.

  Returns:
    A transport for `in_subspace` and `subspace`.

  Raises:
    ValueError: a rate outside [0, 1).

  References:
    Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = so.subspace(
    ...   so.SubspaceSpec(rank=16),
    ...   so.projectors.power_iteration(),
    ...   optax.scale_by_adam(0.9, 0.99),
    ...   transport=so.transports.both(0.9, 0.99),
    ... )
  """
  _arguments.check_decay(b1, 'b1')
  _arguments.check_decay(b2, 'b2')

  def move(moment: _base.Moment) -> jax.Array:
    if moment.kind != 'square':
      return _map_mean(moment)
    if moment.mean is None:
      return moment.carry_squares(moment.value)
    return _map_square(moment, moment.mean, b1, b2)

  return _base.Transport('both', move)


def reset() -> _base.Transport:
  """Resets a matrix's state, counters included, when its basis moves (RSO).

  Each matrix has its own state, as with `per_matrix`. With `online_pca`, which
  moves bases at every step, nothing accumulates.

  Returns:
    A transport for `in_subspace` and `subspace`; 'reset' is short for it.

  References:
    Chen et al., `RSO <https://arxiv.org/abs/2502.07222>`_, 2025

  Example:
    >>> import subspace_optax as so
    >>> so.transports.reset().resets
    True
  """
  return _base.Transport('reset', resets=True)


_BY_NAME = {'keep': keep, 'first': first, 'reset': reset}


def as_transport(transport: Any) -> _base.Transport:
  """Returns a transport, given itself or its name."""
  if isinstance(transport, _base.Transport):
    return transport
  if isinstance(transport, str) and transport in _BY_NAME:
    return _BY_NAME[transport]()
  names = ', '.join(map(repr, _BY_NAME))
  raise ValueError(
    f'transport must be {names} or from subspace_optax.transports, such as '
    f'transports.both(b1=0.9, b2=0.999), got {transport!r}.'
  )


def _map_mean(moment: _base.Moment) -> jax.Array:
  return moment.carry(moment.value)


def _map_square(
  moment: _base.Moment, mean: jax.Array, b1: Any, b2: Any
) -> jax.Array:
  weight = _debias(b2, moment.count)
  square = _linalg.widen(moment.value)
  mean = _linalg.widen(mean) / _debias(b1, moment.count)
  variance = square / weight - jnp.square(mean)
  new = moment.carry_squares(variance) + jnp.square(moment.carry(mean))
  return weight * jnp.abs(new)


def _debias(rate: Any, count: Any) -> jax.Array:
  """Returns 1 - b^t, or 1 where t = 0 and the moments are 0."""
  rate = jnp.asarray(rate, jnp.float32)
  return jnp.where(count > 0, 1.0 - rate ** count.astype(jnp.float32), 1.0)
