"""Theorem 4: GoLore converges as 1/sqrt(T) with single samples."""

from benchmarks.claims import claim
from benchmarks.claims import counter
from benchmarks.claims import theorems

picture = theorems.picture


def run() -> claim.Found:
  return theorems.run('golore', counter.golore)
