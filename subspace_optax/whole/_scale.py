# SPDX-License-Identifier: Apache-2.0
"""SCALE: outputs of matrices scaled to one length, momentum for the head only.

Glentis et al., `A Minimalist Optimizer Design for LLM Pretraining
<https://arxiv.org/abs/2506.16659>`_, 2025. For a matrix of inputs i by outputs
j, with M = G or, for the head, M <- b M + (1 - b) G,

  U_ij = M_ij / max(sqrt(mean_i M_ij^2), 1e-8),   W <- W - lr U.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _beside
from subspace_optax._chain import _check_matches
from subspace_optax._chain import _describe
from subspace_optax._chain import _dtypes
from subspace_optax._chain import _first_states
from subspace_optax._chain import _match_updates
from subspace_optax._chain import _spec
from subspace_optax._matrix import _boxes
from subspace_optax._matrix import _linalg
from subspace_optax._matrix import _tree
from subspace_optax.whole import _roles
from subspace_optax.whole import _with_plain

_LEAST = 1e-8


class ScaleState(NamedTuple):
  """State of `normalize_outputs`."""

  head: Any  # state of the head's momentum; `MaskedNode` for other leaves
  plain: Any  # state of the optimizer for vectors; `MaskedNode` for matrices


def normalize_outputs(
  spec: _spec.SubspaceSpec,
  momentum: optax.GradientTransformation,
  plain: optax.GradientTransformation,
  *,
  head: str | None,
  scale: Any,
) -> optax.GradientTransformationExtraArgs:
  """Returns the directions of SCALE, float32 or wider.

  Args:
    spec: which leaves are matrices.
    momentum: runs on the head.
    plain: runs on leaves that are not matrices.
    head: see `optimizers.scale`.
    scale: multiplies the directions of matrices.
  """
  spec = _with_plain.whole_spec(spec)
  spec = dataclasses.replace(spec, allow_empty=True)
  plain = optax.with_extra_args_support(plain)

  def find_roles(updates):
    readings = [
      _roles.find_roles(spec, matches, names, head)
      for names, matches in _match_updates.find_readings(spec, updates)
    ]
    paths = [path for path, _ in _tree.flatten(updates)[0]]
    does = lambda role: role and (role.inputs, role.is_head)
    told = [[does(roles.get(path)) for path in paths] for roles in readings]
    _match_updates.check_alike(paths, told)
    return readings[0]

  def init(params):
    matches = spec.match(params)
    _match_updates.remember_names(params)
    roles = _roles.find_roles(spec, matches, _tree.axis_names(params), head)
    _check_matches.check_matches(spec, matches)
    _roles.tell(matches, roles, head)
    tell = functools.partial(_tell, roles)
    _describe.record_whole('scale', matches, tell)
    return _first_states.make_state(spec, first_state, params)

  def first_state(params, matches, treedef):
    roles = _roles.find_roles(spec, matches, _tree.axis_names(params), head)
    templates = treedef.unflatten(
      optax.MaskedNode()
      if match is None
      else _first_states.plain_template(spec, match.leaf)
      for match in matches
    )
    of_head, _ = _beside.split(templates, _heads(roles))
    _, rest = _beside.split(templates, roles)
    return ScaleState(momentum.init(of_head), plain.init(rest))

  def update(updates, state, params=None, **extra_args):
    roles = find_roles(updates)
    widen = lambda path, g: _dtypes.widen(spec, g)
    wide = _tree.map_entries(widen, _tree.unbox(updates))
    of_head, others = _beside.split(wide, _heads(roles))
    matrices, rest = _beside.split(others, roles)
    weights = None if params is None else _beside.split(params, roles)[1]
    of_head, head_state = momentum.update(of_head, state.head)
    rest, plain_state = plain.update(rest, state.plain, weights, **extra_args)
    normalize = functools.partial(_choose, roles, scale)
    new = _tree.map_entries(normalize, updates, of_head, matrices, rest)
    return new, ScaleState(head_state, plain_state)

  return optax.GradientTransformationExtraArgs(init, _boxes.bare(update))


def _heads(roles: dict[str, _roles.Role]) -> list[str]:
  return [path for path, role in roles.items() if role.is_head]


def _choose(
  roles: dict[str, _roles.Role], scale: Any, path: str, entry: Any, *of: Any
) -> Any:
  """Returns the direction of a leaf, from one of three optimizers."""
  if _tree.is_masked(entry):
    return entry
  (x,) = [x for x in of if not _tree.is_masked(x)]
  return scale * _unit(x, roles[path].inputs) if path in roles else x


def _unit(x: jax.Array, inputs: tuple[int, ...]) -> jax.Array:
  """Returns a leaf whose outputs have a root mean square of 1."""
  squares = jnp.mean(x * x, axis=inputs, keepdims=True)
  return x / jnp.maximum(_linalg.safe_sqrt(squares), _LEAST)


def _tell(
  roles: dict[str, _roles.Role], match: _spec.Match
) -> tuple[str, str, str] | None:
  """Returns what `describe` shows of a leaf; None for one that stays plain."""
  role = roles.get(match.path)
  if role is None:
    return None
  inputs = math.prod(match.leaf.shape[i] for i in role.inputs)
  return role.why, str(inputs), 'momentum' if role.is_head else 'normalized'
