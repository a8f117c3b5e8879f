"""Small arrays, a few rows for each token: between [rows, T] as the caller has them and tiles as kernels load them. Plain jnp.

Tiles have 64 tokens. The last one starts 64 before the end, so that none ends beyond it: tokens that lie in two tiles are computed twice,
with the same result. Tokens are padded to a multiple of eight, which tiled copies need, and to 64 at least: where T is not so already, the
streams are copied.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu.launch import TOKENS


def total(tokens: int) -> int:
    """Tokens with padding."""
    return max(TOKENS, -(-tokens // 8) * 8)


def count(tokens: int) -> int:
    """Tiles."""
    return -(-total(tokens) // TOKENS)


def padded(x: jax.Array) -> jax.Array:
    """[T, ...] -> [total, ...]."""
    missing = total(x.shape[0]) - x.shape[0]
    return jnp.pad(x, ((0, missing), *((0, 0) for _ in x.shape[1:]))) if missing else x


def start(tile: jax.Array, tokens: int) -> jax.Array:
    """First token of a tile."""
    return jnp.minimum(tile * TOKENS, total(tokens) - TOKENS)


def tiled(x: jax.Array) -> jax.Array:
    """[rows, T] -> [tiles, rows, 64]."""
    rows, tokens = x.shape
    tiles = count(tokens)
    x = jnp.pad(x, ((0, 0), (0, total(tokens) - tokens)))
    if x.shape[1] % TOKENS:
        x = jnp.concatenate([x[:, : (tiles - 1) * TOKENS], x[:, -TOKENS:]], axis=1)
    return x.reshape(rows, tiles, TOKENS).swapaxes(0, 1)


def untiled(x: jax.Array, tokens: int) -> jax.Array:
    """[tiles, rows, 64] -> [rows, T]."""
    tiles, rows, _ = x.shape
    x = x.swapaxes(0, 1).reshape(rows, tiles * TOKENS)
    if rest := total(tokens) % TOKENS:
        x = jnp.concatenate([x[:, : (tiles - 1) * TOKENS], x[:, -rest:]], axis=1)
    return x[:, :tokens]


def first_time(tokens: int) -> jax.Array:
    """[tiles, 1, 64]: one where a token is in its first tile, zero where it is there again or padding."""
    index = tiled(jnp.arange(1, tokens + 1)[None])  # from one, as padding is zero
    return (index > jnp.arange(count(tokens))[:, None, None] * TOKENS).astype(jnp.float32)
