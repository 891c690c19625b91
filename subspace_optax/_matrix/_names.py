# SPDX-License-Identifier: Apache-2.0
"""The meaning of parameter names in common libraries.

A name is a whole component of a path, in snake case and without its number:
`LMHead_0` is `lm_head`, `ln_1` is `ln`. Underscores separate its words.
"""

from collections.abc import Callable
import functools
import re

# Leaves that take their meaning from the module that holds them.
_WEIGHTS = ('kernel', 'weight', 'w')
_ONE_AXIS = re.compile(
  r'bias(es)?|scales?|gammas?|betas?|offsets?|sinks|slopes'
)
_NORM = re.compile(
  r'(layer|rms|batch|group|instance|weight|pre|post|sub|qk?|k)?norms?|lnf?|bn|'
  r'gn|rms'
)
# Vectors of state space models and of RWKV, and buffers.
_NO_MATRIX = re.compile(
  r'a_log|log_(a|alpha|delta|dt|lambda|sigma|std|step)|r_k|k_[ak]|'
  r'time_(decay|faaaa|first|mix(_[a-z])?)|'
  r'([a-z]+_)*(inv_freqs?|freqs|sin|cos|mask)'
)
# Short names of biases; `B_re` and `wq_b` are matrices.
_B = re.compile(r'b_?\d+|b[qkvoQKVO]|b_\w+|(?![wW])\w+_b\d*')
_EMBEDDING = re.compile(r'(pos|tok|token|patch)?emb(s|ed|eds|edder|eddings?)?')
_TABLE = re.compile(
  r'wte|wpe|toks?|tokens?|patch|patches|pos|positions?|rel_pos(_[hw])?|'
  r'codebooks?'
)
# Tables of embeddings, by the end of a leaf's name.
_ROWS = re.compile(
  r'([a-z]+_)*(tokens?|prompts?|codebooks?)|(?!w_)[a-z]+_queries'
)
_MATRIX = ('proj', 'projection', 'dense', 'linear', 'fc', 'mlp', 'mapping')
_NO_TABLE = (*_MATRIX, 'gate', 'hidden', 'project', 'projector', 'transform')
_LAYERS = re.compile(r'[a-z]*(layers?|blocks?)|h|stack|stacked')
_ATTENTION = re.compile(r'[a-z]*(attn|attention)|mha')
_FEED_FORWARD = re.compile(r'mlp|ffn?|moe|experts?')
_CONVOLUTION = re.compile(r'[a-z]*conv(\dd|s|olution)?')
_POINTWISE = re.compile(r'(pw|pointwise)_?conv')
# Names of heads anywhere, and names that are heads only outside layers.
_HEAD = re.compile(
  r'(lm|mlm|vocab)_?head|logitdense|un_?embed[a-z]*|'
  r'([a-z]+_)?logits?(_(dense|fc|head|kernel|layer|linear|out|output|proj))?'
)
_OUTPUT = ('head', 'heads', 'classifier', 'score', 'readout', 'prediction')
_OF_HEADS = ('gate', 'gates', 'mix', 'mixer', 'mixing', 'dim')
_OUT = ('out', 'output', 'outputs')
_ATTENTION_IN = re.compile(
  r'query|key|value|[qkv]|(q|k|v|query|key|value)_proj|w[qkv]|to_[qkv]'
)
_GROUPED = re.compile(r'key|value|[kv]|(k|v|key|value)_proj|w[kv]|to_[kv]')
_ATTENTION_OUT = re.compile(
  r'out|o|wo|to_out|c_proj|(o|out)_proj|(attn|attention)_(out|output|out_proj)'
)

# Axes of one layer's leaf: `i` for rows, `o` for columns, `b` counts matrices.
# These names mean the same in every library.
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
  """Returns the names in a path, without wrappers of arrays.

  A leaf named `ln_w` counts as `ln/w`.
  """
  names = [_snake(part) for part in _parts(path)]
  words = names[-1].split('_')
  if len(words) > 1 and words[-1] in _WEIGHTS:
    names[-1:] = ['_'.join(words[:-1]), words[-1]]
  return tuple(names)


def split(path: str) -> list[str]:
  """Returns the components of a path, whatever separates them."""
  return re.split(r'[/.]|::', path)


@functools.lru_cache(maxsize=4096)
def _parts(path: str) -> tuple[str, ...]:
  """Returns the components of a path as they are spelled."""
  parts = [part for part in split(path) if part.strip('_~')]
  if len(parts) > 1 and (_snake(parts[-1]) == 'array' or parts[-1].isdigit()):
    name = _snake(parts[-2])
    if name in _WEIGHTS or _ONE_AXIS.fullmatch(name):
      parts.pop()
  return tuple(parts) or ('',)


def _snake(part: str) -> str:
  part = re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', part)
  part = part.lower().strip('_')
  return re.sub(r'(?<=[a-z])_?\d+$', '', part)


