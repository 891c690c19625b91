# SPDX-License-Identifier: Apache-2.0
"""Ready-made optimizers in optax's own form.

All take (learning_rate, rank) by position; optimizers of whole matrices take
learning_rate alone. Keyword arguments follow and mean the same in every
optimizer. `galore` takes the arguments of `optax.contrib.galore` before them.
"""

from collections.abc import Callable, Mapping
import functools
import inspect
import numbers
import operator
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_optax import projectors
from subspace_optax import residuals
from subspace_optax import transports
from subspace_optax import whole
from subspace_optax._chain import _dtypes
from subspace_optax._chain import _spec
from subspace_optax._chain import _subspace
from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _notices
from subspace_optax._matrix import _sign
from subspace_optax.low_precision import _quantize_moments
from subspace_optax.transports import _moments
from subspace_optax.whole import _scale

Mask = Any | Callable[[Any], Any] | None
Transformation = optax.GradientTransformationExtraArgs

_T = TypeVar('_T')


class _Default:
  """A default that can be told apart from an equal value passed by a caller.

  It is not a number, so `optax.inject_hyperparams` does not trace it.
  """

  def __init__(self, value: Any):
    self.value = value

  def __eq__(self, other: Any) -> bool:
    return self.value == _unwrap(other)

  def __hash__(self) -> int:
    return hash(self.value)

  def __repr__(self) -> str:
    return repr(self.value)


def _default(value: _T) -> _T:
  """Returns the default of an argument that must be static."""
  return cast(_T, _Default(value))


def _unwrap(argument: Any) -> Any:
  """Returns what a caller passed, or the default."""
  return argument.value if isinstance(argument, _Default) else argument


# Optimizers by name. Tests, benchmarks, the planner and the example trainer
# iterate over them.
READY_MADE: dict[str, Callable[..., Transformation]] = {}

_Make = TypeVar('_Make', bound=Callable[..., Transformation])


def takes(make: Callable[..., Any], argument: str) -> bool:
  """Whether an optimizer has an argument of this name."""
  return argument in inspect.signature(make).parameters


def with_rank(make: Callable[..., Any], rank: Any) -> Callable[..., Any]:
  """Returns `make` with this rank, or unchanged if it takes no rank."""
  return functools.partial(make, rank=rank) if takes(make, 'rank') else make


def _ready_made(*static: str) -> Callable[[_Make], _Make]:
  """Adds an optimizer to `READY_MADE` and checks its arguments.

  Args:
    *static: names of the arguments that can't be traced.
  """

  def add(make: _Make) -> _Make:
    signature = inspect.signature(make)

    @functools.wraps(make)
    def checked(*args: Any, **kwargs: Any) -> Transformation:
      try:
        call = signature.bind(*args, **kwargs)
      except TypeError as error:
        raise TypeError(f'{make.__name__}: {error}') from None
      call.apply_defaults()
      _check_static(make.__name__, {k: call.arguments[k] for k in static})
      _check_spec_alone(call.arguments)
      for name, argument in call.arguments.items():
        call.arguments[name] = _unwrap(argument)
      return make(*call.args, **call.kwargs)

    READY_MADE[make.__name__] = checked
    return cast(_Make, checked)

  return add


_INJECTED_SCHEDULES = (
  ' Schedules that it injects count micro-steps: pass lambda count: '
  'schedule(count // every_k).'
)


def _check_static(optimizer: str, arguments: Mapping[str, Any]) -> None:
  """Raises if any of these arguments is a jax array, traced or not."""
  traced = {k: x for k, x in arguments.items() if isinstance(x, jax.Array)}
  if traced:
    names = tuple(k for k, x in arguments.items() if _is_passed(x))
    shown = ', '.join(f'{k}={x!r}' for k, x in traced.items())
    raise TypeError(
      f'{" and ".join(traced)} must be static, got {shown}; with '
      'optax.inject_hyperparams, write optax.inject_hyperparams('
      f'so.{optimizer}, static_args={names}).'
      + (_INJECTED_SCHEDULES if 'every_k' in names else '')
    )


def _check_spec_alone(arguments: Mapping[str, Any]) -> None:
  """Raises if a spec is passed with arguments that it replaces."""
  spec = arguments['spec']
  if spec is None:
    return
  _spec.check_spec(spec)
  fields = ('rank', 'seed', 'weight_dimension_numbers')
  passed = {k: arguments[k] for k in fields if _is_passed(arguments.get(k))}
  if passed:
    shown = ', '.join(f'{name}={x!r}' for name, x in passed.items())
    has = ', '.join(f'{name}={getattr(spec, name)!r}' for name in passed)
    raise ValueError(
      f'{shown} was passed beside a spec with {has}, which takes its place; '
      f'leave it out, or write spec=so.SubspaceSpec({shown}, ...).'
    )


def _is_passed(argument: Any) -> bool:
  return argument is not None and not isinstance(argument, _Default)


