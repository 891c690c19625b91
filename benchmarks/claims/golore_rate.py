"""Theorem 4: GoLore converges as 1/sqrt(T) with single samples.

python benchmarks/claims/golore_rate.py
"""

import sys

import claim  # isort: skip
import counter
import theorems

RUNS = theorems.Runs('golore', counter.golore, batch=False)
picture = theorems.picture


def run() -> claim.Claim:
  """A run for every T."""
  rows = RUNS.rows()
  found, promised = theorems.slopes(rows)
  last = rows[-1]
  return claim.Claim(
    title='GoLore converges as O(1/sqrt(T)) with single samples',
    source='GoLore, Theorem 4',
    prediction=(
      'with its parameters for each T, the mean of ||grad f||^2 falls as '
      'L Delta / (delta^2.5 T) + sqrt(L Delta sigma^2 / (delta^3.5 T)): a '
      f'slope of {promised:.3f} here'
    ),
    measurement=(
      f'a slope of {found:.3f}; ||grad f||^2 ends at '
      f'{claim.number(last["last"])} where GaLore ends at '
      f'{claim.number(last["galore_last"])}'
    ),
    checks=theorems.checks(rows),
    table=theorems.table(rows),
    notes=(
      f'The theorem holds here from T = {theorems.least_steps():,} on, but its '
      'eta is so small that eta delta T passes 1 at about T = 13,000 only; '
      'below that nothing moves and there is no slope to measure.',
      'The slope is that of the learning rate, eta of order 1 / (L tau) with '
      'tau of order sqrt(T), which the theorem prescribes: at these rates '
      'noise adds little to the mean. It is measured that the bound is met at '
      'its order, not that no other choice is faster.',
      'sigma is the noise of the whole gradient, sigma^2 = L Delta / 30. One '
      'seed.',
      'Thm. 2 to 4 are about momentum SGD with momentum projection, as run '
      'here; none is about Adam.',
    ),
    caption=(
      'Mean of ||grad f||^2 over T steps, each point a run with the '
      "theorem's parameters for its T; and where GaLore ends with them."
    ),
    data=rows,
  )


if __name__ == '__main__':
  claim.measure(sys.modules[__name__])
