# SPDX-License-Identifier: Apache-2.0
"""Plans of several methods, as a table and as a picture."""

from collections.abc import Mapping
import math

from subspace_optax.plan import _planner


def table(plans: Mapping[str, _planner.Plan], card: float | None) -> str:
  """Returns a line a method, in GB; with a card, how many would hold it all.

  The number is that of the bytes alone, were they cut evenly over devices.
  """
  names = [*_planner.Plan._fields, 'total', *(['cards'] if card else [])]
  first = max(map(len, [*plans, 'GB']))
  head = 'GB'.ljust(first) + ''.join(f'{name:>13}' for name in names)
  lines = [head]
  for method, plan in plans.items():
    cells = [f'{size / 1e9:>13.2f}' for size in (*plan, plan.total)]
    if card:
      cells.append(f'{math.ceil(plan.total / card):>13}')
    lines.append(method.ljust(first) + ''.join(cells))
  return '\n'.join(lines)


def picture(
  plans: Mapping[str, _planner.Plan], path: str, card: float | None, title: str
) -> None:
  """Draws a stacked bar a method, and a line where the card ends."""
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
    axes.axvline(card / 1e9, color='black', linestyle='--', label='card')
  axes.invert_yaxis()
  axes.set_xlabel('GB per device')
  axes.set_title(title, fontsize='medium')
  figure.legend(loc='outside lower center', ncols=7, fontsize='small')
  figure.savefig(path, dpi=130)
