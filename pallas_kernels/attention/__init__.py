"""Dense causal attention over packed documents: MLA in its multi-head form, as a flash kernel (arXiv 2405.04434, 2205.14135).

spec         what it returns
reference    the specification in plain jnp
xla          a block of queries at a time in plain XLA, for any size and platform
tpu          flash kernels
gpu          flash kernels for Hopper
choose       which implementation runs
api          what a user calls
"""

from pallas_kernels.attention.api import dense_attention
from pallas_kernels.attention.spec import Attended

__all__ = ["Attended", "dense_attention"]
