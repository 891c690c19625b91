# SPDX-License-Identifier: Apache-2.0
"""Plans of several methods, as a table or a picture."""

from collections.abc import Mapping
import math
import textwrap
from typing import NamedTuple

from subspace_optax.plan import _planner

# The fraction of a GPU that jax takes by default; users change it by
# XLA_PYTHON_CLIENT_MEM_FRACTION.
_PREALLOCATED = 0.75


def title(model: str, s: _planner.Settings) -> str:
  """Returns a title for the settings, without the optimizer."""
  mode = 'all activations kept'
  if s.remat or s.layerwise:
    mode = 'layer by layer' if s.layerwise else 'layers recomputed'
  cut = ', '.join(f'{k}={v}' for k, v in s.mesh.items() if v > 1)
  parts = [model, f'rank {s.rank}', f'{s.batch} x {s.seq:,} tokens', mode]
  return ', '.join([*parts, *([cut] if cut else [])])


def assumed(s: _planner.Settings) -> str:
  """Returns the settings that the title leaves out, as flags."""
  flags = {
    'param-dtype': s.param_dtype,
    'dtype': s.dtype or s.param_dtype,
    'moment-dtype': s.moment_dtype,
    'basis-dtype': s.basis_dtype,
    'rounding': s.rounding,
    'attention-chunk': s.attention_chunk,
  }
  given = [
    f'--{name} {value}' for name, value in flags.items() if value is not None
  ]
  text = ' '.join([*given, *(['--regenerate'] if s.regenerate else [])])
  lines = textwrap.wrap(text, 78, break_on_hyphens=False)
  return 'assumed:\n' + textwrap.indent('\n'.join(lines), '  ')


class Card(NamedTuple):
  """A device, and the fraction of it that is left to the runtime."""

  name: str
  reserve: float

  @property
  def size(self) -> float:
    """The bytes of the device."""
    return _planner.card_bytes(self.name)

  def verdict(self, plan: _planner.Plan) -> str:
    """Returns 'fits', 'tight' or 'does not fit'."""
    if plan.fits(self.name, self.reserve):
      return 'fits'
    return 'tight' if plan.total <= self.size else 'does not fit'

  def usable(self) -> str:
    """Returns a sentence about the card."""
    return (
      f'card {self.name}: {self.size / 1e9:g} GB, of which '
      f'{self.reserve * self.size / 1e9:.3g} GB are left to the runtime '
      f'(--reserve {self.reserve:g})'
    )

  def sentence(self, plan: _planner.Plan) -> str:
    """Returns the verdict as a sentence, with the jax setting it may need."""
    left, kept = self.size - plan.total, self.reserve * self.size
    if (kind := self.verdict(plan)) == 'does not fit':
      return f'it does not fit: {-left / 1e9:.3f} GB are missing'
    if kind == 'tight':
      return (
        f'it is tight: {left / 1e9:.3f} GB are left, less than the runtime may '
        'need'
      )
    text = f'it fits: {(left - kept) / 1e9:.3f} GB are left beside that'
    if plan.total > _PREALLOCATED * self.size and self.name[0] != 'v':
      text += (
        f';\non a GPU set XLA_PYTHON_CLIENT_MEM_FRACTION={1 - self.reserve:g}, '
        f'since jax takes {_PREALLOCATED:.0%} of it at first'
      )
    return text


def table(plans: Mapping[str, _planner.Plan], card: Card | None) -> str:
  """Returns one line per method, in GB; with a card, also how many it takes.

  The number of cards assumes that the bytes are cut evenly over them.
  """
  names = [*_planner.Plan._fields, 'total']
  names += ['cards', 'one card'] if card else []
  first = max(map(len, [*plans, 'GB']))
  head = 'GB'.ljust(first) + ''.join(f'{name:>13}' for name in names)
  lines = [head]
  for method, plan in plans.items():
    cells = [f'{size / 1e9:>13.2f}' for size in (*plan, plan.total)]
    if card:
      cells.append(f'{math.ceil(plan.total / card.size):>13}')
      cells.append(f'{card.verdict(plan):>13}')
    lines.append(method.ljust(first) + ''.join(cells))
  return '\n'.join(lines)


def picture(
  plans: Mapping[str, _planner.Plan], path: str, card: Card | None, title: str
) -> None:
  """Draws one stacked bar per method, and a line where the card ends."""
  try:
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ValueError(
      f'picture={path!r} needs matplotlib: pip install matplotlib.'
    ) from error
  figure = Figure(figsize=(8, 1.5 + 0.45 * len(plans)), layout='constrained')
  backend_agg.FigureCanvasAgg(figure)
  axes = figure.subplots()
  left = [0.0] * len(plans)
  for part in _planner.Plan._fields:
    sizes = [getattr(plan, part) / 1e9 for plan in plans.values()]
    axes.barh(list(plans), sizes, left=left, label=part)
    left = [a + b for a, b in zip(left, sizes, strict=True)]
  if card:
    end, reserved = card.size / 1e9, card.reserve * card.size / 1e9
    axes.axvline(end, color='black', linestyle='--', label='card')
    axes.axvspan(
      end - reserved, end, color='black', alpha=0.15, label='runtime'
    )
    title += f', {card.name} ({end:g} GB)'
  axes.invert_yaxis()
  axes.set_xlabel('GB per device')
  axes.set_title(title, fontsize='medium')
  figure.legend(loc='outside lower center', ncols=8, fontsize='small')
  figure.savefig(path, dpi=130)
