"""`projectors.dct` against the transform's definition in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grid
import references as ref
import subspace_optax as so

GAP = 2
SELECTIONS = ['l1', 'l2', 'random']


def transform(m):
  """Returns D, m x m, by its formula; phases are exact in integers."""
  i, k = np.arange(m)[:, None], np.arange(m)[None, :]
  d = np.cos(np.pi * ((2 * i + 1) * k % (4 * m)) / (2 * m))
  return d * np.where(k == 0, np.sqrt(1 / m), np.sqrt(2 / m))


def largest(g, rank, select):
  """Returns the columns of D along which g is largest, in order."""
  s = transform(len(g)).T @ g
  norms = np.abs(s).sum(1) if select == 'l1' else np.linalg.norm(s, axis=1)
  return np.sort(np.argsort(-norms)[:rank])


def columns(state):
  return ref.find(state, 'columns').columns


def bases(node, view):
  return view.bases(node.basis)


# Stacks of either side, and matrices of either side alone.
STACKS = {'stack': ref.STACK, 'layers/out/kernel': ref.OUT}
ALONE = {'tall': ref.TALL, 'query/kernel': ref.QUERY}
VIEWS = {'l1': STACKS, 'l2': ALONE, 'random': STACKS}


@functools.cache
def project(select, rank=ref.RANK):
  tx = so.project(so.SubspaceSpec(rank), so.projectors.dct(GAP, select))
  return ref.jit(tx.init), ref.jit(tx.update)


@functools.cache
def run(select, steps=2 * GAP + 1):
  """Returns gradients, nodes and states of some steps."""
  views = VIEWS[select]
  init, update = project(select)
  state, found = init(ref.like(views)), []
  for t in range(steps):
    grads = ref.like(views, 100 + t)
    nodes, state = update(grads, state)
    found.append((grads, nodes, state))
  return views, found


@pytest.mark.parametrize('select', ['l1', 'l2'])
def test_columns_are_those_of_the_largest_norms(select):
  views, steps = run(select)
  for t in (0, GAP, 2 * GAP):
    for shown in range(t, min(t + GAP, len(steps))):
      for name, view in views.items():
        gradients = view.matrices(steps[t][0][name])
        found = np.asarray(columns(steps[shown][2])[name])
        found = found.reshape(len(gradients), -1)
        expected = [largest(g, ref.RANK, select) for g in gradients]
        np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize('select', ['l1', 'l2'])
def test_bases_are_columns_of_the_transform(select):
  views, steps = run(select)
  _, nodes, state = steps[-1]
  for name, view in views.items():
    made = bases(nodes[name], view)
    chosen = np.asarray(columns(state)[name]).reshape(len(made), -1)
    for p, k in zip(made, chosen, strict=True):
      np.testing.assert_allclose(p, transform(len(p))[:, k], rtol=0, atol=3e-7)


def test_random_bases_are_columns_with_the_same_signs_of_rows():
  views, steps = run('random')
  seen = []
  for _, nodes, _ in (steps[0], steps[GAP]):
    for name, view in views.items():
      for p in bases(nodes[name], view):
        d = transform(len(p))
        found = signed_columns(p, d)
        assert found is not None
        chosen, signs = found
        assert len(set(chosen)) == ref.RANK
        seen.append((*chosen, *signs))
  assert len(set(seen)) == len(seen) and any(-1 in x for x in seen)


def signed_columns(p, d):
  """Returns k and s with P = diag(s) D[:, k]; None if there are no such.

  Some columns differ in their signs alone, so that each may be several.
  """
  apart = np.abs(np.abs(p[:, :, None]) - np.abs(d[:, None, :])).max(0)
  for chosen in itertools.product(*[np.flatnonzero(x < 3e-7) for x in apart]):
    signs = np.sign(np.sum(p * d[:, chosen], axis=1))
    if np.allclose(p, signs[:, None] * d[:, chosen], rtol=0, atol=3e-7):
      return tuple(map(int, chosen)), tuple(map(int, signs))
  return None


@pytest.mark.parametrize('m, rank', [(512, 128), (1000, 250), (40_000, 7)])
def test_orthonormal_in_float32_at_any_length(m, rank):
  params = {'w': jnp.ones((m, rank), jnp.bfloat16)}
  spec = so.SubspaceSpec(rank, side='in', only_if_smaller=False)
  tx = so.project(spec, so.projectors.dct(1, 'random'))
  nodes, _ = ref.jit(tx.update)(params, ref.jit(tx.init)(params))
  p = np.asarray(nodes['w'].basis, np.float64)
  assert p.shape == (m, rank)
  np.testing.assert_allclose(p.T @ p, np.eye(rank), rtol=0, atol=1e-6)


@pytest.mark.parametrize('select', SELECTIONS)
def test_transition_is_the_dense_formula(select):
  views, steps = run(select)
  for t in range(1, len(steps)):
    for name, view in views.items():
      new, old = (bases(steps[i][1][name], view) for i in (t, t - 1))
      found = steps[t][1][name].before.transition
      found = np.asarray(found if select == 'random' else found.dense)
      found = found.reshape(len(new), ref.RANK, ref.RANK)
      for c, p_new, p_old in zip(found, new, old, strict=True):
        np.testing.assert_allclose(
          c, ref.transition(p_new, p_old), rtol=0, atol=2e-6
        )
        assert select == 'random' or set(np.unique(c)) <= {0.0, 1.0}


@pytest.mark.parametrize(
  'inner, select', grid.cover(['adam', 'momentum'], ['l1', 'random'], of=2)
)
def test_first_moments_are_carried_by_the_dense_formula(inner, select):
  tx, inner, _ = ref.INNER[inner]
  views = STACKS
  rule = so.projectors.dct(GAP, select)
  init, step = ref.pieces(so.SubspaceSpec(ref.RANK), rule, tx, 'first')
  state = init(ref.like(views))
  dense = {k: ref.InSubspace(v, inner, 'first') for k, v in views.items()}
  for t in range(2 * GAP + 1):
    grads = ref.like(views, t)
    nodes, updates, state = step(grads, state)
    for name, view in views.items():
      dense[name].move(bases(nodes[name], view))
      np.testing.assert_allclose(
        view.matrices(updates[name]),
        dense[name].step(grads[name]),
        rtol=2e-4,
        atol=2e-5,
      )


class DctAdam:
  """Modoranu et al., DCT-AdamW, for one m x n matrix of n >= m."""

  b1, b2, eps = 0.9, 0.99, 1e-8

  def __init__(self, m, n, feedback):
    self.m = self.v = np.zeros((ref.RANK, n))
    self.t, self.p, self.feedback = 0, None, feedback
    self.error = np.zeros((m, n))

  def step(self, g):
    g = g + self.error
    if self.t % GAP == 0:
      new = transform(len(g))[:, largest(g, ref.RANK, 'l1')]
      turn = new.T @ (new if self.p is None else self.p)
      self.m, self.v, self.p = turn @ self.m, np.abs(turn @ self.v), new
    self.t += 1
    r = self.p.T @ g
    self.error = self.feedback * (g - self.p @ r)
    self.m = self.b1 * self.m + (1 - self.b1) * r
    self.v = self.b2 * self.v + (1 - self.b2) * r**2
    mean, square = (
      self.m / (1 - self.b1**self.t),
      self.v / (1 - self.b2**self.t),
    )
    return self.p @ (mean / (np.sqrt(square) + self.eps))


@pytest.mark.parametrize('feedback', [False, True])
def test_dct_adamw(feedback):
  """Both moments follow their columns: m <- Q m and v <- |Q v|, Q = P_n^T P_o.

  LDAdam's rule is that for a partial permutation.
  """
  b1, b2, views = DctAdam.b1, DctAdam.b2, ALONE if feedback else STACKS
  tx = so.subspace(
    so.SubspaceSpec(ref.RANK),
    so.projectors.dct(GAP, 'l1'),
    optax.scale_by_adam(b1, b2, DctAdam.eps),
    transport=so.transports.both(b1, b2),
    residual=so.residuals.error_feedback(b1=0.0) if feedback else None,
  )
  update, state = ref.jit(tx.update), ref.jit(tx.init)(ref.like(views))
  dense = {
    k: [DctAdam(v.m, v.n, feedback) for _ in range(v.count)]
    for k, v in views.items()
  }
  for t in range(4 * GAP):
    g = ref.like(views, t)
    updates, state = update(g, state)
    for k, v in views.items():
      pairs = zip(dense[k], v.matrices(g[k]), strict=True)
      wanted = np.stack([adam.step(one) for adam, one in pairs])
      np.testing.assert_allclose(
        v.matrices(updates[k]),
        wanted,
        rtol=0,
        atol=2e-4,
        err_msg=f'{k} at step {t}',
      )


def test_random_projections_are_unbiased():
  """E[P P^T] = (r / m) I, within five standard errors, and signs decorrelate.

  Columns of a stack of matrices are independent samples.
  """
  count, m, rank = 4000, 6, 2
  view = ref.view((count, m, 8))
  init, update = project('random', rank=rank)
  params = {k: jnp.ones(view.shape) for k in 'ab'}
  state, found = init(params), []
  for _ in range(GAP + 1):
    nodes, state = update(params, state)
    found.append({k: bases(nodes[k], view) for k in params})
  for p in (found[0]['a'], found[GAP]['a'], found[0]['b']):
    squares = p @ np.swapaxes(p, 1, 2)
    error = squares.std(0) / np.sqrt(count)
    expected = rank / m * np.eye(m)
    assert np.all(np.abs(squares.mean(0) - expected) <= 5 * error + 1e-6)
  # Subsets of two periods and of two leaves have no more in common than chance.
  for other in (found[GAP]['a'], found[0]['b']):
    p = found[0]['a']
    shared = np.sum((np.swapaxes(p, 1, 2) @ other) ** 2, axis=(1, 2))
    error = shared.std() / np.sqrt(count)
    assert abs(shared.mean() - rank**2 / m) < 5 * error


def test_a_random_choice_looks_at_no_gradient():
  init, update = project('random')
  params = ref.like(VIEWS['random'])
  one, _ = update(params, init(params))
  other, _ = update(jax.tree.map(lambda x: x * jnp.nan, params), init(params))
  for k in params:
    np.testing.assert_array_equal(one[k].basis, other[k].basis)


@pytest.mark.parametrize('bad', [0.0, np.nan, np.inf])
@pytest.mark.parametrize('select', ['l1', 'l2'])
def test_a_bad_gradient_leaves_the_basis_to_the_next(select, bad):
  init, update = project(select)
  views = VIEWS[select]
  good = ref.like(views, 1)
  spoiled = jax.tree.map(lambda x: x.at[..., 0, 0].set(bad) * (bad != 0), good)
  _, first = update(good, init(good))
  before = columns(first)
  state = first
  for _ in range(GAP - 1):
    _, state = update(ref.like(views, 2), state)
  _, state = update(spoiled, state)  # due here
  jax.tree.map(np.testing.assert_array_equal, columns(state), before)
  last = ref.like(views, 3)
  _, state = update(last, state)
  for name, view in views.items():
    expected = [largest(g, ref.RANK, select) for g in view.matrices(last[name])]
    found = np.asarray(columns(state)[name]).reshape(len(expected), -1)
    np.testing.assert_array_equal(found, expected)


def test_the_rank_is_clipped_at_the_transform():
  spec = so.SubspaceSpec(100, only_if_smaller=False)
  tx = so.project(spec, so.projectors.dct())
  params = {'w': ref.normal(0, (6, 9))}
  nodes, state = ref.jit(tx.update)(params, ref.jit(tx.init)(params))
  np.testing.assert_array_equal(columns(state)['w'], np.arange(6))
  np.testing.assert_allclose(
    nodes['w'].basis @ nodes['w'].coords, params['w'], rtol=0, atol=1e-5
  )


def test_nothing_of_the_size_of_a_basis_is_stored():
  tx = so.project(so.SubspaceSpec(8), so.projectors.dct())
  params = {'w': jax.ShapeDtypeStruct((64, 256), jnp.float32)}
  state = jax.eval_shape(tx.init, params)
  assert sum(x.size for x in jax.tree.leaves(state)) < 2 * 8


def test_bad_arguments():
  with pytest.raises(ValueError, match='select must be one of'):
    so.projectors.dct(select='largest')
  with pytest.raises(ValueError, match='at least 1'):
    so.projectors.dct(0)
  tx = so.project(so.SubspaceSpec(2, side='in'), so.projectors.dct())
  long = {'w': jax.ShapeDtypeStruct((2**20 + 1, 4), jnp.bfloat16)}
  with pytest.raises(ValueError, match="'w'.*1048577"):
    jax.eval_shape(tx.init, long)
  switch = so.projectors.switch
  with pytest.raises(ValueError, match='switch stores its bases, but dct'):
    switch({0: so.projectors.svd(), 5: so.projectors.dct()})
