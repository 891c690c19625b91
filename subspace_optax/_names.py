# Copyright 2026 The subspace_optax Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the names of parameters say in the libraries of the field.

A name is a whole component of a path, in snake case and without its number:
`LMHead_0` is `lm_head`, `ln_1` is `ln`. Its words are what underscores part.
"""

import functools
import re

# Leaves that are named by the module that holds them.
_WEIGHTS = ('kernel', 'weight', 'w')
_ONE_AXIS = ('bias', 'biases', 'scale', 'gamma', 'beta', 'offset', 'sinks')
_NORM = re.compile(
  r'(layer|rms|batch|group|instance|weight|pre|post|sub|qk?|k)?norms?|ln|bn|gn'
)
_EMBEDDING = re.compile(r'(pos|tok|token|patch)?emb(s|ed|eds|edder|eddings?)?')
_TABLE = re.compile(r'wte|wpe|toks?|tokens?|patch|patches|pos|positions?')
_MATRIX = ('proj', 'projection', 'dense', 'linear', 'fc', 'mlp', 'mapping')
_LAYERS = re.compile(r'[a-z]*(layers?|blocks?)|h|stack|stacked')
_ATTENTION = re.compile(r'[a-z]*(attn|attention)|mha')
_FEED_FORWARD = re.compile(r'mlp|ffn?|moe|experts?')
_CONVOLUTION = re.compile(r'[a-z]*conv(\dd|s|olution)?')
# Heads wherever they stand, and names that are heads outside of layers only.
_HEAD = re.compile(
  r'(lm|mlm|vocab)_head|([a-z]+_)?logits?(_[a-z]+)?|logitdense|un_?embed[a-z]*'
)
_OUTPUT = ('head', 'heads', 'classifier', 'score', 'readout')
_OUT = ('out', 'output', 'outputs')
_ATTENTION_IN = re.compile(
  r'query|key|value|[qkv]|(q|k|v|query|key|value)_proj|w[qkv]|to_[qkv]'
)
_GROUPED = re.compile(r'key|value|[kv]|(k|v|key|value)_proj|w[kv]|to_[kv]')
_ATTENTION_OUT = re.compile(
  r'out|o|wo|to_out|c_proj|(o|out)_proj|(attn|attention)_(out|output|out_proj)'
)

# Axes of one layer's leaf: `i` of the rows, `o` of the columns, `b` counts
# matrices. Names that mean this in every library.
_FORMS = {
  'q_einsum': ('oio',),
  'kv_einsum': ('boio',),
  'qkv_einsum': ('boio',),
  'attn_vec_einsum': ('iio',),
  'gating_einsum': ('bio',),
  'wq_b': ('ioo',),
  'wkv_b': ('ioo',),
  'qkv_proj': ('iboo', 'bioo'),
  'c_attn': ('iboo', 'bioo'),
  'o_a_proj': ('bio',),
}


@functools.lru_cache(maxsize=4096)
def components(path: str) -> tuple[str, ...]:
  """Returns the names in a path; wrappers of arrays are left out."""
  names = [_snake(part) for part in re.split(r'[/.]', path)]
  names = [name for name in names if name not in ('', '~')]
  if len(names) > 1 and (names[-1] == 'array' or names[-1].isdigit()):
    if names[-2] in _WEIGHTS + _ONE_AXIS:
      names.pop()
  return tuple(names) or ('',)


def _snake(part: str) -> str:
  part = re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', part)
  part = part.lower().strip('_')
  return re.sub(r'(?<=[a-z])_?\d+$', '', part)


def module(path: str) -> str:
  """Returns the name of what a weight belongs to: `query` of `query/kernel`."""
  *above, leaf = components(path)
  return above[-1] if leaf in _WEIGHTS and above else leaf


def is_weight(path: str) -> bool:
  """Whether a leaf is called as weights of any module are."""
  return components(path)[-1] in _WEIGHTS


def in_layer(path: str) -> bool:
  """Whether a path leads into a layer: `layers/0`, `encoderblock_3/mlp`."""
  return any(map(_in_layers, components(path)))


def is_norm(path: str) -> bool:
  """Whether a leaf is a norm's scale, one axis for each layer."""
  *above, leaf = components(path)
  name, owner = module(path).split('_'), above[-1:] or ['']
  if leaf.split('_')[-1] in ('scale', 'gamma') or _NORM.fullmatch(name[-1]):
    return True
  if _NORM.fullmatch(owner[0].split('_')[-1]):  # any of a norm's own vectors
    return name[-1] not in _MATRIX
  starts = _NORM.fullmatch(name[0]) or name[:2] == ['layer', 'norm']
  return bool(starts) and leaf != 'kernel' and name[-1] not in _MATRIX


