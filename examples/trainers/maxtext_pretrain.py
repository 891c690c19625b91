"""MaxText's own `train` with an optimizer of this library.

    pip install . maxtext
    JAX_NUM_CPU_DEVICES=4 python examples/trainers/maxtext_pretrain.py

`get_optimizer` stands in for the function of that name in
`maxtext/optimizers/optimizers.py`: paste its body there, before the first `if`,
to keep MaxText's command line. Arguments of this script go to MaxText.
"""

import json
import os
import pathlib
import sys
import tempfile

os.environ.setdefault('DECOUPLE_GCLOUD', 'TRUE')  # no Google Cloud for a test

import maxtext
from maxtext.optimizers import optimizers
from maxtext.trainers.pre_train import train
import optax

import subspace_optax as so

BASE = pathlib.Path(maxtext.__file__).parent / 'configs/base.yml'
SMALL = (
  'hardware=cpu skip_jax_distributed_system=true dataset_type=synthetic '
  'enable_goodput_recording=false dtype=float32 attention=dot_product '
  'base_emb_dim=64 base_mlp_dim=128 base_num_decoder_layers=2 head_dim=16 '
  'base_num_query_heads=4 base_num_kv_heads=4 vocab_size=256 '
  'max_target_length=32 per_device_batch_size=4 learning_rate=3e-3 '
  'ici_fsdp_parallelism=2 ici_tensor_parallelism=2 '
).split()


def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
  """What MaxText's function of this name returns from now on."""
  del model, mesh
  adam = optax.scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps)
  return so.subspace_muon(
    learning_rate_schedule,
    0.25,
    plain=adam,
    weight_decay=config.adam_weight_decay,
    mask=optimizers.get_adamw_mask(config),
  )


def run(folder, name, steps, *, save=True):
  """Trains up to `steps`, from the last checkpoint; returns losses by step."""
  metrics = folder / f'{name}.jsonl'
  train.main(
    [
      sys.argv[0],
      str(BASE),
      *SMALL,
      f'base_output_directory={folder}',
      f'run_name={name}',
      f'metrics_file={metrics}',
      f'steps={steps}',
      'learning_rate_schedule_steps=20',
      f'enable_checkpointing={str(save).lower()}',
      'checkpoint_period=10',
      'async_checkpointing=false',
      *sys.argv[1:],
    ]
  )
  lines = map(json.loads, metrics.read_text().splitlines())
  return {x['step']: x['learning/loss'] for x in lines if 'learning/loss' in x}


def main():
  """Trains by AdamW, in subspaces, and in subspaces with an interruption."""
  theirs = optimizers.get_optimizer
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    adamw = run(folder, 'adamw', 20, save=False)
    optimizers.get_optimizer = get_optimizer
    try:
      muon = run(folder, 'subspace_muon', 20, save=False)
      run(folder, 'resumed', 11)
      resumed = run(folder, 'resumed', 20)
    finally:
      optimizers.get_optimizer = theirs
  for title, losses in (('adamw', adamw), ('subspace_muon', muon)):
    print(f'{title:14s} loss {losses[0]:.3f} -> {losses[19]:.3f}')
  worst = max(abs(resumed[i] / muon[i] - 1) for i in range(11, 20))
  print(f'After a resume at step 11 losses differ by {worst:.1e} at most.')
  return adamw, muon, resumed


if __name__ == '__main__':
  main()
