# SPDX-License-Identifier: Apache-2.0
"""How SCALE treats each leaf: matrices, embeddings, the head and the rest.

A `SubspaceSpec` says which leaves are matrices, as for subspaces. Heads and
embeddings are the leaves that it keeps plain because of their names.
"""

from collections.abc import Iterable
import re
from typing import Any, NamedTuple

from subspace_optax._chain import _spec
from subspace_optax._matrix import _names
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _tree

AUTO = 'auto'


class Role(NamedTuple):
  """How a leaf is normalised.

  Attributes:
    match: the spec's match for the leaf.
    inputs: axes of the leaf's inputs, over which the root mean square is taken.
    is_head: whether the leaf is a head, which has momentum.
    why: 'matrix', 'embedding', 'head' or 'tied head'.
  """

  match: _spec.Match
  inputs: tuple[int, ...]
  is_head: bool
  why: str


def find_roles(
  spec: _spec.SubspaceSpec,
  matches: Iterable[_spec.Match | None],
  names: _tree.AxisNames,
  head: str | None,
) -> dict[str, Role]:
  """Returns the roles of all leaves that are normalised, by path.

  Args:
    spec: a spec that accepts matrices of any size.
    matches: the spec's matches.
    names: names of the axes in boxes, by path.
    head: see `optimizers.scale`.

  Raises:
    ValueError: `head` is a regular expression that matches no leaf's path.
  """
  known = [match for match in matches if match is not None]
  found = [_role(spec, match, names, head) for match in known]
  roles = {role.match.path: role for role in found if role}
  heads = [role for role in roles.values() if role.is_head]
  if head is not None and not heads:
    tied = _find_tied(roles.values()) if head == AUTO else None
    if tied is not None:
      roles[tied.match.path] = tied
    elif head != AUTO and not are_layers(known):
      paths = ', '.join(match.path for match in known)
      raise ValueError(
        f'head={head!r} finds no leaf of two axes or more among {paths}; pass '
        "a regular expression of the head's path, or None if there is no head."
      )
  return roles


def _role(
  spec: _spec.SubspaceSpec,
  match: _spec.Match,
  names: _tree.AxisNames,
  head: str | None,
) -> Role | None:
  """Returns the role of a leaf, None for a leaf of the plain optimizer."""
  if len(match.leaf.shape) < 2:
    return None
  kind = _kind(match, names.get(match.path))
  named = head not in (None, AUTO) and bool(re.search(head, match.path))
  inputs = _inputs(spec, match, kind)
  if kind == 'embedding':
    return _tie(match) if named else Role(match, inputs, False, kind)
  if named or (kind == 'head' and head == AUTO):
    return Role(match, inputs, True, 'head')
  if kind == 'head' or match.layout is not None:
    return Role(match, inputs, False, 'matrix')
  return None


def _kind(match: _spec.Match, names: Any) -> str:
  """Returns 'embedding' or 'head' for leaves with such names, else ''."""
  if match.kind == 'an embedding or a head':  # by the name of an axis
    return 'head' if names and names[-1] == 'vocab' else 'embedding'
  return {'an embedding': 'embedding', 'a head': 'head'}.get(match.kind, '')


def _inputs(
  spec: _spec.SubspaceSpec, match: _spec.Match, kind: str
) -> tuple[int, ...]:
  """Returns the axes of a leaf's inputs."""
  if match.layout is not None:
    return match.layout.rows
  # In all libraries, tokens are the first axis of tables.
  is_last = spec.outputs_first and kind != 'embedding'
  return (len(match.leaf.shape) - (1 if is_last else 2),)


def _tie(match: _spec.Match) -> Role:
  """Returns a table as a tied head, whose inputs are the width, not tokens."""
  return Role(match, (len(match.leaf.shape) - 1,), True, 'tied head')


def _find_tied(roles: Iterable[Role]) -> Role | None:
  """Returns the largest embedding table as a tied head, if there is any."""
  tables = [role.match for role in roles if role.why == 'embedding']
  size = lambda match: match.leaf.size
  return _tie(max(tables, key=size)) if tables else None


def are_layers(matches: Iterable[_spec.Match | None]) -> bool:
  """Whether a tree is only a stack of layers, whose head is in another tree.

  `layerwise` splits such trees.
  """
  return all(_names.in_layer(match.path) for match in matches if match)


def tell(
  matches: Iterable[_spec.Match | None],
  roles: dict[str, Role],
  head: str | None,
) -> None:
  """Warns if the head is guessed, or if there is none."""
  if head != AUTO or are_layers(matches):
    return
  heads = [role for role in roles.values() if role.is_head]
  tied = [role.match.path for role in heads if role.why == 'tied head']
  rest = (
    'Pass a regular expression of its path as `head`, or head=None if there is '
    'no head.'
  )
  if tied:
    _notices.warn(
      f'scale finds no head by its name, and takes the embedding {tied[0]!r} '
      'for one that is tied: it has momentum, and its outputs are tokens. '
      f'{rest}'
    )
  elif not heads:
    _notices.warn(
      f'scale finds no head by its name, and no embedding that may be tied: '
      f'no leaf has momentum. {rest}'
    )
