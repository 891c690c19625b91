"""RoBERTa checkpoints in the format of Hugging Face, to label texts.

Heads and a pooler, as `roberta-base` and the like hold for other uses, are left
out: a new head is trained for the labels at hand.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from flax import nnx
import jax
import numpy as np

import hf_files
from hf_files import Folder
import roberta

_OUTER = {
  ('embed', 'embedding'): 'roberta.embeddings.word_embeddings.weight',
  ('positions', 'embedding'): 'roberta.embeddings.position_embeddings.weight',
  ('types', 'embedding'): 'roberta.embeddings.token_type_embeddings.weight',
}
_MODULES = {
  ('embed_norm',): 'roberta.embeddings.LayerNorm',
  ('head', 'dense'): 'classifier.dense',
  ('head', 'out'): 'classifier.out_proj',
}
_BLOCK = {
  ('attention', 'wq'): 'attention.self.query',
  ('attention', 'wk'): 'attention.self.key',
  ('attention', 'wv'): 'attention.self.value',
  ('attention', 'wo'): 'attention.output.dense',
  ('attention_norm',): 'attention.output.LayerNorm',
  ('mlp', 'up'): 'intermediate.dense',
  ('mlp', 'down'): 'output.dense',
  ('mlp_norm',): 'output.LayerNorm',
}
# The only values that roberta.py can do; they may be absent.
_EXPECTED = {
  'model_type': 'roberta',
  'hidden_act': 'gelu',
  'position_embedding_type': 'absolute',
}
_OTHER_USES = ('lm_head.', 'roberta.pooler.')


def read_config(folder: Folder) -> roberta.RobertaConfig:
  """The sizes of a checkpoint."""
  path = pathlib.Path(folder, 'config.json')
  raw = hf_files.read_json(path)
  hf_files.check_expected(raw, _EXPECTED, path)
  size = lambda name: hf_files.number(raw, name, path)
  return roberta.RobertaConfig(
    width=size('hidden_size'),
    mlp_width=size('intermediate_size'),
    layers=size('num_hidden_layers'),
    heads=size('num_attention_heads'),
    vocab=size('vocab_size'),
    positions=size('max_position_embeddings'),
    first_position=raw.get('pad_token_id', 1) + 1,
    types=raw.get('type_vocab_size', 1),
    outputs=len(raw.get('id2label') or range(2)),
    norm_epsilon=raw.get('layer_norm_eps', 1e-5),
  )


def _config_json(
  c: roberta.RobertaConfig, labels: Sequence[str]
) -> dict[str, Any]:
  return {
    'architectures': ['RobertaForSequenceClassification'],
    **_EXPECTED,
    'vocab_size': c.vocab,
    'hidden_size': c.width,
    'intermediate_size': c.mlp_width,
    'num_hidden_layers': c.layers,
    'num_attention_heads': c.heads,
    'max_position_embeddings': c.positions,
    'pad_token_id': c.first_position - 1,
    'type_vocab_size': c.types,
    'layer_norm_eps': c.norm_epsilon,
    'torch_dtype': c.param_dtype,
    **hf_files.labels_json(labels),
  }


def _name(path: tuple) -> str:
  """The tensor that holds a parameter of the model with unstacked layers."""
  if path in _OUTER:
    return _OUTER[path]
  *module, kind = path
  kind = 'bias' if kind == 'bias' else 'weight'
  if path[0] != 'blocks':
    return f'{_MODULES[tuple(module)]}.{kind}'
  _, layer, *inner = module
  return f'roberta.encoder.layer.{layer}.{_BLOCK[tuple(inner)]}.{kind}'


def _wanted(c: roberta.RobertaConfig) -> dict[str, tuple[tuple, Any]]:
  """(path, abstract parameter) by the name of the tensor."""
  c = dataclasses.replace(c, scan_layers=False)
  model = nnx.eval_shape(lambda: roberta.Roberta(c, nnx.Rngs(0)))
  flat = hf_files.by_path(nnx.to_pure_dict(nnx.state(model)))
  return {_name(path): (path, x) for path, x in flat.items()}


def load(folder: Folder, **changes) -> tuple[roberta.RobertaConfig, dict]:
  """(configuration, parameters) of a checkpoint, all but its head for labels.

  Args:
    folder: of the checkpoint.
    **changes: fields of the configuration that no checkpoint decides.

  Returns:
    The parameters are NumPy arrays in the tree of `nnx.to_pure_dict`.

  Raises:
    ValueError: a file or a tensor is missing, unexpected, of the wrong shape or
      of a model that `roberta.Roberta` can't be.
  """
  folder = pathlib.Path(folder)
  c = dataclasses.replace(read_config(folder), **changes)
  wanted = {k: v for k, v in _wanted(c).items() if v[0][0] != 'head'}
  tensors = (
    (name, x)
    for name, x in hf_files.read_tensors(folder)
    if not name.startswith((*_OTHER_USES, 'classifier.'))
    and not name.endswith('.position_ids')
  )
  found = hf_files.take(tensors, wanted, folder)
  return c, hf_files.as_tree(found, c.scan_layers)


def first_head(c: roberta.RobertaConfig, key: jax.Array) -> dict[str, Any]:
  """Random parameters of a head, in their place in the tree."""
  head = roberta.Head(c, nnx.Rngs(key))
  return {'head': nnx.to_pure_dict(nnx.state(head))}


def save(
  folder: Folder,
  c: roberta.RobertaConfig,
  params: Mapping,
  *,
  labels: Sequence[str],
):
  """Writes a checkpoint of `RobertaForSequenceClassification`.

  Args:
    folder: where to; made if it is not there.
    c: the configuration of the model.
    params: in the tree of `nnx.to_pure_dict`.
    labels: of the outputs, one for each.

  Raises:
    ValueError: labels do not fit the outputs.
  """
  if len(labels) != c.outputs:
    raise ValueError(f'labels={labels!r} do not fit outputs={c.outputs}')
  if c.scan_layers:
    params = hf_files.unstack(params, c.layers)
  flat = hf_files.by_path(jax.tree.map(np.asarray, dict(params)))
  named = {_name(path): (path, x) for path, x in flat.items()}
  hf_files.write(folder, named, _config_json(c, labels))
