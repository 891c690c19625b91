# SPDX-License-Identifier: Apache-2.0
"""Muon with its momentum in 8 bits, by `quantize_moments`.

Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024.
"""

from collections.abc import Sequence
from typing import Any

import optax

from subspace_optax._chain import _spec
from subspace_optax.low_precision import _quantize_moments
from subspace_optax.whole import _normuon
from subspace_optax.whole import _with_plain


def scale_by_muon8bit(
  spec: _spec.SubspaceSpec | None = None,
  *,
  b: Any = 0.95,
  steps: int = 5,
  ns_coeffs: Any = 'standard',
  preconditioning: str = 'frobenius',
  rounding: str = 'auto',
  exclude: str | Sequence[str] | None = 'auto',
) -> optax.GradientTransformationExtraArgs:
  """Muon with Nesterov momentum in 8 bits.

  It is for matrices only. Give embeddings, heads, norms and biases another
  optimizer by `optax.partition` or as `plain` of `subspace`; `normuon` with
  `b2=None` and `moment_bits=8` includes one for them. On a mesh, each device
  orthogonalises its own matrices; see `scale_by_normuon`.

  Args:
    spec: which axes of leaves form matrices, and the seed of the rounding;
      `SubspaceSpec(1)` by default. Its rank, side and bases do not matter.
    b: decay rate of the momentum.
    steps: see `residuals.orthogonal`.
    ns_coeffs: see `residuals.orthogonal`.
    preconditioning: see `residuals.orthogonal`.
    rounding: see `quantize_moments`.
    exclude: see `quantize_moments`.

  Returns:
    `scale_by_normuon` without mean squares, in `quantize_moments`. Updates are
    those of `optax.contrib.scale_by_muon` once its bias correction has faded,
    times sqrt(out / in) for kernels with more outputs than inputs.

  Raises:
    ValueError: see `scale_by_normuon`; an unknown rounding; at `init`, a leaf
      that is not a matrix according to `spec`.

  References:
    Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> state = so.scale_by_muon8bit().init({'w': jnp.ones((64, 512))})
    >>> state.coded.trace['w'].dtype
    dtype('int8')
  """
  spec = _with_plain.whole_spec(_spec.SubspaceSpec(1) if spec is None else spec)
  tx = _quantize_moments.quantize_moments(
    _normuon.scale_by_normuon(
      spec,
      b=b,
      b2=None,
      steps=steps,
      ns_coeffs=ns_coeffs,
      preconditioning=preconditioning,
    ),
    rounding=rounding,
    exclude=exclude,
    seed=spec.seed,
  )

  def init(params):
    _check_matrices(spec, params)
    return tx.init(params)

  return tx._replace(init=init)


def _check_matrices(spec: _spec.SubspaceSpec, params: Any) -> None:
  """Raises for a leaf that is not a matrix, which would pass unchanged."""
  for match in spec.match(params):
    if match and match.layout is None:
      raise ValueError(
        f'scale_by_muon8bit is for matrices alone, and leaf {match.path!r} of '
        f'shape {tuple(match.leaf.shape)} is none: {match.reason}. Give it '
        'another optimizer, by optax.partition or as `plain` of `subspace`; '
        'normuon(b2=None, moment_bits=8) has one.'
      )
