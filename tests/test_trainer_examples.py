"""The examples in other people's trainers, where those are installed.

nanodo is on no index, and of haliax only prereleases work, on jax before 0.11:
they are not in the extra `test`. The texts are compared without them.
"""

import importlib
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = ROOT / 'examples/trainers'
DOCS = (ROOT / 'docs/trainers.md').read_text()


def test_hook_is_that_of_the_docs():
  (block,) = re.findall(r'```python\n(.*?)```', DOCS, re.DOTALL)
  imports, hook = block.split('\n\n\n', 1)
  source = (EXAMPLES / 'haliax_stacked.py').read_text()
  assert hook in source
  assert all(line in source.splitlines() for line in imports.splitlines())


@pytest.mark.parametrize('name', ['nanodo_muon', 'haliax_stacked'])
def test_commands_are_those_of_the_docs(name):
  docstring = (EXAMPLES / f'{name}.py').read_text().split('"""')[1]
  commands = [x.strip() for x in docstring.splitlines() if x.startswith('    ')]
  assert commands[-1].endswith(f'python examples/trainers/{name}.py')
  assert '```sh\n' + '\n'.join(commands) + '\n```' in DOCS


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
