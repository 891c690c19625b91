"""Dense float64 references, written from the papers' formulas in numpy.

Everything here works on one m x n matrix with its basis P on the left, (m, r).
`View` cuts leaves of any number of axes into such matrices, and transposes
those whose right side is projected.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import subspace_optax as so


class View(NamedTuple):
  """A leaf's axes: what counts matrices, their rows and their columns."""

  shape: tuple[int, ...]
  rows: tuple[int, ...]
  cols: tuple[int, ...]
  left: bool  # Whether the basis spans the rows.

  @property
  def batch(self):
    return tuple(i for i in range(len(self.shape)) if i not in self._sides)

  @property
  def _sides(self):
    return self.rows + self.cols

  @property
  def _projected(self):
    return self.rows if self.left else self.cols

  def _size(self, axes):
    return math.prod(self.shape[i] for i in axes)

  @property
  def m(self):
    """Length of the side that the basis spans."""
    return self._size(self._projected)

  @property
  def n(self):
    """Length of the other side."""
    return self._size(self._sides) // self.m

  @property
  def count(self):
    """How many matrices the leaf holds."""
    return self._size(self.batch)

  def matrices(self, leaf):
    """Returns the leaf as (count, m, n), the projected side first."""
    x = np.transpose(_float64(leaf), self.batch + self.rows + self.cols)
    x = x.reshape(-1, self._size(self.rows), self._size(self.cols))
    return x if self.left else np.swapaxes(x, 1, 2)

  def leaf(self, matrices):
    """Undoes `matrices`."""
    x = matrices if self.left else np.swapaxes(matrices, 1, 2)
    order = self.batch + self.rows + self.cols
    x = x.reshape([self.shape[i] for i in order])
    return np.transpose(x, np.argsort(order))

  def basis_shape(self, rank):
    axes = sorted(self.batch + self._projected)
    return (*(self.shape[i] for i in axes), rank)

  def bases(self, basis):
    """Returns a basis, (*batch and projected axes, r), as (count, m, r)."""
    assert basis.shape == self.basis_shape(basis.shape[-1])
    axes = sorted(self.batch + self._projected)
    order = [axes.index(i) for i in self.batch + self._projected]
    x = np.transpose(_float64(basis), [*order, len(order)])
    return x.reshape(-1, self.m, basis.shape[-1])

  def coords(self, coords, rank):
    """Returns coordinates, the leaf's axes but r for m, as (count, r, n)."""
    axes, at = list(range(len(self.shape))), min(self._projected)
    axes = [i for i in axes if i == at or i not in self._projected]
    sizes = dict(enumerate(self.shape)) | {at: rank}
    assert coords.shape == tuple(sizes[i] for i in axes)
    free = self.cols if self.left else self.rows
    order = [axes.index(i) for i in (*self.batch, at, *free)]
    return np.transpose(_float64(coords), order).reshape(-1, rank, self.n)


def _float64(x):
  return np.asarray(jnp.asarray(x, jnp.float32), np.float64)


def view(shape, rows=-2, cols=-1, left=None):
  """Returns the view of a leaf; by default the basis spans the short side."""
  axes = lambda a: tuple(i % len(shape) for i in np.atleast_1d(a).tolist())
  sides = axes(rows), axes(cols)
  m, n = (math.prod(shape[i] for i in side) for side in sides)
  return View(tuple(shape), *sides, m <= n if left is None else left)


# The same few kernels everywhere, since every new shape compiles anew: both
# sides, stacked layers, and attention kernels whose axes the library finds.
WIDE, TALL = view((8, 12)), view((12, 8))
STACK = view((2, 8, 12))
QUERY = view((9, 3, 4), 0, (1, 2))
OUT = view((2, 3, 4, 9), (1, 2), 3)
RANK = 3
KERNELS = {'tall': TALL, 'stack': STACK}
ATTENTION = {'query/kernel': QUERY, 'layers/out/kernel': OUT}


# Optimizers on one array: `start(shape)` and `update(gradient, state)`, which
# returns what a descent step subtracts. 'm' is the first moment.


class Adam(NamedTuple):
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8

  def start(self, shape):
    return {'m': np.zeros(shape), 'v': np.zeros(shape), 't': 0}

  def update(self, g, s):
    t = s['t'] + 1
    m = self.b1 * s['m'] + (1 - self.b1) * g
    v = self.b2 * s['v'] + (1 - self.b2) * g * g
    mhat, vhat = m / (1 - self.b1**t), v / (1 - self.b2**t)
    return mhat / (np.sqrt(vhat) + self.eps), {'m': m, 'v': v, 't': t}


