# Copyright 2026 The subspace_optax Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The front door: the three pieces in a row."""

from typing import Any

import optax

from subspace_optax import _in_subspace
from subspace_optax import _project
from subspace_optax import _spec
from subspace_optax import _unproject
from subspace_optax._projectors import _base


def subspace(
  spec: _spec.SubspaceSpec,
  projector: _base.Projector,
  inner: optax.GradientTransformation,
  *,
  transport: str = 'keep',
  residual: _unproject.Residual | None = None,
  scale: Any = 1.0,
) -> optax.GradientTransformationExtraArgs:
  """Chains `project`, `in_subspace` and `unproject`.

  Args:
    spec: which leaves, as which matrices, at which rank.
    projector: how bases are found and moved.
    inner: the optimizer that runs on coordinates.
    transport: see `in_subspace`.
    residual: see `unproject`.
    scale: see `unproject`.

  Returns:
    A transformation from gradients to updates, without learning rate.

  Raises:
    ValueError: see the three pieces.
    TypeError: see the three pieces.

  References:
    Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, and Liang
    et al., `Online Subspace Descent <https://arxiv.org/abs/2408.12857>`_, 2024

  Example:
    >>> import optax, subspace_optax as so
    >>> tx = optax.chain(
    ...   so.subspace(
    ...     so.SubspaceSpec(rank=0.25),
    ...     so.projectors.stiefel(update_proj_gap=200),
    ...     optax.scale_by_adam(),
    ...     transport='first',
    ...   ),
    ...   optax.add_decayed_weights(0.01),
    ...   optax.scale_by_learning_rate(1e-3),
    ... )
  """
  return optax.chain(
    _project.project(spec, projector, keep_gradient=residual is not None),
    _in_subspace.in_subspace(inner, spec, transport=transport),
    _unproject.unproject_any(scale, residual, allow_empty=True),
  )
