"""`benchmarks/accelerator.py` on the CPU, with tiny sizes."""

import json
import pathlib
import time

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytest.importorskip('benchmarks', reason='a source distribution has none')

from benchmarks import accelerator  # noqa: E402
import subspace_optax as so  # noqa: E402


@pytest.mark.slow
def test_pieces_go_on_where_they_were(tmp_path):
  args = accelerator.Args(
    models=('llama_test',),
    names=('so.scale',),
    steps=2,
    large='llama_test',
    large_method='golore8bit',
    large_rank=4,
    large_steps=2,
    seq=8,
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
  text = accelerator.page(out)
  assert '## Steps, llama_test' in text and '| so.scale |' in text


def test_work_stops_when_there_is_no_time_for_as_much_again():
  clock = accelerator.Clock(0.2)
  clock.check()
  time.sleep(0.15)
  with pytest.raises(accelerator.Late):
    clock.check()


def test_every_ready_made_optimizer_is_timed():
  names = accelerator.optimizers(64)
  assert {f'so.{name}' for name in so.optimizers.READY_MADE} <= set(names)
