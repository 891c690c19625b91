# SPDX-License-Identifier: Apache-2.0
"""Bytes of a training step on each device, before anything is run."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from subspace_optax._chain import _projection
from subspace_optax._chain import _spec
from subspace_optax._matrix import _tree
from subspace_optax.plan import _cut
from subspace_optax.plan import _flax
from subspace_optax.plan import _methods
from subspace_optax.plan import _models
from subspace_optax.plan import _nearest
from subspace_optax.plan import _step
from subspace_optax.state import _memory
from subspace_optax.steps import _layerwise
from subspace_optax.steps import _stacks
from subspace_optax.steps import _subproblem

_DTYPES = ('float32', 'bfloat16', 'float16')

# Bytes of cards that their makers call 24 GB and so on.
CARDS = {
  'rtx3090': 24e9,
  'rtx4090': 24e9,
  'rtx5090': 32e9,
  'a100-40': 40e9,
  'a100-80': 80e9,
  'h100': 80e9,
  'h200': 141e9,
  'v4': 32e9,
  'v5e': 16e9,
  'v5p': 95e9,
  'v6e': 32e9,
}

# The fraction of a card that a plan leaves to the runtime. On a GPU the
# driver's context, libraries and loaded programs take 0.5 to 1 GB, and the
# allocator loses some to fragmentation. A TPU keeps less for itself.
RESERVE = 0.05


class Plan(NamedTuple):
  """Bytes on each device at the peak of a training step.

  Attributes:
    weights: bytes of the parameters.
    gradients: bytes of the gradients that are in memory together.
    states: bytes of the optimizer's moments and counters, and of the errors
      that rounding keeps.
    bases: bytes of the bases, if they are stored.
    activations: bytes that the forward pass keeps for the backward pass.
    workspace: bytes of the largest temporaries besides all of these.
  """

  weights: int
  gradients: int
  states: int
  bases: int
  activations: int
  workspace: int

  @property
  def total(self) -> int:
    """The sum of the parts."""
    return sum(self)

  def fits(self, card: str | float, reserve: float = RESERVE) -> bool:
    """Whether a device holds the plan and the share left to the runtime.

    Args:
      card: name of the card, or its GB.
      reserve: fraction of the card that is left to the runtime.

    Raises:
      ValueError: an unknown card, or a share outside [0, 1).
    """
    return self.total <= usable_bytes(card, reserve)

  def __str__(self) -> str:
    rows = [*self._asdict().items(), ('total', self.total)]
    return '\n'.join(f'{name:<12}{size / 1e9:>10.3f} GB' for name, size in rows)


class Settings(NamedTuple):
  """Settings of a training step; see `plan`."""

  batch: int = 1
  seq: int = 2048
  mesh: Any = ''
  rank: Any = 0.25
  param_dtype: Any = 'bfloat16'
  dtype: Any = None
  moment_dtype: Any = None
  basis_dtype: Any = None
  regenerate: bool = False
  layerwise: bool = False
  remat: bool = False
  attention_chunk: int = 512
  rounding: str = 'nearest'


def card_bytes(card: str | float) -> float:
  """Returns the bytes of a card, given its name or its GB."""
  if isinstance(card, str) and card in CARDS:
    return CARDS[card]
  try:
    size = float(card)
  except ValueError:
    size = 0.0
  if not 0 < size < float('inf'):
    near = _nearest.did_you_mean(card, CARDS)
    raise ValueError(
      f'card={card!r} is unknown{near}; choose from {sorted(CARDS)}, or give a '
      'positive number of GB.'
    )
  return size * 1e9


def usable_bytes(card: str | float, reserve: float = RESERVE) -> float:
  """Returns the bytes of a card that the runtime does not need."""
  if not 0 <= reserve < 1:
    raise ValueError(
      f'reserve={reserve}: expected a share of the card, from 0 to below 1.'
    )
  return (1 - reserve) * card_bytes(card)


def plan(model: Any, method: Any, **settings: Any) -> Plan:
  """Counts the bytes that a training step takes on each device.

  It allocates and compiles nothing. docs/plan.md lists the assumptions:
  parameters and state are updated in place, layers are scanned, and the loss is
  the mean cross-entropy.

  Args:
    model: a name; 'package.module:callable' or the callable, which returns an
      nnx module, a linen module or a `Model`; or a `Model`.
    method: a name, an optax optimizer, or an object that makes its own step,
      such as `rso.subproblems`.
    **settings: batch (1), rows over all devices; seq (2048); mesh, such as
      'fsdp=4,tensor=2', with 'data' for copies; rank (0.25), an int or a
      fraction of each short side; param_dtype ('bfloat16'); dtype of the
      activations, None for that of the parameters; moment_dtype, None for each
      optimizer's default, float32 in ours and the parameters' in optax's;
      basis_dtype, None for float32 or, with moments of 8 bits, bfloat16, also
      'int8' and 'int4'; regenerate (False), whether random bases are not
      stored; layerwise (False), whether each layer is updated as soon as its
      gradient is known; remat (False), whether layers are recomputed;
      attention_chunk (512), queries whose scores are in memory at a time in
      named models, 0 for all; rounding of narrow weights ('nearest', also
      'compensated', 'stochastic').

  Returns:
    The bytes of each part; `print` shows them.

  Raises:
    ValueError: an unknown name or setting; a batch that the mesh does not cut
      evenly; `remat` or `layerwise` for a model in one piece.

  Example:
    >>> import subspace_optax.plan
    >>> plan = subspace_optax.plan.plan('llama_60m', 'golore', rank=128)
    >>> plan.weights == plan.gradients, plan.fits('rtx4090')
    (True, True)
  """
  s = checked(settings)
  made = resolved(model, s)
  return join(made, s, training(made, s), optimizer(made, method, s))


def resolved(model: Any, s: Settings) -> _models.Model:
  """Returns the model that a name, a path or a callable stands for."""
  return _flax.resolve(model, s.param_dtype, s.dtype, s.seq, s.attention_chunk)


def checked(settings: Mapping[str, Any]) -> Settings:
  """Returns valid settings, or raises an error that names the wrong one."""
  unknown = set(settings) - set(Settings._fields)
  if unknown:
    name = sorted(unknown)[0]
    near = _nearest.did_you_mean(name, Settings._fields)
    raise ValueError(
      f'{name}: no such setting{near}; choose from {Settings._fields}.'
    )
  s = Settings(**settings)
  for name in ('param_dtype', 'dtype', 'moment_dtype'):
    _check_dtype(name, getattr(s, name))
  if s.rounding not in _subproblem.ROUNDING:
    near = _nearest.did_you_mean(s.rounding, _subproblem.ROUNDING)
    raise ValueError(
      f'rounding={s.rounding!r} is unknown{near}; choose from '
      f'{_subproblem.ROUNDING}.'
    )
  if s.basis_dtype is not None:  # `SubspaceSpec` raises its own error
    _spec.SubspaceSpec(1, basis_dtype=s.basis_dtype)
  if s.attention_chunk < 0:
    raise ValueError(
      f'attention_chunk={s.attention_chunk}: expected a number of queries, or '
      '0 for all at a time.'
    )
  if s.seq < 1:
    raise ValueError(f'seq={s.seq}: expected a positive length.')
  return s._replace(mesh=_cut.sizes(s.mesh))


def _check_dtype(name: str, dtype: Any) -> None:
  try:
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
      raise TypeError
  except TypeError:
    near = _nearest.did_you_mean(dtype, _DTYPES)
    raise ValueError(
      f'{name}={dtype!r} is no float{near}; choose from {_DTYPES}.'
    ) from None


class Optimizer(NamedTuple):
  """Bytes on a device that depend on the optimizer."""

  gradients: Any  # tree of shapes, like the parameters
  states: int
  bases: int
  drawn: int  # bases that a step draws before its forward pass
  update: int  # held in addition during the update, gradients included
  turn: int = 0  # the same for one layer of a layer-wise step


def optimizer(model: _models.Model, method: Any, s: Settings) -> Optimizer:
  """Counts the bytes of an optimizer."""
  tx = method
  if isinstance(method, str):
    chosen = _methods.Settings(
      s.rank, s.moment_dtype, s.basis_dtype, s.regenerate
    )
    tx = _methods.make(method, chosen)
  params, on = _cut.placed(model.params, s.mesh)
  step = _step.given_gradients(tx)
  kept = _layerwise_step(model, tx, s) if s.layerwise else step
  state = _cut.state_of(kept, params, on)
  bases = _bases(state)
  states = _cut.local_bytes(state) - bases
  if s.rounding == 'compensated':
    states += _lost(params)
  share = _cut.local_bytes(params) / max(_memory.tree_bytes(params), 1)
  work = lambda tree: int(_step.update_workspace(step, tree) * share)
  if s.layerwise:
    return Optimizer(
      params, states, bases, 0, *_turns(model, params, state, work)
    )
  gradients = step.gradients(params, state)
  drawn = _cut.local_bytes(jax.eval_shape(step.bases, params, state))
  update = _cut.local_bytes(gradients) + work(params)
  return Optimizer(gradients, states, bases, drawn, update)


def _turns(
  model: _models.Model, params: Any, state: Any, work: Callable[[Any], int]
) -> tuple[int, int]:
  """Returns the bytes held by the update of the rest, and of one layer.

  One turn computes a layer's parameters and state; the next one writes them.
  """
  stack, rest = model.parts(params)
  layers = jax.tree.leaves(stack)[0].shape[0]
  rest_bytes = _cut.local_bytes(rest)
  old = _cut.local_bytes(stack) // layers
  new = _cut.local_bytes((stack, state.blocks)) // layers
  one = work({model.stack: _stacks.layer_shapes(stack)})
  return rest_bytes + work(rest), rest_bytes + old + new + one


def _layerwise_step(model: _models.Model, tx: Any, s: Settings) -> Any:
  """Returns the step that updates layer by layer."""
  if not isinstance(tx, optax.GradientTransformation):
    raise ValueError(
      'layerwise=True needs an optax optimizer; rso has a step of its own.'
    )
  _check_pieces(model, s)
  return _layerwise.layerwise(
    tx, model.embed, model.block, model.head, stack=model.stack
  )


def _bases(state: Any) -> int:
  """Returns the bytes of all stored bases in a state."""
  found = _tree.find(state, _projection.ProjectState)
  return sum(_cut.local_bytes(x.subspaces.basis) for _, x in found)


def _lost(params: Any) -> int:
  """Returns the bytes that compensated rounding keeps for narrow weights."""
  narrow = [x for x in jax.tree.leaves(params) if x.dtype.itemsize < 4]
  return _cut.local_bytes(narrow)


def _check_pieces(model: _models.Model, s: Settings) -> None:
  for name in ('remat', 'layerwise'):
    if getattr(s, name) and model.whole is not None:
      raise ValueError(
        f'{name}=True needs a model in pieces; model={model.name!r} is one. '
        'Recompute layers in the model itself, or give a `plan.Model`.'
      )


def _local_params(model: _models.Model, s: Settings) -> Any:
  """Returns a device's shapes in its products, gathered from fsdp."""
  params, _ = _cut.placed(model.params, s.mesh)
  if model.whole is not None:
    params = model.params
  shape = lambda x: jax.ShapeDtypeStruct(_cut.local(x, 'tensor'), x.dtype)
  return jax.tree.map(shape, params)


