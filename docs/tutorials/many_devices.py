# %% [markdown]
# # Many devices on a laptop
#
# jax can treat one CPU as four devices. Programs are partitioned as for four
# accelerators, so on a laptop you can see where arrays live and what crosses
# the links.
#
# You need `pip install -e .` in a clone; `benchmarks/` counts the bytes.

# %%
import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)  # before jax is used

# %%
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from benchmarks import hlo
import subspace_optax as so

mesh = jax.make_mesh((4,), ('fsdp',), axis_types=(AxisType.Auto,))
mesh

# %% [markdown]
# ## Parameters sharded over devices
#
# Here is a stack of 8 layers. Each of its matrices is sharded along its inputs,
# as FSDP does.

# %%
shapes = {'up': (8, 128, 512), 'down': (8, 512, 128)}
cut = NamedSharding(mesh, P(None, 'fsdp', None))
params = {
  name: jax.device_put(jnp.ones(shape), cut) for name, shape in shapes.items()
}
[shard.data.shape for shard in params['up'].addressable_shards]

# %% [markdown]
# ## State where it belongs
#
# `so.state_sharding` says where each array of the state goes, before the state
# exists. Pass its result to `jax.jit`, and no device ever holds more than its
# part.

# %%
tx = so.golore(1e-3, rank=16, regenerate=True)
place = so.state_sharding(tx, params)
state = jax.jit(tx.init, out_shardings=place)(params)


def on_one_device(tree):
  arrays = jax.tree.leaves(tree)
  return sum(x.addressable_shards[0].data.nbytes for x in arrays)


whole = sum(x.nbytes for x in jax.tree.leaves(state))
print(f'state {whole:,} bytes, on one device {on_one_device(state):,}')

# %% [markdown]
# ## Bytes in the program
#
# The compiled text of an update names every collective. `hlo.collectives` reads
# them from it, and `hlo.sent` adds up what a device sends if the devices form a
# ring. Of a step that sometimes refreshes, we count the 'cheap' branch, which
# does not.


# %%
def kilobytes(program):
  found = hlo.collectives(program.as_text(), len(mesh.devices), 'cheap')
  return hlo.sent(found) / 1e3


weights = sum(x.nbytes for x in params.values())
print(f'FSDP sends {3 * 3 / 4 * weights / 1e3:,.0f} kB for the weights')
optimizers = {
  'optax.adamw': optax.adamw(1e-3),
  'so.golore': tx,
  'so.normuon': so.normuon(1e-3, moment_bits=8),
}
with jax.set_mesh(mesh):
  for name, one in optimizers.items():
    place = so.state_sharding(one, params)
    state = jax.jit(one.init, out_shardings=place)(params)
    update = jax.jit(one.update, donate_argnums=(0, 1))
    program = update.lower(params, state, params).compile()
    print(
      f'{name:<12} sends {kilobytes(program):>5,.0f} kB more,'
      f' state on a device {on_one_device(state) / 1e3:>5,.0f} kB'
    )

# %% [markdown]
# AdamW works element by element and sends nothing. Subspace optimizers send
# arrays of width r. NorMuon sends matrices once in each direction, so that each
# device orthogonalises full matrices. For programs compiled for TPUs see [what
# crosses devices](../communication.md).
#
# ## Slow links between replicas
#
# In data parallelism every device has all parameters and a part of the batch,
# and gradients are averaged. `so.data_parallel_step` projects first and
# averages coordinates: r (m + n) numbers per matrix instead of mn.

# %%
mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,))


def loss(params, x):
  layer = lambda x, w: (x + jnp.tanh(x @ w['up']) @ w['down'], None)
  x, _ = jax.lax.scan(layer, x, params)
  return jnp.mean(x**2)


everywhere = NamedSharding(mesh, P())
params = {
  name: jax.device_put(
    0.02 * jax.random.normal(jax.random.key(0), shape), everywhere
  )
  for name, shape in shapes.items()
}
x = jax.device_put(jnp.ones((16, 128)), NamedSharding(mesh, P('data')))
steps = {
  'so.train_step': so.train_step(loss, tx),
  'so.data_parallel_step': so.data_parallel_step(
    loss, tx, mesh, check_vma=False
  ),
}
for name, train in steps.items():
  state = jax.jit(train.init, out_shardings=everywhere)(params)
  program = jax.jit(train.step).lower(params, state, x).compile()
  _, _, value = program(params, state, x)
  print(f'{name:<22} sends {kilobytes(program):>6,.0f} kB, loss {value:.4f}')

# %% [markdown]
# ## Where to go
#
# - [Meshes, checkpoints, numbers](../meshes.md), and [On a pod](../pod.md) for
#   the commands on real meshes.
# - `examples/nnx_mesh.py` and `examples/linen_mesh.py` do the same with Flax.
