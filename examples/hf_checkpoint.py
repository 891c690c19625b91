"""LLaMA, Mistral and Qwen 2 checkpoints in the format of Hugging Face.

The head is the `lm_head` of a language model or the `score` of a classifier,
here `lm_head` in both.
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
import llama

_EMBEDDING, _HEAD = ('embed', 'embedding'), ('lm_head', 'kernel')
_OUTER = {
  _EMBEDDING: 'model.embed_tokens',
  ('final_norm', 'scale'): 'model.norm',
}
_BLOCK = {
  ('attention_norm', 'scale'): 'input_layernorm',
  ('attention', 'wq', 'kernel'): 'self_attn.q_proj',
  ('attention', 'wk', 'kernel'): 'self_attn.k_proj',
  ('attention', 'wv', 'kernel'): 'self_attn.v_proj',
  ('attention', 'wo', 'kernel'): 'self_attn.o_proj',
  ('attention', 'wq', 'bias'): 'self_attn.q_proj',
  ('attention', 'wk', 'bias'): 'self_attn.k_proj',
  ('attention', 'wv', 'bias'): 'self_attn.v_proj',
  ('mlp_norm', 'scale'): 'post_attention_layernorm',
  ('mlp', 'gate', 'kernel'): 'mlp.gate_proj',
  ('mlp', 'up', 'kernel'): 'mlp.up_proj',
  ('mlp', 'down', 'kernel'): 'mlp.down_proj',
}
# By model_type; Mistral is a LLaMA, and Qwen 2 one with biases.
_FAMILIES = {'llama': 'Llama', 'mistral': 'Mistral', 'qwen2': 'Qwen2'}
_TEMPLATE = 'chat_template.jinja'
_LANGUAGE_MODEL, _CLASSIFIER = 'ForCausalLM', 'ForSequenceClassification'
# The only values that llama.py can do; they may be absent.
_EXPECTED = {
  'hidden_act': 'silu',
  'attention_bias': False,
  'mlp_bias': False,
}


# The fields of llama.RopeScaling.
_SCALING = (
  'factor',
  'low_freq_factor',
  'high_freq_factor',
  'original_max_position_embeddings',
)


# --- config.json -------------------------------------------------------------


def _rope(
  raw: Mapping, path: pathlib.Path
) -> tuple[float, llama.RopeScaling | None]:
  """(base of the angles, scaling), which versions write differently."""
  rope = raw.get('rope_parameters') or raw.get('rope_scaling') or {}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  base = float(rope.get('rope_theta', raw.get('rope_theta', 10_000.0)))
  if kind == 'default':
    return base, None
  if kind != 'llama3':
    raise ValueError(f'{path}: rope_type={kind!r} is not supported')
  try:
    return base, llama.RopeScaling(*(rope[name] for name in _SCALING))
  except KeyError as error:
    raise ValueError(f'{path}: {error} is missing of the scaling') from error


def _check_family(raw: Mapping, path: pathlib.Path):
  """Raises if a checkpoint is not of a model that is a LLaMA, or nearly."""
  if (kind := raw.get('model_type')) not in _FAMILIES:
    raise ValueError(
      f'{path}: model_type={kind!r}, expected one of {sorted(_FAMILIES)}'
    )
  hf_files.check_expected(raw, _EXPECTED, path)


def _check(raw: Mapping, c: llama.LlamaConfig, path: pathlib.Path):
  """Raises what llama.py can't do."""
  kind = raw['model_type']
  window = raw.get('sliding_window')
  if window and raw.get('use_sliding_window', kind == 'mistral'):
    raise ValueError(f'{path}: sliding_window={window!r} is not supported')
  head_dim = raw.get('head_dim') or c.width // c.heads
  if head_dim * c.heads != c.width:
    raise ValueError(
      f'{path}: head_dim={head_dim} times num_attention_heads={c.heads} is '
      f'not hidden_size={c.width}'
    )


