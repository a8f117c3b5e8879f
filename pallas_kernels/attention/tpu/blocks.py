"""What the kernels of dense attention share: sizes, the walk over blocks under the causal mask, masks and products.

Logits are held transposed, keys along sublanes and queries along lanes: what there is one of for a query (largest logit, sum, first key) is
a row, reductions over keys are additions of whole registers, and the product with the values needs no transposition of the weights.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tpu.tiles import LANES, round_up

Array = jax.Array

LOG2E = math.log2(math.e)
HIDDEN = -1e30  # a logit that is not seen: finite, so that a block without any visible key makes no NaN


@dataclass(frozen=True)
class Blocks:
    """The square blocks of a stretch of queries, their walk, and the parts of a block that are worked on together."""

    count: int  # blocks of queries
    size: int  # queries, and keys, of a block
    part: int  # keys of a part
    before: int = 0  # blocks of keys before the stretch, which all of its queries may see

    @property
    def queries(self) -> int:
        """Queries of all blocks."""
        return self.count * self.size

    @property
    def keys(self) -> int:
        """Keys of all blocks."""
        return (self.before + self.count) * self.size

    @property
    def parts(self) -> int:
        """Parts of a block."""
        return self.size // self.part

    # The blocks of keys before the stretch have a row of the walk each. After them a row has two blocks of one side, one from the front and
    # one from the back, so that all rows are equally long: the walk visits what lies under the causal mask with two grid axes of fixed
    # size. Steps that are too many visit the block before them again: one in the rows of the former kind, and where the count is odd, half
    # of the row in which the middle block stands alone.

    @property
    def grid(self) -> tuple[int, int]:
        """Rows of the walk, and steps of a row."""
        return self.before + (self.count + 1) // 2, self.count + 1

    def keys_of_queries(self, row: Any, step: Any) -> tuple[Any, Any, Any]:
        """(block of queries, block of keys, is it new): for every block of queries, the keys from the first to its own; `before` is 0."""
        back = step > row
        queries = jnp.where(back, self.count - 1 - row, row)
        again = back & (2 * row == self.count - 1)
        return queries, jnp.where(again, row, jnp.where(back, step - row - 1, step)), jnp.logical_not(again)

    def queries_of_keys(self, row: Any, step: Any) -> tuple[Any, Any, Any]:
        """(block of queries, block of keys, is it new): for every block of keys, the queries from its own, or the first, to the last."""
        own = row - self.before
        back = step >= self.count - own
        keys = jnp.where(back, self.count - 1 - own, own)
        again = back & (2 * own == self.count - 1)
        queries = jnp.where(again, self.count - 1, keys + jnp.where(back, step - (self.count - own), step))
        if not self.before:
            return queries, keys, jnp.logical_not(again)
        earlier, last = own < 0, self.count - 1
        return (
            self.before + jnp.where(earlier, jnp.minimum(step, last), queries),
            jnp.where(earlier, row, self.before + keys),
            jnp.where(earlier, step <= last, jnp.logical_not(again)),
        )


def blocks_of(length: int, size: int, part: int) -> Blocks:
    """The blocks of a sequence of this length; one that is shorter than a block has one block, no larger than it needs."""
    size = min(size, round_up(length, LANES))
    return Blocks(-(-length // size), size, math.gcd(part, size))


def stretches(blocks: Blocks, most: int) -> list[Blocks]:
    """The blocks of a sequence in stretches of at most `most` queries (and at least a block), the first ones first."""
    count = max(1, most // blocks.size)
    starts = range(0, blocks.count, count)
    return [Blocks(min(count, blocks.count - start), blocks.size, blocks.part, start) for start in starts]


def visible(blocks: Blocks, first: Array, of_queries: Any, of_keys: Any, part: int, *, diagonal: bool) -> Array:
    """bool [keys of the part, queries]: what the queries of a block, or on the diagonal those from the part's first key on, see of a part.

    `first` is [1, queries]. Off the diagonal every key is before every query.
    """
    queries = first.shape[1]
    shape = (blocks.part, queries)
    key = of_keys * blocks.size + part * blocks.part + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    seen = key >= first
    if diagonal:
        query = of_queries * blocks.size + blocks.size - queries + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        seen &= key <= query
    return seen


def product(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    """a and b multiplied and summed over these axes, in float32; bfloat16 as the matrix units have it, float32 without loss."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def joined(nope: Array, rope: Array) -> Array:
    """Both parts of queries or keys side by side, with zeros up to whole registers: one contraction, which fills deep units better."""
    missing = -rope.shape[1] % LANES
    zeros = [jnp.zeros((rope.shape[0], missing), rope.dtype)] if missing else []
    return jnp.concatenate([nope, rope, *zeros], axis=1)


def padded(x: Array, axis: int, length: int) -> Array:
    """x with zeros at the end of an axis."""
    missing = length - x.shape[axis]
    return jnp.pad(x, [(0, missing if k == axis else 0) for k in range(x.ndim)]) if missing else x


def padded_first(first: Array, length: int) -> Array:
    """[B, 1, length]: added queries see themselves alone, and nobody sees them."""
    missing = length - first.shape[1]
    own = jnp.broadcast_to(jnp.arange(first.shape[1], length, dtype=first.dtype)[None], (first.shape[0], missing))
    return jnp.concatenate([first, own], axis=1)[:, None]
