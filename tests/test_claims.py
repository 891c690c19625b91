"""`benchmarks/claims`: verdicts follow from numbers, and the page from JSON."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
pytest.importorskip('benchmarks', reason='a source distribution has none')

from benchmarks.claims import claim  # noqa: E402
from benchmarks.claims import galore_memory  # noqa: E402
from benchmarks.claims import golore_lemma  # noqa: E402
from benchmarks.claims import page  # noqa: E402


def example(measured=1.0, **fields):
  """Returns a claim with one check: that a number is 1 but for a tenth."""
  checks = (claim.near('number', measured, 1.0, 0.1),)
  texts = ('title', 'source', 'prediction', 'measurement')
  return claim.Claim(*texts, **{'checks': checks, 'name': 'name'} | fields)


@pytest.mark.parametrize(
  'measured, verdict',
  [
    (1.0, 'holds'),
    (1.1, 'holds'),
    (1.2, 'fails'),
    (0.5, 'fails'),
    (float('nan'), 'fails'),
    (float('inf'), 'fails'),
    (None, 'fails'),
  ],
)
def test_verdict_follows_from_the_number(measured, verdict):
  found = example(measured) if measured is not None else example()
  if measured is None:
    check = dataclasses.replace(found.checks[0], measured=None)
    found = dataclasses.replace(found, checks=(check,))
  assert found.verdict == verdict
  assert claim.from_dict(claim.to_dict(found)).verdict == verdict


def test_verdict_of_several_checks():
  good, bad = example().checks[0], example(2.0).checks[0]
  assert example(checks=(good, bad)).verdict == 'partly'
  assert example(checks=(bad, bad)).verdict == 'fails'
  assert example(checks=()).verdict == 'fails'


@pytest.mark.parametrize(
  'measured, verdict',
  [
    (0.90, 'holds'),
    (0.97, 'too close to call'),
    (1.03, 'too close to call'),
    (1.10, 'fails'),
  ],
)
def test_noise_may_leave_a_verdict_open(measured, verdict):
  check = claim.Check('number', measured, 0, 1, noise=0.02)
  assert example(checks=(check,)).verdict == verdict
  sure = claim.Check('other', 0.5, 0, 1)
  both = example(checks=(check, sure)).verdict
  assert both == ('partly' if verdict == 'fails' else verdict)
  assert claim.from_dict(claim.to_dict(example(checks=(check,)))).checks == (
    check,
  )


def test_the_error_of_a_ratio_of_means():
  over, under = [2.0, 2.2, 2.1], [1.0, 1.1]
  ratio, noise = claim.ratio_of_means(over, under)
  np.testing.assert_allclose(ratio, 2.1 / 1.05)
  errors = [
    np.std(x, ddof=1) / len(x) ** 0.5 / np.mean(x) for x in (over, under)
  ]
  np.testing.assert_allclose(noise, ratio * np.hypot(*errors))
  # A single seed is as far off as one of the other side.
  _, noise = claim.ratio_of_means([2.0], under)
  one = np.std(under, ddof=1) / np.array([2.0, 1.05 * 2**0.5])
  np.testing.assert_allclose(noise, 2 / 1.05 * np.hypot(*one))


def test_a_verdict_in_the_json_is_not_believed():
  fields = claim.to_dict(example(2.0)) | {'verdict': 'holds'}
  assert claim.from_dict(fields).verdict == 'fails'


def test_results_of_other_sources_are_not_used(tmp_path, monkeypatch):
  monkeypatch.setattr(claim, 'CACHE', tmp_path)
  path = tmp_path / 'golore_lemma.json'
  assert claim.load('golore_lemma') is None
  saved = claim.to_dict(example()) | {'digest': claim.digest('golore_lemma')}
  path.write_text(json.dumps(saved))
  assert claim.load('golore_lemma') == example()
  path.write_text(json.dumps(saved | {'digest': 'of older sources'}))
  assert claim.load('golore_lemma') is None


def test_a_script_end_to_end(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(claim, 'CACHE', tmp_path / 'runs')
  monkeypatch.setattr(golore_lemma, 'RANKS', (2,))
  found = claim.measure(golore_lemma)
  assert found.verdict == 'holds'
  assert claim.load('golore_lemma') == claim.from_dict(claim.to_dict(found))
  assert 'verdict      holds' in capsys.readouterr().out
  page.write([found], tmp_path)
  assert (tmp_path / 'evidence' / 'golore_lemma.png').stat().st_size > 1000
  text = (tmp_path / 'evidence.md').read_text()
  assert page.markdown(page.read(tmp_path / 'evidence.json')) == text
  wrong = dataclasses.replace(found.checks[0], measured=0.5)
  worse = dataclasses.replace(found, checks=(wrong,))
  assert '**fails**' in page.markdown([worse])
  assert '**fails**' not in text


@pytest.mark.parametrize(
  'name, rank',
  [
    ('llama_60m', 128),
    pytest.param('llama_7b', 1024, marks=pytest.mark.full),
  ],
)
def test_memory_is_the_formula(name, rank):
  row = galore_memory.measure(name, rank)
  matrices = 7 * galore_memory.llama.named(name).layers
  # Three numbers, a seed and a flag for every matrix, and a few counters.
  assert 0 < row['galore'] - row['formula'] <= 17 * matrices + 16
  assert row['adam'] == 2 * row['weights'] + 4


def test_the_committed_page_is_that_of_the_committed_results():
  text = (ROOT / 'docs' / 'evidence.md').read_text()
  assert page.markdown(page.read()) == text
