"""Which folder imports which, by the contract in pyproject.toml."""

import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def lint(folder):
  """Returns what the linter says of the package in a folder."""
  program = 'from importlinter.cli import lint_imports_command; '
  return subprocess.run(
    [sys.executable, '-c', program + 'lint_imports_command()', '--no-cache'],
    cwd=folder,
    env=os.environ | {'PYTHONPATH': str(folder)},
    capture_output=True,
    text=True,
  )


UPWARD = {
  'projectors/_svd.py': 'from subspace_optax.steps import _stacks',
  '_matrix/_tree.py': 'from subspace_optax._chain import _spec',
  'state/_memory.py': 'import subspace_optax.plan',
  '_matrix/_axes.py': 'import subspace_optax.rso',
}


def test_folders_import_downwards(tmp_path):
  package = tmp_path / 'subspace_optax'
  shutil.copytree(ROOT / 'subspace_optax', package)
  shutil.copy(ROOT / 'pyproject.toml', tmp_path)
  result = lint(tmp_path)
  assert result.returncode == 0, result.stdout + result.stderr
  for file, line in UPWARD.items():
    with (package / file).open('a') as f:
      f.write(line + '\n')
  result = lint(tmp_path)
  assert result.returncode != 0
  for file, line in UPWARD.items():
    name = file.removesuffix('.py').replace('/', '.')
    target = line.split()[1]
    broken = f'subspace_optax.{name} -> {target}'
    assert broken in result.stdout, result.stdout


def test_a_file_without_a_layer_fails(tmp_path):
  package = tmp_path / 'subspace_optax'
  shutil.copytree(ROOT / 'subspace_optax', package)
  shutil.copy(ROOT / 'pyproject.toml', tmp_path)
  (package / '_astray.py').touch()
  result = lint(tmp_path)
  assert result.returncode != 0 and '_astray' in result.stdout


def test_every_folder_has_its_layer_and_there_are_at_most_seven():
  settings = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  (contract,) = settings['tool']['importlinter']['contracts']
  layers = [
    [name.strip().removeprefix('subspace_optax.') for name in layer.split(':')]
    for layer in contract['layers']
  ]
  folders = {
    path.parent.name for path in (ROOT / 'subspace_optax').glob('*/__init__.py')
  }
  assert len([layer for layer in layers if folders & set(layer)]) <= 7
  assert folders <= {name for layer in layers for name in layer}


@pytest.mark.parametrize('version', ['1.2.3', None])
def test_the_version_is_the_installed_one_or_the_fallback(version):
  program = f"""
from importlib import metadata
found = metadata.version
def version(name):
  if name != 'subspace-optax':
    return found(name)
  if {version!r} is None:
    raise metadata.PackageNotFoundError(name)
  return {version!r}
metadata.version = version
import subspace_optax
print(subspace_optax.__version__)
"""
  done = subprocess.run(
    [sys.executable, '-c', program],
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  pyproject = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  fallback = pyproject['tool']['hatch']['version']['fallback-version']
  assert done.stdout.strip() == (version or fallback)
