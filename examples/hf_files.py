"""Folders in the format of Hugging Face, whatever model they hold.

config.json, and tensors in model.safetensors or in several such files with an
index. Kernels are (outputs, inputs) there and (inputs, outputs) here; blocks
have numbers there, and are a stack or a mapping of blocks here.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import json
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

Folder = str | pathlib.Path
Tensors = Iterable[tuple[str, np.ndarray]]  # by name
Parameters = Mapping[str, tuple[tuple, Any]]  # (path, array) by tensor's name


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The contents of a file; a ValueError names one that can't be read."""
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise ValueError(f'{path} cannot be read: {error}') from error


def number(raw: Mapping, name: str, path: pathlib.Path) -> int:
  """An entry of the configuration at `path` that must be an int."""
  if not isinstance(raw.get(name), int):
    raise ValueError(f'{path}: {name}={raw.get(name)!r}, expected an int')
  return raw[name]


def check_expected(raw: Mapping, expected: Mapping, path: pathlib.Path):
  """Raises if an entry is there, and has another value than a model can do."""
  for name, value in expected.items():
    if (given := raw.get(name, value)) != value:
      raise ValueError(f'{path}: {name}={given!r}, expected {value!r}')


def labels_json(labels: Sequence[str]) -> dict[str, Any]:
  """What a configuration says of a classifier's labels."""
  return {
    'id2label': {str(i): label for i, label in enumerate(labels)},
    'label2id': {label: i for i, label in enumerate(labels)},
  }


def _turn(path: tuple, x: np.ndarray) -> np.ndarray:
  """From one format's orientation to the other's."""
  return x.T if path[-1] == 'kernel' else x


def by_path(tree: Mapping) -> dict[tuple, Any]:
  """The leaves of a tree of mappings by their paths."""
  return dict(traverse_util.flatten_dict(tree))


def _stack(params: Mapping) -> dict[str, Any]:
  blocks = [params['blocks'][i] for i in range(len(params['blocks']))]
  return {**params, 'blocks': jax.tree.map(lambda *x: np.stack(x), *blocks)}


def unstack(params: Mapping, layers: int) -> dict[str, Any]:
  """The tree with a mapping of blocks in place of stacked ones."""
  layer = lambda i: jax.tree.map(lambda x: x[i], params['blocks'])
  return {**params, 'blocks': {i: layer(i) for i in range(layers)}}


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  index = folder / 'model.safetensors.index.json'
  if not index.exists():
    return [folder / 'model.safetensors']
  return [
    folder / f for f in sorted({*read_json(index)['weight_map'].values()})
  ]


def read_tensors(folder: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor of every file, one at a time."""
  for path in _files(folder):
    try:
      file = safetensors.safe_open(str(path), framework='numpy')
    except (OSError, safetensors.SafetensorError) as error:
      raise ValueError(f'{path} cannot be read: {error}') from error
    with file:
      for name in file.keys():
        yield name, file.get_tensor(name)


def _fit(name: str, x: np.ndarray, path: tuple, like: Any) -> np.ndarray:
  """A tensor as a parameter; raises if its shape or its type is wrong."""
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'tensor {name!r} holds {x.dtype}, expected floats')
  want = like.shape[::-1] if path[-1] == 'kernel' else like.shape
  if x.shape != want:
    raise ValueError(f'tensor {name!r} has shape {x.shape}, expected {want}')
  return _turn(path, x).astype(like.dtype)


def take(
  tensors: Tensors, wanted: Parameters, source: Folder
) -> dict[tuple, np.ndarray]:
  """The parameters by path.

  Args:
    tensors: of a checkpoint.
    wanted: (path, abstract parameter) of each by the name of its tensor.
    source: what errors name.
  """
  wanted, found = dict(wanted), {}
  for name, x in tensors:
    if name not in wanted:
      raise ValueError(f'{source}: unexpected tensor {name!r}')
    path, like = wanted.pop(name)
    found[path] = _fit(name, x, path, like)
  if wanted:
    raise ValueError(f'{source}: missing tensors {sorted(wanted)}')
  return found


def as_tree(found: Mapping[tuple, np.ndarray], stacked: bool) -> dict[str, Any]:
  """The tree of parameters by path, the blocks one or a stack."""
  params = traverse_util.unflatten_dict(dict(found))
  return _stack(params) if stacked else params


def write(folder: Folder, named: Parameters, config: Mapping):
  """Writes a configuration and tensors: by name, path and parameter."""
  # A transposed view would be written in the order of its memory.
  tensors = {
    name: np.ascontiguousarray(_turn(*one)) for name, one in named.items()
  }
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(
    tensors, folder / 'model.safetensors', metadata={'format': 'pt'}
  )
  text = json.dumps(config, indent=2)
  (folder / 'config.json').write_text(text + '\n')
