"""From the name of an optimizer to an optax chain."""

from collections.abc import Callable, Mapping
import functools
import re
from typing import Any

import jax
import optax
import optax.contrib

import subspace_optax as so

# Peak learning rates (matrices, the rest), tuned at the default model and data.
LEARNING_RATES = {
  'online_subspace_descent': (5e-3, 5e-3),
  'galore': (5e-3, 5e-3),
  'golore': (5e-3, 5e-3),
  'rso': (4e-3, 5e-3),
  'fira_adamw': (1.6e-2, 5e-3),
  'apollo_adamw': (1.6e-2, 5e-3),
  'ldadamw': (4e-3, 5e-3),
  'subspace_adamw': (4e-3, 5e-3),
  'subspace_muon': (5e-3, 5e-3),
  # Not tuned: those of the optimizers whose steps are of the same length.
  'dion': (5e-3, 5e-3),
  'trion': (5e-3, 5e-3),
  'scale': (5e-3, 5e-3),
  'normuon': (5e-3, 5e-3),
  'normuon_no_momentum': (2e-2, 5e-3),
  'contrib_galore': (5e-3, 5e-3),
  'adamw': (2.5e-3, 5e-3),
  'adafactor': (3e-3, 3e-3),
  'muon': (2e-2, 3e-3),
  'muon8bit': (2.5e-3, 3e-3),  # whose steps are as long as those of muon
}
# What docs/choose.md recommends, and what it is measured by.
RECOMMENDED = (
  'normuon8bit',
  'normuon4bit',
  'subspace_muon8bit',
  'normuon_no_momentum',
  'scale',
  'adamw8bit',
  'adamw',
)


def is_matrix(path) -> bool:
  """Attention and MLP kernels: what every method here projects."""
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  return name.endswith('kernel') and not is_head(name)


def is_head(name: str) -> bool:
  """Whether a name is that of a model's head, or of a part of it."""
  return 'head' in name


def matrix_mask(params):
  return jax.tree_util.tree_map_with_path(lambda p, _: is_matrix(p), params)


def matrix_axes(dimension_numbers: Callable):
  """Names the last two axes of every matrix; None keeps a leaf as it is."""

  def label(path, x):
    return (
      dimension_numbers(x.ndim - 2, x.ndim - 1) if is_matrix(path) else None
    )

  return lambda params: jax.tree_util.tree_map_with_path(label, params)


