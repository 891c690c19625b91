# SPDX-License-Identifier: Apache-2.0
r"""The memory of a training step on each device, before anything runs.

  python -m subspace_optax.plan --model llama_7b --optimizer subspace_adamw \
    --rank 1024 --batch 1 --seq 2048 --mesh fsdp=1 --card rtx4090

prints the bytes of weights, gradients, states, bases, activations and
workspace, whether they fit next to the runtime, and the largest rank and batch
that fit.
"""

import argparse
from collections.abc import Sequence
import sys
from typing import Any

from subspace_optax.plan import _methods
from subspace_optax.plan import _models
from subspace_optax.plan import _planner
from subspace_optax.plan import _report
from subspace_optax.plan._largest import largest
from subspace_optax.steps import _subproblem


def _flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m subspace_optax.plan',
    description='Bytes per device of a training step, before anything runs.',
  )
  add = parser.add_argument
  names = ', '.join(_models.NAMED)
  add('--model', required=True, help=f'{names}, or package.module:callable')
  add('--optimizer', default='adamw', help=', '.join(_methods.METHODS))
  add('--rank', default='0.25', help='or a share of each short side')
  add('--batch', type=int, default=1, help='rows, over all devices')
  add('--seq', type=int, default=2048)
  add('--mesh', default='', help='fsdp=4,tensor=2; data is for copies')
  add('--card', default='', help=', '.join(_planner.CARDS) + ', or GB')
  text = 'share of the card that is left to the runtime (default: %(default)s)'
  add('--reserve', type=float, default=_planner.RESERVE, help=text)
  add('--param-dtype', default='bfloat16')
  add('--dtype', help="of activations; by default the parameters'")
  add('--moment-dtype', help="by default float32; of optax's own, parameters'")
  add('--basis-dtype', help='float32, or bfloat16 with 8bit; int8, int4')
  text = 'queries whose scores are in memory at a time, 0 for all'
  add('--attention-chunk', type=int, default=512, help=text)
  add('--rounding', default='nearest', help=', '.join(_subproblem.ROUNDING))
  flag = lambda name, text: add(name, action='store_true', help=text)
  flag('--regenerate', 'random bases are drawn anew in every step')
  flag('--layerwise', 'each layer is updated as soon as it has its gradient')
  flag('--remat', 'layers are recomputed in the backward pass')
  add('--compare', default='', help='optimizers, separated by commas')
  add('--picture', default='', help='a file to draw the bars to')
  return parser


def _number(text: str) -> int | float:
  """Returns a rank."""
  try:
    return float(text) if '.' in text else int(text)
  except ValueError:
    raise ValueError(
      f'rank={text!r}: expected a whole number, or a share as 0.25.'
    ) from None


def _text(args: argparse.Namespace) -> str:
  """Returns the text that the program prints."""
  names = _planner.Settings._fields
  settings = {name: getattr(args, name) for name in names}
  settings['rank'] = _number(args.rank)
  methods = args.compare.split(',') if args.compare else [args.optimizer]
  plans = {}
  for name in methods:
    chosen = _known(name, settings) if args.compare else settings
    plans[name] = _planner.plan(args.model, name, **chosen)
  card = _report.Card(args.card, args.reserve) if args.card else None
  used = _planner.checked(settings)
  title = _report.title(args.model, used)
  if args.picture:
    _report.picture(plans, args.picture, card, title)
  shown = _report.table(plans, card) if args.compare else plans[methods[0]]
  first = title if args.compare else f'{args.optimizer} on {title}'
  lines = [first, _report.assumed(used), '', str(shown)]
  if card:
    lines.append(card.usable())
  if card and not args.compare:
    lines += _verdict(args, plans[methods[0]], card, settings)
  return '\n'.join(lines)


def _known(method: str, settings: dict[str, Any]) -> dict[str, Any]:
  """Returns the settings, with `regenerate` only if the method supports it."""
  random = _methods.named(method).random
  return settings | {'regenerate': settings['regenerate'] and random}


def _verdict(
  args: Any, found: _planner.Plan, card: _report.Card, settings: dict[str, Any]
) -> list[str]:
  """Returns whether the plan fits, and the largest rank and batch that do."""
  most = largest(
    args.model, args.optimizer, args.card, args.reserve, **settings
  )
  lines = [card.sentence(found)]
  if most.rank is not None:
    lines.append(f'largest rank at batch {args.batch}: {most.rank or "none"}')
  lines.append(f'largest batch at rank {args.rank}: {most.batch or "none"}')
  return lines


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the program with these flags; returns its exit status."""
  args = _flags().parse_args(argv)
  try:
    print(_text(args))
  except ValueError as error:
    print(error, file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())
