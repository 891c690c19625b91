"""Residual rules in float64, for one matrix, from the papers' formulas.

A rule is made with `scale` for every matrix, and called with the basis P, the
gradient G, the coordinates R = P^T G and the inner optimizer's direction N of a
step. It returns the update.
"""

import numpy as np

EPS = 1e-8


class Limiter:
  """L of Fira: norms grow by a factor of gamma at most."""

  def __init__(self, scale, gamma=1.01):
    self.scale, self.gamma, self.last = scale, gamma, None

  def limit(self, x, weight=1.0):
    norm = weight * np.linalg.norm(x)
    cut = 1.0
    if self.last is not None:
      cut = max(norm / self.last, self.gamma) / self.gamma
    self.last = norm / cut
    return x / cut


def columns(n, r):
  return np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + EPS)


def outside(p, g):
  return g - p @ np.linalg.pinv(p) @ g


class Fira(Limiter):
  """Scale P N + L(phi E), phi_i = |N_i| / (|R_i| + eps)."""

  def __call__(self, p, g, r, n):
    return self.scale * p @ n + self.limit(columns(n, r) * outside(p, g))


class OfficialFira(Limiter):
  """G - alpha P R, limited before the bias of Adam's moments is corrected."""

  b1, b2, t = 0.9, 0.999, 0

  def __call__(self, p, g, r, n):
    self.t += 1
    bias = np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
    share = self.scale * p @ np.linalg.pinv(p) @ g
    e = columns(n, r) * (g - share)
    return self.scale * p @ n + self.limit(e, 1 / bias)


class Unlimited(Fira):
  def limit(self, x, weight=1.0):
    return x


class Apollo(Limiter):
  """Scale L(G s), s_i as phi_i."""

  def __call__(self, p, g, r, n):
    return self.scale * self.limit(columns(n, r) * g)


class ApolloMini(Limiter):
  """The same with |N| / (|R| + eps)."""

  def __call__(self, p, g, r, n):
    s = np.linalg.norm(n) / (np.linalg.norm(r) + EPS)
    return self.scale * self.limit(s * g)


class Sign:
  """Scale P N + c sign(E)."""

  def __init__(self, scale, strength):
    self.scale, self.strength = scale, strength

  def __call__(self, p, g, r, n):
    return self.scale * p @ n + self.strength * np.sign(outside(p, g))


class Orthogonal:
  """Scale times Newton and Schulz's five steps on P N + w E, as Muon's."""

  def __init__(self, scale, weight, widening=1.0):
    self.scale = scale * max(1.0, widening) ** 0.5
    self.weight = weight

  def __call__(self, p, g, r, n):
    x = p @ n + self.weight * outside(p, g)
    u, s, v = np.linalg.svd(x / np.linalg.norm(x), full_matrices=False)
    for _ in range(5):
      s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return self.scale * self.adapt(u * s @ v)

  def adapt(self, o):
    return o


class NorMuon(Orthogonal):
  """Each output neuron over the root of its running mean of squares."""

  def __init__(self, scale, weight, b2, widening=1.0, outputs_last=True):
    super().__init__(scale, weight, widening)
    self.b2, self.inputs, self.v = b2, 0 if outputs_last else 1, 0.0

  def adapt(self, o):
    mean = np.mean(o**2, axis=self.inputs, keepdims=True)
    self.v = self.b2 * self.v + (1 - self.b2) * mean
    scaled = o / (np.sqrt(self.v) + EPS)
    return scaled * np.linalg.norm(o) / np.linalg.norm(scaled)
