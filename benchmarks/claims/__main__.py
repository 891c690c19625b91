"""Measures every claim and writes docs/evidence.md.

  python -m benchmarks.claims
  python -m benchmarks.claims --again --only counter_example golore_rate

Results are kept in runs/evidence, so an interrupted run can simply be started
again: a claim is measured anew once its script or the library has changed. A
clean checkout has none of them.
"""

import dataclasses
import importlib
import time

import jax
import tyro

from benchmarks import harness
from benchmarks.claims import claim
from benchmarks.claims import page

# In the order of the page.
CLAIMS = (
  'osd_optimizers',
  'osd_hamiltonian',
  'osd_cost',
  'osd_perplexity',
  'random_subspaces',
  'galore_lazy_svd',
  'galore_large_batch',
  'galore_memory',
  'galore_8bit',
  'galore_7b',
  'counter_example',
  'golore_lemma',
  'golore_rate',
  'golore_hybrid',
  'rso_gradient',
  'rso_cost',
  'rso_theorem',
  'rso_perplexity',
)


@dataclasses.dataclass(frozen=True)
class Args:
  """What is measured; see the module."""

  only: tuple[str, ...] = ()  # names of scripts; all by default
  again: bool = False  # measure what has been measured already


def measured(name: str, again: bool) -> claim.Claim:
  """The claim of one script, from an earlier run if there is one."""
  known = None if again else claim.load(name)
  if known is not None:
    print(f'{name} is measured already: {known.verdict}\n', flush=True)
    return known
  jax.clear_caches()
  script = importlib.import_module(f'benchmarks.claims.{name}')
  found = claim.measure(script)
  print(f'{name} took {found.seconds:.0f} s\n', flush=True)
  return found


def main(args: Args) -> None:
  """Measures what is missing, then writes the page of all claims."""
  unknown = set(args.only) - set(CLAIMS)
  if unknown:
    raise ValueError(f'no claims {sorted(unknown)}; choose from {CLAIMS}')
  start = time.perf_counter()
  chosen = args.only or CLAIMS
  results = {}
  for i, name in enumerate(chosen, 1):
    print(f'[{i}/{len(chosen)}] {name}', flush=True)
    results[name] = measured(name, args.again)
  found = [results.get(name) or claim.load(name) for name in CLAIMS]
  claims = [one for one in found if one is not None]
  minutes = (time.perf_counter() - start) / 60
  if len(claims) < len(CLAIMS):
    print(f'{len(claims)} of {len(CLAIMS)} claims measured: no page yet')
    return
  page.write(claims)
  print(f'{harness.DOCS / "evidence.md"}, after {minutes:.1f} minutes:')
  for one in claims:
    print(f'  {one.verdict:<8}{one.title}')


if __name__ == '__main__':
  main(tyro.cli(Args, description=__doc__))
