"""Table 6 of Online Subspace Descent: which optimizers go well together.

python benchmarks/claims/osd_optimizers.py
"""

from collections.abc import Callable
import sys

import claim  # isort: skip
import matplotlib.pyplot as plt
import numpy as np
import optax
import training

RANK = 16

# Perplexity of LLaMA-60M, rank 128 of 512, sequences of 1024: W, then P.
PRINTED = {
  'Lion': 52.65,
  'Adafactor': 33.45,
  'Adam': 29.77,
  'SGD': 3469.14,
  'GaLore Lion': 46.90,
  'GaLore Adafactor': 34.32,
  'GaLore Adam': 48.05,
  'OSD Lion + Lion': 57.97,
  'OSD Adafactor + Adafactor': 47.61,
  'OSD Adam + Adam': 49.01,
  'OSD Lion + Adam': 44.76,
  'OSD Adafactor + Adam': 34.15,
  'OSD Adam + SGD': 53.53,
}
# Pairs of rows, the better one first as printed, that the paper is about.
ORDER = (
  ('Adam', 'Adafactor'),
  ('Adafactor', 'Lion'),
  ('Lion', 'SGD'),
  ('OSD Lion + Adam', 'OSD Lion + Lion'),
  ('OSD Adafactor + Adam', 'OSD Adafactor + Adafactor'),
  ('OSD Adam + Adam', 'OSD Adam + SGD'),
  ('OSD Lion + Adam', 'GaLore Lion'),
  ('OSD Adafactor + Adam', 'GaLore Adafactor'),
  ('GaLore Adam', 'OSD Adam + Adam'),
  ('OSD Adafactor + Adam', 'OSD Adam + Adam'),
)


def make(row: str) -> Callable:
  """The row's optimizer, given a schedule."""
  method, _, rest = row.partition(' ')
  if method not in ('GaLore', 'OSD'):
    scale = optax.scale_by_learning_rate
    return lambda schedule: optax.chain(
      training.OPTIMIZERS[row](), scale(schedule)
    )
  weights, _, bases = rest.partition(' + ')
  projector = training.bases(bases)
  return lambda schedule: training.projected(
    RANK,
    projector,
    training.OPTIMIZERS[weights](),
    schedule,
    # Adafactor looks at whole matrices, and asks for params (their shapes).
    per_matrix=weights == 'Adafactor',
    params='coordinates' if weights == 'Adafactor' else None,
  )


def kendall(found: dict[str, float]) -> float:
  """Share of pairs ordered as printed, less that of the others."""
  names = list(PRINTED)
  signs = [
    np.sign(PRINTED[a] - PRINTED[b]) * np.sign(found[a] - found[b])
    for i, a in enumerate(names)
    for b in names[:i]
  ]
  return float(np.mean(signs))


def run() -> claim.Claim:
  """Trains every row at every rate."""
  grids = {
    row: training.perplexities(make(row))
    for row in claim.track(PRINTED, 'Table 6')
  }
  return judge(grids)


def judge(grids: dict) -> claim.Claim:
  """What the perplexities of all rows at all rates say."""
  best = {row: training.best(grid) for row, grid in grids.items()}
  found = {row: float(value[0]) for row, (_, value) in best.items()}
  checks = [
    claim.Check(f'{worse} / {better}', found[worse] / found[better], least=1.0)
    for better, worse in ORDER
  ]
  close = found['OSD Adafactor + Adam'] / found['Adafactor']
  checks.append(
    claim.Check('OSD Adafactor + Adam / full Adafactor', close, most=1.05)
  )
  worst = max(value for row, value in found.items() if 'OSD' in row)
  printed = PRINTED['OSD Lion + Lion'] / PRINTED['Adam']
  what = 'worst pair / full Adam, against the worst printed'
  checks.append(claim.Check(what, worst / found['Adam'], most=printed))
  agree = kendall(found)
  checks.append(claim.Check("Kendall's tau of all rows", agree, least=0.5))
  table: claim.Table = [('W, then P', 'printed, 60M', 'here, per byte', 'rate')]
  table += [
    (row, f'{printed:,.2f}', f'{found[row]:.3f}', best[row][0])
    for row, printed in PRINTED.items()
  ]
  as_printed = sum(check.holds for check in checks[: len(ORDER)])
  s = training.SETTING
  return claim.Claim(
    title='Online Subspace Descent works with many pairs of optimizers',
    source='Online Subspace Descent, Algorithm 1 and Table 6',
    prediction=(
      'every pair trains; Adam is the best optimizer of P for each of W; '
      'Adafactor + Adam comes close to full Adafactor (34.15 and 33.45)'
    ),
    measurement=(
      f'{as_printed} of {len(ORDER)} comparisons as printed, '
      f"Kendall's tau of all rows {agree:.2f}; Adafactor + Adam at "
      f'{found["OSD Adafactor + Adam"]:.2f}, full Adafactor at '
      f'{found["Adafactor"]:.2f}'
    ),
    checks=tuple(checks),
    table=tuple(table),
    notes=(
      f'Small: a LLaMA of width {s.width} and {s.layers} layers on bytes, rank '
      f'{RANK}, {s.steps} steps of {s.batch} sequences of {s.seq}, one seed, '
      f'each row at the best of the rates {training.RATES}, which is often '
      'the first or the last of them, so a wider grid may change the order; '
      'differences of a percent or two mean nothing. It shows that the pairs '
      'work, and ranks nothing but itself.',
      'As in the paper: embeddings and head by the optimizer of W at the same '
      'rate, updates of matrices scaled by 0.25, clipping at 1, warm-up and '
      'cosine, bases started by an SVD and moved at 0.005 of the schedule. '
      'Adam here is not 8-bit, and the rate of the bases is not tuned. SGD on '
      'everything is tried at rates of Adam only, as its 3469.14 suggests of '
      'the paper.',
      'Full-rank rows are not at 0.25 of the rate, as in the paper: embeddings '
      'and matrices want different rates, and so a full-rank row can be behind '
      'a projected one.',
      'Paper against code: the code has no orthogonality penalty (lambda = 0.1 '
      'in Eq. (6), as here), decays P by 0.01 (the default of AdamW) where the '
      "paper says that both decays are equal, and takes Lion's sign after "
      'projecting back, where the paper, and this library, takes it before.',
      'The paper against others: full Adam gets 34.06 for 60M in the GaLore '
      'paper on another pipeline; here only rows of one table are compared.',
    ),
    caption='Rows from best to worst as printed, and what they reach here.',
    data={'found': found, 'grids': grids},
  )


def picture(data: dict, path) -> None:
  """Printed against measured."""
  figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
  found = data['found']
  names = sorted(PRINTED, key=PRINTED.__getitem__)
  x = np.arange(len(names))
  colors = {'GaLore': 'C1', 'OSD': 'C0'}
  color = [colors.get(name.split(' ')[0], 'C7') for name in names]
  axes.barh(x, [found[name] for name in names], color=color)
  for i, name in enumerate(names):
    axes.text(
      found[name],
      i,
      f' {found[name]:.2f} (printed {PRINTED[name]:,.2f})',
      va='center',
      fontsize=8,
    )
  axes.set_yticks(x, names)
  axes.invert_yaxis()
  axes.set_xlim(0, 1.5 * max(found.values()))
  axes.set_xlabel('validation perplexity per byte here')
  axes.set_title('Rows from best to worst as printed', fontsize=10)
  figure.savefig(path, dpi=110)
  plt.close(figure)


if __name__ == '__main__':
  claim.measure(sys.modules[__name__])
