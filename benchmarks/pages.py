"""Puts tables into pages, between `<!-- NAME begins -->` and `... ends -->`."""

import pathlib


def marks(name: str) -> tuple[str, str]:
  """The two lines that a table stands between."""
  return f'<!-- {name} begins -->', f'<!-- {name} ends -->'


def fill(path: pathlib.Path, tables: dict[str, str]) -> None:
  """Puts every table between its marks."""
  page = path.read_text()
  for name, text in tables.items():
    begin, end = marks(name)
    if begin not in page or end not in page:
      raise ValueError(f'{path} lacks the lines {begin} and {end}')
    before, rest = page.split(begin)
    page = f'{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}'
  path.write_text(page)
