"""The examples in other people's trainers, where those are installed.

Only equinox is in the extra `test`: nanodo is on no index, of haliax and
Levanter only prereleases work, on jax before 0.11, and MaxText, Tunix and Keras
bring hundreds of megabytes. The texts are compared without them.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / 'examples/trainers'
DOCS = (ROOT / 'docs/trainers.md').read_text()


def test_hook_is_that_of_the_docs():
  block, _ = re.findall(r'```python\n(.*?)```', DOCS, re.DOTALL)
  imports, hook = block.split('\n\n\n', 1)
  source = (EXAMPLES / 'haliax_stacked.py').read_text()
  assert hook in source
  assert all(line in source.splitlines() for line in imports.splitlines())


@pytest.mark.parametrize('name', [path.stem for path in EXAMPLES.glob('*.py')])
def test_commands_are_those_of_the_docs(name):
  docstring = (EXAMPLES / f'{name}.py').read_text().split('"""')[1]
  commands = [x.strip() for x in docstring.splitlines() if x.startswith('    ')]
  assert commands[-1].endswith(f'python examples/trainers/{name}.py')
  assert '```sh\n' + '\n'.join(commands) + '\n```' in DOCS


def test_lines_for_maxtext_are_those_of_the_example():
  _, block = re.findall(r'```python\n(.*?)```', DOCS, re.DOTALL)
  source = (EXAMPLES / 'maxtext_pretrain.py').read_text()
  assert block in source.replace('optimizers.get_adamw', 'get_adamw')


def check_losses(text, alike):
  """`alike`: whether both print the first loss, not the first epoch's mean."""
  adam, muon = re.findall(r'loss (\S+) -> ([\d.]+)', text)
  assert adam[0] == muon[0] or not alike
  assert float(adam[1]) < 0.6 * float(adam[0])
  assert float(muon[1]) < 1.05 * float(adam[1])


@pytest.mark.slow
@pytest.mark.parametrize(
  'package, example',
  [
    ('keras', 'keras_fit'),
    ('levanter', 'levanter_lm'),
    ('maxtext', 'maxtext_pretrain'),
    ('tunix', 'tunix_sft'),
  ],
)
def test_example_prints_falling_losses(package, example):
  if importlib.util.find_spec(package) is None:
    pytest.skip(f'{package} is not installed')
  found = subprocess.run(
    [sys.executable, EXAMPLES / f'{example}.py'],
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': '4'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert found.returncode == 0, found.stderr
  check_losses(found.stdout, alike=package != 'keras')


@pytest.mark.slow
def test_equinox_prints_falling_losses(capsys):
  # In this process: it asks for no devices and no backend of its own.
  pytest.importorskip('equinox')
  importlib.import_module('trainers.equinox_fit').main()
  check_losses(capsys.readouterr().out, alike=False)


@pytest.mark.slow
def test_nanodo_goes_on_to_the_bit(capsys):
  pytest.importorskip('nanodo', reason='nanodo is on no index')
  importlib.import_module('trainers.nanodo_muon').main()
  adamw, muon, restored = capsys.readouterr().out.splitlines()
  first, last, own, share = _numbers(muon)
  assert last < _numbers(adamw)[1] < 0.6 * first
  assert own < 1.05 * share and own < 0.5 * _numbers(adamw)[2]
  assert restored.endswith('the same to the bit.')


@pytest.mark.slow
@pytest.mark.skipif(
  jax.__version_info__ >= (0, 11), reason='haliax asks for an older jax'
)
# Of haliax's calls to jax.
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_haliax_shards_the_state():
  pytest.importorskip('haliax', reason='only prereleases of haliax work')
  results = importlib.import_module('trainers.haliax_stacked').main()
  of_adam = results['adamw'][1]
  for losses, own, total in results.values():
    assert losses[-1] < 0.05 * losses[0]
    assert own <= 1.02 * total / 4
    assert own <= of_adam


def _numbers(line):
  return [float(x) for x in re.findall(r'\d+\.\d+', line)]
