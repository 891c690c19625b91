# SPDX-License-Identifier: Apache-2.0
"""A kernel W and its step in a subspace, W + P B, for one linear layer.

The layer computes x W + (x P) B. With W and P constant, its backward pass needs
x P instead of x, and no product has the shape of W: the gradient of B is
(x P)^T dy = P^T dW. If B is 0, the layer computes x W alone; only the gradient
differs, since it is that of B instead of W. With a basis of the outputs, W +
A Q^T, the gradient is x^T (dy Q).

References:
  Chen et al., Randomized Subspace Optimization, arXiv 2502.07222, section 4.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from subspace_optax._matrix import _layout
from subspace_optax._matrix import _sharding

# Names for remat policies. A policy that saves products would save three per
# layer.
LINEAR_OUT = 'linear_out'
PROJECTED_INPUT = 'projected_input'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lifted:
  """W + P B in place of a kernel, never added up.

  It is a tree of three arrays. Functions of all arrays in a tree of parameters,
  such as a norm, therefore treat it as three parameters.

  Attributes:
    kernel: W, the leaf.
    basis: P, with the leaf's batch axes and rows, then the rank r; or Q, with
      the columns instead of rows.
    coords: B, with the leaf's axes, but r instead of the projected ones.
    at_zero: whether B is 0, and serves only for its gradient.
    layout: which axes of the whole leaf are rows, columns and batch. A scan
      over layers removes an axis from the arrays, but not from the layout.
    path: path of the leaf, for messages.
  """

  kernel: jax.Array
  basis: jax.Array
  coords: jax.Array
  layout: _layout.Layout = dataclasses.field(metadata={'static': True})
  at_zero: bool = dataclasses.field(default=False, metadata={'static': True})
  path: str = dataclasses.field(default='', metadata={'static': True})

  def __getitem__(self, index: Any) -> 'Lifted':
    """Returns itself for `...`, by which nnx layers read their kernels."""
    if index is not Ellipsis:
      raise TypeError(
        f'the lifted leaf {self.path!r} was indexed with {index!r}, as only an '
        'array can be; name it in the `exclude` of the spec.'
      )
    return self

  def __getattr__(self, name: str) -> Any:
    raise AttributeError(
      f'the lifted leaf {self.path!r} has no {name!r}, as an array has; it is '
      'there for its layer alone. Name it in the `exclude` of the spec.'
    )

  def _refuse(self, *args: Any) -> Any:
    del args
    raise TypeError(
      f'the lifted leaf {self.path!r} is there for its layer alone: write '
      'rso.dot(x, w) instead of x @ w, or name the leaf in the `exclude` '
      'of the spec.'
    )

  __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
  __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = _refuse

  @property
  def here(self) -> _layout.Layout:
    """The layout of the current arrays, which may lack the first batch axes."""
    whole = self.layout
    gone = whole.batch[: len(whole.shape) - self.kernel.ndim]
    kept = [i for i in range(len(whole.shape)) if i not in gone]
    rows, cols = (tuple(map(kept.index, x)) for x in (whole.rows, whole.cols))
    return dataclasses.replace(
      whole, shape=self.kernel.shape, rows=rows, cols=cols
    )

  def with_kernel(self, kernel: jax.Array) -> 'Lifted':
    """Returns a copy with another kernel, with all arrays in its dtype."""
    basis, coords = (x.astype(kernel.dtype) for x in (self.basis, self.coords))
    return dataclasses.replace(self, kernel=kernel, basis=basis, coords=coords)


def dot(
  x: jax.Array,
  w: jax.Array | Lifted,
  axes: int = 1,
  precision: Any = None,
  out_sharding: Any = None,
) -> jax.Array:
  """Multiplies inputs by a kernel, for models written by hand.

  For both kinds of kernel the result is named `rso.LINEAR_OUT`, which
  `jax.checkpoint_policies.save_only_these_names` can save.

  Args:
    x: inputs; their last axes are contracted.
    w: the kernel, lifted or not; its first axes are contracted.
    axes: number of contracted axes.
    precision: precision of the products, as in `jax.lax.dot_general`.
    out_sharding: sharding of the result, as in `jax.lax.dot_general`; pass it
      under explicit sharding, if a contracted axis is sharded.

  Returns:
    An array with the other axes of x, then those of w, in the dtype to which x
    and the kernel promote.

  Raises:
    ValueError: the contracted axes are not the rows of a lifted kernel.

  Example:
    >>> import jax.numpy as jnp
    >>> from subspace_optax import rso
    >>> rso.dot(jnp.ones((2, 4)), jnp.ones((4, 3))).shape
    (2, 3)
  """
  kernel = w.kernel if isinstance(w, Lifted) else w
  dtype = jnp.result_type(x, kernel)
  x, kernel = x.astype(dtype), kernel.astype(dtype)
  last = tuple(range(x.ndim - axes, x.ndim))
  numbers = ((last, tuple(range(axes))), ((), ()))
  kwargs = {'precision': precision, 'out_sharding': out_sharding}
  if isinstance(w, Lifted):
    w = w.with_kernel(kernel)
    return dot_general(lax.dot_general, x, w, numbers, **kwargs)
  y = lax.dot_general(x, kernel, numbers, **kwargs)
  return checkpoint_name(y, LINEAR_OUT)


def dot_general(
  product: Any, x: jax.Array, w: Lifted, numbers: Any, **kwargs: Any
) -> jax.Array:
  """Returns x W + (x P) B, with `product` in place of `jax.lax.dot_general`.

  All three products use it. If the layer's product rounds to 8 bits, it rounds
  P and B, too.
  """
  _check_axes(w, numbers)
  held, of_coords = _in_subspace(product, x, w, numbers, kwargs)
  y = product(x, lax.stop_gradient(w.kernel), numbers, **kwargs)
  coords = _whole_rank(w.coords, w.here.coords_axes())
  if w.at_zero:
    held = lax.stop_gradient(held)
    y = _with_gradient_of(of_coords, y, held, coords, w.path)
  else:
    y += of_coords(held, coords)
  return checkpoint_name(y, LINEAR_OUT)


def _in_subspace(product, x, w: Lifted, numbers, kwargs) -> tuple[Any, Any]:
  """Returns arrays, and a function of them and B whose result is to be added.

  These are x P and (x P) B, or (x, Q) and (x A) Q^T for a basis of the outputs.
  The function closes over no arrays, as functions with a custom gradient must
  not.
  """
  (lhs, rows), (lhs_batch, batch) = numbers
  layout = w.here
  coords_axes, basis_axes = layout.coords_axes(), layout.basis_axes()
  to_basis = _positions(layout.leaf_axes, basis_axes)
  to_coords = _positions(layout.leaf_axes, coords_axes)
  basis = _whole_rank(lax.stop_gradient(w.basis), basis_axes)
  narrow = _narrow(kwargs, len(layout.cols))
  by_rows = lambda to: ((lhs, _at(to, rows)), (lhs_batch, _at(to, batch)))
  by_rank = lambda h, axes, to: (
    ([h.ndim - 1], [axes.index('y')]),
    (range(len(batch)), _at(to, batch)),
  )
  if layout.project_rows:
    h = product(x, basis, by_rows(to_basis), **narrow)
    last = by_rank(h, coords_axes, to_coords)
    f = lambda h, b: product(h.astype(b.dtype), b, last, **kwargs)
    return checkpoint_name(h, PROJECTED_INPUT), f

  def through_outputs(held: tuple[jax.Array, jax.Array], a: jax.Array):
    x, basis = held
    h = product(x, a, by_rows(to_coords), **narrow)
    last = by_rank(h, basis_axes, to_basis)
    return product(h.astype(basis.dtype), basis, last, **kwargs)

  return (x, basis), through_outputs


def _with_gradient_of(
  f: Any, y: jax.Array, held: Any, coords: jax.Array, path: str
) -> jax.Array:
  """Returns y, but with the gradient of y + f(held, coords) in y and coords."""

  @jax.custom_vjp
  def beside(y, held, coords):
    del held, coords
    return y

  def forward(y, held, coords):
    return y, (held, coords)

  def backward(saved, dy):
    held, coords = saved
    dy = _not_again(path, dy, coords)
    # f is linear in B, so that only its transpose is computed.
    _, pull = jax.vjp(lambda b: f(held, b), coords)
    return dy, None, *pull(dy)

  beside.defvjp(forward, backward)
  return beside(y, held, coords)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _not_again(path: str, dy: jax.Array, coords: jax.Array) -> jax.Array:
  """Returns dy, and raises if it is differentiated.

  The gradient of the inputs leaves out B's part, which is 0 if B is 0, but its
  derivatives are not.
  """
  del path, coords
  return dy


@_not_again.defjvp
def _differentiated_again(path: str, primals: Any, tangents: Any) -> Any:
  del primals, tangents
  raise ValueError(
    f'the loss depends on a gradient through the lifted leaf {path!r}, which '
    'is right to first order only. Take that gradient at '
    '`jax.lax.stop_gradient(params)` if it is to be a constant, or name the '
    'leaf in the `exclude` of the spec.'
  )


def _positions(axes: str, others: str) -> dict[int, int]:
  """Returns the positions of the axes of one array in another."""
  return {i: others.index(c) for i, c in enumerate(axes) if c in others}


def _at(places: dict[int, int], axes: Any) -> list[int]:
  return [places[i] for i in axes]


def _check_axes(w: Lifted, numbers: Any) -> None:
  layout = w.here
  (_, rows), (_, batch) = numbers
  want = tuple(rows), tuple(batch)
  if tuple(map(sorted, want)) == (sorted(layout.rows), sorted(layout.batch)):
    return
  raise ValueError(
    f'the layer of the lifted leaf {w.path!r} contracts axes {want[0]} of its '
    f'kernel of shape {layout.shape}, and has batch axes {want[1]}; in the '
    f'spec the rows are {layout.rows} and the batch axes {layout.batch}. Give '
    'the spec weight_dimension_numbers, or name the leaf in its `exclude`.'
  )


def _whole_rank(x: jax.Array, axes: str) -> jax.Array:
  """Returns `x` with a rank axis that no mesh axis splits."""
  sharding = _sharding.explicit(x)
  if sharding is None:
    return _sharding.with_whole_rank(x, axes)
  spec = _sharding.pad(sharding.spec, x.ndim)
  rank = axes.index('y')
  spec = PartitionSpec(*spec[:rank], None, *spec[rank + 1 :])
  return jax.reshard(x, NamedSharding(sharding.mesh, spec))


def _narrow(kwargs: dict[str, Any], columns: int) -> dict[str, Any]:
  """Returns a product's arguments, with the rank in place of the columns."""
  out = kwargs.get('out_sharding')
  if out is None:
    return kwargs
  spec = out.spec if isinstance(out, NamedSharding) else out
  kept = spec[: max(0, len(spec) - columns)]
  narrow = PartitionSpec(*kept)
  if isinstance(out, NamedSharding):
    narrow = NamedSharding(out.mesh, narrow)
  return {**kwargs, 'out_sharding': narrow}