def module(path: str) -> str:
  """Returns the name of a weight's module: `query` for `query/kernel`."""
  *above, leaf = components(path)
  return above[-1] if leaf in _WEIGHTS and above else leaf


def is_weight(path: str) -> bool:
  """Whether a leaf has a generic name for weights."""
  return components(path)[-1] in _WEIGHTS


def may_be_vector(path: str) -> bool:
  """Whether a leaf of two axes may be one vector per head, such as RWKV's u."""
  return components(path)[-1] == 'u'


def in_layer(path: str) -> bool:
  """Whether a path leads into a layer: `layers/0`, `encoderblock_3/mlp`."""
  return any(map(_in_layers, components(path)))


def _words(name: str) -> list[str]:
  """Returns the words of a name without numbers: ln and g for `ln1_g`."""
  return [re.sub(r'(?<=[a-z])\d+$', '', word) for word in name.split('_')]


def is_norm(path: str) -> bool:
  """Whether a leaf is a norm's scale, with one axis per layer."""
  *above, leaf = components(path)
  name, owner = _words(module(path)), above[-1:] or ['']
  if len(name) > 1 and name[-1] in ('g', 'b', 'gain'):
    name.pop()
  if leaf.split('_')[-1] in ('scale', 'gamma') or _NORM.fullmatch(name[-1]):
    return True
  if _NORM.fullmatch(_words(owner[0])[-1]):  # any of a norm's own vectors
    return name[-1] not in _MATRIX
  starts = _NORM.fullmatch(name[0]) or name[:2] == ['layer', 'norm']
  return bool(starts) and leaf != 'kernel' and name[-1] not in _MATRIX


def is_bias(path: str) -> bool:
  """Whether a leaf is a bias, or another vector without a matrix."""
  leaf, name = components(path)[-1], module(path).split('_')
  words = leaf.split('_')
  if 'bias' in words and words[-1] not in _MATRIX:
    return True
  if _ONE_AXIS.fullmatch(words[-1]) or _NO_MATRIX.fullmatch(leaf):
    return True
  return leaf != 'kernel' and bool(_ONE_AXIS.fullmatch(name[-1]))


def shortens_bias(path: str) -> bool:
  """Whether a leaf has a short name for a bias: `b1`, `b_q`, `attn_b`."""
  leaf = _parts(path)[-1]
  words = _snake(leaf).split('_')
  is_matrix = 'lora' in words or words[-1] in _MATRIX
  return bool(_B.fullmatch(leaf)) and not is_matrix


def plain_kind(path: str, axes: int, in_attention: bool) -> str:
  """Returns the kind that keeps a leaf plain by its name, '' for none.

  Args:
    path: the leaf's path.
    axes: the leaf's number of axes.
    in_attention: whether query, key or value are next to the leaf.
  """
  if is_norm(path):
    return 'a norm'
  if is_bias(path):
    other = _NO_MATRIX.fullmatch(components(path)[-1])
    return 'a vector or buffer' if other else 'a bias'
  if _is_embedding(path):
    return 'an embedding'
  if _is_head(path, axes) and not in_attention:
    return 'a head'
  called = is_convolution(path) if axes > 2 else _has_window(path)
  return 'a convolution' if called else ''


def is_convolution(path: str) -> bool:
  """Whether a leaf's name is that of a convolution."""
  words = module(path).split('_')
  return words[-1] == 'filter' or any(map(_CONVOLUTION.fullmatch, words))


def _has_window(path: str) -> bool:
  """Whether a leaf of two axes has the name of a convolution along one axis.

  Convolutions over a single point are matrices, and so is `conv_ffn_in`.
  """
  name = module(path)
  last = _CONVOLUTION.fullmatch(name.split('_')[-1])
  return bool(last) and not _POINTWISE.search(name)


def _is_embedding(path: str) -> bool:
  names = components(path)
  if names[-1] in ('embedding', 'embeddings') or _is_table(path):
    return True
  # The layers of an embedder have matrices.
  above = enumerate(_layered(path, _is_layers)[:-1])
  layers = [i for i, is_layer in above if is_layer]
  names = names[layers[-1] + 1 if layers else 0 :]
  embeds = [i for i, name in enumerate(names) if _embeds(name)]
  return bool(embeds) and not any(
    name in ('linear', 'dense', 'mlp', 'fc') for name in names[embeds[-1] + 1 :]
  )


def _is_table(path: str) -> bool:
  """Whether a leaf's own name is a table of tokens, queries or words."""
  leaf = _parts(path)[-1]
  return leaf in ('W_E', 'W_pos') or bool(_ROWS.fullmatch(_snake(leaf)))


