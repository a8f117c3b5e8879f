"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450), always computed in float32 or wider."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def wide_dtype(x: Array) -> jnp.dtype:
    """float32, or the array's own type where that is wider: the precision of norms, coefficients, routing and logits."""
    return jnp.promote_types(x.dtype, jnp.float32)


def wide(x: Array) -> Array:
    """The array in its `wide_dtype`."""
    return x.astype(wide_dtype(x))


def inverse_rms(x: Float[Array, "... C"], eps: float) -> Float[Array, "... 1"]:
    """1 / sqrt(mean(x^2) + eps) over the last axis, float32 or wider."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(wide(x)), axis=-1, keepdims=True) + eps)


def rms_norm(x: Float[Array, "... C"], weight: Float[Array, "C"] | None, eps: float) -> Float[Array, "... C"]:
    """x over its root mean square, times `weight` where there is one; returns x's type."""
    y = wide(x) * inverse_rms(x, eps)
    if weight is not None:
        y = y * jnp.expand_dims(weight, range(y.ndim - 1))
    return y.astype(x.dtype)


def sublayer_input(u: Float[Array, "... C"], weight: Float[Array, "C"], eps: float) -> Float[Array, "... C"]:
    """`rms_norm` of what a sublayer reads, kept apart from the sublayer's products in both directions.

    XLA for TPU would compute the norm's gradient within the product that ends the sublayer's backward pass, where it takes fast memory from
    the product: twice its time at 27B.
    """
    return jax.lax.optimization_barrier(rms_norm(u, weight, eps))


def layer_norm(x: Float[Array, "... C"], weight: Float[Array, "C"], bias: Float[Array, "C"], eps: float) -> Float[Array, "... C"]:
    """(x - mean) over its standard deviation, times `weight`, plus `bias`; returns x's type."""
    centred = wide(x) - jnp.mean(wide(x), axis=-1, keepdims=True)
    weight, bias = (jnp.expand_dims(v, range(x.ndim - 1)) for v in (weight, bias))
    return (centred * inverse_rms(centred, eps) * weight + bias).astype(x.dtype)