class Momentum(NamedTuple):
  decay: float = 0.9

  def start(self, shape):
    return {'m': np.zeros(shape)}

  def update(self, g, s):
    m = g + self.decay * s['m']
    return m, {'m': m}


class Lion(NamedTuple):
  b1: float = 0.9
  b2: float = 0.99

  def start(self, shape):
    return {'m': np.zeros(shape)}

  def update(self, g, s):
    direction = np.sign(self.b1 * s['m'] + (1 - self.b1) * g)
    return direction, {'m': self.b2 * s['m'] + (1 - self.b2) * g}


class RMSProp(NamedTuple):
  decay: float = 0.9
  eps: float = 1e-8

  def start(self, shape):
    return {'v': np.zeros(shape)}

  def update(self, g, s):
    v = self.decay * s['v'] + (1 - self.decay) * g * g
    return g / np.sqrt(v + self.eps), {'v': v}


class Sgd(NamedTuple):
  def start(self, shape):
    del shape
    return {}

  def update(self, g, s):
    return g, s


# The same in optax, and the fields of its state.
INNER = {
  'adam': (optax.scale_by_adam(), Adam(), {'m': 'mu', 'v': 'nu'}),
  'momentum': (optax.trace(0.9), Momentum(), {'m': 'trace'}),
  'lion': (optax.scale_by_lion(), Lion(), {'m': 'mu'}),
  'rmsprop': (optax.scale_by_rms(0.9), RMSProp(), {'v': 'nu'}),
}


class InSubspace:
  """An optimizer on the coordinates of every matrix of one leaf."""

  def __init__(self, view, inner, transport='keep', rank=RANK):
    self.view, self.inner, self.transport = view, inner, transport
    self._start = lambda: inner.start((rank, view.n))
    self.states = [self._start() for _ in range(view.count)]
    self.bases = None

  def move(self, bases, which=None):
    """Takes all matrices, or those at some indices, to other bases."""
    if self.bases is None:
      self.bases = np.array(bases)
      return
    for i in range(self.view.count) if which is None else which:
      if self.transport == 'reset':
        self.states[i] = self._start()
      if self.transport == 'first' and 'm' in self.states[i]:
        c = transition(bases[i], self.bases[i])
        self.states[i] = self.states[i] | {'m': c @ self.states[i]['m']}
      self.bases[i] = bases[i]

  def step(self, grad):
    """Returns P N of every matrix."""
    updates = []
    for i, g in enumerate(self.view.matrices(grad)):
      n, self.states[i] = self.inner.update(self.bases[i].T @ g, self.states[i])
      updates.append(self.bases[i] @ n)
    return np.stack(updates)


class OnlinePCA:
  """Online Subspace Descent's bases: the P half of Algorithm 1."""

  def __init__(self, view, bases, optimizer, lam, decay=0.0):
    self.view, self.bases, self.optimizer = view, bases, optimizer
    self.lam, self.decay = lam, decay
    self.states = [optimizer.start(p.shape) for p in bases]

  def step(self, grad, lr):
    """Moves P_t to P_{t+1}."""
    bases = []
    for i, g in enumerate(self.view.matrices(grad)):
      p = self.bases[i]
      d = pca_gradient(p, g, self.lam)
      d, self.states[i] = self.optimizer.update(d, self.states[i])
      bases.append(p - lr * (d + self.decay * p))
    self.bases = np.stack(bases)


def svd_basis(g, r):
  """GaLore, Algorithm 2: U[:, :r] of G = U S V^T."""
  return np.linalg.svd(g, full_matrices=False)[0][:, :r]


def projection(p):
  """Returns P P^T, which tells the subspace whatever the signs of P."""
  return p @ np.swapaxes(p, -1, -2)


def transition(new, old):
  """C = P_n^T P_o (P_o^T P_o)^-1, which for orthonormal P_o is P_n^T P_o."""
  return new.T @ np.linalg.pinv(old).T


def pca_loss(p, g, lam):
  """Online Subspace Descent, Eq. (6)."""
  g = g / np.linalg.norm(g)
  eye = np.eye(p.shape[1])
  return (
    np.linalg.norm(p @ p.T @ g - g) ** 2
    + lam * np.linalg.norm(p.T @ p - eye) ** 2
  )


def pca_gradient(p, g, lam):
  """The gradient of Eq. (6), with the full m x m products."""
  g = g / np.linalg.norm(g)
  e = p @ p.T @ g - g
  eye = np.eye(p.shape[1])
  return 2 * (e @ g.T + g @ e.T) @ p + 4 * lam * p @ (p.T @ p - eye)


