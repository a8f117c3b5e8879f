"""The routed experts' matrix products: tokens sorted by expert, every token computed, none dropped.

Two layouts of the sorted rows share everything but the product itself:

    ragged   rows lie back to back, `pallas_kernels.grouped` multiplies them (TPU, GPU)
    blocked  every expert's rows are padded to whole blocks, a batched product multiplies the blocks (CPU, where XLA's ragged_dot would
             compute every expert for every token)

A few visits, as in decoding, are multiplied one by one on a CPU: most of their blocks would be padding.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mhc_jax.nn.ffn import gated
from pallas_kernels.grouped import grouped_matmul

BLOCK = 128  # rows; half a block is lost to padding per expert, and smaller blocks make slower products
FEW = 16  # visits


def routed_swiglu(
    x: Float[Array, "T C"],
    experts: Int[Array, "T k"],
    weights: Float[Array, "T k"],
    inner: Float[Array, "E C gate_up"],
    out: Float[Array, "E gate_up//2 C"],
    *,
    some_empty: bool = False,
) -> Float[Array, "T C"]:
    """Sum over a token's k experts of weight * SwiGLU_expert(x), in x's type with a float32 or wider sum.

    With `some_empty` a visit may be to expert E, one more than there are, and brings zeros.
    """
    rows_of = partial(ragged, some_empty=some_empty)
    on_cpu = _one_by_one if experts.size <= FEW and not some_empty else partial(_routed, layout=blocked)
    return jax.lax.platform_dependent(x, experts, weights, inner, out, cpu=on_cpu, default=partial(_routed, layout=rows_of))


def swiglu_of_sorted(
    x: Float[Array, "R C"],
    weights: Float[Array, "R 1"],
    rows_of_expert: Int[Array, "E"],
    inner: Float[Array, "E C gate_up"],
    out: Float[Array, "E gate_up//2 C"],
) -> Float[Array, "R C"]:
    """weight * SwiGLU_expert(x) of rows that lie sorted by expert, back to back; zeros behind the last expert's."""
    return _swiglu(x, weights, inner, out, _grouped(rows_of_expert))


class Rows(NamedTuple):
    """Where each visit (token t, its j-th expert) lies among R rows; visits are numbered t * k + j."""

    visit_of_row: Int[Array, "R"]  # T * k marks a padding row
    row_of_visit: Int[Array, "T k"]  # R: none
    order: Int[Array, "R"] | None = None  # where R = T * k: the visit of each row, those without an expert last


class Permutation(Rows):
    """Rows of which each has a visit, for visits of which each has a row: none is looked for in vain."""


def _routed(x, experts, weights, inner, out, *, layout):
    rows, multiply = layout(experts, inner.shape[0])
    made = _swiglu(dispatch(x, rows), spread(weights, rows)[:, None], inner, out, multiply)
    return combine(made, rows).astype(x.dtype)


def _swiglu(x, weights, inner, out, multiply):
    # Weighted before the second product and not after it: so no gradient needs what that product gave, kept or made again.
    return multiply(_weighted(multiply(x, inner.astype(x.dtype)), weights), out.astype(x.dtype))


@jax.custom_vjp
def _weighted(gate_up: Float[Array, "R gate_up"], weights: Float[Array, "R 1"]) -> Float[Array, "R gate_up//2"]:
    """weights * silu(gate) * up, of the two halves, in their type; computed in the weights'.

    Its gradient is written out: by the chain of operations the unweighted product is kept in the wide type, and read once more.
    """
    gate, up = (half.astype(weights.dtype) for half in jnp.split(gate_up, 2, axis=1))
    return (weights * jax.nn.silu(gate) * up).astype(gate_up.dtype)


def _weighted_fwd(gate_up, weights):
    return _weighted(gate_up, weights), (gate_up, weights)


