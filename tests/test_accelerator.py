"""`benchmarks/accelerator.py` on the CPU, with tiny sizes."""

import json
import time
import types

import numpy as np
import pytest

from benchmarks import accelerator
from benchmarks import accelerator_page
import small_llama
import subspace_optax as so


@pytest.mark.slow
def test_pieces_go_on_where_they_were(tmp_path, monkeypatch):
  small_llama.thin_in(monkeypatch)
  args = accelerator.Args(
    models=('llama_test',),
    names=('so.scale',),
    steps=2,
    large='llama_test',
    large_method='scale',
    large_rank=4,
    large_steps=2,
    seq=8,
    device='Some Device',
    out=str(tmp_path),
  )
  out, clock = accelerator.folder(args), accelerator.Clock(600)
  accelerator.steps(args, out, clock)
  accelerator.large(args, out, clock)
  saved = {x.name: x.read_text() for x in out.glob('*.json')}
  (row,) = json.loads(saved['step.json'])['rows']['llama_test'].values()
  assert row['over_adamw'] > 0 and row['state_bytes'] < row['adam_state_bytes']
  (row,) = json.loads(saved['large.json'])['rows'].values()
  assert len(row['losses']) == 2 and np.isfinite(row['losses']).all()
  # Again nothing is to be done, and nobody looks at the time.
  accelerator.steps(args, out, accelerator.Clock(-1))
  accelerator.large(args, out, accelerator.Clock(-1))
  assert saved == {x.name: x.read_text() for x in out.glob('*.json')}
  text = accelerator_page.page(out)
  assert '## Steps, llama_test' in text and '| so.scale |' in text


def test_pieces_have_processes_of_their_own_and_may_fail(monkeypatch, capsys):
  started = []

  def run(command, env, **options):
    if '-c' in command:
      return types.SimpleNamespace(stdout='Some Device\ngpu\n48e9\n')
    started.append((command, env))
    return types.SimpleNamespace(returncode=len(started) % 2)

  monkeypatch.setattr(accelerator.subprocess, 'run', run)
  accelerator.start_pieces(accelerator.Args(), ['python'])
  names = [command[command.index('--piece') + 1] for command, _ in started]
  assert names == list(accelerator.PIECES)
  assert all('cuda' in command for command, _ in started)
  environments = dict(zip(names, (env for _, env in started), strict=True))
  share = float(environments['large']['XLA_PYTHON_CLIENT_MEM_FRACTION'])
  np.testing.assert_allclose(share, 24e9 / (48e9 / 0.95), rtol=1e-2)
  assert environments['tests']['JAX_PLATFORMS'] == 'cpu'
  assert 'tests: failed with 1' in capsys.readouterr().out


def test_files_that_did_not_run_are_run_again(tmp_path, monkeypatch):
  args = accelerator.Args(tests=('a', 'b'), platform='cuda')
  codes = iter([2, 1, 0])

  def run(command, env, **options):
    assert env['SUBSPACE_OPTAX_TEST_PLATFORM'] == 'cuda'
    text = 'FAILED tests/test_b.py::x - y\n1 failed in 1 s\n'
    return types.SimpleNamespace(returncode=next(codes), stdout=text, stderr='')

  monkeypatch.setattr(accelerator.subprocess, 'run', run)
  files = lambda: json.loads((tmp_path / 'tests.json').read_text())['files']
  accelerator.tests(args, tmp_path, accelerator.Clock(60))
  assert files() == {
    'b': {'summary': '1 failed in 1 s', 'failed': ['FAILED tests/test_b.py::x']}
  }
  accelerator.tests(args, tmp_path, accelerator.Clock(60))
  assert set(files()) == {'a', 'b'} and next(codes, None) is None


def test_work_stops_when_there_is_no_time_for_as_much_again():
  clock = accelerator.Clock(0.2)
  clock.check()
  time.sleep(0.15)
  with pytest.raises(accelerator.Late):
    clock.check()


def test_every_ready_made_optimizer_is_timed():
  names = accelerator.optimizers(64)
  assert {f'so.{name}' for name in so.optimizers.READY_MADE} <= set(names)
