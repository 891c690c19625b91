"""Makes a site of pages that are also read in the repository.

The front page is the README. Pictures and tables of benchmarks come along as
pages and files of the site; what else lies outside of docs/ is named, and not
linked: the site need not know where the repository is.
"""

import pathlib
import posixpath
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
  folder = posixpath.dirname(_in_repository(page.file.src_uri))
  here = posixpath.dirname(page.file.src_uri)

  def link(match):
    kind, text, target = match.groups()
    path, _, anchor = target.partition('#')
    known = _in_site(posixpath.normpath(posixpath.join(folder, path)))
    if files.get_file_from_path(known) is None:
      return text if not kind else match[0]
    way = posixpath.relpath(known, here or '.')
    return f'{kind}[{text}]({way}{"#" + anchor if anchor else ""})'

  return _LINK.sub(link, markdown)


def _in_repository(uri: str) -> str:
  """Returns where a page of the site is in the repository."""
  if uri == 'index.md':
    return 'README.md'
  return f'benchmarks/{uri}' if uri.startswith('results/') else f'docs/{uri}'


def _in_site(path: str) -> str:
  """Returns where a path of the repository is in the site."""
  if path == 'README.md':
    return 'index.md'
  if path.startswith('docs/tutorials/'):  # a page is made of each script
    path = path.removesuffix('.py') + '.md' if path.endswith('.py') else path
  return path.removeprefix('docs/').removeprefix('benchmarks/')
