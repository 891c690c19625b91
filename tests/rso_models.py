"""Small models whose linear layers the tests of `rso` lift.

Every model is a stack of blocks: attention by kernels of three axes, and an MLP
with biases. Sizes are such that no product of activations has as many elements
as a kernel has.
"""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_optax as so
from subspace_optax import rso

BATCH, TIME, WIDTH, HEADS, HIDDEN, LAYERS = 2, 5, 8, 2, 20, 2
HEAD_WIDTH = 6  # of all heads: 12
KERNELS = (WIDTH * HEADS * HEAD_WIDTH, WIDTH * HIDDEN)  # elements of a kernel
SPEC = so.SubspaceSpec(rank=3, only_if_smaller=False)


def _attention(query, key, value, **kwargs):
  """Linear, since not every compiler has an exact exp in float64."""
  del kwargs
  scores = jnp.einsum('bqhd,bkhd->bhqk', query, key) / query.shape[1]
  return jnp.einsum('bhqk,bkhd->bqhd', scores, value)


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    kwargs = {'param_dtype': jnp.float64, 'rngs': rngs}
    self.attention = nnx.MultiHeadAttention(
      HEADS,
      WIDTH,
      HEADS * HEAD_WIDTH,
      decode=False,
      attention_fn=_attention,
      **kwargs,
    )
    self.up = nnx.Linear(WIDTH, HIDDEN, **kwargs)
    self.down = nnx.Linear(HIDDEN, WIDTH, use_bias=False, **kwargs)

  def __call__(self, x):
    x = x + self.attention(jnp.sin(x))
    return x + self.down(jnp.tanh(self.up(x)))


class NnxModel(nnx.Module):
  def __init__(self, rngs, stacked: bool, remat: bool):
    self.remat = remat
    self.blocks = (
      nnx.vmap(NnxBlock)(rngs.split(LAYERS))
      if stacked
      else nnx.List([NnxBlock(rngs) for _ in range(LAYERS)])
    )

  def __call__(self, x):
    step = lambda x, block: (block(x), None)
    step = jax.checkpoint(step) if self.remat else step
    if isinstance(self.blocks, nnx.List):
      for block in self.blocks:
        x, _ = step(x, block)
      return x
    return jax.lax.scan(step, x, self.blocks)[0]


class LinenBlock(nn.Module):
  boxed: bool = False

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.lecun_normal()
    if self.boxed:
      init = nn.with_partitioning(init, ('fsdp', 'tensor'))
    kwargs = {'param_dtype': jnp.float64, 'kernel_init': init}
    attention = nn.MultiHeadDotProductAttention(
      HEADS,
      qkv_features=HEADS * HEAD_WIDTH,
      attention_fn=_attention,
      param_dtype=jnp.float64,
      name='attention',
    )
    x = x + attention(jnp.sin(x))
    h = nn.Dense(HIDDEN, name='up', **kwargs)(x)
    h = nn.Dense(WIDTH, use_bias=False, name='down', **kwargs)(jnp.tanh(h))
    return x + h


class LinenModel(nn.Module):
  stacked: bool
  remat: bool
  axis: int = 0
  boxed: bool = False

  @nn.compact
  def __call__(self, x):
    block = nn.remat(LinenBlock) if self.remat else LinenBlock
    if not self.stacked:
      for i in range(LAYERS):
        x = block(self.boxed, name=f'blocks_{i}')(x)
      return x
    body = lambda block, x: (block(x), None)
    scan = nn.scan(
      body,
      variable_axes={'params': self.axis},
      split_rngs={'params': True},
      length=LAYERS,
      metadata_params={nn.PARTITION_NAME: None},
    )
    return scan(block(self.boxed, name='blocks'), x)[0]


class Problem(NamedTuple):
  """A model's parameters, and its loss with and without lifted ones.

  Made once a process, in float64: all tests that take one enable it.
  """

  params: Any
  plain: Any
  lifted: Any


def inputs() -> jax.Array:
  return jax.random.normal(jax.random.key(7), (BATCH, TIME, WIDTH), jnp.float64)


