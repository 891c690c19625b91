"""Theorem 3: GaLore converges if every gradient is that of a large batch.

python benchmarks/claims/galore_large_batch.py
"""

import sys

import claim  # isort: skip
import counter
import theorems

RUNS = theorems.Runs('large_batch_galore', counter.galore, batch=True)
picture = theorems.picture


def run() -> claim.Claim:
  """A run for every T."""
  rows = RUNS.rows()
  found, promised = theorems.slopes(rows)
  last = rows[-1]
  return claim.Claim(
    title='GaLore with large batches converges as O(1/sqrt(T))',
    source='GoLore, Theorem 3',
    prediction=(
      'with batches of B = 1 / (delta b1) samples, which grow as sqrt(T), the '
      f'mean of ||grad f||^2 has a slope of {promised:.3f} over T here'
    ),
    measurement=(
      f'a slope of {found:.3f} with B from {rows[0]["batch_size"]} to '
      f'{last["batch_size"]}; ||grad f||^2 ends at '
      f'{claim.number(last["last"])} where single samples end at '
      f'{claim.number(last["galore_last"])}'
    ),
    checks=theorems.checks(rows),
    table=theorems.table(rows),
    notes=(
      'Paper against code: the theorem has the batch of B at every step, as '
      'here, the experiments at refreshes only; that reading is a row of the '
      'counter-example.',
      'A batch of B leaves a stall of sigma / sqrt(B) in place of sigma, and '
      'only since B grows with T does the theorem reach any accuracy. No '
      'GaLore of a fixed batch does on this function.',
      'As with Theorem 4, the slope is that of the learning rate which the '
      'theorem prescribes.',
    ),
    caption=(
      'Mean of ||grad f||^2 over T steps, each point a run with the '
      "theorem's parameters for its T; and where single samples end."
    ),
    data=rows,
  )


if __name__ == '__main__':
  claim.measure(sys.modules[__name__])