def _weighted_bwd(saved, g):
    gate_up, weights = saved
    gate, up = (half.astype(weights.dtype) for half in jnp.split(gate_up, 2, axis=1))
    g = g.astype(weights.dtype)
    sigmoid = jax.nn.sigmoid(gate)
    silu, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    halves = jnp.concatenate([g * weights * up * slope, g * weights * silu], axis=1)
    return halves.astype(gate_up.dtype), (g * silu * up).sum(axis=1, keepdims=True)


_weighted.defvjp(_weighted_fwd, _weighted_bwd)


def _grouped(rows_of_expert: Int[Array, "E"]):
    """The product of rows that lie back to back with their experts' matrices."""

    def multiply(x: Float[Array, "R I"], w: Float[Array, "E I O"]) -> Float[Array, "R O"]:
        return grouped_matmul(x, w, rows_of_expert.astype(jnp.int32))

    return multiply


def _one_by_one(x, experts, weights, inner, out):
    """Every visit by itself: reads the matrices of the experts that are visited and no others."""
    rows = []
    for token, visited in enumerate(experts):
        y = [gated(x[token] @ inner[e].astype(x.dtype)) @ out[e].astype(x.dtype) for e in visited]
        rows.append(weights[token] @ jnp.stack(y).astype(weights.dtype))
    return jnp.stack(rows).astype(x.dtype)


def ragged(experts: Int[Array, "T k"], num_experts: int, some_empty: bool = False):
    """Rows back to back, and the product of such rows with their experts' matrices."""
    flat = experts.reshape(-1)
    # Sorted together, not looked up afterwards: gathers of single numbers take a TPU and its compiler long.
    in_order, order = jax.lax.sort((flat, jnp.arange(flat.size)), num_keys=1, is_stable=True)
    multiply = _grouped(jnp.bincount(flat, length=num_experts))
    if not some_empty:
        return Permutation(order, jnp.argsort(order).reshape(experts.shape), order), multiply
    visit_of_row = jnp.where(in_order < num_experts, order, flat.size)
    row_of_visit = jnp.where(flat < num_experts, jnp.argsort(order), flat.size)
    return Rows(visit_of_row, row_of_visit.reshape(experts.shape), order), multiply