def _outputs(raw: Mapping) -> int | None:
  """The number of labels; a classifier that names none has two."""
  names = raw.get('architectures') or ()
  if not any(name.endswith(_CLASSIFIER) for name in names):
    return None
  return len(raw.get('id2label') or range(2))


def read_config(folder: Folder) -> llama.LlamaConfig:
  """The sizes of a checkpoint."""
  path = pathlib.Path(folder, 'config.json')
  raw = hf_files.read_json(path)
  _check_family(raw, path)
  size = lambda name: hf_files.number(raw, name, path)
  base, scaling = _rope(raw, path)
  c = llama.LlamaConfig(
    width=size('hidden_size'),
    mlp_width=size('intermediate_size'),
    layers=size('num_hidden_layers'),
    heads=size('num_attention_heads'),
    kv_heads=raw.get('num_key_value_heads'),
    vocab=size('vocab_size'),
    outputs=_outputs(raw),
    rope_base=base,
    rope_scaling=scaling,
    norm_epsilon=raw.get('rms_norm_eps', 1e-6),
    qkv_bias=raw.get('model_type') == 'qwen2',
  )
  _check(raw, c, path)
  return c


def _scaling_json(scaling: llama.RopeScaling) -> dict[str, Any]:
  fields = dict(zip(_SCALING, dataclasses.astuple(scaling), strict=True))
  return {'rope_scaling': {'rope_type': 'llama3', **fields}}


def _config_json(
  c: llama.LlamaConfig, labels: Sequence[str], tied: bool, end: int | None
) -> dict[str, Any]:
  kind = 'qwen2' if c.qkv_bias else 'llama'
  suffix = _CLASSIFIER if labels else _LANGUAGE_MODEL
  return {
    'architectures': [_FAMILIES[kind] + suffix],
    'model_type': kind,
    **_EXPECTED,
    'vocab_size': c.vocab,
    'hidden_size': c.width,
    'intermediate_size': c.mlp_width,
    'num_hidden_layers': c.layers,
    'num_attention_heads': c.heads,
    'num_key_value_heads': c.kv_heads or c.heads,
    'rms_norm_eps': c.norm_epsilon,
    'rope_theta': c.rope_base,
    'bos_token_id': None,
    'eos_token_id': end,
    'tie_word_embeddings': tied,
    'torch_dtype': c.param_dtype,
    **(_scaling_json(c.rope_scaling) if c.rope_scaling else {}),
    **(hf_files.labels_json(labels) if labels else {}),
  }


# --- Names and shapes --------------------------------------------------------


def _name(path: tuple, c: llama.LlamaConfig) -> str:
  """The tensor that holds a parameter of the model with unstacked layers."""
  if path == _HEAD:
    return 'lm_head.weight' if c.outputs is None else 'score.weight'
  if path in _OUTER:
    return f'{_OUTER[path]}.weight'
  _, layer, *rest = path
  kind = 'bias' if rest[-1] == 'bias' else 'weight'
  return f'model.layers.{layer}.{_BLOCK[tuple(rest)]}.{kind}'


def _parameters(c: llama.LlamaConfig) -> dict[tuple, Any]:
  """The abstract parameters of the model with unstacked layers, by path."""
  c = dataclasses.replace(c, scan_layers=False)
  model = nnx.eval_shape(lambda: llama.Llama(c, nnx.Rngs(0)))
  return hf_files.by_path(nnx.to_pure_dict(nnx.state(model)))


# --- Reading -----------------------------------------------------------------


def _is_ignored(name: str, tied: bool) -> bool:
  """Constants that old versions saved, and copies of a tied embedding."""
  copy = tied and name == 'lm_head.weight'
  return copy or name.endswith('rotary_emb.inv_freq')


