"""Theorem 3: GaLore converges if every gradient is that of a large batch."""

from benchmarks.claims import claim
from benchmarks.claims import counter
from benchmarks.claims import theorems

picture = theorems.picture


def run() -> claim.Found:
  return theorems.run('large_batch_galore', counter.galore)
