"""What a user calls: one signature for every platform, and bad input refused.

Scores and selection take `implementation`: "tpu" (Pallas Mosaic TPU), "gpu" (Pallas Mosaic GPU, Hopper), "xla" (any platform and shape), or
None for what the platform has; and `interpret`, which runs a kernel step by step on any platform, for tests.

Letters in shapes: B sequences, S queries, T keys, J heads of the indexer and I their size; H heads of attention, D and R their unrotated
and rotated size, K the size of a latent.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.case import Implementation
from pallas_kernels.indexer import dense_loss, select, sparse_loss
from pallas_kernels.indexer.choose import choose
from pallas_kernels.visible import Selected, Span

Array = jax.Array


def index_scores(
    q: Array, k: Array, weight: Array, span: Span, *, implementation: Implementation | None = None, interpret: bool = False
) -> Array:
    """The indexer's scores, all of them: I[t, s] = sum_j weight[t, j] relu(q[t, j] . k[s]) (arXiv 2512.02556, Eq. 1).

    Args:
      q: [B, S, J, I], bfloat16 or float32.
      k: [B, T, I] of q's type.
      weight: [B, S, J] float32, with all scales in it.
      span: which keys each query sees, int32 [B, S] each. For self-attention, S = T, no query sees a key after its own, whatever it says.

    Returns:
      [B, S, T] float32, -inf where not visible. Zeros have no sign, and NaN is the lowest number, so that selection is well defined.
      For chunks of queries and for tests: the selecting functions below never hold [B, S, T].

    Raises:
      ValueError: a shape, a type or the platform does not fit; the message says what would.
    """
    _check(q, k, weight, span)
    return choose(q, implementation, interpret).index_scores(q, k, weight, _causal(span, k))


def select_tokens(
    q: Array,
    k: Array,
    weight: Array,
    span: Span,
    top_k: int,
    *,
    query_chunk: int = 512,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Selected:
    """For each query the visible keys with the top_k largest scores; ties go to the lower index. No gradient.

    Args as in `index_scores`, and
      query_chunk: queries whose scores exist at a time; fewer where batch times keys is large.

    Returns:
      Selected of min(top_k, T) keys, count = min(top_k, visible keys). The same on every run.
    """
    _check(q, k, weight, span)
    _check_positive(top_k=top_k, query_chunk=query_chunk)
    kernels = choose(q, implementation, interpret)
    q, k, weight = map(jax.lax.stop_gradient, (q, k, weight))
    return select.select_tokens(kernels, q, k, weight, _causal(span, k), top_k, query_chunk)


def select_pages(
    q: Array,
    k: Array,
    weight: Array,
    span: Span,
    pages: int,
    *,
    query_chunk: int = 512,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Selected:
    """For each PAGE queries the pages of PAGE keys with the largest scores: the most that any of the queries gives to any key it sees.

    The pages of the queries' last visible keys come before all others: with at least as many `pages` as those are, each query keeps its
    own position. Ties go to the lower index. Args as in `select_tokens`. No gradient.

    Returns:
      Selected [B, ceil(S / PAGE), min(pages, ceil(T / PAGE))]: indices count pages; no page is chosen that none of the queries sees.
    """
    _check(q, k, weight, span)
    _check_positive(pages=pages, query_chunk=query_chunk)
    kernels = choose(q, implementation, interpret)
    q, k, weight = map(jax.lax.stop_gradient, (q, k, weight))
    return select.select_pages(kernels, q, k, weight, _causal(span, k), pages, query_chunk)


def dense_indexer_loss(
    q: Array,
    k: Array,
    weight: Array,
    q_nope: Array,
    q_rope: Array,
    k_nope: Array,
    k_rope: Array,
    log_total: Array,
    first: Array,
    *,
    scale: float,
    query_chunk: int = 512,
) -> Array:
    """How far the indexer is from dense attention, in nats: sum over queries of KL(p || softmax of scores) (arXiv 2512.02556, Eq. 3).

    Both are over the visible keys. p is the mean over heads of attention's probabilities, recomputed from its logits
    (q_nope . k_nope + q_rope . k_rope) * scale and their log-sum-exp. Self-attention, S = T: a query sees the keys from `first` to its own
    position.

    Args:
      q, k, weight: as in `index_scores`. The loss has gradients for these alone.
      q_nope, q_rope: attention's queries [B, H, S, D] and [B, H, S, R].
      k_nope, k_rope: its keys [B, H, S, D], and [B, S, R] for all heads.
      log_total: [B, H, S] float32, log-sum-exp of the visible logits.
      first: [B, S] int32.
      scale: of the logits.
      query_chunk: queries whose scores exist at a time; fewer where batch times keys is large.

    Returns:
      float32 scalar.

    Raises:
      ValueError: a shape or a type does not fit.
    """
    _check(q, k, weight, Span(first, first))
    _check_positive(query_chunk=query_chunk)
    batch, heads, length, width = q_nope.shape
    rotated = q_rope.shape[-1]
    wanted = {
        "k": (k, (batch, length, k.shape[-1])),
        "q": (q, (batch, length, *q.shape[2:])),
        "q_rope": (q_rope, (batch, heads, length, rotated)),
        "k_nope": (k_nope, (batch, heads, length, width)),
        "k_rope": (k_rope, (batch, length, rotated)),
        "log_total": (log_total, (batch, heads, length)),
    }
    _check_shapes(wanted, f"q_nope {q_nope.shape}")
    main = (q_nope, q_rope, k_nope, k_rope, log_total)
    return dense_loss.dense_loss(scale, query_chunk, q, k, weight, main, first)


def sparse_indexer_loss(
    q: Array,
    k: Array,
    weight: Array,
    q_nope: Array,
    q_rope: Array,
    key_up: Array,
    latent: Array,
    selected: Selected,
    *,
    scale: float,
    query_chunk: int = 512,
) -> Array:
    """As `dense_indexer_loss`, over the selected keys alone: both distributions are normalised over them (arXiv 2512.02556, Eq. 4).

    Args:
      q, k, weight: as in `index_scores`. The loss has gradients for these alone.
      q_nope, q_rope: attention's queries [B, S, H, D] and [B, S, H, R].
      key_up: [K, H, D], from latents to keys.
      latent: [B, T, K + R], a key's normalised latent and its rotated part.
      selected: tokens [B, S, n]; a query without any adds nothing.
      scale: of the logits.
      query_chunk: queries that are handled at a time; fewer where what is gathered for them is large.

    Returns:
      float32 scalar.

    Raises:
      ValueError: a shape or a type does not fit.
    """
    _check(q, k, weight, Span(selected.count, selected.count))
    _check_positive(query_chunk=query_chunk)
    batch, length, heads, width = q_nope.shape
    rotated = q_rope.shape[-1]
    wanted = {
        "q": (q, (batch, length, *q.shape[2:])),
        "q_rope": (q_rope, (batch, length, heads, rotated)),
        "key_up": (key_up, (key_up.shape[0], heads, width)),
        "latent": (latent, (batch, k.shape[1], key_up.shape[0] + rotated)),
        "selected.index": (selected.index, (batch, length, selected.index.shape[-1])),
    }
    _check_shapes(wanted, f"q_nope {q_nope.shape}")
    return sparse_loss.sparse_loss(scale, query_chunk, q, k, weight, (q_nope, q_rope, key_up, latent), selected)


def _causal(span: Span, k: Array) -> Span:
    """The span, kept from the future where S = T: kernels leave out what lies after the diagonal without asking the span."""
    length = span.stop.shape[1]
    if length != k.shape[1]:
        return span
    return Span(span.first, jnp.minimum(span.stop, jnp.arange(1, length + 1, dtype=jnp.int32)[None]))


def _check(q: Array, k: Array, weight: Array, span: Span) -> None:
    if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q is {q.dtype} {q.shape}; a float type and [B, S, J, I] are needed")
    batch, length, heads, size = q.shape
    wide = jnp.promote_types(q.dtype, jnp.float32)
    wanted = {"weight": (weight, (batch, length, heads)), "span": (span.first, (batch, length)), "span.stop": (span.stop, (batch, length))}
    if k.ndim != 3:
        raise ValueError(f"k has shape {k.shape}; [B, T, I] is needed")
    _check_shapes({"k": (k, (batch, k.shape[1], size)), **wanted}, f"q {q.shape}")
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"q {q.shape} or k {k.shape} is empty")
    for name, array, dtype in (
        ("k", k, q.dtype),
        ("weight", weight, wide),
        ("span", span.first, jnp.int32),
        ("span", span.stop, jnp.int32),
    ):
        if array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype}; {jnp.dtype(dtype)} is needed where q is {q.dtype}")


def _check_shapes(wanted: dict[str, tuple[Array, tuple[int, ...]]], given: str) -> None:
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; {shape} is needed for {given}")


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")
