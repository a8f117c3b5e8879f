"""Real shapes of sparse attention, and what it must do at each: for tests, benchmarks and the static cost engine.

The attention of DeepSeek-V3.2: 128 heads, latents of 512 + 64 columns, 2048 keys a query as single tokens or as 32 pages, bfloat16. They
are the last queries of a sequence, which have all their keys; time grows in proportion to the queries. Decoding is one query of each of
many sequences, which share no latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Direction, Implementation
from pallas_kernels.choose import Kernels
from pallas_kernels.sparse_attention import pytorch
from pallas_kernels.sparse_attention.choose import FAMILY
from pallas_kernels.sparse_attention.chunks import attend_backward, attend_forward, plan_of
from pallas_kernels.sparse_attention.spec import Keys, Weights
from pallas_kernels.visible import PAGE

HEADS, NOPE, ROPE, VALUE, RANK = 128, 128, 64, 128, 512
CHOSEN, QUERIES = 2048, 512
DECODED, CACHED = 128, 8192  # sequences, a query of each, and their keys
TOKENS = (32768, 131072)
SCALE = 0.1


@dataclass(frozen=True)
class Shape:
    """Which keys are chosen, and how many sequences, queries and keys there are."""

    pages: bool
    batch: int
    queries: int
    tokens: int

    @property
    def lists(self) -> tuple[int, int]:
        """Lists of a sequence and the entries of each."""
        return (-(-self.queries // PAGE), CHOSEN // PAGE) if self.pages else (self.queries, CHOSEN)

    @property
    def name(self) -> str:
        """What a person types."""
        rows = f"s{self.queries}" if self.batch == 1 else f"b{self.batch}_s{self.queries}"
        return f"{rows}_t{self.tokens}_{'pages' if self.pages else 'tokens'}{self.lists[1]}"


def cases() -> list[Case]:
    """Pages and single tokens, in both directions and at every length, and decoding by tokens."""
    directions: tuple[Direction, ...] = ("forward", "backward")
    prefill = [Shape(pages, 1, QUERIES, tokens) for pages in (True, False) for tokens in TOKENS]
    return [_case(shape, direction) for shape in prefill for direction in directions] + [_case(Shape(False, DECODED, 1, CACHED), "forward")]


def _case(shape: Shape, direction: Direction) -> Case:
    queries, width = shape.batch * shape.queries, RANK + ROPE
    projections = RANK * (NOPE + VALUE)
    if direction == "forward":
        products, moved = CHOSEN * (width + RANK) + projections, NOPE + ROPE + VALUE
        note = "q read, out written; 2 H (k (2 K + R) + K (D + V)) FLOPs a query"
    else:
        products, moved = CHOSEN * (3 * width + 2 * RANK) + 3 * RANK * NOPE + 2 * RANK * VALUE, 2 * (NOPE + ROPE) + VALUE
        note = "q and d_out read, d_q written; 2 H (k (5 K + 3 R) + K (3 D + 2 V)) FLOPs a query"
    latents = 0
    if shape.batch > 1:
        latents, note = shape.batch * CHOSEN * width * 2, f"every sequence's chosen latents and {note}"
    return Case(
        name=shape.name,
        kernel="sparse_mla",
        direction=direction,
        build=partial(_build, shape, direction),
        floor_bytes=latents + queries * HEADS * moved * 2,
        floor_note=note,
        floor_flops=2 * HEADS * products * queries,
        values=partial(_chosen, shape),
        rare="sums of another range of keys brought in" if direction == "backward" and not shape.pages else "",
        pytorch=lambda: pytorch.build(shape.pages, direction, _build(shape, "forward", "xla")[1][:4], _drawn(shape), SCALE),
    )


def _drawn(shape: Shape) -> np.ndarray:
    """Keys drawn at random for every list, as many as it has room for: int32 [B, lists, entries]."""
    rng = np.random.default_rng(0)
    number, entries = shape.lists
    among = shape.tokens // PAGE if shape.pages else shape.tokens
    lists = [np.sort(rng.choice(among, entries, replace=False)) for _ in range(shape.batch * number)]
    return np.array(lists, np.int32).reshape(shape.batch, number, entries)


def _chosen(shape: Shape, args: tuple[Any, ...]) -> tuple[Any, ...]:
    index = jnp.asarray(_drawn(shape))
    first, stop = (jnp.full((shape.batch, shape.queries), end, jnp.int32) for end in (0, shape.tokens))
    return (*args[:4], Keys(index, jnp.full(index.shape[:2], index.shape[2], jnp.int32), first, stop), *args[5:])


def _build(shape: Shape, direction: Direction, implementation: Implementation) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def array(*rest: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct((shape.batch, *rest), dtype)

    whole = partial(array, dtype=jnp.int32)
    q_nope, q_rope, out = (array(shape.queries, HEADS, width) for width in (NOPE, ROPE, VALUE))
    latent = array(shape.tokens, RANK + ROPE)
    number, entries = shape.lists
    keys = Keys(whole(number, entries), whole(number), whole(shape.queries), whole(shape.queries))
    key_up, value_up = (jax.ShapeDtypeStruct((RANK, HEADS, width), jnp.bfloat16) for width in (NOPE, VALUE))
    weights = Weights(key_up, value_up)  # type: ignore[arg-type]
    arguments = (q_nope, q_rope, weights, latent, keys)
    plan = plan_of(
        Kernels(FAMILY, implementation, False),
        q_rope,
        latent,
        entries,
        scale=SCALE,
        pages=shape.pages,
        query_chunk=shape.queries,
        backward=direction == "backward",
    )
    if direction == "forward":
        return partial(attend_forward, plan), arguments
    return partial(attend_backward, plan), (*arguments, out, array(shape.queries, HEADS, dtype=jnp.float32), out)
