"""The README's Python blocks run, and its table of costs is the registry's."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import cases
import subspace_optax as so

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


def _costs():
  """Returns the cells of the table of costs by what its rows are about."""
  text = README.read_text().partition('## What it costs')[2]
  table = re.search(r'(^\|.*\|\n)+', text, re.MULTILINE)
  assert table
  rows = [re.findall(r'[^|]+', line) for line in table[0].splitlines()[2:]]
  return {name.strip(' `'): map(str.strip, rest) for name, *rest in rows}


def _evaluate(formula, **sizes):
  """Returns what a sum of products of letters, as `mr + 2nr`, amounts to."""
  terms = re.findall(r'(\d*)([mnr]+)', formula)
  return sum(int(k or 1) * math.prod(sizes[c] for c in x) for k, x in terms)


def test_every_ready_made_optimizer_has_a_row_of_costs():
  assert list(_costs()) == [*so.optimizers.READY_MADE, 'Adam']
  for name in so.optimizers.READY_MADE:
    assert f'`{name}`' in (so.__doc__ or '')


@pytest.mark.parametrize('name', so.optimizers.READY_MADE)
def test_the_state_is_what_the_row_says(name):
  params = {'w': jax.ShapeDtypeStruct((64, 160), jnp.float32)}
  tx = cases.ready_made(name, rank=8)(1e-3)
  sizes = [x.size for x in jax.tree.leaves(jax.eval_shape(tx.init, params))]
  _, state, _ = _costs()[name]
  formula, _, side = state.partition(',')
  m, n = (160, 64) if 'm the long side' in side else (64, 160)
  wanted = _evaluate(formula.partition(';')[0], m=m, n=n, r=8)
  assert sum(size for size in sizes if size > 1) == wanted