def is_bias(path: str) -> bool:
  """Whether a leaf is a bias, or another vector of no matrix."""
  leaf, name = components(path)[-1], module(path).split('_')
  return leaf.split('_')[-1] in _ONE_AXIS or (
    leaf != 'kernel' and name[-1] in _ONE_AXIS
  )


def plain_kind(path: str, axes: int, in_attention: bool) -> str:
  """Returns what keeps a leaf out of a subspace by its name, '' if nothing.

  Args:
    path: the leaf's path.
    axes: how many it has.
    in_attention: whether query, key or value stand beside it.
  """
  if is_norm(path):
    return 'a norm'
  if is_bias(path):
    return 'a bias'
  if _is_embedding(path):
    return 'an embedding'
  if _is_head(path, axes) and not in_attention:
    return 'a head'
  return 'a convolution' if is_convolution(path) else ''


def is_convolution(path: str) -> bool:
  """Whether a leaf is called a convolution."""
  return any(map(_CONVOLUTION.fullmatch, module(path).split('_')))


def _is_embedding(path: str) -> bool:
  names = components(path)
  if names[-1] in ('embedding', 'embeddings'):
    return True
  # An embedder that has layers has matrices in them.
  layers = [i for i, name in enumerate(names) if _is_layers(name)]
  return any(map(_embeds, names[layers[-1] + 1 if layers else 0 :]))


def _embeds(name: str) -> bool:
  words = name.split('_')
  if _TABLE.fullmatch(name):
    return True
  ends = map(_EMBEDDING.fullmatch, (words[0], words[-1]))
  return words[-1] not in _MATRIX and any(ends)


def _is_layers(name: str) -> bool:
  words = name.split('_')
  return bool(_LAYERS.fullmatch(words[-1])) and not (
    words[0] in (*_OUT, *_OUTPUT, 'final') or _EMBEDDING.fullmatch(words[0])
  )


def _is_head(path: str, axes: int) -> bool:
  names = components(path)
  if names[-1] in _WEIGHTS and len(names) > 1:
    names = names[:-1]
  for i, name in enumerate(names):
    others = names[:i] + names[i + 1 :]
    if _HEAD.fullmatch(name) and not any(map(_in_layers, names[i + 1 :])):
      return True
    if axes == 2 and _ends_model(name) and not any(map(_in_layers, others)):
      return True
  return False


def _ends_model(name: str) -> bool:
  words = name.split('_')
  if words[-1] in _OUTPUT:
    return True
  last = words[0] in (*_OUT, 'head', 'final', 'vocab')
  last = last and words[-1] in (*_MATRIX, 'layer')
  return (last or words[-1] in _OUT) and not any(map(_is_block, words))


def _is_block(word: str) -> bool:
  return bool(_ATTENTION.fullmatch(word) or _FEED_FORWARD.fullmatch(word))


def _in_layers(name: str) -> bool:
  words = name.split('_')
  inner = any(map(_is_block, words)) and words[-1] not in _OUTPUT
  return inner or _is_layers(name) or bool(re.fullmatch(r'h\d+', words[0]))


def is_attention_in(path: str) -> bool:
  """Whether a leaf is called query, key or value."""
  return bool(_ATTENTION_IN.fullmatch(module(path)))


def forms(path: str) -> tuple[str, ...]:
  """Returns the layouts of three or more axes that a name has everywhere."""
  return _FORMS.get(module(path), ())


def attention_forms(path: str) -> tuple[str, ...]:
  """Returns the layouts that a name has if heads are axes, likeliest first.

  Flax keeps inputs first, Keras heads, haliax outputs, query's in groups.
  """
  if _in_feed_forward(path):
    return ()
  if is_grouped(path):
    return ('ioo', 'ooi', 'oio')
  if is_attention_in(path):
    return ('ioo', 'ooi', 'oio', 'oooi')
  return ('iio', 'oii') if is_attention_out(path) else ()


def _in_feed_forward(path: str) -> bool:
  """Whether the nearest block above a leaf is an MLP or of experts."""
  for name in reversed(components(path)):
    words = name.split('_')
    if any(map(_ATTENTION.fullmatch, words)):
      return False
    if any(map(_FEED_FORWARD.fullmatch, words)):
      return True
  return False


def is_attention_out(path: str) -> bool:
  """Whether a leaf takes heads back to the model's width."""
  return bool(_ATTENTION_OUT.fullmatch(module(path)))


def is_grouped(path: str) -> bool:
  """Whether a leaf may have fewer heads than the query has."""
  return bool(_GROUPED.fullmatch(module(path)))
