"""`benchmarks/pareto.py`: where searches go, and what is told apart."""

import dataclasses
import math

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import contenders
from benchmarks import corpora
from benchmarks import harness
from benchmarks import pareto
from benchmarks import pareto_report
from benchmarks import pareto_run
from benchmarks.claims import claim
from benchmarks.claims import tuned
import errors


def search(method, losses, size, lr=0.01, multiple=1.0):
  """Returns a search whose seeds are all at the best."""
  runs = [
    {
      'lr': lr,
      'decay': 0.003,
      'seed': i,
      'validation': x,
      'test': x,
      'curve': list(np.linspace(2 * (x or 1), x or 1, 11)),
      'processor': 'some',
    }
    for i, x in enumerate(losses)
  ]
  return {
    'method': method,
    'corpus': 'docstrings',
    'size': '0.1M',
    'multiple': multiple,
    'batch': 8,
    'seq': 128,
    'steps': 50,
    'best': {'lr': lr, 'decay': 0.003},
    'lacks': 0,
    'memory': {'optimizer_bytes': size},
    'runs': runs,
  }


ADAMW = search('adamw', [1.50, 1.52], 2**20)
SMALL = search('scale', [1.60], 2**16)
GOOD = search('muon', [1.40, 1.42, 1.44], 2**19)
WORSE = search('galore', [1.80, 1.81], 2**19)
ALL = [ADAMW, SMALL, GOOD, WORSE]


def row(point, validation):
  return point._asdict() | {'validation': validation}


def test_a_search_walks_to_its_best_and_around_it():
  args, start = pareto.Args(seeds=2), pareto.Point.near(0.01, 0.003)
  valley = lambda p: (math.log2(p.lr) + 5) ** 2 + math.log(p.decay / 0.003) ** 2
  rows = []
  while wanted := pareto.wanted(start, rows, args):
    rows.append(row(wanted[0], valley(wanted[0])))
    assert len(rows) <= args.most + args.seeds
  best = pareto.best(rows)
  assert (best.lr, best.decay) == (0.04, 0.003)
  tuned = {pareto.Point(x['lr'], x['decay']) for x in rows if x['seed'] == 0}
  assert set(pareto.neighbours(best)) <= tuned
  assert [x['seed'] for x in rows].count(1) == 1


def test_a_run_that_diverged_is_never_the_best():
  points = [pareto.Point.near(lr, 0.003) for lr in (0.01, 0.02)]
  rows = [row(points[0], 9.0), row(points[1], None)]
  assert pareto.best(rows) == points[0]


def test_a_search_starts_from_the_one_most_like_it(tmp_path):
  worker = pareto.Worker(
    pareto.Args(runs=str(tmp_path / 'runs'), out=str(tmp_path / 'none.json'))
  )
  job = pareto_run.Job('adamw', 'code', '0.1M', 4.0, 8, 128)
  assert worker.start(job) == pareto.Point.near(4e-3, pareto.FIRST_DECAY)
  for i, (corpus, size, multiple, lr) in enumerate(
    [('code', '0.1M', 1.0, 0.1), ('docstrings', '0.4M', 1.0, 0.2)]
  ):
    other = pareto_run.Job('adamw', corpus, size, multiple, 8, 128)
    sources = {'program': 'some', 'text': 'some'}
    fields = pareto.fields(other, sources, pareto.Point.near(lr, 0.001))
    path = worker.store.folder / f'{i}.json'
    harness.save_results(path, fields | {'validation': 1.0})
  assert worker.start(job) == pareto.Point(0.1, 0.001)
  varied = dataclasses.replace(job, method='adamw, warm-up 0.2')
  assert worker.start(varied) == pareto.Point(0.1, 0.001)


def test_a_run_of_another_text_is_another_run(tmp_path):
  store = pareto.Store(str(tmp_path))
  job = pareto_run.Job('adamw', 'code', '0.1M', 1.0, 8, 128)
  sources = {'program': 'one', 'text': 'one'}
  fields = pareto.fields(job, sources, pareto.Point.near(0.1, 0.001))
  harness.save_results(store.path(fields), fields)
  assert store.rows(job, sources) == [fields]
  for name in sources:
    other = sources | {name: 'other'}
    assert store.rows(job, other) == []
    assert not store.path(fields | other).exists()


def test_a_variation_is_compared_with_its_method_at_the_same_point_and_seed():
  changed = search('adamw, b2 0.95', [1.485], 2**20)
  diverged = search('adamw, b1 0.95', [None], 2**20)
  elsewhere = search('adamw, warm-up 0.2', [1.3], 2**20, lr=0.02)
  rows = pareto_report.variations([changed, diverged, elsewhere, *ALL])
  assert rows == [
    ['adamw, b1 0.95', 'diverged', 'diverged'],
    ['adamw, b2 0.95', '-1.00 %', '-1.00 %'],
  ]
  text = pareto_report.markdown(
    {'machine': MACHINE, 'searches': [changed, *ALL]}
  )
  assert text.count('| adamw, b2 0.95 | -1.00 % | -1.00 % |') == 1
  assert text.count('b2 0.95') == 1


