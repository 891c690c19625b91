"""One training run of the Pareto benchmark: a program for many runs."""

from collections.abc import Hashable
import dataclasses
import functools
import hashlib
import math
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import contenders
from benchmarks import corpora
from benchmarks import harness
from benchmarks import programs
import data
import llama
import recipes
import train_step

CHUNK = 50  # steps in one call of the program
# Weights of the matrices of a size: width, width of the MLP, layers, heads.
SIZES = {
  '0.1M': (64, 172, 2, 2),
  '0.4M': (128, 344, 2, 4),
  '1.6M': (256, 688, 2, 8),
  '10M': (384, 1032, 6, 6),
  '30M': (512, 1376, 10, 8),
  '85M': (768, 2048, 12, 12),
}


@dataclasses.dataclass(frozen=True)
class Job:
  """All runs that one program does: they differ in rate, decay and seed.

  Attributes:
    method: a name of `contenders.CONTENDERS`.
    corpus: a name of `corpora.CORPORA`, whose bytes are the tokens.
    size: a name of `SIZES`.
    multiple: tokens, over 20 for each weight of the matrices.
    batch: sequences in a step.
    seq: their length.
    lr_rest: peak rate of embedding, head and norms.
    clip: global norm that gradients are clipped to.
  """

  method: str
  corpus: str
  size: str = '0.4M'
  multiple: float = 1.0
  batch: int = 16
  seq: int = 128
  lr_rest: float = 4e-3
  clip: float = 1.0

  @property
  def config(self) -> llama.LlamaConfig:
    width, mlp_width, layers, heads = SIZES[self.size]
    return llama.LlamaConfig(width, mlp_width, layers, heads, vocab=256)

  @property
  def steps(self) -> int:
    c = self.config
    weights = c.layers * c.width * (4 * c.width + 3 * c.mlp_width)
    tokens = 20 * self.multiple * weights
    return CHUNK * round(tokens / (self.batch * self.seq * CHUNK))


def shape(steps: int, share: float) -> optax.Schedule:
  """Linear warm-up to 1 over a share of the steps, then linear to 0."""
  warmup = int(steps * share)
  rise = optax.linear_schedule(1 / warmup, 1.0, warmup)
  fall = optax.linear_schedule(1.0, 0.0, steps - warmup)
  return optax.join_schedules([rise, fall], [warmup])


class Trainer:
  """Trains one job; rate, decay and seed cost no compilation."""

  def __init__(self, job: Job):
    self.job, self.how = job, contenders.CONTENDERS[job.method]
    self.loss = train_step.make_loss(self._model(0)[0])
    self.validate = jax.jit(self._validate)
    self.init = jax.jit(lambda p: self._method(1.0, 0.0).init(p))

  def _model(self, seed: int) -> tuple[Any, Any]:
    model = llama.Llama(self.job.config, nnx.Rngs(seed))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)

  def _method(self, lr: Any, decay: Any) -> train_step.Method:
    """What trains; `decay` is the share of a matrix lost in a step at peak.

    So a decay means as much whatever the learning rate that suits a method.
    """
    factor = shape(self.job.steps, self.how.warmup)
    if self.how.loop is not None:
      loop = self.how.loop(lr, self.job.lr_rest, factor)
      return train_step.method(loop, clip=self.job.clip)
    assert self.how.make is not None
    own = self.how.make(lambda count: lr * factor(count), decay / lr)
    if not self.how.whole:
      rest = optax.chain(
        contenders.adam(self.how.bits, *self.how.betas),
        optax.scale_by_learning_rate(lambda c: self.job.lr_rest * factor(c)),
      )
      parts: dict[Hashable, Any] = {True: own, False: rest}
      own = optax.partition(parts, recipes.matrix_mask)
    clip = optax.clip_by_global_norm(self.job.clip)
    return train_step.method(optax.chain(clip, own))

  def _steps(self, state: Any, lr: Any, decay: Any, batches: Any) -> Any:
    step = train_step.make_step(self.loss, self._method(lr, decay))

    def one(state, batch):
      state, metrics = step(state, batch)
      return state, metrics['loss']

    state, losses = jax.lax.scan(one, state, batches)
    return state, jnp.mean(losses)

  def _validate(self, params: Any, batches: jax.Array) -> jax.Array:
    return jnp.mean(jax.lax.map(lambda b: self.loss(params, b), batches))

  @functools.cached_property
  def _state(self) -> Any:
    params = jax.eval_shape(lambda: self._model(0)[1])
    return {'params': params, 'opt_state': jax.eval_shape(self.init, params)}

  @functools.cached_property
  def _lowered(self) -> Any:
    job, number = self.job, jax.ShapeDtypeStruct((), jnp.float32)
    batches = (CHUNK, 1, job.batch, job.seq + 1)
    return jax.jit(self._steps, donate_argnums=0).lower(
      self._state, number, number, jax.ShapeDtypeStruct(batches, jnp.int32)
    )

  @functools.cached_property
  def digest(self) -> str:
    """Of the whole program: code that changes no result changes no digest."""
    return hashlib.sha256(self._lowered.as_text().encode()).hexdigest()[:16]

  @functools.cached_property
  def sources(self) -> dict[str, str]:
    """What a run is made of, but for its settings."""
    return {'program': self.digest, 'text': load_corpus(self.job.corpus)[2]}

  @functools.cached_property
  def program(self) -> Any:
    """The compiled steps of a chunk."""
    return self._lowered.compile()

  def run(self, lr: float, decay: float, seed: int) -> dict[str, Any]:
    """Trains once; losses are None where they are not finite."""
    job, began = self.job, time.perf_counter()
    train, held = load_corpus(job.corpus)[:2]
    params = jax.tree.map(jnp.copy, self._model(seed)[1])
    state, curve = {'params': params, 'opt_state': self.init(params)}, []
    numbers = jnp.float32(lr), jnp.float32(decay)
    for first in range(0, job.steps, CHUNK):
      one = lambda t: data.batch(train, (1, job.batch), job.seq, seed, t)
      steps = range(first, first + CHUNK)
      batches = jnp.asarray(np.stack([one(t) for t in steps]))
      state, loss = self.program(state, *numbers, batches)
      curve.append(finite(loss))
      if curve[-1] is None:
        break
    half, trained = len(held) // 2, self._method(1.0, 0.0).merged(**state)
    evaluate = lambda text: finite(
      self.validate(
        trained,
        jnp.asarray(data.validation_batches(text, job.batch, job.seq, 64)),
      )
    )
    return {
      'validation': evaluate(held[:half]),
      'test': evaluate(held[half:]),
      'curve': curve,
      'seconds': round(time.perf_counter() - began, 1),
      # The same run on another kind of processor rounds otherwise.
      'processor': harness.describe_machine()['processor'],
    }

  def memory(self) -> dict[str, int]:
    """Bytes of the optimizer's state, of weights, and of what a step adds."""
    return {
      'optimizer_bytes': programs.tree_bytes(self._state['opt_state']),
      'weight_bytes': programs.tree_bytes(self._state['params']),
      # Gradients and activations are in it.
      'temporary_bytes': programs.count_bytes(self.program).temporaries,
    }


def finite(loss: Any) -> float | None:
  loss = float(loss)
  return round(loss, 5) if math.isfinite(loss) else None


@functools.cache
def load_corpus(name: str) -> tuple[np.ndarray, np.ndarray, str]:
  train, held, digest = corpora.load(name, harness.ROOT / 'runs' / 'pareto')
  return train, held, digest[:16]
