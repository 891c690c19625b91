"""Makes a site of pages that are also read in the repository.

The front page is the README. Pictures and tables of benchmarks come along as
pages and files of the site; what else lies outside of docs/ is named, and not
linked: the site need not know where the repository is.
"""

import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
_LINK = re.compile(r'(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)')


def on_files(files, config):
  """Adds the front page, and what benchmarks have written."""
  files.append(
    File.generated(config, 'index.md', abs_src_path=ROOT / 'README.md')
  )
  for path in sorted(RESULTS.iterdir()):
    if path.suffix in ('.png', '.md'):
      name = f'results/{path.name}'
      files.append(File.generated(config, name, abs_src_path=path))
  return files


def on_page_markdown(markdown, page, config, files):
  """Turns links of the repository into links of the site."""
  del config
  of_readme = page.file.src_uri == 'index.md'

  def link(match):
    kind, text, target = match.groups()
    path, _, anchor = target.partition('#')
    known = _in_site(path, of_readme)
    if known is None or files.get_file_from_path(known) is None:
      return text if not kind else match[0]
    up = '../' * page.file.src_uri.count('/')
    return f'{kind}[{text}]({up}{known}{"#" + anchor if anchor else ""})'

  return _LINK.sub(link, markdown)


def _in_site(path: str, of_readme: bool) -> str | None:
  """Returns where a path of the repository is in the site."""
  inside = path.removeprefix('docs/') if of_readme else path
  found = inside.removeprefix('../')
  if found.startswith('benchmarks/results/'):
    return found.removeprefix('benchmarks/')
  if found == 'README.md':
    return 'index.md'
  return inside if not inside.startswith('../') else None
