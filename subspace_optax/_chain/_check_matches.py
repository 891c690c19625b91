# SPDX-License-Identifier: Apache-2.0
"""Errors and warnings of `init` on the matrices that a spec finds in a tree."""

from collections.abc import Iterable

from subspace_optax._chain import _spec
from subspace_optax._matrix import _notices
from subspace_optax.projectors import _base

_SMALLER = (
  'Take a smaller rank, pass only_if_smaller=False, or name them in `exclude`.'
)


def check_matches(
  spec: _spec.SubspaceSpec, matches: Iterable[_spec.Match | None]
) -> None:
  """Raises if nothing is left to project; warns of deviations from the spec.

  The piece that owns the bases calls it, once per optimizer.
  """
  known = [match for match in matches if match is not None]
  wanted = [match for match in known if match.selected]
  small = [match for match in wanted if match.layout is None]
  ranked = f'SubspaceSpec(rank={spec.rank!r})'
  if wanted and len(small) == len(wanted):
    _notices.refuse(
      f'{ranked} leaves no matrix to project:\n{_reasons(small)}\n{_SMALLER}'
    )
    return
  clipped = [match for match in wanted if match.is_clipped]
  guessed = [
    match
    for match in known
    if match.how == 'assumed' and (match.layout or not match.selected)
  ]
  if small:
    _notices.warn(
      f'{ranked} leaves these matrices plain:\n{_reasons(small)}\n{_SMALLER}'
    )
  if clipped:
    _notices.warn(
      f'{ranked} projects these matrices at their full rank, which may take '
      f'more state than Adam:\n{_full_ranks(clipped)}\n'
      'Take a smaller rank, or name them in `exclude`.'
    )
  reversed_ = [match for match in known if match.is_reversed]
  if reversed_:
    _notices.warn(
      'the biases of these kernels are as long as what is read as their inputs:'
      f'\n{_guesses(reversed_)}\nPass outputs_first={not spec.outputs_first} '
      'to SubspaceSpec, or their axes in weight_dimension_numbers.'
    )
  if guessed:
    _notices.warn(
      'no metadata and no other leaf tells which axes of these leaves form '
      f'matrices; assumed are\n{_guesses(guessed)}\nSay which axes they have '
      'in weight_dimension_numbers, or name the leaves in `exclude`.'
    )


def check_sides(
  projector: _base.Projector, matches: Iterable[_spec.Match | None]
) -> None:
  """Raises if a basis would span a side that is too long for its projector."""
  most = projector.most_rows
  for match in matches:
    if match and match.layout and most is not None and match.layout.m > most:
      raise ValueError(
        f'{projector.name} takes sides of up to {most} rows, and that of '
        f'{match.path!r}, of shape {match.leaf.shape}, has {match.layout.m}; '
        'project the other one by `side` of SubspaceSpec, or name the leaf in '
        '`exclude`.'
      )


def _reasons(matches: list[_spec.Match]) -> str:
  return '\n'.join(f'  {x.path}: {x.reason}' for x in matches)


def _full_ranks(matches: list[_spec.Match]) -> str:
  ranks = ((x, x.layout.rank) for x in matches if x.layout)
  return '\n'.join(f'  {x.path}: rank {r} of {x.matrices}' for x, r in ranks)


def _guesses(matches: list[_spec.Match]) -> str:
  return '\n'.join(
    f'  {x.path} {tuple(x.leaf.shape)}: {x.matrices}' for x in matches
  )
