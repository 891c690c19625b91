"""Trains a very small byte-level LLaMA by any optimizer, in one program."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import programs
import data
import llama
import recipes
import subspace_optax as so
import train_step


@dataclasses.dataclass(frozen=True)
class Setting:
  """The model and its training."""

  width: int = 64
  mlp_width: int = 176
  layers: int = 2
  heads: int = 2
  seq: int = 64
  batch: int = 8
  steps: int = 200
  scale: float = 0.25  # of projected updates: GaLore's alpha
  update_proj_gap: int = 50  # of GaLore
  basis_rate: float = 0.005  # peak rate of the bases


SETTING = Setting()
# One grid for every optimizer, about what the papers chose theirs from.
RATES = (0.03, 0.01, 0.003)
VALIDATION = 128  # batches


@functools.cache
def corpus() -> data.Corpus:
  """The text of the examples."""
  return data.load()


@functools.cache
def model() -> Any:
  """(loss, init) of the model."""
  s = SETTING
  config = llama.LlamaConfig(
    s.width, s.mlp_width, s.layers, s.heads, vocab=corpus().vocab
  )
  make = lambda key: llama.Llama(config, nnx.Rngs(key))
  graphdef, _ = programs.split(lambda: make(0))
  init = lambda key: nnx.to_pure_dict(nnx.state(make(key)))
  return train_step.make_loss(graphdef), init


@functools.cache
def batches(seed: int) -> np.ndarray:
  """(steps, B, T + 1) tokens."""
  s = SETTING
  tokens = corpus().train
  return np.stack(
    [data.batch(tokens, (s.batch,), s.seq, seed, t) for t in range(s.steps)]
  )


@functools.cache
def validation() -> np.ndarray:
  """Windows of held-out text."""
  return data.validation_batches(
    corpus().validation, SETTING.batch, SETTING.seq, VALIDATION
  )


def schedule(peak: Any) -> Callable:
  """The papers': a warm-up over a tenth, then a cosine to a tenth."""
  unit = recipes.schedule(1.0, SETTING.steps)
  return lambda count: peak * unit(count)


def program(make: Callable[[Any], Any]) -> Callable:
  """(peak rate, key, batches) -> validation loss of the trained model.

  `make` takes a schedule to an optimizer.
  """
  loss, init = model()

  @jax.jit
  def run(peak, key, batches_SxBxT1, held_out):
    clip = optax.clip_by_global_norm(1.0)  # as in the papers
    tx = optax.chain(clip, make(schedule(peak)))
    step = train_step.make_step(loss, tx)
    one = lambda state, batch: (step(state, batch[None])[0], ())
    params = init(key)
    state = {'params': params, 'opt_state': tx.init(params)}
    trained = lax.scan(one, state, batches_SxBxT1)[0]['params']
    return jnp.mean(lax.map(lambda batch: loss(trained, batch), held_out))

  return run


def perplexities(
  make: Callable, seeds: int = 1, rates: tuple[float, ...] = RATES
) -> dict[str, list[float]]:
  """Validation perplexity per byte: a list over seeds for every rate."""
  run = program(make)

  def one(rate: float, seed: int) -> float:
    loss = run(rate, jax.random.key(seed), batches(seed), validation())
    return math.exp(min(float(loss), 700.0))

  return {str(r): [one(r, seed) for seed in range(seeds)] for r in rates}


def best(found: dict[str, list[float]]) -> tuple[str, list[float]]:
  """The rate whose mean over seeds is lowest, and its perplexities."""
  mean = lambda item: math.inf if np.isnan(item[1]).any() else np.mean(item[1])
  return min(found.items(), key=mean)


def adafactor() -> optax.GradientTransformation:
  """As in the paper's code: no relative step, no momentum, clipped at 1."""
  return optax.chain(
    optax.scale_by_factored_rms(min_dim_size_to_factor=8, epsilon=1e-30),
    optax.clip_by_block_rms(1.0),
  )


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
  'Lion': optax.scale_by_lion,
  'Adafactor': adafactor,
  'Adam': optax.scale_by_adam,
  'SGD': optax.identity,
}


def bases(name: str = '') -> so.projectors.Projector:
  """Bases moved by an optimizer at the rate of OSD's code, or GaLore's."""
  if not name:
    return so.projectors.svd(SETTING.update_proj_gap)
  rate = optax.scale_by_learning_rate(schedule(SETTING.basis_rate))
  optimizer = optax.chain(OPTIMIZERS[name](), rate)
  return so.projectors.online_pca(optimizer, init='svd')


def projected(
  rank: int,
  projector: so.projectors.Projector,
  inner: optax.GradientTransformation,
  **options: Any,
) -> Callable[..., optax.GradientTransformation]:
  """One point of the grid, made of a schedule."""
  spec, scale = so.SubspaceSpec(rank), SETTING.scale
  tx = so.subspace(spec, projector, inner, scale=scale, **options)
  return lambda rate: optax.chain(tx, optax.scale_by_learning_rate(rate))