@functools.cache
def nnx_problem(stacked: bool, remat: bool, pure: bool = True) -> Problem:
  model = nnx.jit(lambda: NnxModel(nnx.Rngs(0), stacked, remat))()
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(merge, params, x):
    return jnp.mean(merge(graphdef, params, rest)(x) ** 2)

  params = nnx.to_pure_dict(params) if pure else params
  return Problem(
    params,
    functools.partial(loss, nnx.merge),
    functools.partial(loss, rso.nnx_merge),
  )


@functools.cache
def linen_problem(stacked: bool, remat: bool, **kwargs) -> Problem:
  model = LinenModel(stacked, remat, **kwargs)
  params = jax.jit(model.init)(jax.random.key(0), inputs())['params']
  plain = lambda p, x: jnp.mean(model.apply({'params': p}, x) ** 2)
  lifted = lambda p, x: jnp.mean(rso.linen_apply(model, {'params': p}, x) ** 2)
  return Problem(params, plain, lifted)


def _name(path: Any) -> str:
  """Returns a leaf's path without the name of what is in a box."""
  name = jax.tree_util.keystr(path, simple=True, separator='/')
  return re.sub('kernel/value$', 'kernel', name)


def flat(tree: Any) -> dict[str, Any]:
  """Returns leaves by path, boxes opened; masked ones are not there."""
  pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {_name(path): x for path, x in pairs}


def subscripts(path: str, ndim: int, axis: int = 0) -> tuple[str, str, str]:
  """Returns einsum's subscripts of a kernel, its basis and coordinates."""
  if re.search('query|key|value', path):
    kernel, basis, coords = 'mnk', 'mr', 'rnk'
  elif '/out/' in path:
    kernel, basis, coords = 'nkm', 'nkr', 'rm'
  else:
    kernel, basis, coords = 'mn', 'mr', 'rn'
  if ndim == len(kernel):
    return kernel, basis, coords
  layered = lambda s: s[:axis] + 'l' + s[axis:]
  return layered(kernel), layered(basis), layered(coords)


def draw(problem: Problem, axis: int = 0, seed: int = 1) -> tuple[Any, Any]:
  """Returns random bases and coordinates for all kernels."""
  rng = np.random.default_rng(seed)

  def of(path, leaf, which):
    name = _name(path)
    if 'kernel' not in name:
      return optax.MaskedNode()
    axes = subscripts(name, leaf.ndim, axis)
    size = dict(zip(axes[0], leaf.shape, strict=True)) | {'r': SPEC.rank}
    shape = [size[c] for c in axes[which]]
    return jnp.asarray(0.3 * rng.standard_normal(shape), leaf.dtype)

  return tuple(
    jax.tree_util.tree_map_with_path(
      functools.partial(of, which=which), problem.params
    )
    for which in (1, 2)
  )


def spec(params: Any, axis: int) -> so.SubspaceSpec:
  """Returns the spec for layers along an axis."""

  def of(path, leaf):
    name = _name(path)
    if 'kernel' not in name:
      return None
    kernel, basis, coords = subscripts(name, leaf.ndim, axis)
    rows = tuple(kernel.index(c) for c in basis if c not in 'lr')
    cols = tuple(kernel.index(c) for c in coords if c not in 'lr')
    return so.DimensionNumbers(rows, cols)

  dims = jax.tree_util.tree_map_with_path(of, params)
  return dataclasses.replace(SPEC, weight_dimension_numbers=dims)


def merged(params: Any, bases: Any, coords: Any, axis: int = 0) -> Any:
  """Returns the parameters with W + P B in the place of every kernel."""
  bases, coords = flat(bases), flat(coords)

  def add(path, leaf):
    name = _name(path)
    if name not in bases:
      return leaf
    w, p, b = subscripts(name, leaf.ndim, axis)
    return leaf + np.einsum(f'{p},{b}->{w}', bases[name], coords[name])

  return jax.tree_util.tree_map_with_path(add, params)


def projected(gradient: Any, bases: Any, axis: int = 0) -> dict[str, Any]:
  """Returns P^T G of every kernel, the gradient of all else."""
  bases, found = flat(bases), {}
  for path, g in flat(gradient).items():
    found[path] = np.asarray(g)
    if path in bases:
      w, p, b = subscripts(path, g.ndim, axis)
      found[path] = np.einsum(f'{p},{w}->{b}', bases[path], g)
  return found
