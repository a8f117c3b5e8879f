"""Rotary position embedding with YaRN, on interleaved pairs as DeepSeek's attention uses it, or on halves as its indexer does.

Sources: RoFormer (arXiv 2104.09864), YaRN (arXiv 2309.00071, section 3.2) with the settings of DeepSeek-V3 (arXiv 2412.19437, 4.3).
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mhc_jax.config import RopeConfig
from mhc_jax.nn.norm import wide_dtype


def frequencies(dim: int, rope: RopeConfig) -> Float[np.ndarray, "{dim}//2"]:
    """Radians per position of each rotated pair, float64.

    With YaRN, pairs that turn more than `beta_fast` times within the original context keep their frequency, pairs that turn less than
    `beta_slow` times are slowed down by `yarn_factor`, and those between are blended linearly in the pair's index.
    """
    inverse = rope.theta ** (-np.arange(0, dim, 2) / dim)
    if rope.yarn_factor == 1.0:
        return inverse

    def pair_that_turns(rotations: float) -> float:
        return dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(rope.beta_slow)), dim - 1)
    slowed = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return inverse * (1 - slowed) + inverse / rope.yarn_factor * slowed


def softmax_temperature(rope: RopeConfig) -> float:
    """YaRN's factor on attention logits, (0.1 mscale ln(factor) + 1)^2; 1 without YaRN."""
    return (0.1 * rope.mscale * math.log(rope.yarn_factor) + 1.0) ** 2


def rotate(
    x: Float[Array, "B S *heads dim"], positions: Int[Array, "B S"], rope: RopeConfig, *, interleaved: bool = True
) -> Float[Array, "B S *heads dim"]:
    """Rotates pairs by position times frequency, in float32 or wider; the result has x's type.

    Pair i is (x[2i], x[2i+1]) where they are interleaved, else (x[i], x[i + dim/2]).
    """
    wide_type = wide_dtype(x)
    angle = positions.astype(wide_type)[..., None] * jnp.asarray(frequencies(x.shape[-1], rope), wide_type)[None, None]
    angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 3), angle.shape[-1])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else jnp.split(x, 2, axis=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    y = jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return y.astype(x.dtype)
