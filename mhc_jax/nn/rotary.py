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
    wide_type, dim = wide_dtype(x), x.shape[-1]
    first = np.arange(dim) % 2 == 0 if interleaved else np.arange(dim) < dim // 2
    of_pair = np.repeat(frequencies(dim, rope), 2) if interleaved else np.tile(frequencies(dim, rope), 2)
    angle = positions.astype(wide_type)[..., None] * jnp.asarray(of_pair, wide_type)[None, None]
    angle = angle.reshape(*angle.shape[:2], *(1,) * (x.ndim - 3), dim)
    first = first.reshape(*(1,) * (x.ndim - 1), dim)
    # Entries change places with their partners by shifts: every second entry of an array's last axis is slow to pick out on a TPU.
    away = 1 if interleaved else dim // 2
    partner = jnp.where(first, jnp.roll(x, -away, axis=-1), jnp.roll(x, away, axis=-1))
    y = x * jnp.cos(angle) + partner * jnp.where(first, -jnp.sin(angle), jnp.sin(angle))
    return y.astype(x.dtype)
