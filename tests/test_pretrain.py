"""The example trainer: what a run leaves, how it goes on, what it refuses."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import checkpoint
import flags
import interrupt
import labelled
import mesh
import pretrain
import recipes
import report
import run_folder
import settings
import small_llama
import trackers
import train_step

ROOT = pathlib.Path(__file__).parent.parent
WORDS = 'the cat sat on a mat and so did two dogs near one old log'.split()


@pytest.fixture(scope='module', autouse=True)
def few_programs():
  with small_llama.installed():
    yield


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """A folder of six small files."""
  folder = tmp_path_factory.mktemp('text')
  for i in range(6):
    words = np.random.default_rng(i).choice(WORDS, 400)
    (folder / f'{i}.txt').write_text(' '.join(words))
  return folder


@pytest.fixture(scope='module')
def tiny(text):
  """A configuration that trains in a second, once it is compiled."""
  return pretrain.Config(
    model='llama_test', data=(str(text),), rank=small_llama.RANK, batch=4,
    seq=16, steps=6, accumulation=2, update_proj_gap=2, log_every=2,
    eval_every=3, save_every=2, eval_batches=2, final_eval_batches=4,
  )  # fmt: skip


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
  """(configuration, summary) of a whole run."""
  out = tmp_path_factory.mktemp('runs') / 'finished'
  config = dataclasses.replace(tiny, out=str(out))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pretrain, 'draw', small_llama.DRAW)
    (summary,) = pretrain.main(config)
  return config, summary


def without_alike(names):
  """Of those in 8 bits only what we recommend: the others are built alike."""
  return [
    x for x in names if not x.endswith('8bit') or x in recipes.RECOMMENDED
  ]


def shapes(config):
  """(step, abstract state, abstract batch): a run without compiling it."""
  config = pretrain.for_optimizer(config, config.optimizer)
  run = pretrain.plan(config, 256, mesh.make())
  state = jax.eval_shape(run.init)
  batch = jax.ShapeDtypeStruct((2, 2, 17), jnp.int32)
  return train_step.make_step(run.loss, run.method), state, batch


# --- A whole run -------------------------------------------------------------


def test_a_run_leaves_its_files(finished):
  config, summary = finished
  out = pathlib.Path(config.out)
  saved = json.loads((out / 'config.json').read_text())
  assert saved['optimizer'] == config.optimizer and len(saved['sha256']) == 64
  assert json.loads((out / 'summary.json').read_text()) == summary
  assert (out / 'curves.png').read_bytes().startswith(b'\x89PNG')
  assert {p.name for p in (out / 'checkpoints').iterdir()} == {'4', '6'}


def test_metrics_are_finite_and_complete(finished):
  rows = report.read_rows(pathlib.Path(finished[0].out, 'metrics.jsonl'))
  training = [row for row in rows if 'loss' in row]
  assert [row['step'] for row in training] == [2, 4, 6]
  assert [row['step'] for row in rows if 'validation_loss' in row] == [3, 6]
  names = {'loss', 'lr', 'gradient_norm', 'tokens_per_second'}
  assert all(names <= row.keys() for row in training)
  assert all(np.isfinite(list(row.values())).all() for row in rows)


def test_energy_is_a_share(finished):
  rows = report.read_rows(pathlib.Path(finished[0].out, 'metrics.jsonl'))
  energy = [row['captured_energy'] for row in rows if 'loss' in row]
  assert all(0 < e < 1.1 for e in energy)


def test_summary(finished):
  _, summary = finished
  loss = summary['validation_loss']
  np.testing.assert_allclose(summary['validation_perplexity'], np.exp(loss))
  np.testing.assert_allclose(
    summary['validation_bits_per_byte'], loss / np.log(2)
  )
  assert 0 < summary['trigram_bits_per_byte'] < 8
  assert summary['memory']['adam'] >= 2 * summary['memory']['params']


def test_an_earlier_run_is_moved_not_overwritten(tmp_path):
  config = pretrain.Config(out=str(tmp_path / 'run'))
  for i in range(2):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'config.json').write_text(str(i))
    run_folder.make_room(config)
  assert not (tmp_path / 'run').exists()
  for i in range(2):
    assert (tmp_path / f'run.{i + 1}' / 'config.json').read_text() == str(i)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
  (tmp_path / 'thesis.tex').touch()
  with pytest.raises(ValueError, match='out=.* is a folder of something else'):
    run_folder.make_room(pretrain.Config(out=str(tmp_path)))


def test_compare_draws_every_optimizer(tiny, tmp_path, capsys, monkeypatch):
  """contrib_galore has empty arrays in its state and needs unstacked layers."""
  small_llama.install_in(monkeypatch, layers=1)
  pictures, close = [], report.plt.close
  monkeypatch.setattr(
    report.plt, 'close', lambda f: (pictures.append(f), close(f))
  )
  config = dataclasses.replace(
    tiny, compare='adamw, contrib_galore', out=str(tmp_path / 'c'), steps=2,
    tensorboard=True,
  )  # fmt: skip
  summaries = pretrain.main(config)
  assert [s['optimizer'] for s in summaries] == ['adamw', 'contrib_galore']
  said = capsys.readouterr().out
  assert 'the layers are not stacked in this run' in said
  assert (tmp_path / 'c' / 'curves.png').exists()
  assert list((tmp_path / 'c' / 'adamw' / 'tensorboard').iterdir())
  axes, _ = pictures[-1].axes
  assert axes.get_ylabel() == 'loss in nats per token'
  rows = report.read_rows(tmp_path / 'c' / 'adamw' / 'metrics.jsonl')
  drawn = [y for line in axes.lines for y in np.atleast_1d(line.get_ydata())]
  assert {row['loss'] for row in rows if 'loss' in row} <= set(drawn)
  bar = summaries[0]['trigram_bits_per_byte'] * np.log(2)
  assert any(np.allclose(y, bar) for y in drawn)
  memory = [s['memory']['adam'] for s in summaries]
  assert memory[0] == memory[1]


# --- Going on ----------------------------------------------------------------


def stop_at(monkeypatch, step, number):
  """Sends a signal to this process when the loop has done `step` steps."""
  advance = report.LiveLine.advance

  def advance_and_signal(self, done):
    advance(self, done)
    if done == step:
      signal.raise_signal(number)

  monkeypatch.setattr(report.LiveLine, 'advance', advance_and_signal)


@pytest.fixture(scope='module')
def stopped(finished, tmp_path_factory):
  """The same run, of which Ctrl-C left three steps."""
  out = tmp_path_factory.mktemp('runs') / 'stopped'
  config = dataclasses.replace(finished[0], out=str(out))
  with pytest.MonkeyPatch.context() as patch:
    said: list[str] = []
    patch.setattr(report, 'say', said.append)
    stop_at(patch, 3, signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
      pretrain.main(config)
  assert ended.value.code == 130
  assert 'saved after step 3 of 6' in said[-1]
  assert (out / 'checkpoints' / '3').exists()
  return out


@pytest.fixture
def going_on(tiny, stopped, tmp_path):
  """The configuration that goes on with a copy of it."""
  shutil.copytree(stopped, tmp_path / 'run')
  return dataclasses.replace(tiny, out=str(tmp_path / 'run'), resume=True)


def test_stopped_and_resumed_equals_uninterrupted(finished, going_on):
  (resumed,) = pretrain.main(going_on)
  assert resumed['params_sha256'] == finished[1]['params_sha256']
  assert resumed['validation_loss'] == finished[1]['validation_loss']


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_one_acts(number):
  before = signal.getsignal(number)
  with interrupt.Stop() as stop:
    assert stop.signal == 0 and signal.getsignal(number) != before
    signal.raise_signal(number)
    assert stop.signal == number and signal.getsignal(number) == before


def test_resume_after_the_end_changes_nothing(finished):
  config, summary = finished
  (again,) = pretrain.main(dataclasses.replace(config, resume=True))
  assert again['params_sha256'] == summary['params_sha256']


CHILD = """
import os, signal, sys
import checkpoint, pretrain, pytest, small_llama

