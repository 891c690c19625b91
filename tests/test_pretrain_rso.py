"""The example trainer without whole gradients: RSO, and compressed GoLore."""

import dataclasses
import functools
import pathlib
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import data
import hf_checkpoint
import llama
import mesh
import pretrain
import report
import small_llama
import test_pretrain
import train_step


@pytest.fixture(scope='module', autouse=True)
def few_programs():
  with small_llama.installed():
    yield


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  """Six steps; subproblems end at steps 2, 4 and 6. Nothing is clipped."""
  folder = tmp_path_factory.mktemp('text')
  words = np.random.default_rng(0).choice(test_pretrain.WORDS, 2400)
  (folder / 'a.txt').write_text(' '.join(words))
  return pretrain.Config(
    model='llama_test', data=(str(folder),), rank=small_llama.RANK, batch=4,
    seq=16, steps=6, update_proj_gap=2, log_every=1, eval_every=6, save_every=6,
    clip=0.0, eval_batches=2, final_eval_batches=4, schedule='constant',
  )  # fmt: skip


def run(config, folder, **changes):
  """(summary, losses) of a run."""
  config = dataclasses.replace(config, out=str(folder), **changes)
  (summary,) = pretrain.main(config)
  rows = report.read_rows(pathlib.Path(folder, 'metrics.jsonl'))
  return summary, [row['loss'] for row in rows if 'loss' in row]


METHODS = {
  'rso': {'optimizer': 'rso'},
  'compressed': {'optimizer': 'golore', 'compressed': True},
}


@pytest.fixture(scope='module')
def whole_run(tiny, tmp_path_factory):
  """From a method to the (configuration, summary, losses) of its one run."""

  @functools.cache
  def once(name):
    out = tmp_path_factory.mktemp('runs') / name
    config = dataclasses.replace(tiny, **METHODS[name], out=str(out))
    return config, *run(config, out)

  return once


@pytest.fixture(params=METHODS)
def finished(request, whole_run):
  return whole_run(request.param)


def test_stopped_in_mid_subproblem_and_resumed_equals_uninterrupted(
  finished, tmp_path, monkeypatch
):
  config, summary, losses = finished
  with monkeypatch.context() as patch:
    test_pretrain.stop_at(patch, 3, signal.SIGINT)
    with pytest.raises(SystemExit):
      run(config, tmp_path / 'run')
  resumed, again = run(config, tmp_path / 'run', resume=True)
  assert resumed['params_sha256'] == summary['params_sha256']
  assert resumed['validation_loss'] == summary['validation_loss']
  assert again == losses and losses[-1] < losses[0]


def test_exported_weights_are_those_that_were_evaluated(
  tiny, tmp_path, monkeypatch
):
  # In mid subproblem; compressed steps have no weights but plain ones.
  monkeypatch.setattr(llama, 'Block', small_llama.BLOCK)
  config = dataclasses.replace(tiny, optimizer='rso', export=True)
  summary, _ = run(config, tmp_path, steps=3)
  c, params = hf_checkpoint.load(tmp_path / 'weights')
  corpus = data.load(config.data, 0)
  windows = data.validation_batches(corpus.validation, 4, 16, 4)
  create = lambda: llama.Llama(c, pretrain.nnx.Rngs(0))
  graphdef, _ = pretrain.nnx.split(pretrain.nnx.eval_shape(create))
  loss = jax.jit(train_step.make_loss(graphdef))
  found = np.mean([loss(params, jnp.asarray(x)) for x in windows])
  np.testing.assert_allclose(found, summary['validation_loss'], rtol=1e-5)


def test_merged_in_mid_subproblem_is_the_same_model(tiny):
  config = dataclasses.replace(tiny, optimizer='rso')
  config = pretrain.for_optimizer(config, 'rso')
  program = pretrain.plan(config, 256, mesh.make())
  state = program.init()
  rng = np.random.default_rng(0)
  noise = lambda b: jnp.asarray(0.1 * rng.standard_normal(b.shape), b.dtype)
  own = state['opt_state']
  coords = jax.tree.map(noise, own.coords)
  state['opt_state'] = own._replace(coords=coords)
  batch, how = rng.integers(0, 256, (4, 17)), program.method
  models = lambda s: (how.model(**s), how.merged(**s), s['params'])
  losses = jax.jit(lambda s: [program.loss(x, batch) for x in models(s)])
  unmerged, merged, without = losses(state)
  np.testing.assert_allclose(unmerged, merged, rtol=1e-5)
  assert abs(merged - without) > 1e-3


def test_compressed_golore_is_golore(tiny, whole_run, tmp_path):
  # GoLore@50%: gradients choose the bases first, with whole ones at refreshes.
  _, losses = run(tiny, tmp_path, optimizer='golore')
  np.testing.assert_allclose(whole_run('compressed')[2], losses, rtol=1e-5)


def test_on_a_mesh_the_losses_are_the_same(tiny, whole_run, tmp_path):
  # Compressed steps: tests/test_compressed.py. Their recipe's SVDs are others
  # on a mesh, randomized ones.
  changes = {'optimizer': 'rso', 'steps': 4, 'mesh': 'data=2,fsdp=2'}
  _, found = run(tiny, tmp_path, **changes)
  np.testing.assert_allclose(found, whole_run('rso')[2][:4], rtol=1e-4)


def _reduced(config):
  """Shapes of all arrays that data parallelism sums over the devices."""
  devices = mesh.make('data=4')
  with jax.set_mesh(devices):
    config = pretrain.for_optimizer(config, config.optimizer)
    program = pretrain.plan(config, 256, devices)
    batch = mesh.batch(
      devices, (1, 4, 17), 1, np.zeros((1, 4, 17), 'int32').__getitem__
    )
    text = pretrain.compiled(program, devices, batch).as_text()
  types = re.findall(r'= (.*?) all-reduce(?:-start)?\(', text)
  return {s for t in types for s in re.findall(r'\w\d+\[([\d,]*)\]', t)}


@pytest.mark.parametrize(
  'name',
  # What the library compresses: tests/test_compressed.py.
  ['rso', 'whole', pytest.param('compressed', marks=pytest.mark.full)],
)
def test_all_reduces_carry_coordinates_only(tiny, name):
  changes = METHODS.get(name, {'optimizer': 'adamw'})
  config = dataclasses.replace(tiny, **changes, steps=1)
  # Every projected kernel of the model, alone and stacked.
  kernels = {'16,16', '2,16,16'}
  assert bool(kernels & _reduced(config)) == (name == 'whole')


def test_what_cannot_be_compressed(tiny, tmp_path):
  for name, message in (
    ('rso', 'compressed=True.*rso'),
    ('fira_adamw', 'residual rule looks at every gradient'),
  ):
    config = dataclasses.replace(tiny, optimizer=name, compressed=True)
    with pytest.raises(ValueError, match=message):
      step, state, _ = test_pretrain.shapes(config)
      jax.eval_shape(step, state, jax.ShapeDtypeStruct((1, 4, 17), jnp.int32))
  with pytest.raises(ValueError, match='weight_decay=0.1: rso has none'):
    run(tiny, tmp_path / 'decay', optimizer='rso', weight_decay=0.1)
