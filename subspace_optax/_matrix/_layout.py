# SPDX-License-Identifier: Apache-2.0
"""A leaf of any number of axes, seen as a batch of matrices.

Every product keeps the leaf's own axes (einsum, no reshape), since merging
sharded axes is an error under explicit sharding and a gather under automatic
sharding. With the matrix G (m x n, m the projected side) of one batch element:

  leaf    (..., m axes, ..., n axes, ...)   the parameter or gradient
  basis   (batch and m axes, r)             P
  coords  the leaf's axes, r for the m axes R = P^T G

If the columns of the leaf are the projected side, read G^T for G.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from subspace_optax._matrix import _placement
from subspace_optax._matrix import _sharding

_AXES = 'abcdefghijklmnopqrstuvw'
_HIGHEST = lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Layout:
  """Which axes of a leaf are the matrix's rows and columns, and the rank.

  Attributes:
    shape: the leaf's shape.
    rows: axes of the matrix's rows (optax's reduction axes).
    cols: axes of the matrix's columns (optax's output axes).
    project_rows: whether the basis spans the rows' space (P^T G) or the
      columns' (G Q).
    rank: r, at most the short side.
    axis_name: a mapped axis along which leaves are parts of a mean, so that
      products with them are averaged.
    blocks: widths of the matrices side by side along the columns' axis, as in a
      fused kernel; empty for one matrix.
  """

  shape: tuple[int, ...]
  rows: tuple[int, ...]
  cols: tuple[int, ...]
  project_rows: bool
  rank: int
  axis_name: Any = None
  blocks: tuple[int, ...] = ()

  @property
  def batch(self) -> tuple[int, ...]:
    """Axes that count matrices, in order."""
    both = self.rows + self.cols
    return tuple(i for i in range(len(self.shape)) if i not in both)

  @property
  def matrix(self) -> tuple[int, ...]:
    """Axes of one matrix, in order."""
    return tuple(sorted(self.rows + self.cols))

  @property
  def projected(self) -> tuple[int, ...]:
    """Axes that the basis spans."""
    return self.rows if self.project_rows else self.cols

  @property
  def free(self) -> tuple[int, ...]:
    """Axes of the matrix that are not projected."""
    return self.cols if self.project_rows else self.rows

  def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(self.shape[i] for i in axes)

  @property
  def m(self) -> int:
    """Length of the projected side."""
    return math.prod(self._sizes(self.projected))

  @property
  def n(self) -> int:
    """Length of the other side."""
    return math.prod(self._sizes(self.free))

  @property
  def inputs(self) -> int:
    """Length of the matrix's rows' axes, a kernel's inputs."""
    return math.prod(self._sizes(self.rows))

  @property
  def outputs(self) -> int:
    """Length of the matrix's columns' axes, a kernel's outputs."""
    return math.prod(self._sizes(self.cols))

  @property
  def batch_shape(self) -> tuple[int, ...]:
    """Shape of one value per matrix."""
    return self._sizes(self.batch)

  @property
  def _basis_axes(self) -> tuple[int, ...]:
    return tuple(sorted(self.batch + self.projected))

  @property
  def basis_shape(self) -> tuple[int, ...]:
    """Shape of the leaf's bases."""
    return self._shape(self.basis_axes())

  @property
  def coords_shape(self) -> tuple[int, ...]:
    """Shape of the leaf's coordinates."""
    return self._shape(self.coords_axes())

  def _shape(self, axes: str) -> tuple[int, ...]:
    """Returns the sizes of axes that subscripts name."""
    sizes = dict(zip(_AXES, self.shape, strict=False)) | {'y': self.rank}
    return tuple(sizes[c] for c in axes)

  # Einsum subscripts; `r` names the rank axis.

  @property
  def leaf_axes(self) -> str:
    """Subscripts of the leaf."""
    return _AXES[: len(self.shape)]

  @property
  def batch_axes(self) -> str:
    """Subscripts of one value per matrix."""
    return ''.join(_AXES[i] for i in self.batch)

  def basis_axes(self, r: str = 'y') -> str:
    """Subscripts of the basis."""
    return ''.join(_AXES[i] for i in self._basis_axes) + r

  @property
  def longest_axis(self) -> int:
    """The longest of a basis's axes except batch and rank axes."""
    longest = max(self.projected, key=lambda i: (self.shape[i], i))
    return self._basis_axes.index(longest)

  def coords_axes(self, r: str = 'y') -> str:
    """Subscripts of the coordinates."""
    axes = [
      '' if i in self.projected else _AXES[i] for i in range(len(self.shape))
    ]
    axes[min(self.projected)] = r
    return ''.join(axes)

  @property
  def coords_batch(self) -> tuple[int, ...]:
    """Axes of the coordinates that count matrices."""
    return tuple(map(self.coords_axes().index, self.batch_axes))

  # Products with the whole gradient run at the default precision and in the
  # gradient's dtype, like all other products of the training step, with float32
  # sums. Products of only bases and transitions run in full float32.

  def project(self, leaf: jax.Array, basis: jax.Array) -> jax.Array:
    """Returns R = P^T G."""
    return self.multiply(leaf, basis, self.basis_axes(), self.coords_axes())

  def back(self, leaf: jax.Array, coords: jax.Array) -> jax.Array:
    """Returns G R^T, of the basis's shape."""
    return self.multiply(leaf, coords, self.coords_axes(), self.basis_axes())

  def unproject(self, basis, coords, sharding) -> jax.Array:
    """Returns P R with the leaf's shape and, if explicit, sharding.

    The dtype is float32, or that of the wider factor if it is wider.
    """
    eq = f'{self.basis_axes()},{self.coords_axes()}->{self.leaf_axes}'
    wide = jnp.promote_types(_wide(basis), coords.dtype)
    basis = _sharding.with_whole_rank(basis, self.basis_axes())
    coords = _sharding.with_whole_rank(coords, self.coords_axes())
    return _sharding.einsum(
      eq, basis, coords, out_sharding=sharding, preferred_element_type=wide
    )

  def gram(self, left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns L^T R of two bases, (*batch, r, r)."""
    eq = f'{self.basis_axes("y")},{self.basis_axes("z")}->{self.batch_axes}yz'
    product = _sharding.einsum(eq, left, right, precision=_HIGHEST)
    return _sharding.with_whole_rank(product, f'{self.batch_axes}yz')

  def gram_coords(self, left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns L R^T of two coordinates, (*batch, r, r)."""
    eq = f'{self.coords_axes("y")},{self.coords_axes("z")}->{self.batch_axes}yz'
    return _sharding.einsum(eq, left, right, precision=_HIGHEST)

  def mix_basis(self, basis: jax.Array, square: jax.Array) -> jax.Array:
    """Returns P S for S of (*batch, r, r)."""
    eq = f'{self.basis_axes("y")},{self.batch_axes}yz->{self.basis_axes("z")}'
    return _sharding.einsum(eq, basis, square, precision=_HIGHEST)

  def mix_coords(self, square: jax.Array, coords: jax.Array) -> jax.Array:
    """Returns S R for S of (*batch, r, r)."""
    eq = f'{self.batch_axes}zy,{self.coords_axes("y")}->{self.coords_axes("z")}'
    return _sharding.einsum(eq, square, coords, precision=_HIGHEST)

  def multiply(
    self, leaf: jax.Array, other: jax.Array, axes: str, result_axes: str
  ) -> jax.Array:
    """Returns the product of a leaf and an array with `axes`."""
    wide = _wide(leaf)
    product = functools.partial(
      _sharding.einsum,
      f'{self.leaf_axes},{axes}->{result_axes}',
      preferred_element_type=wide,
    )
    other = _sharding.with_whole_rank(other, axes).astype(leaf.dtype)
    if leaf.dtype == jnp.bfloat16 and not self._is_in_order:
      # XLA:CPU has no kernel for these bfloat16 products.
      result = lax.platform_dependent(
        leaf,
        other,
        cpu=lambda x, y: product(x.astype(wide), y.astype(wide)),
        default=product,
      )
    else:
      result = product(leaf, other)
    return self.mean(_sharding.with_whole_rank(result, result_axes))

  @property
  def _is_in_order(self) -> bool:
    """Whether the leaf is a stack of matrices, (*batch, rows, columns)."""
    last = len(self.shape) - 2
    return self.batch == tuple(range(last)) and len(self.rows) == 1

  def mean(self, x: jax.Array) -> jax.Array:
    """Returns the mean along the mapped axis, if there is one."""
    return x if self.axis_name is None else lax.pmean(x, self.axis_name)

  # One value per matrix.

  def energy(self, leaf: jax.Array) -> jax.Array:
    """Returns ||G||_F^2 of every matrix, in float32 or wider."""
    return self._sum_squares(leaf.astype(_wide(leaf)), self.leaf_axes)

  def largest(self, leaf: jax.Array) -> jax.Array:
    """Returns the largest absolute value of every matrix."""
    return jnp.max(jnp.abs(leaf), axis=self.rows + self.cols)

  def coords_energy(self, coords: jax.Array) -> jax.Array:
    """Returns ||R||_F^2 of every matrix."""
    return self._sum_squares(coords, self.coords_axes())

  def basis_energy(self, x: jax.Array) -> jax.Array:
    """Returns ||X||_F^2 of every matrix for X of the basis's shape."""
    return self._sum_squares(x, self.basis_axes())

  def along_leaf(self, x: jax.Array) -> jax.Array:
    """Returns one value per matrix, shaped to broadcast against the leaf."""
    return self.along(x, self.leaf_axes)

  def along_basis(self, x: jax.Array) -> jax.Array:
    """Returns one value per matrix, shaped to broadcast against the basis."""
    return self.along(x, self.basis_axes())

  def along_coords(self, x: jax.Array) -> jax.Array:
    """Returns one value per matrix, shaped to broadcast against coords."""
    return self.along(x, self.coords_axes())

  def along(self, x: jax.Array, axes: str) -> jax.Array:
    """Returns one value per matrix, shaped to broadcast against some axes."""
    return jnp.expand_dims(x, self._of_matrix(axes))

  def ranks_along(self, x: jax.Array, axes: str) -> jax.Array:
    """Returns (*batch, r), shaped to broadcast against some axes."""
    kept = [c for c in axes if c == 'y' or c in self.batch_axes]
    x = jnp.moveaxis(x, -1, kept.index('y'))
    return jnp.expand_dims(x, [i for i, c in enumerate(axes) if c not in kept])

  def _sum_squares(self, x: jax.Array, axes: str) -> jax.Array:
    return jnp.sum(jnp.square(x), axis=self._of_matrix(axes))

  def _of_matrix(self, axes: str) -> tuple[int, ...]:
    """Returns the positions of a matrix's own axes among `axes`."""
    return tuple(i for i, c in enumerate(axes) if c not in self.batch_axes)

  # One value per column: the leaf's axes without the projected ones.

  def columns(self, leaf: jax.Array) -> jax.Array:
    """Returns the sum of every column of a leaf, over the projected side."""
    return jnp.sum(leaf, axis=self.projected)

  def coords_columns(self, coords: jax.Array) -> jax.Array:
    """Returns the sum of every column of coordinates, over the rank."""
    return jnp.sum(coords, axis=self.rank_axis)

  def sum_columns(self, x: jax.Array) -> jax.Array:
    """Returns the sum over a matrix's columns, given one value per column."""
    return jnp.sum(x, axis=self._of_matrix(self.coords_axes(r='')))

  def along_columns(self, x: jax.Array) -> jax.Array:
    """Returns one value per matrix, shaped to broadcast against columns."""
    return self.along(x, self.coords_axes(r=''))

  def columns_to_leaf(self, x: jax.Array) -> jax.Array:
    """Returns one value per column, shaped to broadcast against the leaf."""
    return jnp.expand_dims(x, self.projected)

  def columns_to_coords(self, x: jax.Array) -> jax.Array:
    """Returns one value per column, shaped to broadcast against coords."""
    return jnp.expand_dims(x, self.rank_axis)

  @property
  def rank_axis(self) -> int:
    """The position of the rank among the axes of coordinates."""
    return self.coords_axes().index('y')

  # Placement of arrays of state, given the placement of the leaf.

  def zeros(
    self, axes: str, leaf: jax.Array, dtype: Any = jnp.float32
  ) -> jax.Array:
    """Returns zeros with some axes, sharded like `leaf`."""
    static = (self._shape(axes), jnp.dtype(dtype))
    return self._place(jnp.zeros, static, (), leaf, axes)

  def place_leaf(self, make, static, args, leaf) -> jax.Array:
    """Returns `make(*static, *args)`, of the leaf's shape, sharded like it."""
    return self._place(make, static, args, leaf, self.leaf_axes)

  def place_basis(self, make, static, args, leaf) -> jax.Array:
    """Returns `make(*static, *args)`, a basis, sharded like `leaf`."""
    return self._place(make, static, args, leaf, self.basis_axes())

  def place_coords(self, make, static, args, leaf) -> jax.Array:
    """Returns `make(*static, *args)`, coordinates, sharded like `leaf`."""
    return self._place(make, static, args, leaf, self.coords_axes())

  def place_values(self, make, static, args, leaf) -> jax.Array:
    """Returns `make(*static, *args)`, a value per matrix, sharded as `leaf`."""
    return self._place(make, static, args, leaf, self.batch_axes)

  def place_numbers(self, make, static, args, leaf) -> jax.Array:
    """Returns `make(*static, *args)`, (*batch, r), with an unsharded rank."""
    return self._place(make, static, args, leaf, f'{self.batch_axes}x')

  def _place(self, make, static, args, leaf, axes: str) -> jax.Array:
    return _placement.place(make, static, args, leaf, self.leaf_axes, axes)

  def align_basis(self, x: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns `x` with the sharding of products with `leaf`."""
    return _placement.align(x, leaf, self.leaf_axes, self.basis_axes())

  def settle_basis(self, x: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns `x` sharded as by `place_basis`, under explicit sharding."""
    return _placement.settle(x, leaf, self.leaf_axes, self.basis_axes())

  def settle_coords(self, x: jax.Array, leaf: jax.Array) -> jax.Array:
    """Returns `x` sharded as by `place_coords`, under explicit sharding."""
    return _placement.settle(x, leaf, self.leaf_axes, self.coords_axes())

  # One matrix of a stack, with batch axes of size 1.

  @property
  def one(self) -> 'Layout':
    """The layout of a single matrix of this leaf."""
    sizes = enumerate(self.shape)
    shape = tuple(1 if i in self.batch else size for i, size in sizes)
    return dataclasses.replace(self, shape=shape)

  def take(self, x: jax.Array, axes: str, i: jax.Array) -> jax.Array:
    """Returns the part of `x`, with `axes`, that belongs to the i-th matrix."""
    letters = zip(axes, x.shape, strict=True)
    sizes = [1 if c in self.batch_axes else n for c, n in letters]
    return lax.dynamic_slice(x, self._start(axes, i), sizes)

  def put(self, x: jax.Array, axes: str, i: jax.Array, part: jax.Array):
    """Returns `x` with its part for the i-th matrix replaced."""
    return lax.dynamic_update_slice(x, part, self._start(axes, i))

  def _start(self, axes: str, i: jax.Array) -> list[jax.Array]:
    indices = jnp.unravel_index(i, self.batch_shape)
    at = dict(zip(self.batch_axes, indices, strict=True))
    return [at.get(c, jnp.zeros_like(i)) for c in axes]

  # Plain matrices, for factorisations that need them. Never with sharded axes.

  def to_matrix(self, leaf: jax.Array) -> jax.Array:
    """Returns the leaf as (*batch, rows, columns)."""
    perm = self.batch + self.rows + self.cols
    shape = (*self.batch_shape, self.inputs, self.outputs)
    return jnp.transpose(leaf, perm).reshape(shape)

  def from_matrix(self, matrix: jax.Array) -> jax.Array:
    """Returns (*batch, m, r) in the basis's shape."""
    order = self.batch + self.projected
    split = matrix.reshape(*self._sizes(order), matrix.shape[-1])
    perm = [order.index(i) for i in self._basis_axes]
    return jnp.transpose(split, (*perm, len(perm)))

  def basis_to_matrix(self, basis: jax.Array) -> jax.Array:
    """Returns a basis as (*batch, m, r)."""
    order = self.batch + self.projected
    perm = [self._basis_axes.index(i) for i in order]
    split = jnp.transpose(basis, (*perm, len(perm)))
    return split.reshape(*self.batch_shape, self.m, basis.shape[-1])


def _wide(x: jax.Array) -> Any:
  """Returns the dtype of `x`, or float32 if that is wider."""
  return jnp.promote_types(x.dtype, jnp.float32)


def square(batch_shape: tuple[int, ...], size: int, rank: int) -> Layout:
  """Returns the layout of a batch of size x size matrices."""
  ndim = len(batch_shape)
  shape = (*batch_shape, size, size)
  return Layout(shape, (ndim,), (ndim + 1,), True, rank)