def schedule(peak: float, steps: int, kind: str = 'cosine'):
  """Linear warm-up over a tenth of the steps, then a cosine to a tenth."""
  if kind == 'constant':
    return optax.constant_schedule(peak)
  warmup = max(1, steps // 10)
  return optax.warmup_cosine_decay_schedule(
    peak / warmup, peak, warmup, max(steps, warmup + 1), end_value=0.1 * peak
  )


def micro_steps(c) -> int:
  """The microbatches that the optimizer accumulates, in the subspace."""
  inside = getattr(c, 'accumulate_in_subspace', False)
  return c.accumulation if inside else 1


def ready_made(make: Callable) -> Callable:
  """From one of the library's optimizers to what is made of the settings."""

  def build(c, lr):
    steps = micro_steps(c)
    choices = {
      'rank': c.rank,
      'update_proj_gap': c.update_proj_gap,
      # GoLore@50%: gradients choose the bases, then chance does.
      'random_from': c.steps // 2,
      'weight_decay': c.weight_decay,
      'every_k': steps if steps > 1 else None,
      'seed': c.seed,
    }
    given = {k: x for k, x in choices.items() if x is not None}
    return make(lr, **{k: x for k, x in given.items() if takes(make, k)})

  return build


def rso(c, lr):
  """Subproblems in place of a chain; their schedule is that of the matrices."""
  if c.weight_decay:
    raise ValueError(
      f'weight_decay={c.weight_decay}: rso has none; choose another optimizer'
    )
  peak, rest = rates(c)
  return so.rso.subproblems(
    so.SubspaceSpec(c.rank, side='in', seed=c.seed),
    optax.adam(1.0),
    update_proj_gap=c.update_proj_gap,
    schedule=lr,
    plain=optax.adam(rest / peak),
    rounding='stochastic' if c.param_dtype == 'bfloat16' else 'nearest',
  )


def contrib_galore(c, lr):
  return optax.contrib.galore(
    lr,
    c.rank,
    c.update_proj_gap,
    weight_decay=c.weight_decay,
    weight_dimension_numbers=matrix_axes(optax.contrib.GaLoreDimensionNumbers),
  )


def adamw(c, lr):
  return optax.adamw(lr, weight_decay=c.weight_decay)


def adamw8bit(c, lr):
  return optax.chain(
    so.scale_by_adam8bit(seed=c.seed),
    optax.add_decayed_weights(c.weight_decay),
    optax.scale_by_learning_rate(lr),
  )


def adafactor(c, lr):
  return optax.adafactor(
    lr,
    min_dim_size_to_factor=32,
    multiply_by_parameter_scale=False,
    weight_decay_rate=c.weight_decay or None,
  )


def muon(c, lr):
  return optax.contrib.muon(
    lr,
    weight_decay=c.weight_decay,
    adam_weight_decay=c.weight_decay,
    muon_weight_dimension_numbers=matrix_axes(
      optax.contrib.MuonDimensionNumbers
    ),
  )


takes = so.optimizers.takes
_MAKERS: dict[str, Callable] = {
  'muon8bit': functools.partial(so.normuon, b2=None, moment_bits=8),
  'normuon4bit': functools.partial(so.normuon, b=0.9, moment_bits=4),
  'normuon_no_momentum': functools.partial(so.normuon, b=None, moment_bits=8),
}
for _name, _make in so.optimizers.READY_MADE.items():
  _MAKERS[_name] = _make
  if takes(_make, 'moment_bits'):
    _MAKERS[f'{_name}8bit'] = functools.partial(_make, moment_bits=8)
_OTHERS = (rso, contrib_galore, adamw, adamw8bit, adafactor, muon)
_CHOSEN = {name: ready_made(make) for name, make in _MAKERS.items()}
OPTIMIZERS = dict(sorted((_CHOSEN | {f.__name__: f for f in _OTHERS}).items()))
# Which accumulate r-sized sums.
ACCUMULATE = tuple(k for k, x in _MAKERS.items() if takes(x, 'every_k'))


def known(name: str, table: Mapping[str, Any]) -> Any:
  """The entry of an optimizer, or of the one that it is a form of; or None."""
  return table.get(name, table.get(re.sub(r'(\dbit|_no_momentum)$', '', name)))


def rates(c) -> tuple[float, float]:
  """Peak learning rates of the matrices and of the rest."""
  lr, rest = known(c.optimizer, LEARNING_RATES) or (5e-3, 5e-3)
  if c.lr is not None:
    lr = rest = c.lr
  return lr, rest if c.lr_rest is None else c.lr_rest


def check_options(c) -> None:
  """Raises for what an optimizer can't do."""
  if micro_steps(c) > 1 and c.optimizer not in ACCUMULATE:
    raise ValueError(
      f'accumulate_in_subspace=True with optimizer={c.optimizer!r}: only '
      f'{ACCUMULATE}'
    )


def make(c, clip: bool = True) -> Any:
  """The chain: clip the global norm, the optimizer, the split of the rates.

  Subproblems of RSO are no transformation, and split their rates themselves.
  """
  check_options(c)
  lr, rest = rates(c)
  made = OPTIMIZERS[c.optimizer](c, schedule(lr, c.steps, c.schedule))
  if not isinstance(made, optax.GradientTransformation):
    return made
  steps = [made]
  if c.clip and clip:
    steps.insert(0, optax.clip_by_global_norm(c.clip))
  if rest != lr:
    others = lambda p: jax.tree.map(lambda matrix: not matrix, matrix_mask(p))
    steps.append(optax.masked(optax.scale(rest / lr), others))
  if c.rounding != 'nearest':
    steps.append(so.round_updates(c.rounding, seed=c.seed))
  return optax.chain(*steps)