small_llama.install()
small_llama.thin_in(pytest.MonkeyPatch())
step, save = int(sys.argv.pop(1)), checkpoint.save

def save_and_die(checkpointer, tx, state, done):
  save(checkpointer, tx, state, done)
  if done == step:
    os.kill(os.getpid(), signal.SIGKILL)

checkpoint.save = save_and_die
sys.exit(pretrain.cli())
"""


def killed_at(step, config, compiled_folder):
  """What a process says that kills itself while it writes a checkpoint."""
  command = [sys.executable, '-c', CHILD, str(step), '--resume']
  command += ['--data', *config.data]
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if type(value) in (int, str):
      command += [f'--{field.name.replace("_", "-")}', str(value)]
  paths = (ROOT, ROOT / 'examples', ROOT / 'tests')
  environment = {
    'PATH': '', 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': ':'.join(map(str, paths)),
    # To compile fast, and once for all of them.
    'XLA_FLAGS': os.environ['XLA_FLAGS'],
    'JAX_COMPILATION_CACHE_DIR': str(compiled_folder),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }  # fmt: skip
  child = subprocess.run(
    command, env=environment, text=True, check=False,
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
  )  # fmt: skip
  assert child.returncode == -signal.SIGKILL, child.stdout
  return child.stdout


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(
  finished, going_on, compiled_folder, capsys
):
  said = killed_at(6, going_on, compiled_folder)
  assert 'going on after step 3' in said
  (summary,) = pretrain.main(going_on)
  # What a run writes in the background is there before it writes more.
  assert 'going on after step 3' not in capsys.readouterr().out
  assert summary['params_sha256'] == finished[1]['params_sha256']
  rows = report.read_rows(pathlib.Path(going_on.out, 'metrics.jsonl'))
  assert [row['step'] for row in rows if 'loss' in row] == [2, 4, 6]


def test_an_unfinished_checkpoint_is_ignored(tmp_path):
  tx = optax.sgd(0.1, momentum=0.9)
  params = {'a': jnp.arange(3.0), 'empty': jnp.zeros((0, 0))}
  state = {'params': params, 'opt_state': tx.init(params)}
  with checkpoint.open_folder(tmp_path) as saved:
    assert checkpoint.restore(saved, tx, state).step == 0
    for step in (1, 2, 3):
      moved = {**state, 'params': {**params, 'a': params['a'] + step}}
      checkpoint.save(saved, tx, moved, step)
  (tmp_path / '4.orbax-checkpoint-tmp').mkdir()
  with checkpoint.open_folder(tmp_path) as saved:
    step, got, changes = checkpoint.restore(saved, tx, state)
  assert step == 3 and not changes
  assert got['params']['empty'].shape == (0, 0)
  np.testing.assert_array_equal(got['params']['a'], [3.0, 4.0, 5.0])


def test_half_a_line_of_metrics_is_dropped(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"st')
  with report.Metrics(pretrain.Config(out=str(tmp_path)), 1) as log:
    log.write({'step': 2, 'loss': 1.5})
  assert [row['loss'] for row in report.read_rows(path)] == [2.0, 1.5]


# --- Bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model': 'llama_1m'}, "model='llama_1m', but .* model='llama_test'"),
    ({'steps': 7}, 'steps=7, but .* steps=6'),
    ({'optimizer': 'galore'}, "optimizer='galore', but"),
    ({'lr': 0.5}, 'lr.*=0.5, but'),
    (
      {'lr_rest': 0.5, 'update_proj_gap': 9},
      'update_proj_gap=9.*, but .* has .*update_proj_gap=2.*; to go',
    ),
  ],
)
def test_a_checkpoint_of_another_config(finished, change, message):
  config = dataclasses.replace(finished[0], resume=True, **change)
  with pytest.raises(ValueError, match=message):
    pretrain.main(config)


def test_resume_at_another_rank(going_on, capsys):
  changed = dataclasses.replace(going_on, rank=10)
  (found,) = pretrain.main(changed)
  assert np.isfinite(found['validation_loss'])
  said = ' '.join(capsys.readouterr().out.split())
  assert 'going on after step 3' in said and 'rank 8 -> 10 of blocks' in said
  # The newest checkpoint is of rank 10 now, whoever asks.
  (again,) = pretrain.main(changed)
  assert again['params_sha256'] == found['params_sha256']


def saved_at(config, step):
  """The first state of a run, kept as that after some step."""
  run = pretrain.for_optimizer(config, config.optimizer)
  _, tx, state = pretrain.build(run, 256)
  folder = pathlib.Path(config.out, 'checkpoints')
  with checkpoint.open_folder(folder) as saved:
    checkpoint.save(saved, tx, state, step)
  return state


def test_resume_at_another_rank_of_what_has_none(tiny, tmp_path, capsys):
  config = dataclasses.replace(tiny, optimizer='adamw', out=str(tmp_path))
  state = saved_at(config, 6)
  (found,) = pretrain.main(dataclasses.replace(config, resume=True, rank=10))
  assert found['params_sha256'] == pretrain.digest(state['params'])
  said = ' '.join(capsys.readouterr().out.split())
  assert 'going on after step 6' in said and 'rank 8' not in said


@pytest.mark.parametrize('name', ['layerwise', 'compressed'])
def test_other_steps_at_another_rank(name, tiny, tmp_path, capsys):
  config = dataclasses.replace(
    tiny, optimizer='galore', accumulation=1, out=str(tmp_path), **{name: True}
  )
  saved_at(config, config.steps - 1)
  (found,) = pretrain.main(dataclasses.replace(config, resume=True, rank=10))
  said = ' '.join(capsys.readouterr().out.split())
  assert 'rank 8 -> 10 of blocks' in said
  assert np.isfinite(found['validation_loss'])


def test_subproblems_keep_their_rank(tiny, tmp_path):
  config = dataclasses.replace(tiny, optimizer='rso', out=str(tmp_path))
  saved_at(config, 2)
  changed = dataclasses.replace(config, resume=True, rank=10)
  with pytest.raises(ValueError, match="in out=.*='rso' and rank=10: .*rank=8"):
    pretrain.main(changed)


def test_a_checkpoint_of_another_text(finished, tmp_path):
  (tmp_path / 'other.txt').write_text('another text ' * 500)
  config = dataclasses.replace(finished[0], resume=True, data=(str(tmp_path),))
  with pytest.raises(ValueError, match='sha256=.*data=.* is another text'):
    pretrain.main(config)


@pytest.mark.parametrize(
  ('change', 'error'),
  [
    ({'model': 'gpt'}, ValueError),
    ({'optimizer': 'adamwx'}, ValueError),
    ({'rank': 0}, ValueError),
    ({'rank': 2.5}, TypeError),
    ({'steps': '10'}, TypeError),
    ({'batch': True}, TypeError),
    ({'data': 'folder'}, TypeError),
    ({'accumulation': 3}, ValueError),
    ({'clip': -1.0}, ValueError),
    ({'lr': float('nan')}, ValueError),
    ({'dtype': 'float8'}, ValueError),
    ({'wandb': 1}, TypeError),
    ({'schedule': 'linear'}, ValueError),
    ({'data': ('/nowhere',)}, ValueError),
    ({'seq': 10**6}, ValueError),
  ],
)
def test_bad_arguments_are_named_with_their_value(tiny, change, error):
  ((name, value),) = change.items()
  shown = repr(value).strip('()')
  with pytest.raises(error, match=f'{name}=.*{shown.strip(",")}'):
    pretrain.main(dataclasses.replace(tiny, **change))


def test_an_unknown_optimizer_to_compare(tiny):
  config = dataclasses.replace(tiny, compare='galore,sophia')
  with pytest.raises(ValueError, match="optimizer='sophia' is unknown"):
    pretrain.main(config)


# --- The flags ---------------------------------------------------------------


def parse(*argv):
  return flags.parse(pretrain.Config, '', settings.PRETRAINING, argv)


def test_no_flags_are_the_defaults():
  assert parse() == pretrain.Config()


def test_flags_of_each_kind():
  found = parse(
    '--data', 'a', 'b', '--rank', '3', '--lr=0.5', '--remat', '--log_every',
    '7', '--no-scan-layers', '--clip-by', 'layer',
  )  # fmt: skip
  assert found == pretrain.Config(
    data=('a', 'b'), rank=3, lr=0.5, remat=True, log_every=7,
    scan_layers=False, clip_by='layer',
  )  # fmt: skip


@pytest.mark.parametrize('name', settings.PRETRAINING)
def test_a_preset_sets_defaults_that_flags_override(name):
  wanted = settings.PRETRAINING[name]
  found = parse('--preset', name)
  settings.check(found)
  assert found == dataclasses.replace(pretrain.Config(), **wanted)
  assert wanted['dtype'] == 'bfloat16'
  other = parse('--dtype', 'float32', f'--preset={name}')
  assert other == dataclasses.replace(found, dtype='float32')


def test_compare_alone_is_what_we_recommend():
  names = settings.optimizers(parse('--compare'))
  assert names == list(recipes.RECOMMENDED)
  wanted = {'subspace_muon8bit', 'normuon8bit', 'normuon4bit', 'scale', 'adamw'}
  assert wanted <= set(names)
  assert settings.optimizers(parse('--compare', 'a,b')) == ['a', 'b']


def test_help_has_groups_choices_and_presets(capsys):
  with pytest.raises(SystemExit) as done:
    pretrain.cli(['--help'])
  text = capsys.readouterr().out
  assert done.value.code == 0
  for group in ('presets', 'model', 'optimizer', 'data', 'run', 'devices'):
    assert f'\n{group}:\n' in text
  words = text.replace('{', ' ').replace('}', ' ').replace(',', ' ').split()
  wanted = {*recipes.OPTIMIZERS, *pretrain.llama.NAMED, *settings.PRETRAINING}
  assert wanted <= set(words)
  for field in dataclasses.fields(pretrain.Config):
    assert f'--{field.name.replace("_", "-")} ' in text.replace(',', ' ')


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['--optimizer', 'adamwx'], ('--optimizer', "'adamwx'", "mean 'adamw'")),
    (['--model', 'gpt'], ('--model', "'gpt'", 'llama_60m')),
    (['--preset', 'phone'], ('--preset', "'phone'", 'one_card')),
    (['--preset', 'one-card'], ('--preset', "mean 'one_card'?", 'pod')),
    (['--ranks', '3'], ('--ranks',)),
    (['--rank', '2.5'], ('--rank', "'2.5'")),
    (['--compare', 'galore,adm'], ("optimizer='adm' is unknown", "mean 'adam")),
    (['--batch', '0'], ('batch=0: expected more than 0',)),
    (['--data', '/nowhere'], ("data='/nowhere'",)),
    (['--layerwise', '--optimizer', 'rso'], ('layerwise=True', 'rso')),
  ],
)
def test_errors_of_users_are_one_line(text, argv, words, capsys, tmp_path):
  base = ['--model', 'llama_test', '--data', str(text), '--out', str(tmp_path)]
  try:
    status = pretrain.cli([*base, *argv])
  except SystemExit as stopped:
    status = stopped.code
  error = capsys.readouterr().err
  assert status == 2 and error.count('\n') == 1
  assert all(word in error for word in words)


def test_errors_that_we_did_not_raise_have_a_traceback():
  bug = lambda c: jnp.zeros(2).reshape(3)
  with pytest.raises(TypeError, match='reshape'):
    flags.run(bug, pretrain.Config, '', {}, [])
  with pytest.raises(ValueError, match='invalid literal'):
    flags.run(lambda c: int('x'), pretrain.Config, '', {}, [])
  ours = lambda c: labelled.rows([[1]], np.array([1, 0]), 3)
  with pytest.raises(ValueError, match='broadcast'):
    flags.run(ours, pretrain.Config, '', {}, [])


# --- What a run shows and logs -----------------------------------------------


def test_the_live_line(capsys):
  line = report.LiveLine('adamw', 0, 10, 'nats/token')
  with line:
    assert line.compile(lambda: 'made') == 'made'
    line.show({'step': 5, 'validation_loss': 2.5})
    row = {'loss': 2.0, 'tokens_per_second': 1000.0, 'lr': 0.1}
    line.show({'step': 5, 'steps_per_second': 2.5} | row)
  said = capsys.readouterr().out.splitlines()
  assert said[0] == 'compiling' and said[1].startswith('compiled in ')
  assert said[2:] == [
    'step 5/10  validation 2.500  nats/token',
    'step 5/10  loss 2.000  validation 2.500  nats/token  1,000 tokens/s  '
    'lr 1.0e-01  left 2 s',
  ]


class Wandb(types.ModuleType):
  """What of the module wandb is called, noted."""

  def __init__(self):
    super().__init__('wandb')
    self.started, self.rows, self.ended = [], [], 0

  def init(self, **how):
    self.started.append(how)
    return types.SimpleNamespace(
      id=how['id'] or 'new', log=self._log, finish=self._finish
    )

  def _log(self, numbers, step):
    self.rows.append((step, numbers))

  def _finish(self):
    self.ended += 1


def test_weights_and_biases(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', fake := Wandb())
  config = pretrain.Config(out=str(tmp_path), wandb=True, rank=4)
  settings.check(config)
  for step in (1, 2):
    with report.Metrics(config, step) as log:
      log.write({'step': step, 'loss': 2.0})
  assert fake.rows == [(1, {'loss': 2.0}), (2, {'loss': 2.0})]
  assert [how['id'] for how in fake.started] == [None, 'new']
  assert fake.started[0]['config']['rank'] == 4 and fake.ended == 2
  assert fake.started[0]['project'] == 'subspace_optax'


def test_tensorboard_drops_what_came_behind_the_checkpoint(
  tmp_path, monkeypatch
):
  made = []
  writer = lambda folder, purge_step: made.append((folder, purge_step))
  fake = types.SimpleNamespace(SummaryWriter=writer)
  monkeypatch.setitem(sys.modules, 'tensorboardX', fake)
  trackers.make(pretrain.Config(out=str(tmp_path), tensorboard=True), 20)
  assert made == [(str(tmp_path / 'tensorboard'), 21)]


@pytest.mark.parametrize(
  ('name', 'module'), [('wandb', 'wandb'), ('tensorboard', 'tensorboardX')]
)
def test_trackers_that_are_not_installed(name, module, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, module, None)
  assert pretrain.cli([f'--{name}']) == 2
  assert f'{name}=True needs `pip install {module}`' in capsys.readouterr().err


# --- The step ----------------------------------------------------------------


# Each as it is with 8 bits or stacked layers.
ALIKE = (
  ('normuon', True),
  ('subspace_muon', True),
  ('online_subspace_descent', False),
)


@pytest.mark.parametrize(
  ('optimizer', 'scan_layers'),
  [
    pytest.param(*point, marks=pytest.mark.full if point in ALIKE else ())
    for point in [
      *((x, x != 'contrib_galore') for x in without_alike(recipes.OPTIMIZERS)),
      *((x, False) for x in ('galore', 'online_subspace_descent', 'muon')),
    ]
  ],
)
def test_every_optimizer_keeps_its_state_structure(
  tiny, optimizer, scan_layers, monkeypatch
):
  if not scan_layers:
    small_llama.install_in(monkeypatch, layers=1)
  config = dataclasses.replace(
    tiny, optimizer=optimizer, scan_layers=scan_layers
  )
  step, state, batch = shapes(config)
  after, metrics = jax.eval_shape(step, state, batch)
  kinds = lambda tree: jax.tree.map(
    lambda x: (x.shape, x.dtype, x.weak_type), tree
  )
  assert kinds(after) == kinds(state)
  assert metrics['loss'].dtype == jnp.float32


def test_galore_and_contrib_galore_project_the_same_matrices(tiny, monkeypatch):
  small_llama.install_in(monkeypatch, layers=1)

  def sizes(optimizer):
    config = dataclasses.replace(tiny, scan_layers=False, optimizer=optimizer)
    _, state, _ = shapes(config)
    return sorted(x.size for x in jax.tree.leaves(state) if x.size > 1)

  assert sizes('galore') == sizes('contrib_galore')


def test_accumulation_averages():
  loss = lambda w, x: jnp.mean((x @ w) ** 2)
  rng = np.random.default_rng(0)
  w, x = (rng.random(s, np.float32) for s in ((5,), (4, 3, 5)))
  mean = jax.jit(lambda x: train_step.mean_gradient(loss, w, x))
  whole, parts = mean(x.reshape(1, 12, 5)), mean(x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts
  )