@_ready_made('rank', 'every_k', 'moment_bits', 'seed')
def galore(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _default(128),
  update_proj_gap: Any = _default(200),
  scale: Any = 1.0,
  base_optimizer: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  weight_dimension_numbers: Any = None,
  *,
  plain: optax.GradientTransformation | None = None,
  stagger: bool = False,
  every_k: int | None = None,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """GaLore: an optimizer in the gradient's leading singular subspace.

  Takes the arguments of `optax.contrib.galore` and, on trees of plain kernels,
  makes the same steps. It also handles stacked and sharded kernels, any dtypes,
  and zero and NaN gradients. Embeddings, heads, norms and biases stay plain,
  that is, they are not projected; see `describe`.

  The implementations of the authors and of Hugging Face have two other
  defaults. They project the short side (`proj_type='std'`); this one, like
  contrib, projects the long side (their 'reverse_std', except for square
  matrices; `side='reverse_std'` is exact) unless you pass
  `spec=SubspaceSpec(128)`. And their `scale` is 0.25.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    update_proj_gap: T, steps between SVDs; the first is at step 0.
    scale: alpha, multiplies the updates of projected leaves.
    base_optimizer: the optimizer in the subspace and for plain leaves,
      `optax.scale_by_adam()` by default. It must return directions along the
      gradient, since the learning rate and the sign are applied after it.
      `optax.adam(...)` steps against the gradient and raises an error here;
      contrib's galore accepts it, and the loss grows. With
      `optax.inject_hyperparams` and bfloat16 parameters, pass
      `hyperparam_dtype=jnp.float32`: in bfloat16 a b2 of 0.999 is 1, and Adam
      divides by zero.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    weight_dimension_numbers: which axes form matrices; see `SubspaceSpec`.
    plain: optimizer for leaves that are not projected, `base_optimizer` by
      default.
    stagger: whether matrices are refreshed at different steps within every T,
      so that no step computes all SVDs. The bases then start as random samples.
    every_k: number of micro-steps per step. Their gradients are accumulated in
      the subspace; see `subspace`. None means 1.
    moment_bits: 32, or 8 or 4 to quantize all moments; see `quantize_moments`.
    seed: seed of the first bases, if staggered, and of stochastic rounding.
    spec: a `SubspaceSpec` instead of `rank`, `seed` and
      `weight_dimension_numbers`; passing both is an error.

  Returns:
    An optimizer. State per m x n matrix, m the long side: mr + 2nr.

  Raises:
    ValueError: see `SubspaceSpec` and `projectors.svd`; at `init`, a
      `base_optimizer` that steps against the gradient.
    TypeError: see the same.

  References:
    Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
    Projection <https://arxiv.org/abs/2403.03507>`_, 2024, Algorithm 2

  Example:
    >>> import jax, jax.numpy as jnp, subspace_optax as so
    >>> tx = so.galore(learning_rate=0.01, rank=16)
    >>> params = {'w': jnp.ones((100, 100)), 'b': jnp.ones((100,))}
    >>> state = tx.init(params)
    >>> updates, state = jax.jit(tx.update)(params, state, params)
    >>> so.memory_report(tx, params).state < so.memory_report(tx, params).adam
    True
  """
  return _assemble(
    _choose_spec(
      spec,
      rank=rank,
      seed=seed,
      weight_dimension_numbers=weight_dimension_numbers,
      side='long',
      only_if_smaller=False,
    ),
    projectors.svd(update_proj_gap, stagger=stagger),
    base_optimizer,
    'base_optimizer',
    scale=scale,
    plain=plain,
    after=_decay_and_step(learning_rate, weight_decay, mask),
    every_k=every_k,
    moment_bits=moment_bits,
  )


@_ready_made('rank', 'random_from', 'seed', 'every_k', 'moment_bits')
def golore(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _default(128),
  *,
  update_proj_gap: Any = _default(200),
  scale: Any = 1.0,
  random_from: int = _default(0),
  regenerate: bool = False,
  inner: optax.GradientTransformation | None = None,
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  every_k: int | None = None,
  stagger: bool = False,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """GoLore: GaLore with random bases, so that noise cannot trap training.

  Bases come from the gradient's SVD before step `random_from` and are Haar
  samples from that step on. First moments follow the bases (momentum
  projection). If a tree has no matrix to project, the inner optimizer updates
  all of it; see `describe`.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    update_proj_gap: tau, steps between refreshes.
    scale: multiplies the updates of projected leaves.
    random_from: first step with random bases; 0 for pure GoLore, 8,000 for
      GoLore@20% of 10,000 steps.
    regenerate: whether bases are random columns of the cosine transform,
      recomputed at every step, instead of stored Haar samples. Both have the
      properties that the proofs require of a random basis; see
      `projectors.dct`.
    inner: the optimizer in the subspace and for plain leaves,
      `optax.scale_by_adam()` by default. Its first moments must be registered;
      see `in_subspace`. It must return directions along the gradient, which
      `optax.adam(...)` does not.
    plain: optimizer for leaves that are not projected, `inner` by default.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    every_k: number of micro-steps per step. Their gradients are accumulated in
      the subspace; see `subspace`. None means 1.
    stagger: whether matrices are refreshed at different steps within every tau,
      so that no step refreshes all of them.
    moment_bits: 32, or 8 or 4 to quantize all moments; see `quantize_moments`.
    seed: seed of the random bases and of stochastic rounding.
    spec: a `SubspaceSpec` instead of `rank` and `seed`; passing both is an
      error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: mr + 2nr, or 2nr
    with `regenerate`.

  Raises:
    ValueError: `regenerate` together with `random_from`; see `SubspaceSpec` and
      `projectors.switch`; at `init`, an `inner` that steps against the
      gradient.
    TypeError: see the same; `random_from` is not an int.

  References:
    He et al., `Subspace Optimization for Large Language Models with
    Convergence Guarantees <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> tx = so.golore(1e-3, rank=128, random_from=8_000)
  """
  _arguments.check_int(random_from, 'random_from', least=0)
  if regenerate and random_from != 0:
    raise ValueError(
      f'regenerate=True is for bases that are random from the start, but '
      f'random_from={random_from}: bases of an SVD must be stored. Leave one '
      'of them out.'
    )
  rule = projectors.stiefel(update_proj_gap, stagger=stagger)
  if regenerate:
    rule = projectors.dct(update_proj_gap, 'random', stagger=stagger)
  if random_from != 0:
    svd = projectors.svd(update_proj_gap, stagger=stagger)
    rule = projectors.switch({0: svd, operator.index(random_from): rule})
  return _assemble(
    _choose_spec(spec, rank=rank, seed=seed),
    rule,
    inner,
    'inner',
    transport='first',
    scale=scale,
    plain=plain,
    after=_decay_and_step(learning_rate, weight_decay, mask),
    every_k=every_k,
    moment_bits=moment_bits,
  )


@_ready_made('rank', 'seed', 'every_k', 'moment_bits')
def online_subspace_descent(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _default(128),
  *,
  scale: Any = 1.0,
  alpha: Any = 5.0,
  orthogonality: float = 0.1,
  basis_optimizer: optax.GradientTransformation | None = None,
  inner: optax.GradientTransformation | None = None,
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  every_k: int | None = None,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """Online Subspace Descent: bases learned along with the weights, no SVD.

  If a tree has no matrix to project, the inner optimizer updates all of it; see
  `describe`.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    scale: multiplies the updates of projected leaves. The authors' scripts use
      0.25, and a learning rate of 0.005 times the schedule for the bases.
    alpha: learning rate of the bases divided by that of the weights.
    orthogonality: lambda of Eq. (6).
    basis_optimizer: OptimizerP with its own learning rate, by default Adam at
      `alpha` times `learning_rate`. `optax.sgd` saves Adam's 2mr of state.
    inner: OptimizerW, the optimizer in the subspace and for plain leaves,
      `optax.scale_by_adam()` by default. It must return directions along the
      gradient, which `optax.adam(...)` does not.
    plain: optimizer for leaves that are not projected, `inner` by default.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    every_k: number of micro-steps per step. Their gradients are accumulated in
      the subspace; see `subspace`. None means 1.
    moment_bits: 32, or 8 or 4 to quantize all moments; see `quantize_moments`.
    seed: seed of the first bases and of stochastic rounding.
    spec: a `SubspaceSpec` instead of `rank` and `seed`; passing both is an
      error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: 3mr + 2nr, or
    mr + 2nr with SGD for the bases.

  Raises:
    ValueError: a negative `alpha`; see `SubspaceSpec` and
      `projectors.online_pca`; at `init`, an `inner` that steps against
      the gradient.
    TypeError: see the same.

  References:
    Liang et al., `Memory-Efficient LLM Training with Online Subspace Descent
    <https://arxiv.org/abs/2408.12857>`_, 2024, Algorithm 1

  Example:
    >>> import subspace_optax as so
    >>> tx = so.online_subspace_descent(1e-3, rank=128)
  """
  if not isinstance(alpha, jax.Array) and not alpha >= 0:
    raise ValueError(f'alpha must not be negative, got {alpha}.')
  if basis_optimizer is None:
    basis_optimizer = optax.adam(_scale_schedule(alpha, learning_rate))
  return _assemble(
    _choose_spec(spec, rank=rank, seed=seed),
    projectors.online_pca(
      _sign.require_against(basis_optimizer, 'basis_optimizer'), orthogonality
    ),
    inner,
    'inner',
    scale=scale,
    plain=plain,
    after=_decay_and_step(learning_rate, weight_decay, mask),
    every_k=every_k,
    moment_bits=moment_bits,
  )


@_ready_made('rank', 'seed', 'moment_bits')
def fira_adamw(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _default(128),
  *,
  update_proj_gap: Any = _default(200),
  scale: Any = 0.25,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  limiter: Any = 1.01,
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  stagger: bool = False,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """Fira: GaLore's Adam in the subspace, plus the scaled residual.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    update_proj_gap: T, steps between SVDs; the first is at step 0.
    scale: alpha, multiplies the update from the subspace but not the residual.
      The authors use 0.25, and 0.0625 from a billion parameters on.
    b1: decay rate of first moments.
    b2: decay rate of second moments.
    eps: added to the square root of second moments.
    eps_root: added under that square root; use a value above 0 to differentiate
      through a step.
    limiter: gamma, the largest factor by which the residual's norm may grow per
      step.
    plain: optimizer for leaves that are not projected, Adam by default. It must
      return directions along the gradient.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    stagger: whether matrices are refreshed at different steps within every T.
      The bases then start as random samples.
    moment_bits: 32, or 8 or 4 to quantize all moments; see `quantize_moments`.
    seed: seed of the first bases, if staggered, and of stochastic rounding.
    spec: a `SubspaceSpec` instead of `rank` and `seed`; passing both is an
      error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: mr + 2nr + 1.

  Raises:
    ValueError: see `SubspaceSpec`, `projectors.svd` and `residuals.fira`.
    TypeError: see the same.

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> tx = so.fira_adamw(1e-2, rank=128)
  """
  tx = _assemble(
    _choose_spec(spec, rank=rank, seed=seed),
    projectors.svd(update_proj_gap, stagger=stagger),
    optax.scale_by_adam(b1, b2, eps, eps_root),
    residual=residuals.fira(limiter),
    scale=scale,
    plain=plain,
    after=_decay_and_step(learning_rate, weight_decay, mask),
    moment_bits=moment_bits,
  )
  return _notices.warning_of_ones(tx, b1=b1, b2=b2)


@_ready_made('rank', 'update_proj_gap', 'seed', 'moment_bits')
def apollo_adamw(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _default(128),
  *,
  update_proj_gap: Any = _default(200),
  scale: Any = 1.0,
  granularity: str = 'channel',
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  limiter: Any = 1.01,
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  stagger: bool = False,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """APOLLO: whole gradients, scaled per column or per matrix.

  The random bases are not stored, but drawn again from their seeds at every
  step. APOLLO-Mini is `rank=1, scale=128**0.5, granularity='tensor'`.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    update_proj_gap: T, steps between new bases.
    scale: alpha, multiplies the scaled gradients. The `scale` of the authors
      and of Hugging Face is its square: pass 128**0.5 for their 128. Passing
      128 here makes steps 11.3 times as long.
    granularity: 'channel' or 'tensor'; see `residuals.apollo`.
    b1: decay rate of first moments.
    b2: decay rate of second moments.
    eps: added to the square root of second moments.
    eps_root: added under that square root; use a value above 0 to differentiate
      through a step.
    limiter: gamma, the largest factor by which an update's norm may grow per
      step.
    plain: optimizer for leaves that are not projected, Adam by default. It must
      return directions along the gradient.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    stagger: whether matrices get new bases at different steps within every T.
    moment_bits: 32, or 8 or 4 to quantize all moments; see `quantize_moments`.
    seed: seed of the bases and of stochastic rounding.
    spec: a `SubspaceSpec` instead of `rank` and `seed`; passing both is an
      error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: 2nr and a few
    numbers.

  Raises:
    ValueError: see `SubspaceSpec`, `projectors.gaussian`, `residuals.apollo`.
    TypeError: see the same.

  References:
    Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> apollo = so.apollo_adamw(1e-2, rank=128)
    >>> mini = so.apollo_adamw(
    ...   1e-2, rank=1, scale=128**0.5, granularity='tensor'
    ... )
  """
  tx = _assemble(
    _choose_spec(spec, rank=rank, seed=seed),
    projectors.gaussian(update_proj_gap, stagger=stagger, regenerate=True),
    optax.scale_by_adam(b1, b2, eps, eps_root),
    residual=residuals.apollo(granularity, limiter),
    scale=scale,
    plain=plain,
    after=_decay_and_step(learning_rate, weight_decay, mask),
    moment_bits=moment_bits,
  )
  return _notices.warning_of_ones(tx, b1=b1, b2=b2)


@_ready_made('rank', 'seed', 'moment_bits')
def ldadamw(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _default(128),
  *,
  scale: Any = 1.0,
  b1: Any = 0.908,
  b2: Any = 0.99,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  momentum: float = 0.908,
  error_feedback: bool = True,
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """LDAdam: power iteration, transport of both moments and error feedback.

  The first power step starts from Haar samples; in the authors' code it starts
  from an SVD.

  Args:
    learning_rate: a float or a schedule.
    rank: r, clipped to the short side; see `SubspaceSpec`.
    scale: multiplies the updates of projected leaves.
    b1: decay rate of first moments.
    b2: decay rate of second moments.
    eps: added to the square root of second moments.
    eps_root: added under that square root; use a value above 0 to differentiate
      through a step.
    momentum: rho, the weight of past coordinates in the power steps.
    error_feedback: whether to add the residual to the next gradient. This keeps
      a buffer of the size of the matrix.
    plain: optimizer for leaves that are not projected, Adam by default. It must
      return directions along the gradient.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    moment_bits: 32, or 8 or 4 to quantize all moments; see `quantize_moments`.
    seed: seed of the first bases and of stochastic rounding.
    spec: a `SubspaceSpec` instead of `rank` and `seed`; passing both is an
      error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: mr + 3nr, and mn
    for error feedback. Unless `spec` says otherwise, all of it is float32, even
    for narrower parameters.

  Raises:
    ValueError: see `SubspaceSpec`, `projectors.power_iteration` and
      `residuals.error_feedback`.
    TypeError: see the same.

  References:
    Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> tx = so.ldadamw(1e-3, rank=128)
  """
  tx = _assemble(
    _choose_spec(spec, rank=rank, seed=seed),
    projectors.power_iteration(momentum=momentum),
    optax.scale_by_adam(b1, b2, eps, eps_root),
    transport=transports.both(b1, b2),
    residual=residuals.error_feedback(b1) if error_feedback else None,
    scale=scale,
    plain=plain,
    after=_decay_and_step(learning_rate, weight_decay, mask),
    moment_bits=moment_bits,
  )
  return _notices.warning_of_ones(tx, b1=b1, b2=b2)


@_ready_made('rank', 'update_proj_gap', 'seed', 'moment_bits')
def subspace_adamw(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _default(0.25),
  *,
  update_proj_gap: Any = _default(200),
  scale: Any = 1.0,
  b1: Any = 0.9,
  b2: Any = 0.999,
  eps: Any = 1e-8,
  eps_root: Any = 0.0,
  limiter: Any = 1.01,
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  stagger: bool = False,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """AdamW for whole matrices with moments of a quarter of their rows.

  Our recipe for low memory: Adam on coordinates in random columns of the cosine
  transform. The columns are drawn every T steps and not stored, and first
  moments follow them. Fira's residual is added at the paper's alpha = 1. With N
  Adam's direction, L Fira's limiter and phi the ratio of |N| to |R| in each
  column,

    W <- W - lr (P N + L(phi (G - P R))).

  In a random basis every column has about r / m of its energy inside the
  subspace, so phi, and with it the step, is the same at every rank.

  Args:
    learning_rate: a float or a schedule, about Adam's.
    rank: r, by default a fraction of the short side; see `SubspaceSpec`.
    update_proj_gap: T, steps between new bases.
    scale: alpha, multiplies the update from the subspace.
    b1: decay rate of first moments.
    b2: decay rate of second moments, which do not change when a basis moves.
    eps: added to the square root of second moments.
    eps_root: added under that square root; use a value above 0 to differentiate
      through a step.
    limiter: gamma, the largest factor by which the residual's norm may grow per
      step.
    plain: optimizer for leaves that are not projected, Adam by default. It must
      return directions along the gradient.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    stagger: whether matrices get new bases at different steps within every T.
    moment_bits: 32, or 8 or 4 to quantize all moments; see `quantize_moments`.
    seed: seed of the bases and of stochastic rounding.
    spec: a `SubspaceSpec` instead of `rank` and `seed`; passing both is an
      error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: 2nr and a few
    numbers.

  Raises:
    ValueError: see `SubspaceSpec`, `projectors.dct`, `residuals.fira`.
    TypeError: see the same.

  References:
    Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024; He et al.,
    `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> tx = so.subspace_adamw(5e-3)
  """
  tx = _assemble(
    _choose_spec(spec, rank=rank, seed=seed),
    projectors.dct(update_proj_gap, 'random', stagger=stagger),
    optax.scale_by_adam(b1, b2, eps, eps_root),
    transport='first',
    residual=residuals.fira(limiter, rounding=None),
    scale=scale,
    plain=plain,
    after=_decay_and_step(learning_rate, weight_decay, mask),
    moment_bits=moment_bits,
  )
  return _notices.warning_of_ones(tx, b1=b1, b2=b2)


@_ready_made('rank', 'update_proj_gap', 'seed', 'moment_bits')
def subspace_muon(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _default(0.25),
  *,
  update_proj_gap: Any = _default(200),
  scale: Any = 8.0,
  b: Any = 0.95,
  b2: Any = 0.95,
  ns_coeffs: Any = 'standard',
  preconditioning: str = 'frobenius',
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  stagger: bool = False,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """Muon with momentum in a random subspace, and no basis in its state.

  Our recipe for quality. Muon orthogonalises momentum; here it keeps momentum
  only of r coordinates, in random columns of the cosine transform. The columns
  are drawn every T steps, and GoLore's C carries the momentum to the new ones.
  The update orthogonalises Nesterov momentum inside the subspace plus E, this
  step's gradient outside it, with the weight that the gradient has inside:

    M <- b M + R,   W <- W - lr alpha NS(P (R + b M) + (1 + b) E).

  It then brings output neurons to one size, as NorMuon does. Updates have
  singular values near `scale` times the learning rate (times sqrt(out / in) for
  kernels with more outputs than inputs) at any rank and width, so that one
  learning rate serves all of them. A step costs Muon's products and 2 products
  with a basis.

  Args:
    learning_rate: a float or a schedule, about Adam's for embeddings, heads
      and norms.
    rank: r, by default a fraction of the short side; see `SubspaceSpec`.
    update_proj_gap: T, steps between new bases.
    scale: alpha, the step size of matrices relative to that of other leaves.
    b: decay rate of the momentum, in [0, 1).
    b2: decay rate of the mean squares of output neurons, in [0, 1). None leaves
      neurons as in Muon. For this and the next two, see `residuals.orthogonal`.
    ns_coeffs: coefficients of the Newton-Schulz iteration.
    preconditioning: how to bring singular values to at most 1 before it.
    plain: optimizer for leaves that are not projected,
      `optax.scale_by_adam()` by default. It must return directions along the
      gradient, which `optax.adam(...)` does not.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    stagger: whether matrices get new bases at different steps within every T.
    moment_bits: 32, or 8 or 4 to quantize all moments; see `quantize_moments`.
    seed: seed of the bases and of stochastic rounding.
    spec: a `SubspaceSpec` instead of `rank` and `seed`; passing both is an
      error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: nr, a number per
    output unless `b2` is None, and a few numbers.

  Raises:
    ValueError: b or b2 outside [0, 1); see `SubspaceSpec`, `projectors.dct`,
      `residuals.orthogonal`.
    TypeError: see `projectors.dct`.

  References:
    Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon>`_, 2024;
    Li et al., `NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025; He et al.,
    `GoLore <https://arxiv.org/abs/2410.11289>`_, 2024

  Example:
    >>> import subspace_optax as so
    >>> tx = so.subspace_muon(5e-3)
  """
  _arguments.check_decay(b, 'b')
  plain, plain_name = _plain_or_adam(plain)
  tx = _assemble(
    _choose_spec(spec, rank=rank, seed=seed),
    projectors.dct(update_proj_gap, 'random', stagger=stagger),
    optax.trace(b, nesterov=True),
    transport='first',
    residual=residuals.orthogonal(
      1.0 + b,
      ns_coeffs=ns_coeffs,
      preconditioning=preconditioning,
      b2=b2,
    ),
    scale=scale,
    plain=plain,
    plain_name=plain_name,
    after=_decay_and_step(learning_rate, weight_decay, mask),
    moment_bits=moment_bits,
  )
  return _notices.warning_of_ones(tx, b=b, b2=b2)


@_ready_made('seed', 'moment_bits')
def normuon(
  learning_rate: optax.ScalarOrSchedule,
  *,
  scale: Any = 8.0,
  b: Any = 0.95,
  b2: Any = 0.95,
  ns_coeffs: Any = 'standard',
  preconditioning: str = 'frobenius',
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """NorMuon on whole matrices, without a subspace; Adam on the rest.

  The baseline for `subspace_muon`: Muon's momentum of whole matrices, with
  output neurons brought to one size; see `scale_by_normuon`. Steps are as long
  as those of `subspace_muon`: singular values are near `scale` times the
  learning rate.

  Args:
    learning_rate: a float or a schedule, about Adam's for embeddings, heads
      and norms.
    scale: alpha, the step size of matrices relative to that of other leaves.
    b: decay rate of the momentum, in [0, 1). None keeps no momentum, and hardly
      any state for matrices; the best learning rate is then about four times as
      high.
    b2: decay rate of the mean squares of output neurons; None for plain Muon.
    ns_coeffs: see `scale_by_normuon`.
    preconditioning: see `scale_by_normuon`.
    plain: optimizer for leaves that are not matrices, `optax.scale_by_adam()`
      by default. It must return directions along the gradient.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    moment_bits: 32, or 8 or 4 to quantize all moments; see `quantize_moments`.
    seed: seed of the stochastic rounding in 8 bits.
    spec: a `SubspaceSpec` that says which leaves are matrices, and their axes;
      its rank, side and bases do not matter. Passing `seed` with it is an
      error.

  Returns:
    An optimizer. State per matrix: with `b`, an array of the matrix's size;
    with `b2`, a number per output.

  Raises:
    ValueError: see `scale_by_normuon`.
    TypeError: `plain` is not an optimizer.

  References:
    Li et al., `NorMuon <https://arxiv.org/abs/2510.05491>`_, 2025, Algorithm 1

  Example:
    >>> import subspace_optax as so
    >>> tx = so.normuon(5e-3, weight_decay=0.1)
  """
  _check_number('scale', scale)
  _check_bits(moment_bits)
  spec = _choose_spec(spec, rank=1, seed=seed)
  matrices = whole.scale_by_normuon(
    spec, b=b, b2=b2, ns_coeffs=ns_coeffs, preconditioning=preconditioning
  )
  ready = functools.partial(_quantize, moment_bits, spec.seed)
  tx = whole.run_with_plain(
    spec,
    optax.chain(ready(matrices, ''), optax.scale(scale)),
    ready(*_plain_or_adam(plain)),
    _decay_and_step(learning_rate, weight_decay, mask),
    whole.matrices_in,
  )
  return _notices.warning_of_ones(tx, b=b, b2=b2)


@_ready_made('rank', 'seed', 'moment_bits')
def dion(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _default(0.25),
  *,
  scale: Any = 8.0,
  b: Any = 0.95,
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """Dion: orthogonal updates of rank r from the momentum of whole matrices.

  Half a power step on B = M + G, from the last step's coordinates, finds the
  basis P. The part of the momentum inside the subspace decays; the part outside
  accumulates:

    P = orth(B Q^T),  R = P^T B,  M <- B - (1 - b) P R,  Q <- unit rows of R,
    W <- W - lr alpha sqrt(out / in) P Q.

  Only the m x r basis is orthogonalised, and only arrays of width r cross
  devices.

  Args:
    learning_rate: a float or a schedule, about Adam's for embeddings, heads
      and norms.
    rank: r, by default a fraction of the short side; see `SubspaceSpec`.
    scale: alpha, the step size of matrices relative to that of other leaves.
    b: mu, decay rate of the momentum inside the subspace, in [0, 1).
    plain: optimizer for leaves that are not projected,
      `optax.scale_by_adam()` by default. It must return directions along the
      gradient, which `optax.adam(...)` does not.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    moment_bits: 32, or 8 or 4 to quantize the moments of `plain`; see
      `quantize_moments`. `spec` sets the dtype of the momentum of matrices.
    seed: seed of the first bases and of stochastic rounding.
    spec: a `SubspaceSpec` instead of `rank` and `seed`; passing both is an
      error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: mn + mr + nr. The
    paper keeps mn + nr, since it stores no basis.

  Raises:
    ValueError: b outside [0, 1); see `SubspaceSpec`.
    TypeError: see `SubspaceSpec`.

  References:
    Ahn et al., `Dion: Distributed Orthonormalized Updates
    <https://arxiv.org/abs/2504.05295>`_, 2025, Algorithm 1

  Example:
    >>> import subspace_optax as so
    >>> tx = so.dion(2e-3)
  """
  return _assemble_momentum(
    _choose_spec(spec, rank=rank, seed=seed),
    projectors.lagged_power(),
    'rows',
    b=b,
    scale=scale,
    plain=plain,
    after=_decay_and_step(learning_rate, weight_decay, mask),
    moment_bits=moment_bits,
  )


@_ready_made('rank', 'seed', 'moment_bits')
def trion(
  learning_rate: optax.ScalarOrSchedule,
  rank: Any = _default(0.25),
  *,
  scale: Any = 8.0,
  b: Any = 0.95,
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """Trion: Dion with columns of the cosine transform, without factorisations.

  The basis of each step is the r columns along which B = M + G, momentum plus
  gradient, has the largest l1 norm. Newton-Schulz runs on its r x n
  coordinates:

    R = P^T B,  M <- B - (1 - b) P R,
    W <- W - lr alpha sqrt(out / in) P NS(R).

  Args:
    learning_rate: a float or a schedule, about Adam's for embeddings, heads
      and norms.
    rank: r, by default a fraction of the short side; see `SubspaceSpec`.
    scale: alpha, the step size of matrices relative to that of other leaves.
    b: mu, decay rate of the momentum inside the subspace, in [0, 1).
    plain: optimizer for leaves that are not projected,
      `optax.scale_by_adam()` by default. It must return directions along the
      gradient, which `optax.adam(...)` does not.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    moment_bits: 32, or 8 or 4 to quantize the moments of `plain`; see
      `quantize_moments`. `spec` sets the dtype of the momentum of matrices.
    seed: seed of stochastic rounding.
    spec: a `SubspaceSpec` instead of `rank` and `seed`; passing both is an
      error.

  Returns:
    An optimizer. State per m x n matrix, m the short side: mn, and the indices
    of r columns.

  Raises:
    ValueError: b outside [0, 1); see `SubspaceSpec`, `projectors.dct`.
    TypeError: see `SubspaceSpec`.

  References:
    Modoranu et al., `FFT-based Dynamic Subspace Selection
    <https://arxiv.org/abs/2505.17967>`_, 2025

  Example:
    >>> import subspace_optax as so
    >>> tx = so.trion(2e-3)
  """
  return _assemble_momentum(
    _choose_spec(spec, rank=rank, seed=seed),
    projectors.dct(1, 'l1'),
    'orthogonal',
    b=b,
    scale=scale,
    plain=plain,
    after=_decay_and_step(learning_rate, weight_decay, mask),
    moment_bits=moment_bits,
  )


def _assemble_momentum(
  spec: _spec.SubspaceSpec,
  projector: projectors.Projector,
  form: str,
  *,
  b: Any,
  plain: optax.GradientTransformation | None,
  **rest: Any,
) -> Transformation:
  """Returns an optimizer that keeps the momentum of whole matrices."""
  _arguments.check_decay(b, 'b')
  plain, plain_name = _plain_or_adam(plain)
  return _assemble(
    spec,
    projector,
    optax.identity(),
    residual=residuals.momentum_feedback(b, form),
    plain=plain,
    plain_name=plain_name,
    **rest,
  )


@_ready_made('head', 'seed', 'moment_bits')
def scale(
  learning_rate: optax.ScalarOrSchedule,
  *,
  scale: Any = 1.0,
  b: Any = 0.9,
  head: str | None = 'auto',
  plain: optax.GradientTransformation | None = None,
  weight_decay: Any = 0.0,
  mask: Mask = None,
  moment_bits: int = _default(32),
  seed: int = _default(0),
  spec: _spec.SubspaceSpec | None = None,
) -> Transformation:
  """SCALE: normalised gradients, with momentum for the head alone.

  The optimizer with the least state: it has no subspace, and among matrices
  only the head has state. M is G, or for the head M <- b M + (1 - b) G. Each
  output j of a matrix moves by a root mean square of lr:

    W_ij <- W_ij - lr alpha M_ij / max(sqrt(mean_i M_ij^2), 1e-8).

  The inputs of an embedding are its tokens. The table of a tied model computes
  the logits and counts as the head; its inputs are the width. `describe` shows
  how each leaf is treated. A gradient that is not finite stays in the head's
  momentum, as in optax; see `optax.apply_if_finite`.

  Args:
    learning_rate: a float or a schedule; the paper uses 1e-3 at 350M.
    scale: alpha, the step size of matrices relative to that of other leaves.
    b: decay rate of the head's momentum, in [0, 1).
    head: 'auto' finds heads by name or, if there is none, takes the largest
      embedding, with a warning. A regular expression matches the paths of
      heads, which may be embeddings. None is for a model without a head; no
      matrix then has momentum.
    plain: optimizer for norms, biases and all other leaves that are not
      matrices, `optax.scale_by_adam()` by default. It must return directions
      along the gradient, which `optax.adam(...)` does not.
    weight_decay: decoupled weight decay, of the weights before the step;
      `scale` does not multiply it.
    mask: which leaves get weight decay; see `optax.add_decayed_weights`.
    moment_bits: 32, or 8 or 4 to quantize all moments; see `quantize_moments`.
    seed: seed of stochastic rounding.
    spec: a `SubspaceSpec` that says which leaves are matrices, and their axes;
      its rank does not matter. Passing `seed` with it is an error.

  Returns:
    An optimizer. State per i x j matrix: none, except ij for the head.

  Raises:
    ValueError: b outside [0, 1); see `SubspaceSpec`; at `init`, a regular
      expression that matches no head.
    TypeError: `head` is neither a string nor None; see `SubspaceSpec`.

  References:
    Glentis et al., `A Minimalist Optimizer Design for LLM Pretraining
    <https://arxiv.org/abs/2506.16659>`_, 2025

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> tx = so.scale(1e-3)
    >>> up, norm = jnp.ones((16, 64)), jnp.ones((16,))
    >>> params = {'norm': norm, 'up': up, 'lm_head': jnp.ones((16, 99))}
    >>> print(so.describe(tx, params))
    scale
    path     shape    as      inputs  update
    lm_head  (16,99)  head    16      momentum
    norm     (16)     plain   -       has fewer than two axes
    up       (16,64)  matrix  16      normalized
  """
  _arguments.check_decay(b, 'b')
  _check_number('scale', scale)
  _check_bits(moment_bits)
  _arguments.check_pattern('head', head)
  spec = _choose_spec(spec, rank=1, seed=seed)
  ready = functools.partial(_quantize, moment_bits, spec.seed)
  tx = _scale.normalize_outputs(
    spec,
    ready(optax.ema(b, debias=False), ''),
    ready(*_plain_or_adam(plain)),
    head=head,
    scale=scale,
  )
  after = _decay_and_step(learning_rate, weight_decay, mask)
  return _dtypes.round_last(optax.chain(tx, after))


def _choose_spec(
  spec: _spec.SubspaceSpec | None, **fields: Any
) -> _spec.SubspaceSpec:
  """Returns the spec, or one that also allows trees without matrices."""
  if spec is not None:
    return spec
  return _spec.SubspaceSpec(**fields, allow_empty=True)


def _decay_and_step(
  learning_rate: Any, weight_decay: Any, mask: Mask
) -> Transformation:
  """Returns decoupled weight decay and the learning rate."""
  _check_number('learning_rate', learning_rate, 'or a schedule')
  _check_number('weight_decay', weight_decay, 'or a schedule')
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask),
    optax.scale_by_learning_rate(learning_rate),
  )


def _scale_schedule(alpha: Any, learning_rate: Any) -> Any:
  """Returns alpha times a learning rate or schedule."""
  if callable(learning_rate):
    return lambda count: alpha * learning_rate(count)
  return alpha * learning_rate


def _has_wide_moments(optimizer: optax.GradientTransformation) -> bool:
  """Whether an optimizer has 32-bit moments, judged by the state's types."""
  try:
    # `init` runs on types alone: arrays would start the backend.
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    state = jax.eval_shape(optimizer.init, {'x': one})
  except Exception:  # an optimizer for certain trees; `init` will say more
    return True
  coded = _moments.holds_codes(state)
  return not coded and bool(_moments.moments_in(state))


def _check_number(name: str, value: Any, rest: str = '') -> None:
  """Raises for other than a number, such as a misplaced positional argument."""
  if isinstance(value, jax.Array | np.ndarray) or (rest and callable(value)):
    return
  if isinstance(value, bool) or not isinstance(value, numbers.Real):
    names = ', '.join(inspect.signature(galore).parameters)
    raise TypeError(
      f'{name} must be a number {rest}'.rstrip() + f', got {value!r}. Only '
      f'`galore` takes its first arguments by position: ({names}).'
    )


def _check_bits(moment_bits: Any) -> None:
  if moment_bits not in (4, 8, 32):
    raise ValueError(f'moment_bits must be 32, 8 or 4, got {moment_bits!r}.')


def _assemble(
  spec: _spec.SubspaceSpec,
  projector: projectors.Projector,
  inner: optax.GradientTransformation | None,
  inner_name: str = '',
  *,
  after: optax.GradientTransformation,
  scale: Any,
  plain: optax.GradientTransformation | None,
  plain_name: str = '',
  moment_bits: int,
  every_k: int | None = None,
  **how: Any,
) -> Transformation:
  """Returns `subspace` with moments in `moment_bits`, followed by `after`.

  `every_k` is None for one micro-step, since `inject_hyperparams` would trace a
  number. `inner_name` and `plain_name` are the arguments' names if a caller
  passed the optimizers, which may then step against the gradient; else ''.
  """
  _check_number('scale', scale)
  _check_bits(moment_bits)
  if inner is None:
    inner, inner_name = optax.scale_by_adam(), ''
  ready = functools.partial(_quantize, moment_bits, spec.seed)
  return _subspace.subspace(
    spec,
    projector,
    ready(inner, inner_name),
    plain=None if plain is None else ready(plain, plain_name),
    scale=scale,
    every_k=1 if every_k is None else every_k,
    after=after,
    **how,
  )


def _plain_or_adam(
  plain: optax.GradientTransformation | None,
) -> tuple[optax.GradientTransformation, str]:
  """Returns the optimizer and, if it was passed, its name for `_quantize`."""
  return (optax.scale_by_adam(), '') if plain is None else (plain, 'plain')


def _quantize(bits: int, seed: int, optimizer: Any, name: str) -> Any:
  """Returns an optimizer with moments in `bits`; checks it if it has a name."""
  if name:
    _arguments.require_optimizer(optimizer, name)
  if bits != 32 and _has_wide_moments(optimizer):
    optimizer = _quantize_moments.quantize_moments(optimizer, bits, seed=seed)
  if not name:
    return optimizer
  return _sign.require_along(optimizer, name, with_params=name == 'plain')
