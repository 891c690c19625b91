"""Runs the tutorials, and makes a page and a notebook of each.

A tutorial is a script whose cells begin with `# %%`: Python runs it, editors
and Jupyter (with jupytext) open it as a notebook, and a diff of it reads well.
What its cells print is made here, at every build. One that fails ends it.
"""

import base64
import os
import pathlib

import jupytext
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
import nbclient
from nbclient.exceptions import CellExecutionError
import nbformat

TUTORIALS = pathlib.Path(__file__).resolve().parent / 'tutorials'
_SECONDS = 300  # of a cell, at most
# Programs are small, and most of the time is that of compiling them. Numbers
# must not depend on the machine's accelerator.
_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'XLA_FLAGS': '--xla_backend_optimization_level=0 '
  '--xla_llvm_disable_expensive_passes=true '
  '--xla_cpu_parallel_codegen_split_count=1',
}


def on_files(files, config):
  """Adds the page, the notebook and the pictures of every tutorial."""
  for path in sorted(TUTORIALS.glob('*.py')):
    notebook = _run(path)
    made = {
      f'{path.stem}.md': _page(path.stem, notebook),
      f'{path.stem}.ipynb': nbformat.writes(notebook),
      **_pictures(path.stem, notebook),
    }
    for name, content in made.items():
      uri = f'tutorials/{name}'
      files.append(File.generated(config, uri, content=content))
  return files


def _run(path):
  """Returns the notebook of a script, with what its cells print."""
  notebook = jupytext.read(path)
  where = {'metadata': {'path': str(TUTORIALS)}}
  client = nbclient.NotebookClient(
    notebook,
    timeout=_SECONDS,
    kernel_name='python3',
    coalesce_streams=True,
    extra_arguments=['--log-level=ERROR'],
    resources=where,
  )
  try:
    return client.execute(env={**os.environ, **_ENVIRONMENT})
  except CellExecutionError as error:
    raise PluginError(f'{path}: a cell fails\n{error}') from None


def _page(name, notebook):
  """Returns the text of the page."""
  parts = [_cell(name, i, cell) for i, cell in enumerate(notebook.cells)]
  title, *rest = parts[0].split('\n\n', 1)
  link = f'[Download this page as a notebook]({name}.ipynb){{ download }}'
  return '\n\n'.join([title, link, *rest, *parts[1:]])


def _cell(name, i, cell):
  """Returns a cell as Markdown: its text, or code and what it prints."""
  if cell.cell_type == 'markdown':
    return cell.source
  blocks = [f'```python\n{cell.source}\n```']
  for j, output in enumerate(cell.outputs):
    if 'image/png' in output.get('data', {}):
      blocks.append(f'![What the cell draws]({name}-{i}-{j}.png)')
    elif text := output.get('text') or output.data['text/plain']:
      blocks.append(f'``` {{ .text .output }}\n{text.rstrip()}\n```')
  return '\n\n'.join(blocks)


def _pictures(name, notebook):
  """Returns the pictures of all cells by their names."""
  return {
    f'{name}-{i}-{j}.png': base64.b64decode(output.data['image/png'])
    for i, cell in enumerate(notebook.cells)
    for j, output in enumerate(cell.get('outputs', ()))
    if 'image/png' in output.get('data', {})
  }
