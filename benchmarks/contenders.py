"""The optimizers of the Pareto benchmark, each with all that it keeps.

Most are made alike: (schedule, weight decay) -> an optimizer of the matrices.
Embedding, head and norms are Adam's, in 8 bits where the method's moments are
in 8 or 4 bits, unless the method is one of whole models. RSO owns its loop.
"""

from collections.abc import Callable
import functools
import inspect
from typing import Any, NamedTuple

import jax
import optax
import optax.contrib

from benchmarks import peers
import recipes
import subspace_optax as so

B2 = 0.99  # of every Adam


class Contender(NamedTuple):
  """An optimizer, and where its search starts.

  Attributes:
    make: (schedule, weight decay) -> optimizer of the matrices; None of what
      owns its loop.
    lr: first peak learning rate of the search.
    bits: of the moments of the rest.
    ours: whether this library is where it comes from.
    whole: whether it takes all leaves, embedding, head and norms included.
    loop: (peak rate, that of the rest, schedule) -> `rso`'s subproblems, which
      have no weight decay; else None.
    betas: decay rates of Adam's moments of the rest.
    warmup: share of the steps in which learning rates rise.
    varies: the method that this one is but for its betas or its warm-up, if it
      is to show what tuning these would gain.
  """

  make: Callable[[Any, Any], optax.GradientTransformation] | None
  lr: float
  bits: int = 32
  ours: bool = False
  whole: bool = False
  loop: Callable[[Any, Any, optax.Schedule], so.rso.Subproblems] | None = None
  betas: tuple[float, float] = (0.9, B2)
  warmup: float = 0.1
  varies: str = ''


def adam(
  bits: int = 32, b1: float = 0.9, b2: float = B2
) -> optax.GradientTransformation:
  moments = optax.scale_by_adam(b1, b2)
  return moments if bits == 32 else so.quantize_moments(moments, 8)


def _stepping(direction: Callable[[], Any]) -> Callable[[Any, Any], Any]:
  """Adds decoupled weight decay and the learning rate."""
  return lambda lr, decay: optax.chain(
    direction(),
    optax.add_decayed_weights(decay),
    optax.scale_by_learning_rate(lr),
  )


def _adafactor() -> optax.GradientTransformation:
  """Adafactor without momentum, its updates clipped to a root mean square 1."""
  return optax.chain(
    optax.scale_by_factored_rms(min_dim_size_to_factor=32),
    optax.clip_by_block_rms(1.0),
  )


def _muon(bits: int, beta: float = 0.95, steps: int = 5) -> Callable[[], Any]:
  """Muon on the last two axes of every leaf."""

  def axes(params: Any) -> Any:
    number = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda x: number(x.ndim - 2, x.ndim - 1), params)

  def direction() -> optax.GradientTransformation:
    muon = optax.contrib.scale_by_muon(
      ns_steps=steps, beta=beta, weight_dimension_numbers=axes
    )
    muon = muon if bits == 32 else so.quantize_moments(muon, bits)
    # As in `optax.contrib.muon` by default.
    return optax.chain(muon, optax.stateless(_lengthen))

  return direction


def _lengthen(updates: Any, params: Any) -> Any:
  """Multiplies updates of kernels that widen by sqrt(out / in)."""
  del params
  factor = lambda x: max(1.0, x.shape[-1] / x.shape[-2]) ** 0.5
  return jax.tree.map(lambda x: factor(x) * x, updates)


def ours(name: str, **options: Any) -> Callable[[Any, Any], Any]:
  """One of the library's ready-made optimizers."""
  make = so.optimizers.READY_MADE[name]
  takes = inspect.signature(make).parameters
  if 'b2' in takes and 'muon' not in name:
    options.setdefault('b2', B2)
  if 'rank' in takes and 'spec' not in options:
    options.setdefault('rank', 0.25)
  with_decay = 'weight_decay' in takes

  def build(lr: Any, decay: Any) -> optax.GradientTransformation:
    own = {'weight_decay': decay} if with_decay else {}
    return make(lr, **own, **options)

  return build


def _dct_adamw(lr: Any, decay: Any) -> optax.GradientTransformation:
  """DCT-AdamW: chosen columns of the cosine transform, nothing outside."""
  return so.subspace(
    so.SubspaceSpec(0.25),
    so.projectors.dct(200),
    adam(),
    transport=so.transports.both(0.9, B2),
    after=optax.chain(
      optax.add_decayed_weights(decay), optax.scale_by_learning_rate(lr)
    ),
  )


def _rso(
  transport: str,
) -> Callable[[Any, Any, optax.Schedule], so.rso.Subproblems]:
  """Subproblems of a quarter of the inputs, by Adam."""

  def make(lr: Any, lr_rest: Any, schedule: Any) -> so.rso.Subproblems:
    by_adam = lambda rate: optax.chain(adam(), optax.scale(-rate))
    return so.rso.subproblems(
      so.SubspaceSpec(0.25, side='in'),
      by_adam(lr),
      plain=by_adam(lr_rest),
      transport=transport,
      schedule=schedule,
    )

  return make


