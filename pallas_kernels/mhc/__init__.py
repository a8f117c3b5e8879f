"""mHC's residual streams: the seam between two sublayers, forward and backward (arXiv 2512.24880).

spec         options of a mapping, its weights, how coefficients are packed
reference    the specification in plain jnp
gates        logits to coefficients and back, on planes of tokens: the arithmetic that kernels hold in registers
xla          the seam in plain XLA, for any shape and platform
choose       which implementation runs
api          what a user calls
"""

from pallas_kernels.mhc.api import mhc_post, mhc_post_pre, mhc_pre, sinkhorn
from pallas_kernels.mhc.spec import Mapping, Weights

__all__ = ["Mapping", "Weights", "mhc_post", "mhc_post_pre", "mhc_pre", "sinkhorn"]