def _embeds(name: str) -> bool:
  words = name.split('_')
  if _TABLE.fullmatch(name) or _EMBEDDING.fullmatch(words[-1]):
    return True
  starts = _EMBEDDING.fullmatch(words[0])
  return bool(starts) and not any(word in _NO_TABLE for word in words)


def may_be_model(part: str, path: str) -> bool:
  """Whether a component of a path is a head or an embedder by its name.

  These may hold layers. An embedder may also hold tables, whose leaves are not
  named `kernel`.
  """
  name = _snake(part)
  if _embeds(name):
    return components(path)[-1] == 'kernel'
  return _ends_model(name) and not _HEAD.fullmatch(name)


def _layered(path: str, is_layer: Callable[[str], bool]) -> list[bool]:
  """Whether each name is that of a layer, or a number above a module."""
  parts = _parts(path)
  above = parts[: -2 if _snake(parts[-1]) in _WEIGHTS else -1]
  first = sum(part in ('params', 'model') for part in parts[:2])
  numbered = [_is_numbered(part, i <= first) for i, part in enumerate(above)]
  return [
    is_layer(name) or (i < len(numbered) and numbered[i])
    for i, name in enumerate(components(path))
  ]


def _is_numbered(part: str, is_first: bool) -> bool:
  """Whether the number in a name makes it a layer.

  It does in `encoder/3`, `cell_2` and `stage1/unit2`. It does not in `gpt2`,
  which is a model, in Flax's `Transformer_0`, or in one of several heads.
  """
  name = _snake(part)
  if part.isdigit():
    return True
  if name.split('_')[-1] in _MATRIX or _embeds(name) or _ends_model(name):
    return False
  if re.match(r'[A-Z].*_0$', part):
    return False
  return bool(re.search(r'_\d+$' if is_first else r'\d$', part))


def _is_layers(name: str) -> bool:
  words = name.split('_')
  return bool(_LAYERS.fullmatch(words[-1])) and not (
    words[0] in (*_OUT, *_OUTPUT, 'final') or _EMBEDDING.fullmatch(words[0])
  )


def _is_head(path: str, axes: int) -> bool:
  names = components(path)
  if names[-1] in _WEIGHTS and len(names) > 1:
    names = names[:-1]
  if _parts(path)[-1] == 'W_U' and not in_layer(path):
    return True
  if module(path) == 'decoder' and 'predictions' in names:
    return True
  layered = _layered(path, _in_layers)[: len(names)]
  for i, name in enumerate(names):
    above, below = any(layered[:i]), any(layered[i + 1 :])
    ends = axes == 2 and _ends_model(name) and not above
    if (ends or _HEAD.fullmatch(name)) and not below:
      return True
  return False


def _ends_model(name: str) -> bool:
  words = name.split('_')
  of_head = words[0] == 'head' and words[-1] not in _OF_HEADS
  if of_head or words[-1] in _OUTPUT:
    return True
  last = words[0] in (*_OUT, 'final', 'vocab')
  last = last and words[-1] in (*_MATRIX, 'layer')
  return (last or words[-1] in _OUT) and not any(map(_is_block, words))


def _is_block(word: str) -> bool:
  return bool(_ATTENTION.fullmatch(word) or _FEED_FORWARD.fullmatch(word))


def _in_layers(name: str) -> bool:
  words = name.split('_')
  inner = any(map(_is_block, words)) and words[-1] not in _OUTPUT
  return inner or _is_layers(name) or bool(re.fullmatch(r'h\d+', words[0]))


def is_attention_in(path: str) -> bool:
  """Whether a leaf's name is that of query, key or value."""
  return bool(_ATTENTION_IN.fullmatch(module(path)))


def forms(path: str) -> tuple[str, ...]:
  """Returns the forms with three or more axes that a name has everywhere."""
  return _FORMS.get(module(path), ())


def attention_forms(path: str) -> tuple[str, ...]:
  """Returns the forms that a name has if heads are axes, likeliest first.

  Flax has inputs first, Keras heads, haliax outputs, with groups for queries.
  """
  if _in_feed_forward(path):
    return ()
  if is_grouped(path):
    return ('ioo', 'ooi', 'oio')
  if is_attention_in(path):
    return ('ioo', 'ooi', 'oio', 'oooi')
  return ('iio', 'oii') if is_attention_out(path) else ()


def _in_feed_forward(path: str) -> bool:
  """Whether the nearest block above a leaf is an MLP or experts."""
  for name in reversed(components(path)):
    words = name.split('_')
    if any(map(_is_block, words)):
      return not any(map(_ATTENTION.fullmatch, words))
  return False


def is_attention_out(path: str) -> bool:
  """Whether a leaf maps heads back to the model's width."""
  return bool(_ATTENTION_OUT.fullmatch(module(path)))


def is_grouped(path: str) -> bool:
  """Whether a leaf may have fewer heads than the query has."""
  return bool(_GROUPED.fullmatch(module(path)))
