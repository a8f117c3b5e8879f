"""What Engram's gate is made of beside arrays: its constants, and the short convolution's arguments."""

from typing import NamedTuple

import jax

CLAMP = 1e-6  # least magnitude of a score under its root
TAPS = 4
DILATION = 3
HALO = (TAPS - 1) * DILATION  # earlier tokens that the convolution reaches


class ShortConv(NamedTuple):
    """The short convolution over gated values (arXiv 2601.07372, section 2.3): causal, one filter a channel, taps t, t-3, t-6, t-9."""

    weight: jax.Array  # [4, n, C] float32; tap j multiplies what token t - 3 j has
    gain: jax.Array  # [n, C] float32, of the RMSNorm before the filter
    reach: jax.Array  # [T] int32: how many earlier tokens of the same document and sequence a token may see; tap j counts if it is >= 3 j
