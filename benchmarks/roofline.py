"""The arithmetic of `scaling.py`: FLOPs, bytes and times, nothing measured.

Every function takes counts and returns counts. FLOPs are multiplications and
additions, so a product of a b x m and an m x n matrix has 2bmn. Bytes are those
that one chip sends, holds or reads.
"""

import dataclasses
import math
from typing import NamedTuple


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a chip and its links can do at best, by its maker's data sheet."""

  flops: float  # bf16, a second
  hbm: float  # bytes a second
  capacity: float  # bytes
  fast: float  # bytes a second that a chip sends to others of its domain
  slow: float  # and to other domains
  domain: int  # chips that fast links join
  float32: float  # how often slower than bf16 a full float32 product is


class Matrices(NamedTuple):
  """`count` matrices of m x n, m the short side."""

  m: int
  n: int
  count: int


@dataclasses.dataclass(frozen=True)
class Model:
  """A LLaMA's sizes."""

  width: int
  mlp_width: int
  layers: int
  kv_width: int
  vocab: int = 32_000

  @property
  def matrices(self) -> list[Matrices]:
    """Those that optimizers project."""
    d, f, k = self.width, self.mlp_width, self.kv_width
    shapes = [(d, d, 2), (k, d, 2), (d, f, 3)]
    return [Matrices(m, n, count * self.layers) for m, n, count in shapes]

  @property
  def projected(self) -> int:
    """Parameters of the matrices."""
    return sum(x.m * x.n * x.count for x in self.matrices)

  @property
  def plain(self) -> int:
    """Those of the embedding, the head and the norms."""
    return 2 * self.vocab * self.width + (2 * self.layers + 1) * self.width

  @property
  def parameters(self) -> int:
    return self.projected + self.plain

  def flops(self, tokens: float, sequence: int, remat: bool) -> float:
    """Forward and backward: 6 per parameter and token, and attention.

    The embedding is looked up. Scores and sums over values are counted whole,
    as a kernel without a causal short cut does them.
    """
    products = self.parameters - self.vocab * self.width
    attention = 2 * self.layers * self.width * sequence
    passes = 8 if remat else 6
    return passes * tokens * (products + attention)


class Method(NamedTuple):
  """What an optimizer adds to FSDP or data parallelism.

  Attributes:
    products: k of the k m n r FLOPs of a step, with bf16 gradients.
    small: k of the k m r^2 FLOPs, at full float32.
    state: (a, b, c) of the a m r + b n r + c m n numbers that it keeps.
    compressed: whether replicas may average r(m + n) numbers instead of mn.
  """

  products: int
  small: int
  state: tuple[int, int, int]
  compressed: bool = False


METHODS = {
  'AdamW': Method(0, 0, (0, 0, 2)),
  'online_subspace_descent': Method(6, 8, (3, 2, 0), compressed=True),
  # Its residual needs the mean of whole gradients.
  'subspace_adamw': Method(4, 8, (0, 2, 0)),
}


def rank(m: int, share: float) -> int:
  return max(1, round(share * m))


def update_flops(method: Method, model: Model, share: float) -> list[float]:
  """The FLOPs of one update in bf16 and in float32, of all chips together."""
  of = [(x, rank(x.m, share)) for x in model.matrices]
  large = sum(x.count * method.products * x.m * x.n * r for x, r in of)
  small = sum(x.count * method.small * x.m * r * r for x, r in of)
  return [large, small]


def state_numbers(method: Method, model: Model, share: float) -> float:
  """The numbers that an optimizer keeps; two of each plain parameter."""
  a, b, c = method.state
  total = 2.0 * model.plain
  for x in model.matrices:
    r = rank(x.m, share)
    total += x.count * (a * x.m * r + b * x.n * r + c * x.m * x.n)
  return total


def thin_numbers(model: Model, share: float) -> float:
  """r(m + n) of every matrix, summed."""
  return sum(x.count * rank(x.m, share) * (x.m + x.n) for x in model.matrices)


def gathered(size: float, chips: int) -> float:
  """Bytes that each of `chips` sends so that all have `size` of shards."""
  return size * (chips - 1) / chips


def reduced(size: float, chips: int) -> float:
  """Bytes that each sends in an all-reduce: a scatter and a gather."""
  return 2 * gathered(size, chips)


class Links(NamedTuple):
  """Bytes that a chip sends over fast and over slow links."""

  fast: float
  slow: float

  def times(self, k: float) -> 'Links':
    return Links(k * self.fast, k * self.slow)

  def seconds(self, chip: Chip, share: float) -> float:
    """Both at once, at a share of their best speed."""
    return max(self.fast / chip.fast, self.slow / chip.slow) / share


def gathered_over(size: float, chips: int, domain: int) -> Links:
  """A gather over all chips, in two levels.

  Chips of one place in each domain first exchange their shards over the slow
  links, and then every domain gathers inside.
  """
  domain = min(domain, chips)
  domains = math.ceil(chips / domain)
  return Links(gathered(size, domain), gathered(size / domain, domains))
