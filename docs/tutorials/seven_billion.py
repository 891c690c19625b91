# %% [markdown]
# # A 7B model on one card
#
# AdamW takes 55 GB to train LLaMA-7B on one sequence of 2,048 tokens. A card of
# 24 GB is enough if states are small and gradients never exist all at once.
# This page plans such a run, and tries its training step on a stand-in. It
# allocates nothing of 7B parameters.
#
# You need `pip install .` in a clone.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_optax as so
import subspace_optax.plan as plan

# %% [markdown]
# ## The plan
#
# [The planner](../plan.md) traces the training step and counts the memory at
# its peak. `remat` computes layers again in the backward pass, and `layerwise`
# also updates each layer as soon as its gradient is known.

# %%
run = {'batch': 1, 'seq': 2048, 'rank': 1024}
plans = {
  'AdamW': plan.plan('llama_7b', 'adamw', remat=True, **run),
  'AdamW, layer by layer': plan.plan(
    'llama_7b', 'adamw', layerwise=True, **run
  ),
  'and in 8 bits': plan.plan('llama_7b', 'adamw8bit', layerwise=True, **run),
  'Muon in subspaces, 8 bits': plan.plan(
    'llama_7b', 'subspace_muon8bit', layerwise=True, **run
  ),
}
for name, found in plans.items():
  fits = 'fits' if found.fits('rtx4090') else ''
  print(f'{name:<26}{found.total / 1e9:>6.1f} GB  {fits}')

# %% [markdown]
# The parts of the last plan:

# %%
print(plans['Muon in subspaces, 8 bits'])

# %% [markdown]
# Most of what is left is bfloat16 weights. `python -m subspace_optax.plan`
# prints the same in a shell, and the largest rank and batch that would still
# fit.
#
# ## The training step
#
# `so.layerwise` needs the model as three functions: everything before the
# layers, one layer, and everything after them, up to the loss. Stack the
# parameters of all layers along their first axes. The stand-in has 12 layers,
# small enough for this page.


# %%
def embed(rest, tokens):
  return rest['embedding'][tokens[:, :-1]]


def block(layer, x, tokens):
  return x + jax.nn.silu(x @ layer['up']) @ layer['down']


def head(rest, x, tokens):
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(
      x @ rest['head'], tokens[:, 1:]
    )
  )


def make(key, layers=12, width=64, hidden=256, vocab=128):
  keys = jax.random.split(key, 4)
  normal = lambda key, *shape: 0.05 * jax.random.normal(key, shape)
  return {
    'embedding': normal(keys[0], vocab, width),
    'blocks': {
      'up': normal(keys[1], layers, width, hidden),
      'down': normal(keys[2], layers, hidden, width),
    },
    'head': normal(keys[3], width, vocab),
  }


# %% [markdown]
# Any optimizer works; this one compiles faster than the plan's. `layerwise`
# makes a training step with `init` and `step` from it. Donate parameters and
# state, so that they are updated in place.

# %%
tx = so.subspace_adamw(1e-3, rank=0.25, moment_bits=8)
train = so.layerwise(tx, embed, block, head)

params = make(jax.random.key(0))
state = jax.jit(train.init)(params)
tokens = jax.random.randint(jax.random.key(1), (4, 33), 0, 128)
step = jax.jit(train.step, donate_argnums=(0, 1))
by_layer = step.lower(params, state, tokens).compile()

# %% [markdown]
# For comparison, here is the ordinary step of the same model, which holds the
# full gradient:


# %%
def loss(params, tokens):
  rest = {k: x for k, x in params.items() if k != 'blocks'}
  layer = lambda x, layer: (block(layer, x, tokens), None)
  x, _ = jax.lax.scan(layer, embed(rest, tokens), params['blocks'])
  return head(rest, x, tokens)


ordinary = so.train_step(loss, tx)
whole = jax.jit(ordinary.step, donate_argnums=(0, 1))
whole = whole.lower(params, ordinary.init(params), tokens).compile()
for name, program in (('ordinary', whole), ('by layer', by_layer)):
  size = program.memory_analysis().temp_size_in_bytes
  print(f'{name}: {size / 2**20:.2f} MiB of temporaries')

# %% [markdown]
# They take the same steps, to rounding:

# %%
pairs = []
for train_step, program in ((ordinary, whole), (train, by_layer)):
  params = make(jax.random.key(0))
  state, losses = jax.jit(train_step.init)(params), []
  for _ in range(10):
    params, state, metrics = program(params, state, tokens)
    losses.append(float(getattr(metrics, 'loss', metrics)))
  pairs.append(losses)
np.testing.assert_allclose(*pairs, rtol=1e-2)
print(f'loss {pairs[1][0]:.3f} -> {pairs[1][-1]:.3f}')

# %% [markdown]
# ## The same with 7B
#
# All of this also works on shapes. The planner has the shapes of LLaMA-7B, and
# its functions:

# %%
model = plan.named('llama_7b', 'bfloat16')
seven = so.layerwise(
  so.subspace_muon(2e-3, rank=1024, moment_bits=8),
  model.embed,
  lambda layer, x, tokens: model.block(layer, x),
  model.head,
)
print(so.memory_report(seven, model.params))

# %% [markdown]
# "gradients" are those of one layer, embedding and head: nothing else is alive
# at a time. You can also trace the step itself; it returns parameters and state
# of the shapes that it was given.

# %%
state = jax.eval_shape(seven.init, model.params)
new, _, metrics = jax.eval_shape(
  seven.step, model.params, state, model.inputs(1, 2048)
)
assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, model.params)
print(metrics.loss)

# %% [markdown]
# ## Where to go
#
# - With bfloat16 weights, put `so.round_updates()` last in the chain:
#   [memory](../memory.md) has this and every other remedy with its price.
# - [Layer by layer](../layerwise.md), and how clipping changes there.
# - With `examples/`, run `python examples/pretrain.py --model llama_7b --preset
#   one_card --rank 1024 --batch 1 --seq 2048`.
