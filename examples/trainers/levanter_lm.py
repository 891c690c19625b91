"""Levanter's `Trainer` with an optimizer of this library, named in its config.

    pip install . gitpython levanter==1.2.dev1644 haliax==1.4.dev453 'jax<0.11'
    JAX_NUM_CPU_DEVICES=4 python examples/trainers/levanter_lm.py

A YAML file of `levanter.main.train_lm` says the same once this module has been
imported: `optimizer: {type: subspace_muon, learning_rate: 3e-3, rank: 16}`.
"""

import dataclasses
import functools
import pathlib
import tempfile

import draccus
import haliax as hax
import jax
from levanter import checkpoint
from levanter import trainer as levanter_trainer
from levanter.checkpoint import CheckpointerConfig
from levanter.models import llama
from levanter.models import lm_model
from levanter.optim import OptimizerConfig
from levanter.tracker import NoopConfig

import subspace_optax as so


def wrap(box, array, names):
  sizes = zip(names, array.shape, strict=True)
  axes = [hax.Axis(k or f'axis_{i}', n) for i, (k, n) in enumerate(sizes)]
  return hax.NamedArray(array, tuple(axes))


so.register_box(hax.NamedArray, lambda box: [x.name for x in box.axes], wrap)


@OptimizerConfig.register_subclass('subspace_muon')
@dataclasses.dataclass(frozen=True)
class SubspaceMuonConfig(OptimizerConfig):
  """`so.subspace_muon`, with Levanter's schedules and masks."""

  rank: float = 0.25
  moment_bits: int = 32

  def build(self, num_train_steps):
    return so.subspace_muon(
      self.lr_scheduler(num_train_steps),
      # Levanter's kernels have their outputs first.
      spec=so.SubspaceSpec(self.rank, outputs_first=True),
      moment_bits=self.moment_bits,
      weight_decay=self.weight_decay,
      mask=self.build_weight_decay_mask(),
    )


VOCAB = hax.Axis('vocab', 256)
MODEL = llama.LlamaConfig(
  seq_len=32,
  hidden_dim=64,
  intermediate_dim=128,
  num_layers=2,
  num_heads=4,
  num_kv_heads=4,
  gradient_checkpointing=False,
)


def batches(size=16):
  """Bytes of this file, over and over."""
  text = pathlib.Path(__file__).read_bytes()
  position, batch = MODEL.Pos, hax.Axis('batch', size)
  example = functools.partial(hax.vmap(lm_model.LmExample.causal, batch))
  key = jax.random.key(0)
  tokens = jax.numpy.frombuffer(text, jax.numpy.uint8).astype('int32')
  while True:
    key, now = jax.random.split(key)
    first = jax.random.randint(now, (size, 1), 0, len(text) - position.size)
    window = first + jax.numpy.arange(position.size)
    yield example(hax.named(tokens[window], (batch, position)))


def loss_fn(model, example, *, key=None):
  # Levanter's own mean counts by a mask of numbers, which jax refuses by now.
  of_token = lm_model.compute_next_token_loss(
    model, example, key=key, reduction=None
  )
  return hax.mean(of_token).scalar(), {}


def train(optimizer, folder, steps=60):
  """Returns all losses, and the bytes of state of one device and of all."""
  config = levanter_trainer.TrainerConfig(
    id='example',
    num_train_steps=steps,
    train_batch_size=16,
    tracker=NoopConfig(),
    checkpointer=CheckpointerConfig(base_path=str(folder)),
    log_dir=folder,
    log_jaxprs=False,
    log_xla_hlo=False,
    require_accelerator=False,
  )
  losses = []
  tx = draccus.decode(OptimizerConfig, optimizer).build(steps)
  with levanter_trainer.Trainer(config, tx, loss_fn) as trainer:
    state = trainer.initial_state(
      jax.random.key(0),
      model_init=lambda: MODEL.build(VOCAB, key=jax.random.key(1)),
    )
    arrays = jax.tree.leaves(state.opt_state)
    own = sum(x.addressable_shards[0].data.nbytes for x in arrays)
    total = sum(x.nbytes for x in arrays)
    trainer.add_hook(lambda info: losses.append(float(info.loss)), every=1)
    state = trainer.train(state, batches()).state
    checkpoint.save_checkpoint(state.opt_state, steps, folder / 'saved')
    again = checkpoint.load_checkpoint(state.opt_state, folder / 'saved')
    same = jax.tree.map(
      lambda a, b: bool((a == b).all()), state.opt_state, again
    )
    assert all(jax.tree.leaves(same))
  return losses, own, total


def main():
  """Trains by Adam and by the registered optimizer."""
  results = {}
  for name in ('adam', 'subspace_muon'):
    with tempfile.TemporaryDirectory() as folder:
      choice = {'type': name, 'learning_rate': 3e-3, 'weight_decay': 0.1}
      losses, own, total = train(choice, pathlib.Path(folder))
    results[name] = losses, own, total
    print(
      f'{name:14s} loss {losses[0]:.3f} -> {losses[-1]:.3f}, '
      f'{own / 1e3:.1f} KB on a device, a quarter is {total / 4e3:.1f}'
    )
  return results


if __name__ == '__main__':
  main()
