"""The flags of the trainers, and what they may be."""

from collections.abc import Iterable, Mapping
import dataclasses
import difflib
import math
import pathlib
import typing
from typing import Any, Literal

import llama
import recipes
import trackers

Dtype = Literal['float32', 'bfloat16']
Schedule = Literal['cosine', 'constant']
ClipBy = Literal['layer', 'previous', 'two_pass']
Rounding = Literal['nearest', 'stochastic', 'compensated']


def option(
  group: str, default: Any, text: str = '', choices: Iterable[str] = ()
) -> Any:
  """A field with its default, and what `--help` says of it."""
  metadata = {'group': group, 'text': text, 'choices': tuple(choices)}
  return dataclasses.field(default=default, metadata=metadata)


def layerwise() -> Any:
  text = 'update layer by layer in the backward pass'
  return option('optimizer', False, text)


def clip_by() -> Any:
  text = (
    'the norm with --layerwise: of each layer, of all gradients one step '
    'before, or of all by a second backward pass'
  )
  return option('optimizer', 'previous', text)


@dataclasses.dataclass(frozen=True)
class Config:
  """Trains a LLaMA on text."""

  model: str = option('model', 'llama_1m', 'its sizes', llama.NAMED)
  vocab: int = option(
    'model', 0, '0: bytes; else of a BPE trained here, or of the .bin'
  )
  dtype: Dtype = option('model', 'float32', 'of activations and products')
  param_dtype: Dtype = option('model', 'float32', 'of the parameters')
  scan_layers: bool = option(
    'model', True, "stacked kernels, which contrib_galore can't take"
  )
  remat: bool = option('model', False, 'recompute blocks in the backward pass')

  optimizer: str = option(
    'optimizer', 'online_subspace_descent', '', recipes.OPTIMIZERS
  )
  compare: str = option(
    'optimizer',
    '',
    'optimizers separated by commas, one run for each; with no names those '
    f'that we recommend, beside adamw: {",".join(recipes.RECOMMENDED)}',
  )
  rank: int | None = option(
    'optimizer', None, "of the subspaces (default: a quarter of model's width)"
  )
  update_proj_gap: int = option('optimizer', 100, 'steps between new bases')
  lr: float | None = option(
    'optimizer', None, 'peak, of matrices (default: in recipes.py)'
  )
  lr_rest: float | None = option(
    'optimizer', None, 'of embedding, head and norms (default: like --lr)'
  )
  schedule: Schedule = option(
    'optimizer', 'cosine', 'of both rates; cosine after a warm-up'
  )
  weight_decay: float = option('optimizer', 0.0, 'decoupled')
  clip: float = option('optimizer', 1.0, 'global norm of gradients; 0: as is')
  rounding: Rounding = option(
    'optimizer',
    'nearest',
    "of bfloat16 parameters: 'stochastic' costs nothing, 'compensated' keeps "
    'two bytes a parameter',
  )

  data: tuple[str, ...] = option(
    'data', (), 'text files, folders, one .bin, or c4:COUNT (default: docs)'
  )
  batch: int = option('data', 16, 'sequences a step')
  accumulation: int = option('data', 1, 'microbatches that a batch is cut into')
  seq: int = option('data', 64, 'tokens in a sequence')

  steps: int = option('run', 400, 'of the optimizer')
  seed: int = option('run', 0, 'of parameters, batches and bases')
  out: str = option('run', '', 'folder (default: runs/MODEL-OPTIMIZER)')
  resume: bool = option('run', False, 'go on from the newest checkpoint in out')
  log_every: int = option('run', 10, 'steps between lines')
  eval_every: int = option('run', 50, 'steps between validations')
  eval_batches: int = option('run', 16, 'of validation text on the way')
  final_eval_batches: int = option('run', 256, 'and at the end, at most')
  save_every: int = option('run', 100, 'steps between checkpoints')
  tensorboard: bool = option('run', False, 'log to OUT/tensorboard, too')
  wandb: bool = option('run', False, 'log to Weights & Biases, too')


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
  """Trains a LLaMA on text, on one device or on many."""

  attention_chunk: int = option(
    'model', 0, 'queries whose scores are in memory at a time; 0: all'
  )
  compressed: bool = option(
    'optimizer', False, 'no whole gradients; clips the norm of coordinates'
  )
  layerwise: bool = layerwise()
  clip_by: ClipBy = clip_by()
  accumulate_in_subspace: bool = option(
    'optimizer', False, 'r-sized sums of microbatches, not whole gradients'
  )
  export: bool = option('run', False, 'write OUT/weights, for Hugging Face')
  mesh: str = option(
    'devices', '', 'as data=2,fsdp=2,tensor=2; fsdp=-1: all that are left'
  )
  coordinator: str = option(
    'devices', '', 'host:port of process 0; auto: where jax finds it'
  )
  processes: int = option('devices', 1, 'of this run, if no launcher says so')
  process: int = option('devices', 0, 'the number of this one')


