"""Training runs of the quality benchmark: one program for many runs."""

from collections.abc import Hashable
import functools
import math
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import methods
from benchmarks import programs
import data
import llama
import lora
import recipes
import train_step

CHUNK = 100  # steps in one call of the program


class Settings(NamedTuple):
  """What all runs of a comparison share."""

  model: str
  batch: int
  seq: int
  steps: int
  update_proj_gap: int
  lr_rest: float  # of embeddings, head and norms
  clip: float


class Setup(NamedTuple):
  """A method at a rank, on a model."""

  method: str
  rank: float  # over the width; 0 where there is none
  width: float  # of the model over the named one's


def shape(steps: int) -> optax.Schedule:
  """Linear warm-up to 1 over a tenth of the steps, then a cosine to 0.1."""
  return recipes.schedule(1.0, steps)


def config(settings: Settings, width: float) -> llama.LlamaConfig:
  """The model's sizes, bytes as tokens."""
  base = llama.named(settings.model)
  return llama.named(
    settings.model,
    vocab=256,
    width=round(base.width * width),
    mlp_width=round(base.mlp_width * width),
  )


class Trainer:
  """Trains one setup; learning rate, seed and corpus cost no compilation."""

  def __init__(self, settings: Settings, setup: Setup):
    self.settings, self.setup = settings, setup
    self.method = methods.METHODS[setup.method]
    self.config = config(settings, setup.width)
    graphdef, _ = self._model(0)
    self.loss = train_step.make_loss(graphdef)
    self.chunk = math.gcd(settings.steps, CHUNK)
    self.validate = jax.jit(self._validate)
    self.init = jax.jit(lambda p: self._how(0.0).init(p))

  def _model(self, seed: int) -> tuple[Any, Any]:
    model = llama.Llama(self.config, nnx.Rngs(seed))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)

  def start(self, seed: int) -> Any:
    """What is trained: parameters, and LoRA's factors in place of matrices."""
    _, params = self._model(seed)
    if not self.method.lora:
      return params
    rank = max(1, round(self.setup.rank * self.config.width))
    return lora.init(jax.random.key(seed), params, rank)

  def _label(self, path: Any, x: Any) -> str:
    del x
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if name.startswith(('a/', 'b/')):
      return 'matrices'
    if not recipes.is_matrix(path):
      return 'rest'
    return 'frozen' if self.method.lora else 'matrices'

  def _optimizer(self, lr: Any) -> optax.GradientTransformation:
    s, factor = self.settings, shape(self.settings.steps)
    schedule = lambda count: lr * factor(count)
    rest = lambda count: s.lr_rest * factor(count)
    parts: dict[Hashable, optax.GradientTransformation] = {
      'matrices': self.method.make(
        schedule, self.setup.rank, s.update_proj_gap, 0
      ),
      'rest': optax.adam(rest),
      'frozen': optax.set_to_zero(),
    }
    labels = lambda p: jax.tree_util.tree_map_with_path(self._label, p)
    return optax.chain(
      optax.clip_by_global_norm(s.clip), optax.partition(parts, labels)
    )

  def _how(self, lr: Any) -> train_step.Method:
    """How parameters move, at a learning rate of the matrices."""
    if not self.method.rso:
      return train_step.method(self._optimizer(lr))
    s, rank = self.settings, self.setup.rank
    subproblems = self.method.make(
      rank,
      s.update_proj_gap,
      0,
      inner=optax.adam(lr),
      schedule=shape(s.steps),
      plain=optax.adam(s.lr_rest),
    )
    return train_step.method(subproblems, clip=s.clip)

  def _loss_of(self, params: Any, batch: jax.Array) -> jax.Array:
    merged = lora.merge(params, 1.0) if self.method.lora else params
    return self.loss(merged, batch)

  def _steps(self, state: Any, lr: jax.Array, batches: jax.Array) -> Any:
    step = train_step.make_step(self._loss_of, self._how(lr))
    return jax.lax.scan(lambda s, b: (step(s, b)[0], None), state, batches)[0]

  def _validate(self, state: Any, batches: jax.Array) -> jax.Array:
    params = self._how(0.0).merged(**state)
    one = lambda batch: self._loss_of(params, batch)
    return jnp.mean(jax.lax.map(one, batches))

  def run(self, lr: float, seed: int, corpus: tuple) -> dict[str, Any]:
    """Trains once; the loss is None where it is not finite."""
    s, (train, held) = self.settings, corpus[:2]
    began = time.perf_counter()
    params = jax.tree.map(jnp.copy, self.start(seed))
    state = {'params': params, 'opt_state': self.init(params)}
    for first in range(0, s.steps, self.chunk):
      one = lambda t: data.batch(train, (1, s.batch), s.seq, seed, t)
      steps = range(first, first + self.chunk)
      batches = jnp.asarray(np.stack([one(t) for t in steps]))
      state = self.program(state, jnp.float32(lr), batches)
    batches = data.validation_batches(held, s.batch, s.seq, 96)
    loss = float(self.validate(state, jnp.asarray(batches)))
    return {
      'lr': lr,
      'seed': seed,
      'loss': loss if math.isfinite(loss) else None,
      'seconds': round(time.perf_counter() - began, 1),
    }

  @functools.cached_property
  def _state(self) -> Any:
    params = jax.eval_shape(lambda: self.start(0))
    return {'params': params, 'opt_state': jax.eval_shape(self.init, params)}

  @functools.cached_property
  def program(self) -> Any:
    """The compiled steps of a chunk: (state, lr, batches) -> state."""
    s = self.settings
    batches = (self.chunk, 1, s.batch, s.seq + 1)
    steps = jax.jit(self._steps, donate_argnums=0).lower(
      self._state,
      jax.ShapeDtypeStruct((), jnp.float32),
      jax.ShapeDtypeStruct(batches, jnp.int32),
    )
    return steps.compile()

  def memory(self) -> dict[str, int]:
    """Bytes of the optimizer's state, of weights, and of what a step adds."""
    state = self._state
    return {
      'optimizer_bytes': programs.tree_bytes(state['opt_state']),
      'weight_bytes': programs.tree_bytes(state['params']),
      # Gradients and activations are in it.
      'temporary_bytes': programs.count_bytes(self.program).temporaries,
    }