_of_ours = functools.partial(Contender, ours=True)

CONTENDERS: dict[str, Contender] = {
  'adamw': Contender(_stepping(adam), 4e-3),
  'muon': Contender(_stepping(_muon(32)), 1e-2),
  'subspace_muon': _of_ours(ours('subspace_muon'), 2.5e-3),
  'subspace_muon_8bit': _of_ours(
    ours('subspace_muon', moment_bits=8), 2.5e-3, bits=8
  ),
  'subspace_muon_4bit': _of_ours(
    ours('subspace_muon', moment_bits=4), 2.5e-3, bits=8
  ),
  'muon_4bit': Contender(_stepping(_muon(4)), 1e-2, bits=8, ours=True),
  'muon_8bit': Contender(_stepping(_muon(8)), 1e-2, bits=8, ours=True),
  'adamw_8bit': Contender(
    _stepping(functools.partial(adam, 8)), 4e-3, bits=8, ours=True
  ),
  'subspace_adamw': _of_ours(ours('subspace_adamw'), 4e-3),
  'adafactor': Contender(_stepping(_adafactor), 4e-3),
  'adafactor_8bit': Contender(_stepping(_adafactor), 2e-3, bits=8),
  'subspace_adamw_8bit': _of_ours(
    ours('subspace_adamw', moment_bits=8), 4e-3, bits=8
  ),
  'galore': Contender(
    ours('galore', base_optimizer=optax.scale_by_adam(b2=B2)), 4e-3
  ),
  'golore': _of_ours(ours('golore', inner=adam()), 8e-3),
  'online_subspace_descent': _of_ours(
    ours('online_subspace_descent', inner=adam()), 8e-3
  ),
  'rso': _of_ours(None, 4e-3, loop=_rso('reset')),
  'rso, first moments transported': _of_ours(None, 4e-3, loop=_rso('first')),
  # Of the authors' code, and of all others here.
  'galore, short side': Contender(
    ours(
      'galore',
      spec=so.SubspaceSpec(0.25),
      base_optimizer=optax.scale_by_adam(b2=B2),
    ),
    8e-3,
  ),
  'contrib_galore': Contender(
    functools.partial(peers.contrib_galore, b2=B2), 8e-3
  ),
  'lora': Contender(
    lambda lr, decay: peers.factors(_stepping(adam)(lr, decay)), 8e-3
  ),
  'dct_adamw': _of_ours(_dct_adamw, 4e-3),
  'scale': _of_ours(
    ours('scale', plain=adam(), mask=recipes.matrix_mask), 4e-3, whole=True
  ),
  'normuon': _of_ours(ours('normuon'), 1.25e-3),
  'normuon_8bit': _of_ours(ours('normuon', moment_bits=8), 1.25e-3, bits=8),
  # Shorter, as errors of half a byte add up for as long as momentum lasts.
  'normuon_4bit': _of_ours(
    ours('normuon', moment_bits=4, b=0.9), 1.25e-3, bits=8
  ),
  # 8 bits for the rest alone.
  'normuon_no_momentum': _of_ours(
    ours('normuon', moment_bits=8, b=None), 5e-3, bits=8
  ),
  'trion': _of_ours(ours('trion'), 1.25e-3),
  'dion': _of_ours(ours('dion'), 1.25e-3),
}
CONTENDERS |= {
  name: _of_ours(ours(name), 4e-3)
  for name in so.optimizers.READY_MADE
  if name not in CONTENDERS
}


def _form(
  b: float = 0.9,
  weight: float | None = None,
  gap: int = 200,
  rank: float = 0.25,
  projector: Any = None,
  bits: int = 32,
  **options: Any,
) -> Contender:
  """A form of `subspace_muon`, by its pieces."""

  momentum = optax.trace(b, nesterov=True)

  def make(lr: Any, decay: Any) -> optax.GradientTransformation:
    rule = projector or (lambda gap: so.projectors.dct(gap, 'random'))
    return so.subspace(
      so.SubspaceSpec(rank, only_if_smaller=rank < 1),
      rule(gap),
      momentum if bits == 32 else so.quantize_moments(momentum, bits),
      transport=so.transports.first(),
      residual=so.residuals.orthogonal(
        1 + b if weight is None else weight, **options
      ),
      scale=8.0,
      after=optax.chain(
        optax.add_decayed_weights(decay), optax.scale_by_learning_rate(lr)
      ),
    )

  return _of_ours(make, 1.25e-3, bits=bits)


