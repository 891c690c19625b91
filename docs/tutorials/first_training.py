# %% [markdown]
# # First training
#
# A network reads sixteen bytes of text and guesses the next one. We train it
# twice: with AdamW, and with Muon in subspaces with 8-bit momentum. Only one
# line changes between them.
#
# You need `pip install .` in a clone, and matplotlib.

# %%
import pathlib

from flax import nnx
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import subspace_optax as so

# %% [markdown]
# ## Text
#
# The sources of optax will do, since you have them. A batch is a set of random
# windows of that text.

# %%
folder = pathlib.Path(optax.__file__).parent
files = sorted(folder.rglob('*.py'))
text = np.frombuffer(b''.join(x.read_bytes() for x in files), np.uint8)


def batch(step, size=128, context=16):
  starts = np.random.default_rng(step).integers(len(text) - context, size=size)
  windows = text[starts[:, None] + np.arange(context + 1)].astype(np.int32)
  return windows[:, :-1], windows[:, -1]


[bytes(window.tolist()) for window in batch(0)[0][:3]]

# %% [markdown]
# ## A model


# %%
class Model(nnx.Module):
  def __init__(self, rngs, width=128, context=16):
    self.embed = nnx.Embed(256, 32, rngs=rngs)
    self.inputs = nnx.Linear(32 * context, width, rngs=rngs)
    self.hidden = nnx.Linear(width, width, rngs=rngs)
    self.head = nnx.Linear(width, 256, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens).reshape(len(tokens), -1)
    x = nnx.gelu(self.inputs(x))
    x = x + nnx.gelu(self.hidden(x))
    return self.head(x)


# %% [markdown]
# ## A training loop
#
# The loop knows nothing of subspaces: every optimizer here is an
# `optax.GradientTransformation`.


# %%
@nnx.jit
def step(model, optimizer, tokens, target):
  def loss(model):
    logits = model(tokens)
    return jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(logits, target)
    )

  value, gradients = nnx.value_and_grad(loss)(model)
  optimizer.update(model, gradients)
  return value


def train(tx, steps=100):
  model = Model(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  losses = [step(model, optimizer, *batch(t)) for t in range(steps)]
  return np.array(losses), optimizer


# %% [markdown]
# ## What would be projected?
#
# `so.subspace_muon` projects each matrix onto a subspace of a quarter of its
# short side, keeps momentum there, and orthogonalises it together with the
# gradient outside. Ask before you train: the shapes of the parameters are
# enough.

# %%
params = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)
muon = so.subspace_muon(5e-3, rank=0.25, moment_bits=8)
print(so.describe(muon, params))

# %% [markdown]
# Two matrices are projected. Embedding, head and biases are left to Adam
# because of their names; `so.SubspaceSpec(include=..., exclude=...)` changes
# that. The state takes this much memory:

# %%
print(so.memory_report(muon, params))

# %% [markdown]
# ## Training

# %%
runs = {
  'adamw': optax.adamw(5e-3),
  'subspace_muon, 8 bits': muon,
}
trained = {name: train(tx) for name, tx in runs.items()}

for name, (losses, _) in trained.items():
  state = so.memory_report(runs[name], params).state
  print(f'{name:<22} loss {losses[-20:].mean():.3f}, {state / 2**20:.2f} MiB')

# %%
figure, axes = plt.subplots(figsize=(7, 3.5))
for name, (losses, _) in trained.items():
  axes.plot(np.convolve(losses, np.ones(10) / 10, 'valid'), label=name)
_ = axes.set(xlabel='step', ylabel='loss, nats a byte', ylim=(None, 4))
_ = axes.legend()

# %% [markdown]
# A hundred steps of a small network at learning rates that were not tuned do
# not show which optimizer is better. [The results](../../README.md#results)
# come from runs that do. `so.normuon(5e-3, moment_bits=8)`, on full matrices,
# is the third line to try here: it takes more state and is first in those
# results.
#
# ## A look inside
#
# The share of the gradient that the subspaces held in the last step:

# %%
_, optimizer = trained['subspace_muon, 8 bits']
for path, metrics in so.subspace_metrics(optimizer.opt_state).items():
  print(path, metrics['captured_energy'])

# %% [markdown]
# The state is a tree of arrays, which Orbax saves as it saves Adam's state.
#
# ## Where to go
#
# - [How to choose](../choose.md) an optimizer for your memory, and where to
#   start tuning.
# - [The pieces](../pieces.md) that all optimizers here are made of, and a [rule
#   of your own](own_rules.py).
# - `make train` in a clone trains a LLaMA ([examples](../examples.md)).
