# SPDX-License-Identifier: Apache-2.0
"""Boxes: wrappers in which libraries name the axes of arrays for sharding.

Trainers read the sharding of a state from its boxes, and replicate a bare
array. So the arrays of a state are in boxes like their parameter's, with names
for their own axes.
"""

from collections.abc import Callable, Iterable
import contextvars
import math
from typing import Any, NamedTuple

from flax import linen
from flax import nnx
from flax.core import meta
import jax
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from subspace_optax._matrix import _notices
from subspace_optax._matrix import _sharding

Names = tuple[str | None, ...]


class _Kind(NamedTuple):
  """How to read and make the boxes of a class."""

  axes: Callable[[Any], Iterable[Any] | None]
  wrap: Callable[[Any, jax.Array, Names], Any]


_kinds: dict[type, _Kind] = {}


def register_box(
  cls: type,
  axes: Callable[[Any], Iterable[Any] | None],
  wrap: Callable[[Any, jax.Array, Names], Any],
) -> None:
  """Registers a class that wraps one array, such as haliax's `NamedArray`.

  The axis names of parameters in such boxes then determine their matrices, and
  state comes in its own boxes. The boxes of flax, `Partitioned`,
  `LogicallyPartitioned` and `nnx.Variable`, are registered already.

  Args:
    cls: the class, a pytree node with one leaf.
    axes: maps a box to the names of its array's axes, None for an axis without
      a name; or to None if it names no axes.
    wrap: (box, array, names) -> a box like `box` around `array`. A rank axis
      has the name of the first axis that it replaces, so that it is sharded
      like that axis; other new axes have None.

  Raises:
    TypeError: `cls` is not a class, or is an array.

  Example:
    >>> import dataclasses, jax, jax.numpy as jnp, subspace_optax as so
    >>> @jax.tree_util.register_dataclass
    ... @dataclasses.dataclass
    ... class Named:
    ...   array: jax.Array
    ...   names: tuple = dataclasses.field(metadata={'static': True})
    >>> so.register_box(
    ...   Named, lambda box: box.names, lambda box, x, names: Named(x, names)
    ... )
    >>> tx = so.golore(1e-3, rank=4)
    >>> state = tx.init({'w': Named(jnp.ones((16, 64)), ('embed', 'mlp'))})
    >>> print(state[0][1].inner.mu['w'].names)
    ('embed', 'mlp')
  """
  if not isinstance(cls, type) or issubclass(cls, jax.Array):
    raise TypeError(f'cls must be a class around an array, got {cls!r}.')
  _kinds[cls] = _Kind(axes, wrap)


def is_box(x: Any) -> bool:
  """Whether `x` is a box of a registered class."""
  return any(cls in _kinds for cls in type(x).__mro__)


def axes_of(box: Any) -> Names | None:
  """Returns the names of a box's axes; None for an axis with several names."""
  names = _kind(box).axes(box)
  if names is None:
    return None
  return tuple(name if isinstance(name, str) else None for name in names)


def unbox(tree: Any, is_leaf: Callable[[Any], bool] = lambda x: False) -> Any:
  """Returns `tree` with boxes replaced by the arrays inside them."""
  return jax.tree.map(
    lambda x: content(x) if is_box(x) else x,
    tree,
    is_leaf=lambda x: is_box(x) or is_leaf(x),
  )


def content(box: Any) -> Any:
  """Returns the content of a box.

  A box is a pytree node with one child. Reading it as such needs no API of the
  box, and adds none of its sharding constraints.
  """
  return jax.tree.leaves(box, is_leaf=lambda x: x is not box)[0]


def is_unknown(x: Any) -> bool:
  """Whether `x` looks like an array, but is a node around one."""
  if not (hasattr(x, 'shape') and hasattr(x, 'dtype')) or is_box(x):
    return False
  return not jax.tree_util.all_leaves([x]) and len(jax.tree.leaves(x)) == 1


def box_state(init: Callable[[Any], Any], params: Any) -> Any:
  """Returns `init(params)`, with its arrays in boxes like their parameters'.

  The axes that an array shares with its parameter are found from its sharding
  on a mesh with one axis per parameter axis.
  """
  state, boxes = init(params), _boxes_by_path(params)
  if not boxes or _is_off.get():
    return state
  with _notices.quiet():
    traced = _traced_by_axes(init, params)
  kinds = jax.tree.leaves(traced, is_leaf=is_box)
  pairs, treedef = jax.tree.flatten_with_path(state, is_leaf=is_box)
  return treedef.unflatten(
    [
      x if is_box(x) else _box_like(_owner(boxes, path), x, kind)
      for (path, x), kind in zip(pairs, kinds, strict=True)
    ]
  )


_is_off: contextvars.ContextVar[bool] = contextvars.ContextVar(
  'is_off', default=False
)


def without_boxes(tx: Any) -> Any:
  """Returns an optimizer whose state `box_state` does not put into boxes."""

  def init(params: Any) -> Any:
    token = _is_off.set(True)
    try:
      return tx.init(params)
    finally:
      _is_off.reset(token)

  return tx._replace(init=init)