def assemble(
  tensors: hf_files.Tensors, c: llama.LlamaConfig, tied: bool, source: Folder
) -> dict[str, Any]:
  """Puts tensors with names of this format into the tree of the model.

  A tied model gets a copy of its embedding as its head.
  """
  wanted = {_name(p, c): (p, x) for p, x in _parameters(c).items()}
  if tied:
    wanted.pop('lm_head.weight', None)
  own = ((name, x) for name, x in tensors if not _is_ignored(name, tied))
  found = hf_files.take(own, wanted, source)
  if tied:
    found[_HEAD] = found[_EMBEDDING].T
  return hf_files.as_tree(found, c.scan_layers)


def first_head(c: llama.LlamaConfig, key: jax.Array) -> dict[str, Any]:
  """Random parameters of a head, in their place in the tree."""
  shape = c.width, c.outputs or c.vocab
  kernel = 0.02 * jax.random.normal(key, shape, c.param_dtype)
  return {'lm_head': {'kernel': kernel}}


def is_tied(params: Mapping) -> bool:
  """Whether the head of a model equals its embedding."""
  flat = hf_files.by_path(params)
  return np.array_equal(flat[_HEAD].T, flat[_EMBEDDING])


def load(folder: Folder, **changes) -> tuple[llama.LlamaConfig, dict]:
  """(configuration, parameters) of a checkpoint.

  Args:
    folder: of the checkpoint.
    **changes: fields of the configuration that no checkpoint decides, such as
      `param_dtype` and `scan_layers`.

  Returns:
    The parameters are NumPy arrays in the tree of `nnx.to_pure_dict`.

  Raises:
    ValueError: a file or a tensor is missing, unexpected, of the wrong shape or
      of a model that `llama.Llama` can't be.
  """
  folder = pathlib.Path(folder)
  c = dataclasses.replace(read_config(folder), **changes)
  raw = hf_files.read_json(folder / 'config.json')
  tied = bool(raw.get('tie_word_embeddings')) and c.outputs is None
  return c, assemble(hf_files.read_tensors(folder), c, tied, folder)


def marks(folder: Folder) -> tuple[int | None, str]:
  """(token that ends a text, chat template) of a checkpoint."""
  folder = pathlib.Path(folder)
  end: Any = hf_files.read_json(folder / 'config.json').get('eos_token_id')
  end = end[0] if isinstance(end, list) and end else end
  if (path := folder / _TEMPLATE).exists():
    return end, path.read_text()
  path = folder / 'tokenizer_config.json'  # where older versions have it
  template = (
    hf_files.read_json(path).get('chat_template') if path.exists() else ''
  )
  return end, template if isinstance(template, str) else ''


# --- Writing -----------------------------------------------------------------


def save(
  folder: Folder,
  c: llama.LlamaConfig,
  params: Mapping,
  *,
  labels: Sequence[str] = (),
  tied: bool = False,
  marks: tuple[int | None, str] = (None, ''),
):
  """Writes a checkpoint.

  Args:
    folder: where to; made if it is not there.
    c: the configuration of the model.
    params: in the tree of `nnx.to_pure_dict`.
    labels: of a classifier's outputs, one for each.
    tied: whether to leave the head out, since it equals the embedding.
    marks: see the function of this name.

  Raises:
    ValueError: labels do not fit the outputs, or the head is not the embedding.
  """
  if len(labels) != (c.outputs or 0):
    raise ValueError(f'labels={labels!r} do not fit outputs={c.outputs}')
  params = hf_files.unstack(params, c.layers) if c.scan_layers else params
  flat = hf_files.by_path(jax.tree.map(np.asarray, dict(params)))
  if tied and not np.array_equal(flat.pop(_HEAD).T, flat[_EMBEDDING]):
    raise ValueError('tied=True, but the head differs from the embedding')
  named = {_name(p, c): (p, x) for p, x in flat.items()}
  end, template = marks
  hf_files.write(folder, named, _config_json(c, labels, tied, end))
  if template:
    pathlib.Path(folder, _TEMPLATE).write_text(template)
