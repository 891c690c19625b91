"""A `llama_test` of few matrices, and trainers that trace a program once.

With bases of rank `RANK`, queries and outputs of attention are projected; what
is beside them is too narrow to be worth it. A trainer is about none of that.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama
import pretrain

RANK = 8
BLOCK = llama.Block  # of a whole model
DRAW = pretrain.draw  # the picture of a run, which takes as long as the run


def small(**changes: Any) -> llama.LlamaConfig:
  sizes = {'mlp_width': 8, 'kv_heads': 1} | changes
  return dataclasses.replace(llama.NAMED['llama_test'], **sizes)


def install() -> None:
  """Puts it in place of `llama_test`, for as long as this process lives."""
  llama.NAMED['llama_test'] = small()


def install_in(patch: pytest.MonkeyPatch, **changes: Any) -> None:
  patch.setitem(llama.NAMED, 'llama_test', small(**changes))


def _draw(
  key: jax.Array, shape: tuple[int, ...], dtype: Any, **kwargs: Any
) -> jax.Array:
  """Weights of no key: constants, where drawing takes most of a compilation."""
  del key, kwargs
  noise = np.random.default_rng(shape).standard_normal(shape)
  return jnp.asarray(noise / shape[0] ** 0.5, dtype)


def drawn(c: llama.LlamaConfig) -> tuple[Any, Any]:
  """A model's graph and weights, without a program.

  Scales of norms are away from 1, so that their place matters.
  """
  graphdef, shapes = nnx.split(
    nnx.eval_shape(lambda: llama.Llama(c, nnx.Rngs(0)))
  )
  rng = np.random.default_rng(0)

  def draw(path: Any, x: Any) -> jax.Array:
    name, noise = jax.tree_util.keystr(path), rng.standard_normal(x.shape)
    if 'scale' in name:
      noise = 1 + 0.3 * noise
    else:
      noise *= 0.02 if 'embed' in name else x.shape[-2] ** -0.5
    return jnp.asarray(noise, x.dtype)

  shapes = nnx.to_pure_dict(shapes)
  return graphdef, jax.tree_util.tree_map_with_path(draw, shapes)


class OneKernel(nnx.Module):
  """A block of one kernel, which is projected."""

  def __init__(self, c: llama.LlamaConfig, rngs: nnx.Rngs):
    self.up = llama.linear(c, c.width, c.width, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return x + jnp.tanh(self.up(x))


def thin_in(patch: pytest.MonkeyPatch, block: Any = OneKernel) -> None:
  """Blocks of one kernel, and weights that need no program to draw them.

  Every leaf costs a trace and a compilation of the optimizer.
  """
  patch.setattr(llama, 'Block', block)
  patch.setattr(llama, '_INIT', _draw)
  patch.setattr(llama, '_EMBED_INIT', _draw)


@contextlib.contextmanager
def installed() -> Iterator[None]:
  """Thinned, and runs of one configuration share what is compiled.

  They draw nothing.
  """
  plan, compiled, plans, programs = pretrain.plan, pretrain.compiled, {}, {}

  def plan_once(c, vocab, devices):
    key = dataclasses.replace(c, out='', resume=False)
    key = key, llama.NAMED[c.model], llama.Block, vocab, devices
    if key not in plans:
      plans[key] = plan(c, vocab, devices)
    return plans[key]

  def compile_once(run, devices, example):
    if run.init not in programs:
      programs[run.init] = compiled(run, devices, example)
    return programs[run.init]

  with pytest.MonkeyPatch.context() as patch:
    install_in(patch)
    thin_in(patch)
    patch.setattr(pretrain, 'plan', plan_once)
    patch.setattr(pretrain, 'compiled', compile_once)
    patch.setattr(pretrain, 'draw', lambda *_: None)
    yield
