"""`projectors.svd`: what 'gram' does with large matrices, and 'warm'."""

import functools

import numpy as np
import pytest

import references as ref
import subspace_optax as so

RANK = 16
LARGE = {'wide': ref.view((520, 600)), 'tall': ref.view((600, 520))}


# Like those of many layers.
SPECTRUM = 1 / np.arange(1, 521)
BEST = np.sum(SPECTRUM[:RANK] ** 2)


@functools.cache
def gradients():
  return {
    k: ref.decaying(i, v, spectrum=SPECTRUM)
    for i, (k, v) in enumerate(LARGE.items())
  }


def shares(views, bases):
  """Returns captured energy over that of the best subspace."""
  found = []
  for k, v in views.items():
    (g,), (p,) = v.matrices(gradients()[k]), v.bases(bases[k])
    np.testing.assert_allclose(p.T @ p, np.eye(RANK), rtol=0, atol=3e-6)
    found.append(np.linalg.norm(p.T @ g) ** 2 / BEST)
  return np.array(found)


@pytest.mark.parametrize('side', ['short', 'long'])
def test_gram_iterates_on_large_matrices(side):
  """Six rounds in place of eigenvectors of 520 x 520; 2 % for random bases."""
  spec = so.SubspaceSpec(RANK, side=side)
  tx = so.project(spec, so.projectors.svd(1, 'gram'))
  grads = gradients()
  _, state = ref.jit(tx.update)(grads, tx.init(grads))
  views = {
    k: v._replace(left=v.left == (side == 'short')) for k, v in LARGE.items()
  }
  found = shares(views, ref.bases(state))
  assert found.min() > 0.999, found


def run_warm(views, grads, rank, steps, rounds=1):
  rule = so.projectors.svd(1, 'warm', power_iterations=rounds)
  tx = so.project(so.SubspaceSpec(rank), rule)
  update, state = ref.jit(tx.update), tx.init(grads)
  bases = [ref.bases(state)]
  for _ in range(steps):
    _, state = update(grads, state)
    bases.append(ref.bases(state))
  return bases


def test_warm_improves_from_refresh_to_refresh():
  """On a gradient that stays, to what the best subspace captures."""
  bases = run_warm(LARGE, gradients(), RANK, 6)
  found = np.stack([shares(LARGE, p) for p in bases])
  assert (np.diff(found, axis=0) > 0).all(), found
  assert found[0].max() < 0.1 and found[2].min() > 0.95, found
  assert found[-1].min() > 0.999, found


def test_warm_finds_the_leading_subspace():
  views = ref.KERNELS
  grads = {k: ref.decaying(0, v, 0.5) for k, v in views.items()}
  last = run_warm(views, grads, ref.RANK, 8, 2)[-1]
  for k, v in views.items():
    for g, p in zip(v.matrices(grads[k]), v.bases(last[k]), strict=True):
      best = ref.projection(ref.svd_basis(g, ref.RANK))
      np.testing.assert_allclose(ref.projection(p), best, rtol=0, atol=1e-5)


def test_warm_starts_from_the_last_basis():
  """One round of subspace iteration, shifted by half the mean that is left."""
  views = ref.KERNELS
  grads = {k: ref.decaying(0, v, 0.7) for k, v in views.items()}
  bases = run_warm(views, grads, ref.RANK, 2)
  for t in range(2):
    for k, v in views.items():
      old, new = v.bases(bases[t][k]), v.bases(bases[t + 1][k])
      for p, q, g in zip(old, new, v.matrices(grads[k]), strict=True):
        g = g / np.linalg.norm(g)
        kept = np.linalg.norm(p.T @ g) ** 2
        shift = (1 - kept) / (v.m - ref.RANK) / 2
        expected = ref.positive_qr(g @ g.T @ p - shift * p)
        # The same space; which vectors it gets is not a matter of the start.
        np.testing.assert_allclose(
          ref.projection(q), ref.projection(expected), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize('value', [0, -1])
def test_power_iterations_raise(value):
  with pytest.raises(ValueError, match='power_iterations must be at least 1'):
    so.projectors.svd(1, 'warm', power_iterations=value)
  for other in 1.0, True, '2':
    with pytest.raises(TypeError, match='power_iterations must be an int'):
      so.projectors.svd(1, 'warm', power_iterations=other)