def bare(update: Callable[..., Any]) -> Callable[..., Any]:
  """Returns `update` for a state in boxes, which it removes for `update`."""

  def boxed(updates, state, params=None, **extra_args):
    new_updates, new = update(updates, unbox(state), params, **extra_args)
    leaves, structure = jax.tree.leaves(new), jax.tree.structure(state)
    return new_updates, jax.tree.unflatten(structure, leaves)

  return boxed


Path = tuple[Any, ...]


def _boxes_by_path(params: Any) -> dict[Path, Any]:
  pairs = jax.tree.leaves_with_path(params, is_leaf=is_box)
  return {tuple(path): x for path, x in pairs if is_box(x)}


def _owner(boxes: dict[Path, Any], path: Path) -> Any:
  """Returns the box of the parameter whose path a path in a state contains."""
  lengths = range(len(path), 0, -1)
  # The last one, since a wrapper of a tree of parameters may be a tuple, too.
  parts = (
    path[i : i + n] for n in lengths for i in range(len(path) - n, -1, -1)
  )
  return next((boxes[part] for part in parts if part in boxes), None)


def _traced_by_axes(init: Callable[[Any], Any], params: Any) -> Any:
  """Returns the types of a state whose parameters are sharded on every axis."""
  most = max([1, *(len(x.shape) for x in jax.tree.leaves(params))])
  names = tuple(map(str, range(most)))
  explicit = (AxisType.Explicit,) * most
  # Mesh axes of one device divide any size.
  mesh = AbstractMesh((1,) * most, names, axis_types=explicit)

  def shape(x: Any) -> jax.ShapeDtypeStruct:
    spec = PartitionSpec(*names[: len(x.shape)])
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  # Changing from one mesh to another requires going through no mesh.
  with _sharding.no_mesh(), jax.sharding.use_abstract_mesh(mesh):
    return jax.eval_shape(init, jax.tree.map(shape, params))


def _box_like(box: Any, x: jax.Array, kind: jax.ShapeDtypeStruct) -> Any:
  """Returns an array, in a box like its parameter's if it has one."""
  if box is None:
    return x
  name_of = {str(i): name for i, name in enumerate(_axes_for_state(box))}
  spec = getattr(kind.sharding, 'spec', ())  # some scalars have none
  names: list[Any] = [None] * x.ndim
  for i, entry in enumerate(spec):
    # Ranks are split along all mesh axes, including those of longer leaves.
    found = [name_of[k] for k in _sharding.names(entry) if name_of.get(k)]
    if found and _divides(box, found[0], x.shape[i]):
      names[i] = found[0]
  return _kind(box).wrap(box, x, tuple(names))


def _divides(box: Any, name: Any, size: int) -> bool:
  """Whether a mesh, if known, can divide `size` numbers along an axis."""
  mesh = getattr(box, 'mesh', None) or jax.sharding.get_abstract_mesh()
  sizes = dict(mesh.shape)
  # Rules map logical names to mesh axes; the first rule of a name decides.
  rules = getattr(box, 'rules', None) or getattr(box, 'sharding_rules', None)
  rules = list(rules or linen.get_logical_axis_rules() or ())
  axes = dict(reversed(rules)).get(name, name)
  axes = (axes,) if isinstance(axes, str) else axes or ()
  return size % math.prod(sizes.get(axis, 1) for axis in axes) == 0


def axes_for_state(box: nnx.Variable) -> tuple[Any, ...]:
  """Returns the axis names of a variable for its optimizer state, if any."""
  names = box.get_metadata().get(_OF_STATE)
  return tuple(getattr(names, 'spec', names) or ())


def _axes_for_state(box: Any) -> tuple[Any, ...]:
  """Returns the names of a box's axes; several mesh axes stay together."""
  own = isinstance(box, nnx.Variable) and axes_for_state(box)
  return tuple(own or _kind(box).axes(box) or ())


def _kind(box: Any) -> _Kind:
  return next(_kinds[cls] for cls in type(box).__mro__ if cls in _kinds)


# The keys under which a variable's metadata holds names of axes.
_SHARDINGS = ('out_sharding', 'sharding', 'sharding_names')
_OF_STATE = 'optimizer_sharding'  # used instead for optimizer state


def _axes_of_variable(box: nnx.Variable) -> Iterable[Any] | None:
  metadata = box.get_metadata()
  names = next((metadata[k] for k in _SHARDINGS if metadata.get(k)), None)
  names = getattr(names, 'spec', names)
  return names if isinstance(names, Iterable) else None


def _wrap_in_variable(box: nnx.Variable, x: jax.Array, names: Names) -> Any:
  metadata = box.get_metadata()
  known = [k for k in (*_SHARDINGS, _OF_STATE) if metadata.get(k)]
  return box.replace(x, **dict.fromkeys(known, names))


def _wrap_in_metadata(box: Any, x: jax.Array, names: Names) -> Any:
  """Boxes an array if that is possible for unknown axes: in the same shape."""
  del names
  return box.replace_boxed(x) if x.shape == content(box).shape else x


register_box(
  meta.Partitioned,
  lambda box: box.names,
  lambda box, x, names: box.replace(value=x, names=names),
)
register_box(meta.AxisMetadata, lambda box: None, _wrap_in_metadata)
register_box(nnx.Variable, _axes_of_variable, _wrap_in_variable)