_BFLOAT16 = {
  'dtype': 'bfloat16',
  'param_dtype': 'bfloat16',
  'rounding': 'stochastic',
}
_ONE_CARD = {'optimizer': 'subspace_muon8bit', 'layerwise': True, **_BFLOAT16}
# The situations of docs/choose.md, by program.
PRETRAINING: Mapping[str, Mapping[str, Any]] = {
  'one_card': {**_ONE_CARD, 'attention_chunk': 512},
  'pod': {
    'optimizer': 'normuon8bit',
    'mesh': 'fsdp=-1',
    'dtype': 'bfloat16',
    'remat': True,
  },
  'bf16': _BFLOAT16,
}
FINE_TUNING: Mapping[str, Mapping[str, Any]] = {
  'one_card': _ONE_CARD,
  'adapter': {'optimizer': 'lora', 'rank': 16},
  'bf16': _BFLOAT16,
}


def about(kind: type, name: str) -> Mapping[str, Any]:
  """What the nearest class that describes an option says of it."""
  for base in filter(dataclasses.is_dataclass, kind.__mro__):
    for field in dataclasses.fields(base):
      if field.name == name and field.metadata:
        return field.metadata
  raise ValueError(f'{kind.__name__}.{name} is not made by `option`')


def choices(kind: type, field: dataclasses.Field) -> tuple[str, ...]:
  """What an option may be; empty if that is not a list."""
  if typing.get_origin(field.type) is Literal:
    return typing.get_args(field.type)
  return about(kind, field.name)['choices']


def did_you_mean(value: Any, allowed: Iterable[str]) -> str:
  """What an error adds for a value that is nearly one of these."""
  near = difflib.get_close_matches(str(value).lower(), allowed, 1)
  return f' (did you mean {near[0]!r}?)' if near else ''


_POSITIVE = """rank update_proj_gap lr lr_rest batch accumulation seq steps
    log_every eval_every eval_batches final_eval_batches save_every""".split()
_NOT_NEGATIVE = 'vocab seed clip weight_decay attention_chunk'.split()


def check_value(kind: type, field: dataclasses.Field, value: Any):
  if allowed := choices(kind, field):
    if value not in allowed:
      raise ValueError(
        f'{field.name}={value!r} is unknown{did_you_mean(value, allowed)}; '
        f'choose from {sorted(allowed)}'
      )
    return
  wanted: Any = field.type
  wanted = tuple if typing.get_origin(wanted) is tuple else wanted
  number = isinstance(value, int | float) and not isinstance(value, bool)
  fits = isinstance(value, wanted) or (number and isinstance(1.0, wanted))
  if not fits or (isinstance(value, bool) and wanted is not bool):
    raise TypeError(f'{field.name}={value!r}: expected {wanted}')


def check(c: Config):
  """Raises what is wrong with the arguments, by name and value."""
  for field in dataclasses.fields(c):
    check_value(type(c), field, getattr(c, field.name))
  for name in _POSITIVE + _NOT_NEGATIVE:
    value = getattr(c, name, None)
    if value is None or 0 < value < math.inf:
      continue
    if value != 0 or name in _POSITIVE:
      least = 'more than 0' if name in _POSITIVE else '0 or more'
      raise ValueError(f'{name}={value!r}: expected {least}, and finite')
  if c.batch % c.accumulation:
    raise ValueError(
      f'accumulation={c.accumulation} does not divide batch={c.batch}'
    )
  fields = {field.name: field for field in dataclasses.fields(c)}
  for name in optimizers(c):
    check_value(type(c), fields['optimizer'], name)
  if getattr(c, 'layerwise', False):
    check_layerwise(c)
  trackers.check(c)


def check_layerwise(c: Any):
  """Raises for what layer-wise steps can't do."""
  inside = getattr(c, 'accumulate_in_subspace', None)  # None: can't
  remedy = '' if inside is None else '; add --accumulate-in-subspace'
  why = {
    'scan_layers': (not c.scan_layers, 'they are taken over stacked layers'),
    'compressed': (
      getattr(c, 'compressed', False),
      'they are for whole gradients',
    ),
    'accumulation': (
      c.accumulation > 1 and not inside,
      f'gradients are gone layer by layer{remedy}',
    ),
    'optimizer': ('lora' in optimizers(c), 'factors stand in no layer'),
  }
  for name, (bad, reason) in why.items():
    if bad:
      raise ValueError(
        f'{name}={getattr(c, name)!r} with layer-wise steps: {reason}'
      )


def optimizers(c: Config) -> list[str]:
  names = c.compare or c.optimizer
  return [name.strip() for name in names.split(',')]


def alone(c: Any, name: str) -> Any:
  """The configuration of one optimizer's run, among those to compare."""
  out = str(pathlib.Path(c.out, name)) if c.compare else c.out
  return dataclasses.replace(c, optimizer=name, out=out, compare='')