def test_betas_of_adamw_are_those_of_its_name():
  def step(name):
    make = contenders.CONTENDERS[name].make
    params = {'kernel': jnp.ones((16, 32))}
    tx, rng = make(1.0, 0.0), np.random.default_rng(0)
    state, gradients = tx.init(params), rng.normal(size=(3, 16, 32))
    for gradient in gradients:
      gradient = {'kernel': jnp.float32(gradient)}
      updates, state = tx.update(gradient, state, params)
    return np.asarray(updates['kernel'])

  names = [x for x in contenders.CONTENDERS if ', b' in x and 'adamw' in x]
  names = [x for x in names if contenders.CONTENDERS[x].varies == 'adamw']
  assert len(names) == 4
  for name in names:
    betas = {'b1': 0.9, 'b2': contenders.B2}
    key, value = name.removeprefix('adamw, ').split()
    betas[key] = float(value)
    assert contenders.CONTENDERS[name].betas == (betas['b1'], betas['b2'])
    rng = np.random.default_rng(0)
    m = v = 0.0
    for gradient in rng.normal(size=(3, 16, 32)):
      m = betas['b1'] * m + (1 - betas['b1']) * gradient
      v = betas['b2'] * v + (1 - betas['b2']) * gradient**2
    m, v = m / (1 - betas['b1'] ** 3), v / (1 - betas['b2'] ** 3)
    np.testing.assert_allclose(
      step(name), -m / (np.sqrt(v) + 1e-8), rtol=1e-3, atol=1e-5
    )


class Small(nnx.Module):
  """A leaf of each kind that is trained: of all, one is projected."""

  def __init__(self, config, rngs):
    self.embed = nnx.Embed(config.vocab, config.width, rngs=rngs)
    self.up = nnx.Linear(config.width, config.width, use_bias=False, rngs=rngs)

  def __call__(self, tokens):
    return self.embed.attend(self.up(self.embed(tokens)))


# One of each way to make one; programs tell what betas alone change.
@pytest.mark.parametrize(
  'name',
  [
    'muon_8bit, b 0.9',
    'normuon_8bit, b2 0.99',
    'subspace_muon_8bit, b 0.98',
    'subspace_adamw_8bit, b1 0.8',
    'scale, b 0.95',
    'adamw, warm-up 0.2',
  ],
)
def test_a_variation_is_another_program(name, monkeypatch):
  monkeypatch.setattr(pareto_run.llama, 'Llama', Small)
  digest = lambda method: (
    pareto_run.Trainer(pareto_run.Job(method, 'code', '0.1M', 0.1, 1, 8)).digest
  )
  assert digest(name) != digest(contenders.CONTENDERS[name].varies)


def test_a_warm_up_is_a_share_of_the_steps():
  warmed = {k: x for k, x in contenders.CONTENDERS.items() if 'warm-up' in k}
  assert len(warmed) == 12
  for name, how in warmed.items():
    method, share = name.split(', warm-up ')
    assert (how.varies, how.warmup) == (method, float(share))
    rate = pareto_run.shape(1000, how.warmup)
    counts = np.array([0, 1000 * how.warmup / 2, 1000 * how.warmup, 999])
    found = np.array([rate(x) for x in counts])
    np.testing.assert_allclose(found[1:3], [0.5, 1.0], rtol=0.05)
    assert found[0] < 0.03 and found[3] < 0.01


def test_sigma_and_z():
  spread = pareto_report.spread_of(ALL)
  parts = [0.02**2 / 2, 2 * 0.02**2, 0.01**2 / 2]
  assert spread.free == 4
  np.testing.assert_allclose(spread.sigma, (sum(parts) / 4) ** 0.5)
  # Of the two seeds that both have.
  z = pareto_report.z_score(GOOD, ADAMW, spread)
  np.testing.assert_allclose(z, (1.41 - 1.51) / spread.sigma)
  assert pareto_report.change(GOOD, ADAMW) == '-6.62 %'
  assert pareto_report.spread_of([SMALL]) is None
  assert pareto_report.z_score(SMALL, ADAMW, None) is None
  none = pareto_report.Spread(0.0, 1)
  assert pareto_report.z_score(SMALL, ADAMW, none) is None


def test_sigma_takes_seeds_of_points_that_are_not_the_best_too():
  more = [{'lr': 9.0, 'decay': 0.0, 'test': x} for x in (2.0, 2.2, None)]
  again = {**SMALL, 'runs': [*SMALL['runs'], *more]}
  spread = pareto_report.spread_of([again])
  assert spread.free == 1
  np.testing.assert_allclose(spread.sigma, 0.2 / 2**0.5)


