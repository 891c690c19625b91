# %% [markdown]
# # Your own projector, residual and transport
#
# A subspace optimizer is [five choices](../pieces.md). You can write rules for
# three of them in a few lines: how a basis is found, what happens to the
# gradient outside the subspace, and what happens to moments when the basis
# moves. The library takes care of stacks of layers, meshes, dtypes, NaN
# gradients and the schedule of refreshes.
#
# You need `pip install .` in a clone.

# %%
import jax
import jax.numpy as jnp
import optax

import subspace_optax as so

# %% [markdown]
# ## A projector
#
# Some methods train a few rows of each matrix at a time. As a subspace, that is
# a basis whose columns are unit vectors, which pick the rows where the gradient
# is largest.
#
# Write `draw` for one matrix, as in a paper. It gets the matrix, the old basis,
# and the number of the refresh, and returns the new basis, m x r. The matrix's
# gradient is m x n, where m is the side that the basis spans.


# %%
def largest_rows(update_proj_gap):
  def draw(matrix, basis, period):
    del basis, period
    energy = jnp.sum(jnp.square(matrix.gradient), axis=1)
    _, rows = jax.lax.top_k(energy, matrix.rank)
    return jax.nn.one_hot(rows, matrix.m).T

  return so.projectors.periodic('largest_rows', draw, update_proj_gap)


# %% [markdown]
# `so.testing` trains a small tree with it: a matrix, a stack along a middle
# axis, and gradients, one of them zero and one NaN. If all is well, it returns
# silently.

# %%
so.testing.check_projector(largest_rows(2))

# %% [markdown]
# A mistake raises an error that explains it. This rule returns its basis
# transposed:

# %%
turned = so.projectors.periodic('turned', lambda m, basis, t: basis.T, 2)
try:
  so.testing.check_projector(turned)
except ValueError as error:
  print(error)

# %% [markdown]
# `matrix.coordinates(P)` is the product of P transposed with the gradient, and
# `matrix.image(X)` that of the gradient with X transposed. A rule that uses
# only these two stays cheap in data-parallel steps, where `matrix.gradient`
# averages the full gradient over devices.
#
# ## A residual
#
# The gradient outside the subspace is dropped unless a residual takes it. This
# one takes a plain gradient step with it. It sees a `node`, which is a whole
# leaf: `node.direction` is the inner optimizer's output for the coordinates,
# `combine` maps coordinates back to the leaf's shape, and `outside()` is the
# part of the gradient that the basis does not span. It returns the update and
# its state; this rule has none.


# %%
def gradient_descent(eta):
  def update(node, scale, count, state):
    del count
    inside = node.combine(scale * node.direction)
    return inside + eta * node.outside(), state

  return so.residuals.Residual('gradient_descent', update)


# %% [markdown]
# ## A transport
#
# When a basis moves, the moments are still in the coordinates of the old one.
# This rule maps first moments to the new basis, as GoLore does, and shrinks
# them, because less is known about the new coordinates. `moment.transition` is
# the r x r matrix from old coordinates to new ones.


# %%
def shorter(factor):
  def move(moment):
    return factor * moment.mix(moment.transition, moment.value)

  return so.transports.Transport('shorter', move, kinds=('mean', 'sum'))


# %% [markdown]
# `so.testing.check_residual(gradient_descent(0.1))` and
# `so.testing.check_transport(shorter(0.5))` check the two, in half a minute:
# try them. `make test-full` does.
#
# ## All three in an optimizer
#
# `so.subspace` accepts them in place of its own rules, around any inner optax
# optimizer.

# %%
tx = so.subspace(
  so.SubspaceSpec(rank=8),
  largest_rows(update_proj_gap=20),
  optax.scale_by_adam(),
  transport=shorter(0.5),
  residual=gradient_descent(1.0),
  after=optax.scale_by_learning_rate(1e-2),
)

keys = jax.random.split(jax.random.key(0), 3)
x = jax.random.normal(keys[0], (256, 32))
y = jnp.sin(x @ jax.random.normal(keys[1], (32, 48)))
params = {'w': 0.1 * jax.random.normal(keys[2], (32, 48))}


def loss(params):
  return jnp.mean((jnp.tanh(x @ params['w']) - y) ** 2)


train = so.train_step(loss, tx)
step, state = jax.jit(train.step), train.init(params)
for t in range(101):
  params, state, value = step(params, state)
  if t % 25 == 0:
    print(f'step {t:>3}: loss {value:.4f}')

# %%
print(so.describe(tx, params))

# %% [markdown]
# ## Where to go
#
# - The rules of the library are written the same way:
#   `subspace_optax/projectors/_power.py` and its neighbours.
# - The [reference](../api/testing.md) of `so.testing`, and of [transports and
#   residuals](../api/rules.md).
# - [CONTRIBUTING](../../CONTRIBUTING.md) says what a rule needs to become a
#   part of the library.