def training(model: _models.Model, s: Settings) -> Callable:
  """Returns a function that counts a forward and backward pass."""
  _check_pieces(model, s)
  params = _local_params(model, s)
  inputs = model.inputs(_cut.rows(s.mesh, s.batch), s.seq)

  @functools.cache
  def ordinary(sizes: tuple[int, ...]) -> tuple[int, _step.Kept]:
    kept = _step.ordinary(model, params, inputs, s.remat, sizes)
    return sum(sizes), kept

  @functools.cache
  def layerwise(stack: int, rest: int) -> tuple[int, _step.Kept]:
    layers = jax.tree.leaves(model.params[model.stack])[0].shape[0]
    kept = _step.layerwise(model, params, inputs, stack, rest)
    return rest + stack // layers, kept

  def count(gradients: Any) -> tuple[int, _step.Kept]:
    if s.layerwise:
      return layerwise(*map(_cut.local_bytes, model.parts(gradients)))
    return ordinary(tuple(map(_cut.local_bytes, jax.tree.leaves(gradients))))

  return count


def _gathered(model: _models.Model, s: Settings) -> int:
  """Returns the bytes of weights that fsdp gathers for one layer."""
  if s.mesh['fsdp'] == 1:
    return 0
  params = _local_params(model, s)
  if model.whole is not None:
    return max(map(_memory.tree_bytes, jax.tree.leaves(params)))
  stack, rest = model.parts(params)
  layer = _memory.tree_bytes(_stacks.layer_shapes(stack))
  return max([layer, *map(_memory.tree_bytes, rest.values())])


def join(
  model: _models.Model, s: Settings, count: Callable, of: Optimizer
) -> Plan:
  """Puts the parts together."""
  params, _ = _cut.placed(model.params, s.mesh)
  gradients, kept = count(of.gradients)
  peak = max(
    kept.peak + of.drawn + _gathered(model, s),
    kept.held + of.turn,
    of.update,
  )
  # At the peak, some activations may be freed already.
  activations = min(kept.activations, peak - gradients)
  return Plan(
    weights=_cut.local_bytes(params),
    gradients=gradients,
    states=of.states,
    bases=of.bases,
    activations=activations,
    workspace=peak - gradients - activations,
  )
