"""`benchmarks/harness.py`: results that a later run goes on from, tables."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytest.importorskip('benchmarks', reason='a source distribution has none')

from benchmarks import harness  # noqa: E402


def test_a_later_run_goes_on_with_the_same_settings_only(tmp_path):
  path = tmp_path / 'new' / 'results.json'
  results = harness.load_results(path, settings={'rank': 4})
  harness.save_results(path, results | {'rows': [1]})
  assert harness.load_results(path, settings={'rank': 4})['rows'] == [1]
  with pytest.raises(ValueError, match='rank.*4.*8.*--out'):
    harness.load_results(path, settings={'rank': 8})
  assert list(path.parent.iterdir()) == [path]


def test_a_page_keeps_what_is_around_its_tables(tmp_path):
  page = tmp_path / 'page.md'
  page.write_text('a\n<!-- t begins -->\nold\n<!-- t ends -->\nb\n')
  columns = {'x': '{x:.1f}', 'MiB': harness.megabytes('size', 0)}
  text = harness.table_of([{'x': 1, 'size': 2**20}], columns)
  harness.fill_page(page, {'t': text})
  table = '| x | MiB |\n|---|---|\n| 1.0 | 1 |'
  around = 'a\n<!-- t begins -->\n\n{}\n\n<!-- t ends -->\nb\n'
  assert page.read_text() == around.format(table)
  with pytest.raises(ValueError, match='lacks the lines'):
    harness.fill_page(page, {'u': text})


def test_no_benchmark_edits_a_path():
  for path in (ROOT / 'benchmarks').rglob('*.py'):
    text = path.read_text()
    assert 'sys.path' not in text and 'PYTHONPATH' not in text, path
