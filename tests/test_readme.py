"""Pages: Python blocks run, links lead somewhere, and costs are true."""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import cases
import subspace_optax as so

ROOT = pathlib.Path(__file__).parents[1]
README, DOCS = ROOT / 'README.md', ROOT / 'docs'
WITH_BLOCKS = (
  'README.md',
  *(f'docs/{x}.md' for x in ('choose', 'migrate', 'pieces', 'compressed')),
  'docs/layerwise.md',
)
PAGES = [README, ROOT / 'CONTRIBUTING.md', *sorted(DOCS.glob('*.md'))]


@pytest.mark.parametrize('page', WITH_BLOCKS)
def test_the_python_blocks_run(page, capsys):
  text = (ROOT / page).read_text()
  blocks = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  assert blocks
  exec('\n'.join(blocks), {})
  if page in ('README.md', 'docs/migrate.md'):
    assert 'kernel' in capsys.readouterr().out


def test_only_these_pages_have_blocks():
  found = [x for x in PAGES if '```python' in x.read_text()]
  names = {str(x.relative_to(ROOT)) for x in found}
  # Blocks of these are parts of programs, and tested elsewhere.
  others = {'docs/trainers.md', 'docs/memory.md', 'docs/pod.md'}
  assert names == others | set(WITH_BLOCKS)


def _anchors(path):
  """Returns the anchors of a page's headings, as GitHub makes them."""
  titles = re.findall(r'^#+ (.*)$', path.read_text(), re.MULTILINE)
  plain = [re.sub(r'[^\w\- ]', '', title.lower()) for title in titles]
  return {title.replace(' ', '-') for title in plain}


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
  links = re.findall(r'\]\(((?!https?:)[^)\s]+)\)', page.read_text())
  for link in links:
    path, _, anchor = link.partition('#')
    target = (page.parent / path).resolve() if path else page
    assert target.exists(), link
    assert not anchor or anchor in _anchors(target), link


def test_the_readme_is_short():
  assert len(README.read_text().splitlines()) <= 150


MODULES = (
  so.checkpoint,
  so.projectors,
  so.residuals,
  so.rso,
  so.testing,
  so.transports,
)


def _public_names():
  """Returns the names of the package, and those of its public modules."""
  modules = {module.__name__.rpartition('.')[2]: module for module in MODULES}
  yield from (name for name in so.__all__ if name not in modules)
  for prefix, module in modules.items():
    for name, x in vars(module).items():
      of_ours = getattr(x, '__module__', '').startswith('subspace_optax')
      if of_ours and not name.startswith('_'):
        yield f'{prefix}.{name}'


def test_every_public_name_is_in_the_reference():
  text = ''.join(x.read_text() for x in (DOCS / 'api').glob('*.md'))
  found = set(re.findall(r'^::: subspace_optax\.(\S+)$', text, re.MULTILINE))
  names = set(_public_names())
  assert {'projectors.svd', 'rso.subproblems', 'galore'} <= names
  assert found == names


def test_every_page_of_docs_is_in_the_site():
  site = (ROOT / 'mkdocs.yml').read_text()
  pages = [x.relative_to(DOCS) for x in DOCS.rglob('*.md')]
  assert all(f': {x}\n' in site for x in pages)


def test_every_tutorial_is_in_the_site_and_in_the_list():
  site = (ROOT / 'mkdocs.yml').read_text()
  page = (DOCS / 'tutorials.md').read_text()
  tutorials = sorted((DOCS / 'tutorials').glob('*.py'))
  assert tutorials
  for path in tutorials:
    assert f': tutorials/{path.stem}.md\n' in site
    assert f'](tutorials/{path.name})' in page


def test_links_of_tutorials_lead_somewhere():
  for path in (DOCS / 'tutorials').glob('*.py'):
    links = re.findall(r'\]\(((?!https?:)[^)\s]+)\)', path.read_text())
    assert links
    for link in links:
      assert (path.parent / link.partition('#')[0]).exists(), (path, link)


def test_the_commands_are_targets_of_the_makefile():
  commands = re.findall(r'^make (\S+)', README.read_text(), re.MULTILINE)
  makefile = (README.parent / 'Makefile').read_text()
  assert commands == ['train', 'test']
  for command in commands:
    assert f'\n{command}:' in makefile


def _costs():
  """Returns the cells of the table of costs by what its rows are about."""
  text = (DOCS / 'costs.md').read_text()
  table = re.search(r'(^\|.*\|\n)+', text, re.MULTILINE)
  assert table
  rows = [re.findall(r'[^|]+', line) for line in table[0].splitlines()[2:]]
  return {name.strip(' `'): map(str.strip, rest) for name, *rest in rows}


def _evaluate(formula, **sizes):
  """Returns what a sum of products of letters, as `mr + 2nr`, amounts to."""
  terms = re.findall(r'(\d*)([mnr]+)', formula)
  return sum(int(k or 1) * math.prod(sizes[c] for c in x) for k, x in terms)


def test_every_ready_made_optimizer_has_a_row_of_costs():
  assert list(_costs()) == [*so.optimizers.READY_MADE, 'Adam']
  for name in so.optimizers.READY_MADE:
    assert f'`{name}`' in (so.__doc__ or '')


@pytest.mark.parametrize('name', so.optimizers.READY_MADE)
def test_the_state_is_what_the_row_says(name):
  params = {'w': jax.ShapeDtypeStruct((64, 160), jnp.float32)}
  tx = cases.ready_made(name, rank=8)(1e-3)
  sizes = [x.size for x in jax.tree.leaves(jax.eval_shape(tx.init, params))]
  _, state, _ = _costs()[name]
  formula, _, side = state.partition(',')
  m, n = (160, 64) if 'm the long side' in side else (64, 160)
  wanted = _evaluate(formula.partition(';')[0], m=m, n=n, r=8)
  assert sum(size for size in sizes if size > 1) == wanted
