# SPDX-License-Identifier: Apache-2.0
"""Which axes form matrices in parameters with the layout of MaxText.

MaxText scans over its layers along axis 1 (`param_scan_axis`) and keeps heads
as separate axes, so shapes alone do not determine the sides of a matrix.
"""

import operator
import re
from typing import Any

from subspace_optax._chain import _spec
from subspace_optax._matrix import _arguments
from subspace_optax._matrix import _axes
from subspace_optax._matrix import _siblings
from subspace_optax._matrix import _tree

# Axes of one layer's leaf: `i` for rows, `o` for columns, `b` counts matrices.
# The first pattern that matches decides. `wi` has an axis of activations if
# they are fused; with three axes, the one in the middle may also be layers,
# which count matrices, too. `out` has no heads after linear attention, and none
# of the four has heads in T5X.
_KERNELS = (
  (r'(^|/)(query|key|value)/kernel$', ('ioo', 'io')),
  (r'(^|/)(wq_b|wkv_b|wkv)/kernel$', ('ioo',)),
  (r'(^|/)(out|o_proj)/kernel$', ('iio', 'io')),
  (r'(^|/)o_a_proj/kernel$', ('bio',)),
  (r'(^|/)qkv_proj/kernel$', ('iboo',)),
  (r'(^|/)wi/kernel$', ('io', 'ibo')),
  (r'(^|/)(wi|wi_\d+|wo)$', ('bio',)),  # experts have no `kernel` below them
  (r'(^|/)kernel$', ('io',)),
)


def dimension_numbers_from_paths(
  params: Any, *, scan_axis: int = 1, exclude: str | None = _spec.AUTO
) -> Any:
  """Returns the dimension numbers of parameters with the layout of MaxText.

  Pass this function as `weight_dimension_numbers` of a `SubspaceSpec` or of
  `galore`, or `functools.partial(..., scan_axis=0)` for another axis. The end
  of its path determines the axes of a leaf, with L if layers are scanned:

  ========================================  ==============================
  `query|key|value/kernel`                  (embed, L, heads, head_dim)
  `out|o_proj/kernel`                       (heads, L, head_dim, embed)
  these five without heads                  (rows, L, columns)
  `wq_b|wkv_b|wkv/kernel`                   (embed, L, heads, head_dim)
  `o_a_proj/kernel`                         (groups, L, rows, columns)
  `qkv_proj/kernel`                         (embed, L, 3, heads, head_dim)
  `wi/kernel`, activations fused            (embed, L, 2, mlp)
  `wi`, `wi_0`, `wi_1`, `wo`, of experts    (experts, L, rows, columns)
  any other `kernel`                        (rows, L, columns)
  ========================================  ==============================

  Layers, experts and fused axes count matrices. Everything else, such as
  biases, stays plain. If two lines fit a leaf's number of axes, norms beside it
  show whether layers are scanned; without norms, the sizes decide.

  Args:
    params: the parameters, boxed or not; only paths and shapes are used.
    scan_axis: position of L.
    exclude: regular expression for paths that stay plain; 'auto' for the names
      of embeddings, heads, norms, biases and convolutions, as in
      `SubspaceSpec`; None for no path.

  Returns:
    A tree of `DimensionNumbers`, None for leaves that stay plain.

  Raises:
    ValueError: a kernel with more or fewer axes than its name says; a negative
      `scan_axis`, or one past a kernel's axes.
    TypeError: `scan_axis` is not an int.

  Example:
    >>> import jax.numpy as jnp, subspace_optax as so
    >>> spec = so.SubspaceSpec(
    ...   rank=4, weight_dimension_numbers=so.dimension_numbers_from_paths
    ... )
    >>> params = {'query': {'kernel': jnp.ones((32, 3, 4, 16))}}
    >>> print(*so.dimension_numbers_from_paths(params)['query']['kernel'])
    (0,) (2, 3) None
    >>> print(so.describe(spec, params))
    path          shape        as matrices    rank  side  axes   basis
    query/kernel  (32,3,4,16)  3 x (32 x 64)  4     rows  named  float32(32,3,4)
  """
  _arguments.check_int(scan_axis, 'scan_axis', least=0)
  _arguments.check_pattern('exclude', exclude)
  pairs, treedef = _tree.flatten(params)
  leaves = tuple(
    _siblings.Leaf(path, tuple(leaf.shape))
    for path, leaf in pairs
    if not _tree.is_masked(leaf)
  )
  decisions = _axes.decisions_of(leaves)
  found = {
    leaf.path: _numbers(decisions, leaf, operator.index(scan_axis))
    for leaf in leaves
    if not _stays_plain(decisions, leaf.path, exclude)
  }
  return treedef.unflatten([found.get(path) for path, _ in pairs])


def _stays_plain(
  decisions: _axes.Decisions, path: str, exclude: str | None
) -> bool:
  if exclude == _spec.AUTO:
    return bool(decisions.plain_kinds[path])
  return exclude is not None and re.search(exclude, path) is not None


def _numbers(
  decisions: _axes.Decisions, leaf: _siblings.Leaf, scan_axis: int
) -> _spec.DimensionNumbers | None:
  """Returns the dimension numbers of a leaf, None if it is not a kernel."""
  path, shape = leaf.path, leaf.shape
  kernels = (forms for name, forms in _KERNELS if re.search(name, path))
  forms = next(kernels, None)
  if forms is None:
    return None
  alone = [form for form in forms if len(form) == len(shape)]
  scanned = [
    form[:scan_axis] + 'b' + form[scan_axis:]
    for form in forms
    if len(form) + 1 == len(shape) and scan_axis <= len(form)
  ]
  likely = alone + scanned
  if not likely:
    counts = ' or '.join(str(len(form)) for form in forms)
    raise ValueError(
      f'leaf {path!r} has shape {shape}, but by its name it has {counts} axes, '
      f'and one more at scan_axis={scan_axis} for scanned layers; match it '
      'with `exclude`, or give weight_dimension_numbers of your own.'
    )
  if alone and scanned and alone != scanned:
    counted = decisions.family.counted(leaf)
    if counted is None:
      likely = [_by_sizes(path, shape, scan_axis, likely)]
    elif scan_axis in counted:
      likely = scanned
  axes = _axes.of_form(likely[0], 'name')
  return _spec.DimensionNumbers(axes.rows, axes.cols)


def _by_sizes(
  path: str, shape: tuple[int, ...], scan_axis: int, forms: list[str]
) -> str:
  """Returns which of two forms fits the sizes of attention."""
  if not any('ii' in form or 'oo' in form for form in forms):
    raise ValueError(
      f'leaf {path!r} has shape {shape}, which may be fused or, at scan_axis='
      f'{scan_axis}, scanned; match it with `exclude`, or give '
      'weight_dimension_numbers of your own.'
    )
  return _axes.squarest(forms, shape)