def blocked(experts: Int[Array, "T k"], num_experts: int, block: int = BLOCK):
    """Rows padded to blocks of one expert each, and the product of such rows with their experts' matrices."""
    visits = experts.size
    num_blocks = visits // block + min(num_experts, visits)  # enough for any split of the visits over experts
    flat = experts.reshape(-1)
    one_hot = jax.nn.one_hot(flat, num_experts, dtype=jnp.int32)
    rank = jnp.take_along_axis(jnp.cumsum(one_hot, axis=0), flat[:, None], axis=1)[:, 0] - 1  # among the expert's own visits
    count = one_hot.sum(axis=0)
    last_block = jnp.cumsum(-(-count // block))
    first_block = last_block - (-(-count // block))
    row_of_visit = jnp.where(flat < num_experts, first_block[flat] * block + rank, num_blocks * block)
    visit_of_row = jnp.full(num_blocks * block, visits).at[row_of_visit].set(jnp.arange(visits), mode="drop")
    expert_of_block = jnp.clip(jnp.searchsorted(last_block, jnp.arange(num_blocks), side="right"), 0, num_experts - 1)
    rows = Rows(visit_of_row, row_of_visit.reshape(experts.shape))

    def multiply(x: Float[Array, "R I"], w: Float[Array, "E I O"]) -> Float[Array, "R O"]:
        return _block_product(x.reshape(num_blocks, block, -1), w, expert_of_block).reshape(num_blocks * block, -1)

    return rows, multiply


@jax.custom_vjp
def _block_product(x: Float[Array, "N b I"], w: Float[Array, "E I O"], expert: Int[Array, "N"]) -> Float[Array, "N b O"]:
    """Each block times the matrix of its expert."""
    return jnp.einsum("nbi,nio->nbo", x, w[expert])


def _block_product_fwd(x, w, expert):
    return _block_product(x, w, expert), (x, w, expert)


def _block_product_bwd(saved, g):
    x, w, expert = saved
    dx = jnp.einsum("nbo,nio->nbi", g, w[expert])
    # Summing the blocks' gradients into their experts is a product with a one-hot matrix: a scatter-add would run element by element.
    per_block = jnp.einsum("nbi,nbo->nio", x, g)
    dw = jnp.einsum("ne,nio->eio", jax.nn.one_hot(expert, w.shape[0], dtype=g.dtype), per_block)
    return dx, dw, np.zeros(expert.shape, jax.dtypes.float0)


_block_product.defvjp(_block_product_fwd, _block_product_bwd)


# Going to the sorted rows and coming back are gathers in both directions: each is the other's transpose, because the permutation is known.


@jax.custom_vjp
def dispatch(x: Float[Array, "T *C"], rows: Rows) -> Float[Array, "R *C"]:
    """The token of each row; zeros in padding rows."""
    return _token_of_row(x, rows)


def _dispatch_fwd(x, rows):
    return dispatch(x, rows), rows


def _dispatch_bwd(rows, g):
    return _sum_of_visits(g, rows).astype(g.dtype), no_gradient(rows)


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(y: Float[Array, "R *C"], rows: Rows) -> Float[Array, "T *C"]:
    """The sum over the rows of a token's visits, in float32 or wider."""
    return _sum_of_visits(y, rows)


def _combine_fwd(y, rows):
    return combine(y, rows), (y[:0], rows)  # of y its type


def _combine_bwd(saved, g):
    like, rows = saved
    return _token_of_row(g.astype(like.dtype), rows), no_gradient(rows)


combine.defvjp(_combine_fwd, _combine_bwd)


def _token_of_row(x, rows):
    return _rows_of(x, rows.visit_of_row // rows.row_of_visit.shape[1], rows)


def _sum_of_visits(y, rows):
    visits = _rows_of(y, rows.row_of_visit.T, rows)  # the visits outermost, where any number of them leaves a TPU's tiles as they are
    # A TPU's compiler would write the gathered rows once more in the wide type; a GPU's gathers while it sums, if nothing stands between.
    visits = jax.lax.platform_dependent(visits, tpu=jax.lax.optimization_barrier, default=lambda visits: visits)
    return visits.sum(axis=0, dtype=jnp.promote_types(y.dtype, jnp.float32))


@jax.custom_vjp
def spread(values: Float[Array, "T k"], rows: Rows) -> Float[Array, "R"]:
    """The number of each row's visit; zeros in padding rows."""
    visits = values.reshape(-1)
    if rows.order is None:
        return _rows_of(visits[:, None], rows.visit_of_row, rows)[:, 0]
    # By sorting, in both directions: gathers of single numbers take a TPU long.
    _, by_row = jax.lax.sort((rows.row_of_visit.reshape(-1), visits), num_keys=1, is_stable=True)
    return jnp.where(rows.visit_of_row < visits.size, by_row, 0)


def _spread_fwd(values, rows):
    return spread(values, rows), rows


def _spread_bwd(rows, g):
    if rows.order is None:
        return _rows_of(g[:, None], rows.row_of_visit, rows)[..., 0], no_gradient(rows)
    _, by_visit = jax.lax.sort((rows.order, jnp.where(rows.visit_of_row < g.size, g, 0)), num_keys=1)
    return by_visit.reshape(rows.row_of_visit.shape), no_gradient(rows)


spread.defvjp(_spread_fwd, _spread_bwd)


def _rows_of(x: Array, numbers: Array, rows: Rows) -> Array:
    if isinstance(rows, Permutation):
        return x.at[numbers].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return x.at[numbers].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def no_gradient(indices: Any) -> Any:
    """What the backward pass returns for a tree of numbers of rows."""
    return jax.tree.map(lambda index: np.zeros(index.shape, jax.dtypes.float0), indices)
