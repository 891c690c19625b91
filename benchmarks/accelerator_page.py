"""The page of a device's results, of `benchmarks.accelerator`."""

import json
import pathlib

from benchmarks import harness
from benchmarks.harness import GB


def page(out: pathlib.Path) -> str:
  """A device's results, in Markdown."""
  found = {x.stem: json.loads(x.read_text()) for x in out.glob('*.json')}
  machine = next(iter(found.values()))['machine']
  text = f'# {machine["devices"][0]}\n\njax {machine["jax"]}.\n'
  if 'tests' in found:
    rows = [[k, x['summary']] for k, x in found['tests']['files'].items()]
    text += f'\n## Tests\n\n{harness.table(("file", "result"), rows)}\n'
  for model, rows in found.get('step', {}).get('rows', {}).items():
    text += f'\n## Steps, {model}\n\n{_table_of_steps(rows)}\n'
  if 'large' in found:
    text += f'\n## Layer by layer\n\n{_table_of_large(found["large"])}\n'
  return text


def _table_of_steps(rows: dict[str, dict]) -> str:
  columns = {
    'optimizer': '{name}',
    'over AdamW': '{over_adamw:.2f}',
    'ms': lambda row: f'{row["median_seconds"] * 1e3:.1f}',
    'state, MiB': harness.megabytes('state_bytes', 0),
    'temporary, MiB': harness.megabytes('temporary_bytes', 0),
    'compile, s': '{compile_seconds:.1f}',
  }
  named = [{'name': name} | row for name, row in rows.items()]
  return harness.table_of(
    sorted(named, key=lambda row: row['over_adamw']), columns
  )


def _table_of_large(results: dict) -> str:
  peak = lambda row: (
    f'{row["peak_bytes"] / GB:.2f}' if row['peak_bytes'] else '-'
  )
  columns = {
    'model': '{name}',
    'tokens/s': '{tokens_per_second:.0f}',
    'peak, GB': peak,
    "XLA's, GB": harness.gigabytes('predicted_bytes'),
    'first loss': lambda row: f'{row["losses"][0]:.3f}',
    'last loss': lambda row: f'{row["losses"][-1]:.3f}',
  }
  named = [{'name': name} | row for name, row in results['rows'].items()]
  return harness.table_of(named, columns)
