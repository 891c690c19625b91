"""From the command line to a configuration, and from errors to one line."""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
import sys
import traceback
import typing
from typing import Any, NoReturn

import recipes
import settings
import subspace_optax as so

Presets = Mapping[str, Mapping[str, Any]]


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one line."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f'{self.prog}: {message}\n')


def _one_of(allowed: Sequence[str]) -> Callable[[str], str]:
  """What takes a value that is one of these."""

  def check(value: str) -> str:
    if value not in allowed:
      near = settings.did_you_mean(value, allowed)
      raise argparse.ArgumentTypeError(
        f'{value!r} is unknown{near}; choose from {", ".join(allowed)}'
      )
    return value

  return check


def _number(kind: Any) -> type:
  """int of `int | None`, float likewise; str of all else."""
  inner = typing.get_args(kind) or (kind,)
  return next((x for x in (int, float) if x in inner), str)


def _add(group: Any, kind: type, field: dataclasses.Field):
  """Adds the flag of a field."""
  text = settings.about(kind, field.name)['text'].replace('%', '%%')
  if field.default not in (None, '', ()):
    text = f'{text} (default: %(default)s)'.strip()
  how: dict[str, Any] = {'help': text, 'default': field.default}
  if field.type is bool:
    how['action'] = argparse.BooleanOptionalAction
  elif allowed := settings.choices(kind, field):
    how |= {'type': _one_of(allowed), 'metavar': field.name.upper()}
    how['help'] = f'{text} {{{", ".join(allowed)}}}'.strip()
  elif typing.get_origin(field.type) is tuple:
    how |= {'nargs': '*', 'metavar': 'PATH'}
  elif field.name == 'compare':
    how |= {'nargs': '?', 'const': ','.join(recipes.RECOMMENDED)}
    how['metavar'] = 'NAMES'
  else:
    number = _number(field.type)
    how |= {'type': number, 'metavar': number.__name__.upper()}
  group.add_argument(f'--{field.name.replace("_", "-")}', **how)


def _flags(values: Mapping[str, Any]) -> str:
  """Values as they would be given."""
  show = lambda k, x: f'--{k}' if x is True else f'--{k} {x}'
  return ' '.join(show(k.replace('_', '-'), x) for k, x in values.items())


def parser(kind: type, doc: str, presets: Presets) -> argparse.ArgumentParser:
  """The parser of a configuration, in groups."""
  made = _Parser(
    usage='%(prog)s [FLAGS]',
    description=doc.replace('%', '%%'),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  if presets:
    about = made.add_argument_group(
      'presets', 'set defaults, which other flags override'
    )
    lines = '; '.join(f'{name}: {_flags(x)}' for name, x in presets.items())
    names = tuple(presets)
    shown = f'{{{",".join(names)}}}'
    about.add_argument(
      '--preset', type=_one_of(names), metavar=shown, help=lines
    )
  groups = {}
  for field in dataclasses.fields(kind):
    name = settings.about(kind, field.name)['group']
    if not name:  # what another program's flags say
      continue
    groups[name] = groups.get(name) or made.add_argument_group(name)
    _add(groups[name], kind, field)
  return made


def _dashed(word: str) -> str:
  """--log-every of --log_every, the name that errors have."""
  name, equals, value = word.partition('=')
  is_flag = name.startswith('--')
  return name.replace('_', '-') + equals + value if is_flag else word


def parse(
  kind: type, doc: str, presets: Presets, argv: Sequence[str] | None = None
) -> Any:
  """The configuration that flags stand for."""
  argv = [*map(_dashed, sys.argv[1:] if argv is None else argv)]
  made = parser(kind, doc, presets)
  first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  first.add_argument('--preset', nargs='?')
  chosen, _ = first.parse_known_args(argv)
  made.set_defaults(**presets.get(chosen.preset, {}))
  values = vars(made.parse_args(argv))
  values.pop('preset', None)
  return kind(**values | {'data': tuple(values['data'])})


_OURS = (
  pathlib.Path(__file__).resolve().parent,
  pathlib.Path(so.__file__).resolve().parent,
)


def _is_of_users(error: Exception) -> bool:
  """Whether we raised it ourselves, in words for users.

  A builtin that raises has no frame: the last line is then no `raise`.
  """
  last = traceback.extract_tb(error.__traceback__)[-1]
  parents = pathlib.Path(last.filename).resolve().parents
  ours = any(x in parents for x in _OURS)
  raised = (last.line or '').startswith('raise')
  return isinstance(error, OSError) or (ours and raised)


def run(
  main: Callable,
  kind: type,
  doc: str,
  presets: Presets,
  argv: Sequence[str] | None = None,
) -> int:
  """Runs a program with these flags; returns its exit status.

  What users can mend is one line on stderr, and 2.
  """
  try:
    main(parse(kind, doc, presets, argv))
  except KeyboardInterrupt:
    return 130
  except (ValueError, OSError) as error:
    if not _is_of_users(error):
      raise
    print(' '.join(str(error).split()), file=sys.stderr)
    return 2
  return 0
