"""The flags of `pretrain.py`, and what they may be."""

import dataclasses
import math
import pathlib
import typing
from typing import Any, Literal

import llama
import recipes

Dtype = Literal['float32', 'bfloat16']
Schedule = Literal['cosine', 'constant']
ClipBy = Literal['layer', 'previous', 'two_pass']
Rounding = Literal['nearest', 'stochastic', 'compensated']


@dataclasses.dataclass(frozen=True)
class Config:
  """Trains a LLaMA on text."""

  model: str = 'llama_1m'  # a name of llama.NAMED: llama_1m, ..., llama_70b
  optimizer: str = 'online_subspace_descent'  # a name of recipes.OPTIMIZERS
  compare: str = ''  # several optimizers, separated by commas: one run for each
  rank: int = 32  # of the subspaces
  update_proj_gap: int = 100  # steps between refreshes of a basis
  lr: float | None = None  # peak, of the matrices; None: recipes.LEARNING_RATES
  lr_rest: float | None = None  # of embedding, head, norms; None: like lr
  schedule: Schedule = 'cosine'  # both rates; cosine after a warm-up
  weight_decay: float = 0.0
  clip: float = 1.0  # global norm of the gradients; 0: no clipping
  data: tuple[str, ...] = ()  # text files, folders, one .bin, or c4:COUNT
  vocab: int = 0  # 0: bytes; else of a BPE trained here, or of the .bin
  batch: int = 16  # sequences a step
  accumulation: int = 1  # microbatches that a batch is cut into
  seq: int = 64  # tokens in a sequence
  steps: int = 400
  dtype: Dtype = 'float32'  # of activations and matrix products
  param_dtype: Dtype = 'float32'
  eight_bit: bool = False  # a byte for each of Adam's moments
  # Of bfloat16 parameters: 'stochastic' costs nothing, 'compensated' keeps two
  # bytes a parameter.
  rounding: Rounding = 'nearest'
  scan_layers: bool = True  # stacked kernels, which contrib_galore can't take
  remat: bool = False  # recompute the blocks in the backward pass
  seed: int = 0
  log_every: int = 10
  eval_every: int = 50
  eval_batches: int = 16  # batches of validation text on the way
  final_eval_batches: int = 256  # and at the end; fewer if there is less text
  save_every: int = 100
  out: str = ''  # folder of the run; runs/MODEL-OPTIMIZER by default
  resume: bool = False  # go on from the newest complete checkpoint in `out`
  tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
  """Trains a LLaMA on text, on one device or on many."""

  # No whole gradients, by so.rso.compressed_step; clips the norm of P^T G.
  compressed: bool = False
  # Update layer by layer in the backward pass, by so.layerwise; `clip` is then
  # of the norm that `clip_by` says: of each layer, of the whole gradient one
  # step before, or of the whole gradient by a second backward pass.
  layerwise: bool = False
  clip_by: ClipBy = 'previous'
  # Microbatches in the subspace: r-sized sums in place of whole gradients.
  accumulate_in_subspace: bool = False
  attention_chunk: int = 0  # queries at a time, whose scores are there; 0: all
  export: bool = False  # write the weights to `out`/weights, for Hugging Face
  mesh: str = ''  # as data=2,fsdp=2,tensor=2; fsdp=-1: the rest of the devices
  coordinator: str = ''  # host:port of process 0; auto: where jax finds it
  processes: int = 1  # of this run, if no launcher says so
  process: int = 0  # the number of this one


_POSITIVE = """rank update_proj_gap lr lr_rest batch accumulation seq steps
    log_every eval_every eval_batches final_eval_batches save_every""".split()
_NOT_NEGATIVE = 'vocab seed clip weight_decay attention_chunk'.split()


def check_type(field: dataclasses.Field, value: Any):
  origin = typing.get_origin(field.type)
  if origin is Literal:
    allowed = typing.get_args(field.type)
    if value not in allowed:
      raise ValueError(f'{field.name}={value!r}: expected one of {allowed}')
    return
  kind: Any = tuple if origin is tuple else field.type
  number = isinstance(value, int | float) and not isinstance(value, bool)
  fits = isinstance(value, kind) or (number and isinstance(1.0, kind))
  if not fits or (isinstance(value, bool) and kind is not bool):
    raise TypeError(f'{field.name}={value!r}: expected {kind}')


def check(c: Config):
  """Raises what is wrong with the arguments, by name and value."""
  for field in dataclasses.fields(c):
    check_type(field, getattr(c, field.name))
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
  llama.named(c.model)
  if getattr(c, 'layerwise', False):
    check_layerwise(c)
  for name in optimizers(c):
    recipes.check(name)


def check_layerwise(c: Any):
  """Raises for what layer-wise steps can't do."""
  why = {
    'scan_layers': (not c.scan_layers, 'they are taken over stacked layers'),
    'compressed': (c.compressed, 'they are for whole gradients'),
    'accumulation': (
      c.accumulation > 1 and not c.accumulate_in_subspace,
      'gradients are gone layer by layer; add --accumulate-in-subspace',
    ),
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