# Forms of `subspace_muon` that were tried; see docs/recipes.md. The weight of
# the residual is 1 + b, as that of this step's coordinates, where none is said.
FORMS = {
  'b 0.9': _form(0.9),
  'b 0.95': _form(0.95),
  'b 0.9, w 10': _form(0.9, 10.0),
  'b 0.9, w 1': _form(0.9, 1.0),
  'b 0.95, w 4': _form(0.95, 4.0),
  'b 0.98': _form(0.98),
  'b 0.95, rank 0.5': _form(0.95, rank=0.5),
  'b 0.95, rank 1, 4 bits': _form(0.95, rank=1.0, bits=4),
  'b 0.95, rank 0.5, 4 bits': _form(0.95, rank=0.5, bits=4),
  'b 0.95, rank 0.5, 8 bits': _form(0.95, rank=0.5, bits=8),
  'b 0.9, rank 0.5, 4 bits': _form(0.9, rank=0.5, bits=4),
  'b 0.95, 3 steps': _form(0.95, steps=3),
  'b 0.95, 2 steps': _form(0.95, steps=2),
  'b 0.95, rank 0.5, 3 steps': _form(0.95, rank=0.5, steps=3),
  'b 0.95, rank 0.06, 3 steps': _form(0.95, rank=1 / 16, steps=3),
  'b 0, 3 steps': _form(0.0, rank=1 / 16, steps=3),
  'b 0.95, l1': _form(0.95, projector=so.projectors.dct),
  'b 0.95, gap 50': _form(0.95, gap=50),
  'b 0.95, gap 1000': _form(0.95, gap=1000),
  'b 0.95, power': _form(0.95, projector=so.projectors.power_iteration),
  'b 0.95, w 0': _form(0.95, 0.0),
  'b 0.95, b2 0.95': _form(0.95, b2=0.95),
}
CONTENDERS |= {f'subspace_muon, {name}': form for name, form in FORMS.items()}


def _at_rank(rank: float, bits: int) -> Contender:
  # At the full rank nothing is smaller.
  spec = so.SubspaceSpec(rank, only_if_smaller=rank < 1)
  make = ours('subspace_muon', spec=spec, moment_bits=bits)
  return _of_ours(make, 2.5e-3, bits=8)


CONTENDERS['subspace_muon, rank 0.5'] = _of_ours(
  ours('subspace_muon', rank=0.5), 2.5e-3
)
CONTENDERS |= {
  f'subspace_muon_8bit, rank {rank}': _at_rank(rank, 8)
  for rank in (0.5, 0.75, 0.9)
}
CONTENDERS |= {
  f'subspace_muon, 4 bits, rank {rank}': _at_rank(rank, 4)
  for rank in (0.5, 0.75, 1.0)
}
# Forms of Muon.
CONTENDERS |= {
  'normuon, 4 bits, b 0.95': _of_ours(
    ours('normuon', moment_bits=4), 1.25e-3, bits=8
  ),
  'muon, b 0.9': Contender(_stepping(_muon(32, 0.9)), 1e-2),
  'muon, b 0': Contender(_stepping(_muon(32, 0.0)), 5e-3),
  'muon, 3 steps': Contender(_stepping(_muon(32, steps=3)), 1e-2),
  'muon, 4 bits, 3 steps': Contender(_stepping(_muon(4, steps=3)), 1e-2, 8),
  'muon, 4 bits, b 0.9': Contender(_stepping(_muon(4, 0.9)), 1e-2, 8),
}


def _vary(method: str, **betas: float) -> Contender:
  """A method with other betas, and its other Adam with them if it is AdamW."""
  how = CONTENDERS[method]
  if method == 'adamw':
    own = {'b1': how.betas[0], 'b2': how.betas[1]} | betas
    how = how._replace(betas=(own['b1'], own['b2']))
    make = _stepping(functools.partial(adam, **own))
  elif method == 'muon_8bit':
    make = _stepping(_muon(8, betas['b']))
  elif method == 'scale':
    own = {'plain': adam(), 'mask': recipes.matrix_mask}
    make = ours('scale', **own, **betas)
  else:
    name = method.removesuffix('_8bit')
    make = ours(name, moment_bits=8, **betas)
  return how._replace(make=make, varies=method)


# Each beta, and the warm-up, on either side of what the method has.
_BETAS: dict[str, dict[str, tuple[float, float]]] = {
  'adamw': {'b1': (0.8, 0.95), 'b2': (0.95, 0.999)},
  'muon_8bit': {'b': (0.9, 0.98)},
  'normuon_8bit': {'b': (0.9, 0.98), 'b2': (0.9, 0.99)},
  'subspace_muon_8bit': {'b': (0.9, 0.98), 'b2': (0.9, 0.99)},
  'subspace_adamw_8bit': {'b1': (0.8, 0.95), 'b2': (0.95, 0.999)},
  'scale': {'b': (0.8, 0.95)},
}
CONTENDERS |= {
  f'{method}, {name} {beta}': _vary(method, **{name: beta})
  for method, betas in _BETAS.items()
  for name, pair in betas.items()
  for beta in pair
}
CONTENDERS |= {
  f'{method}, warm-up {share}': CONTENDERS[method]._replace(
    warmup=share, varies=method
  )
  for method in _BETAS
  for share in (0.05, 0.2)
}