def test_the_front_is_what_nothing_smaller_beats():
  assert pareto_report.front(ALL) == [SMALL, GOOD]
  text = pareto_report.markdown({'machine': MACHINE, 'searches': ALL})
  assert 'from 0.062 MiB on `scale` (1.6000); from 0.500 MiB on `muon`' in text
  assert '| adamw |' in text and '| +0.00 % | - | 100 % | - | - |' in text


def test_a_rank_is_a_choice_and_a_form_was_only_tried():
  ready = pareto_report.is_ready_made
  assert ready('muon') and ready('subspace_muon_8bit, rank 0.5')
  assert ready('galore, short side')
  assert not ready('muon, b 0.9')
  assert not ready('subspace_muon, b 0.95, rank 0.5')


def test_tokens_of_adamw_are_interpolated_by_their_logarithm():
  longer = search('adamw', [1.31], 2**20, multiple=16.0)
  tokens = lambda x: pareto_report.tokens_of_adamw(x, [longer, ADAMW])
  # 1.42 is 9 / 20 of the way from 1.51 at 1 to 1.31 at 16.
  assert tokens(GOOD) == f'{16 ** (9 / 20):.2f} x'
  assert tokens(SMALL) == '< 1.00 x'
  assert tokens(search('muon', [1.2], 1, multiple=4.0)) == '> 4.00 x'
  assert tokens(search('muon', [1.2], 1, multiple=16.0)) == '-'
  worse = search('adamw', [1.60], 2**20, multiple=16.0)
  assert pareto_report.tokens_of_adamw(GOOD, [ADAMW, worse]) == '-'
  assert tokens(ADAMW) == pareto_report.tokens_of_adamw(GOOD, [ADAMW]) == '-'


def test_the_share_of_steps_to_adamws_last_loss():
  fast = search('muon', [1.2], 1)
  share = pareto_report.share_of_steps(fast, ADAMW)
  # Means of four chunks; that of AdamW's last four is 1.15 of its last.
  means = [2.4 - 0.12 * (i + 1.5) for i in range(8)]
  first = next(i for i, x in enumerate(means) if x <= 1.5 * 1.15)
  np.testing.assert_allclose(share, (first + 4) / 11)
  assert first < 7
  assert pareto_report.share_of_steps(WORSE, ADAMW) is None


MACHINE = {'cores': 2, 'jax': '0'}


def test_the_committed_page_is_of_the_committed_results():
  results = harness.load_results(harness.RESULTS / 'pareto.json')
  page = (harness.RESULTS / 'pareto.md').read_text()
  assert page == pareto_report.markdown(results)


def test_other_ranks_are_shown_on_the_front_and_on_all_corpora():
  rank = search('muon_8bit, rank 0.9', [1.41], 2**18)
  worse = search('muon_8bit, rank 0.5', [1.70], 2**17)
  shown = pareto_report.select_shown([*ALL, rank, worse])
  assert shown == [*ALL, rank]
  first, second = corpora.CORPORA
  place = {'size': '0.1M', 'multiple': 1}
  there = [x | place | {'corpus': first} for x in [*ALL, rank]]
  # Off the second corpus's front, and still a loss there.
  off = rank | {'runs': search('', [1.90], 1)['runs']}
  here = [x | place | {'corpus': second} for x in [*ALL, off]]
  text = pareto_report.summary({'searches': there + here})
  assert '| `muon_8bit, rank 0.9` | 1.410 | 1.900 | 0.25 | 25 % |' in text


def test_the_readme_holds_the_committed_results():
  results = harness.load_results(harness.RESULTS / 'pareto.json')
  page = (harness.ROOT / 'README.md').read_text()
  assert pareto_report.summary(results) in page


def test_what_has_no_decay_searches_none(tmp_path):
  worker = pareto.Worker(
    pareto.Args(runs=str(tmp_path / 'runs'), out=str(tmp_path / 'none.json'))
  )
  start = worker.start(pareto_run.Job('rso', 'code', '0.1M', 1.0, 8, 128))
  assert start.decay == 0
  around = pareto.neighbours(start)
  assert {p.lr for p in around} == {2 * start.lr, start.lr / 2}
  assert {p.decay for p in around} == {0.0}


def test_what_a_search_lacks_counts_neighbours_and_seeds():
  rows = [row(pareto.Point.near(0.01, 0.003), 1.0)]
  around, seeds = pareto.lacking(rows, 3)
  assert len(around) == 4 and [x.seed for x in seeds] == [1, 2]
  args = pareto.Args(most=1, seeds=3)
  assert pareto.wanted(pareto.best(rows), rows, args) == seeds


def test_a_claim_without_rows_says_what_to_run(tmp_path, monkeypatch):
  path = tmp_path / 'pareto.json'
  harness.save_results(path, {'searches': []})
  monkeypatch.setattr(claim, 'PARETO', path)
  with errors.raises(LookupError, 'rso', "'galore, short side'"):
    tuned.perplexities({'RSO': 'rso', 'GaLore': 'galore, short side'})
