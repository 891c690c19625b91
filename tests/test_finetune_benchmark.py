"""`benchmarks/finetune.py`: where its searches go, and a whole run of it.

The checkpoint is the tiny one of `test_finetune_text`.
"""

import dataclasses
import json
import math

import numpy as np
import pytest

from benchmarks import finetune
from benchmarks import harness
from benchmarks import pareto
import finetune_text
from test_finetune_text import checkpoint  # noqa: F401, a fixture
from test_finetune_text import few_programs  # noqa: F401, a fixture
from test_finetune_text import pairs  # noqa: F401, a fixture


def row(point, chosen_by, **others):
  return point._asdict() | {'chosen_by': chosen_by} | others


def test_a_search_ends_between_two_worse_rates_and_then_takes_seeds():
  args, rows = finetune.Args(seeds=3), []
  while wanted := finetune.wanted(rows, args):
    rows.append(row(wanted[0], (math.log2(wanted[0].factor) - 3) ** 2))
  assert finetune.best(rows) == 8.0
  assert {4.0, 8.0, 16.0} <= {x['factor'] for x in rows}
  assert [x['seed'] for x in rows if x['factor'] == 8.0] == [0, 1, 2]
  assert len(rows) == 4 + 2


def test_a_search_that_is_long_enough_takes_what_it_has():
  args = finetune.Args(seeds=1, most=2)
  rows = [row(finetune.Point(x), loss) for x, loss in ((2, 1.0), (4, 0.5))]
  assert finetune.wanted(rows, args) == []


def test_a_run_that_diverged_is_never_the_best():
  rows = [row(finetune.Point(2.0), None), row(finetune.Point(4.0), 9.0)]
  assert finetune.best(rows) == 4.0


def test_means_are_of_the_best_rate_and_of_the_other_half():
  at = {'trained': 1, 'state_bytes': 2, 'step_bytes': 3, 'lr': 0.1}
  at |= {'lr_rest': 0.1, 'before': 3.0, 'method': 'lora'}
  rows = [
    row(finetune.Point(2.0), 1.0, loss=5.0, **at),
    row(finetune.Point(2.0, 1), 9.0, loss=7.0, **at),
    row(finetune.Point(4.0), 2.0, loss=0.0, **at),
  ]
  found = finetune.summary(rows, finetune.Args(seeds=2))
  assert (found['loss'], found['seeds'], found['factor']) == (6.0, 2, 2.0)
  np.testing.assert_allclose(found['std'], math.sqrt(2))
  assert found['lacks'] == 1  # half the rate
  few = finetune.Args(seeds=2, most=2)
  assert finetune.summary(rows, few)['lacks'] == 1  # nor is that forgotten


@pytest.fixture
def args(checkpoint, pairs, tmp_path):  # noqa: F811
  page = tmp_path / 'page.md'
  page.write_text('<!-- finetune begins -->\n<!-- finetune ends -->\n')
  return finetune.Args(
    methods=('lora', 'adamw'),
    steps=3,
    seq=136,
    rank=2,
    seeds=1,
    most=1,
    checkpoint=str(checkpoint),
    data=(str(pairs),),
    runs=str(tmp_path / 'runs'),
    out=str(tmp_path / 'finetune.json'),
    docs=str(page),
  )


def test_runs_once_and_goes_on_from_what_is_reported(args, tmp_path):
  finetune.main(args)
  results = json.loads((tmp_path / 'finetune.json').read_text())
  first, second = results['methods']
  assert first['loss'] <= second['loss'] < first['before']
  assert {first['method'], second['method']} == set(args.methods)
  lora = first if first['method'] == 'lora' else second
  rates = finetune_text.LEARNING_RATES['lora']
  assert (lora['lr'], lora['lr_rest']) == tuple(2 * x for x in rates)
  assert '| `lora` |' in (tmp_path / 'page.md').read_text()

  elsewhere = dataclasses.replace(args, runs=str(tmp_path / 'others'))
  task, store = finetune.Task(elsewhere), pareto.Store(elsewhere.runs)
  finetune.restore(task, store)
  assert finetune.following(task, store) is None
  one = dataclasses.replace(args, methods=('lora',))
  finetune.report(finetune.Task(one), store)  # the other one stays
  assert json.loads((tmp_path / 'finetune.json').read_text()) == results
  with pytest.raises(SystemExit, match='holds steps=3, not 4'):
    finetune.main(dataclasses.replace(one, steps=4))
  # Another program is another run.
  task.settings['lora']['program'] = 'changed'
  method, point, _ = finetune.following(task, store)
  assert (method, point) == ('lora', finetune.Point(finetune.FIRST))


def test_the_committed_page_is_of_the_committed_results():
  results = json.loads((harness.RESULTS / 'finetune.json').read_text())
  page = (harness.DOCS / 'finetune.md').read_text()
  assert finetune.table(results['methods']) in page
