"""The README's Python blocks run, in order, as one program."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / 'README.md'


def test_the_python_blocks_run(capsys):
  blocks = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
  assert len(blocks) >= 3
  exec('\n'.join(blocks), {})
  assert 'float32(256,32)' in capsys.readouterr().out


def test_the_commands_are_targets_of_the_makefile():
  commands = re.findall(r'^make (\S+)', README.read_text(), re.MULTILINE)
  makefile = (README.parent / 'Makefile').read_text()
  assert commands == ['train', 'test']
  for command in commands:
    assert f'\n{command}:' in makefile
