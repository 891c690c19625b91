"""Two corpora of different kinds that need no download.

Both are the bytes of the installed packages of `data.PACKAGES`: their
docstrings, which are English, and their code without docstrings and comments.
Whole files are held out.
"""

import ast
from collections.abc import Callable
import hashlib
import pathlib
import warnings

import numpy as np

from benchmarks import harness
import data

MOST = 8_000_000  # bytes of a corpus, of whole files


def without_docstrings(source: bytes) -> bytes:
  """A Python file as its syntax tree prints it: no comments, no docstrings."""
  with warnings.catch_warnings():  # some packages have invalid escapes
    warnings.simplefilter('ignore')
    tree = ast.parse(source)
  for node in ast.walk(tree):
    body = getattr(node, 'body', None)
    if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
      value = body[0].value
      if isinstance(value, ast.Constant) and isinstance(value.value, str):
        body[:] = body[1:] or [ast.Pass()]
  return ast.unparse(tree).encode() + b'\n\n'


def code() -> dict[str, bytes]:
  """One document a source file."""
  documents, size = {}, 0
  for package in data.PACKAGES:
    files = data.package_files(package)
    for name, path in harness.track(files.items(), f'Reading {package}'):
      if size < MOST:
        documents[name] = without_docstrings(path.read_bytes())
        size += len(documents[name])
  return documents


CORPORA: dict[str, Callable[[], dict[str, bytes]]] = {
  'docstrings': data.installed_docstrings,
  'code': code,
}


def load(name: str, cache: pathlib.Path) -> tuple[np.ndarray, np.ndarray, str]:
  """The bytes to train on, those held out, and a hash of both."""
  path = cache / f'{name}.npz'
  if not path.exists():
    cache.mkdir(parents=True, exist_ok=True)
    train, held = data.split(CORPORA[name](), fraction=0.03)
    new = path.with_suffix('.new.npz')
    np.savez(new, train=data.encode(train), held=data.encode(held))
    new.rename(path)
  found = np.load(path)
  train, held = found['train'], found['held']
  digest = hashlib.sha256(train.tobytes() + held.tobytes()).hexdigest()
  return train, held, digest