def normal(seed, shape, scale=1.0):
  """Returns float32 normals."""
  x = np.random.default_rng(seed).normal(size=shape) * scale
  return jnp.asarray(x, jnp.float32)


def decaying(seed, of, ratio=0.7, spectrum=None):
  """Returns a leaf whose matrices have singular values ratio^i, or given."""
  rng = np.random.default_rng(seed)
  k = min(of.m, of.n)
  spectrum = ratio ** np.arange(k) if spectrum is None else spectrum
  orthonormal = lambda size: np.linalg.qr(rng.normal(size=(size, k)))[0]
  gs = [
    orthonormal(of.m) * spectrum @ orthonormal(of.n).T for _ in range(of.count)
  ]
  return jnp.asarray(of.leaf(np.stack(gs)), jnp.float32)


def captured(p, g):
  """Returns ||P^T G||^2 over that of the best subspace of the same rank."""
  best = np.linalg.svd(g, compute_uv=False)[: p.shape[1]]
  return np.linalg.norm(p.T @ g) ** 2 / np.sum(best**2)


def like(views, seed=0):
  """Returns a tree of normals with the views' shapes."""
  return {
    k: normal(1000 * seed + i, v.shape)
    for i, (k, v) in enumerate(views.items())
  }


def find(state, field):
  """Returns the one state inside an optimizer's state that has this field."""
  is_one = lambda x: hasattr(x, field)
  leaves = jax.tree.leaves(state, is_leaf=is_one)
  (found,) = [x for x in leaves if is_one(x)]
  return found


def bases(state):
  """Returns the tree of bases inside an optimizer's state."""
  return find(state, 'subspaces').subspaces.basis


def start(tx, params, bases=None):
  """Returns the first state of `project`, with given bases or NumPy's.

  Those that `init` draws cost a program for each leaf, for nothing where the
  first step finds others.
  """
  without = lambda params: with_bases(tx.init(params), ())
  if bases is None:
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape).astype(x.dtype)
    shapes = jax.eval_shape(tx.init, params).subspaces.basis
    bases = jax.tree.map(draw, shapes)
  return with_bases(jit(without)(params), bases)


def pieces(spec, rule, inner, transport='keep'):
  """Returns what `subspace` is made of: `init`, and a jitted `step`.

  It returns the projected nodes, updates and states of the three stages.
  """
  stages = (
    so.project(spec, rule),
    so.in_subspace(inner, spec, transport=transport),
    so.unproject(),
  )

  @jit
  def step(updates, states):
    found = []
    for stage, state in zip(stages, states, strict=True):
      updates, state = stage.update(updates, state)
      found.append((updates, state))
    outputs, states = zip(*found, strict=True)
    return outputs[0], outputs[-1], states

  return jit(optax.chain(*stages).init), step


def with_bases(state, basis):
  """Returns a state of `project` that holds other bases."""
  subspaces = state.subspaces._replace(basis=basis)
  return state._replace(subspaces=subspaces)


jit = jax.jit


def positive_qr(y):
  """Returns the Q factor whose R has a positive diagonal."""
  q, r = np.linalg.qr(y)
  return q * np.sign(np.diag(r))


def power_step(p, mean, g, rho):
  """LDAdam: P = orth(b b^T P) of b = rho P M + (1 - rho) G, formed densely."""
  b = rho * p @ mean + (1 - rho) * g
  return positive_qr(b @ b.T @ p)


def carry_both(c, state, b1, b2):
  """LDAdam: Adam's moments after a change of basis by C."""
  t, m, v = (state[k] for k in 'tmv')
  if t == 0:
    return state
  w1, w2 = 1 - b1**t, 1 - b2**t
  mean, square = m / w1, v / w2
  v = w2 * np.abs(c**2 @ (square - mean**2) + (c @ mean) ** 2)
  return state | {'m': c @ m, 'v': v}


class BothInSubspace(InSubspace):
  """Adam whose moments both follow the bases, by LDAdam's rule."""

  def carry(self, c, state):
    return carry_both(c, state, self.inner.b1, self.inner.b2)

  def move(self, bases, which=None):
    if self.bases is None:
      super().move(bases)
      return
    old, states = self.bases.copy(), list(self.states)
    super().move(bases, which)
    for i in range(self.view.count) if which is None else which:
      c = transition(bases[i], old[i])
      self.states[i] = self.carry(c, states[i])
