"""Real shapes of sparse attention, and what it must do at each: for tests, benchmarks and the static cost engine.

The attention of DeepSeek-V3.2: 128 heads, latents of 512 + 64 columns, 2048 keys a query as single tokens or as 32 pages, bfloat16. They
are the last queries of a sequence, which have all their keys; time grows in proportion to the queries.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Implementation
from pallas_kernels.choose import Kernels
from pallas_kernels.sparse_attention.choose import FAMILY
from pallas_kernels.sparse_attention.chunks import attend_backward, attend_forward, plan_of
from pallas_kernels.sparse_attention.spec import Keys, Weights
from pallas_kernels.visible import PAGE

HEADS, NOPE, ROPE, VALUE, RANK = 128, 128, 64, 128, 512
CHOSEN, QUERIES = 2048, 512
TOKENS = (32768, 131072)
SCALE = 0.1


def cases() -> list[Case]:
    """Pages and single tokens, in both directions and at every length."""
    directions: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    return [_case(pages, direction, tokens) for pages in (True, False) for direction in directions for tokens in TOKENS]


def _case(pages: bool, direction: Literal["forward", "backward"], tokens: int) -> Case:
    queries, width = QUERIES, RANK + ROPE
    projections = RANK * (NOPE + VALUE)
    if direction == "forward":
        products, moved = CHOSEN * (width + RANK) + projections, NOPE + ROPE + VALUE
        note = "q read, out written; 2 H (k (2 K + R) + K (D + V)) FLOPs a query"
    else:
        products, moved = CHOSEN * (3 * width + 2 * RANK) + 3 * RANK * NOPE + 2 * RANK * VALUE, 2 * (NOPE + ROPE) + VALUE
        note = "q and d_out read, d_q written; 2 H (k (5 K + 3 R) + K (3 D + 2 V)) FLOPs a query"
    return Case(
        name=f"s{queries}_t{tokens}_{f'pages{CHOSEN // PAGE}' if pages else f'tokens{CHOSEN}'}",
        kernel="sparse_mla",
        direction=direction,
        build=partial(_build, pages, direction, tokens),
        floor_bytes=queries * HEADS * moved * 2,
        floor_note=note,
        floor_flops=2 * HEADS * products * queries,
        values=partial(_chosen, pages),
        rare="sums of another range of keys brought in" if direction == "backward" and not pages else "",
    )


def _chosen(pages: bool, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """With keys drawn at random for every list, as many as it has room for."""
    latent, keys = args[3:5]
    tokens, (_, lists, chosen) = latent.shape[1], keys.index.shape
    rng = np.random.default_rng(0)
    drawn = [np.sort(rng.choice(tokens // PAGE if pages else tokens, chosen, replace=False)) for _ in range(lists)]
    first, stop = (jnp.full(keys.stop.shape, end, jnp.int32) for end in (0, tokens))
    return (*args[:4], Keys(jnp.asarray(np.array(drawn)[None], jnp.int32), jnp.full((1, lists), chosen, jnp.int32), first, stop), *args[5:])


def _build(pages: bool, direction: str, tokens: int, implementation: Implementation) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    queries = QUERIES
    blocks, chosen = (queries // PAGE, CHOSEN // PAGE) if pages else (queries, CHOSEN)
    q_rope, latent = array(1, queries, HEADS, ROPE), array(1, tokens, RANK + ROPE)
    whole = partial(array, dtype=jnp.int32)
    keys = Keys(whole(1, blocks, chosen), whole(1, blocks), whole(1, queries), whole(1, queries))
    weights = Weights(array(RANK, HEADS, NOPE), array(RANK, HEADS, VALUE))
    arguments = (array(1, queries, HEADS, NOPE), q_rope, weights, latent, keys)
    backward = direction == "backward"
    plan = plan_of(
        Kernels(FAMILY, implementation, False), q_rope, latent, chosen, scale=SCALE, pages=pages, query_chunk=queries, backward=backward
    )
    if not backward:
        return partial(attend_forward, plan), arguments
    out = array(1, queries, HEADS, VALUE)
    return partial(attend_backward, plan), (*arguments, out, array(1, queries, HEADS, dtype=jnp.float32), out)
